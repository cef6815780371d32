"""A tokenizer trained on the text of a run, and the prompt of its samples."""

import dataclasses
import json
import pathlib

import pytest

import diffusiongemma as dg
from diffusiongemma import config as configs
from diffusiongemma.config import DataConfig
from diffusiongemma.runs import companions
from diffusiongemma.training import corpus
from diffusiongemma.training import new_tokenizer
from diffusiongemma.training import notices
from diffusiongemma.training import quality
from diffusiongemma.training import train
from diffusiongemma.training.messages import DataError

MICRO = str(pathlib.Path(__file__).parents[1] / 'micro_config.py')
TEXT = 'Der Zug fährt um acht Uhr ab.\n\nEr kommt um neun Uhr an – meistens.\n'


@pytest.fixture(scope='module')
def text_file(tmp_path_factory):
  file = tmp_path_factory.mktemp('text') / 'zug.txt'
  file.write_text(TEXT * 60)
  return file


def test_it_gives_back_the_text_and_spells_it_shortly(text_file):
  data = DataConfig(path=str(text_file), tokenizer='new:400')
  tokenizer = new_tokenizer.train(data)
  assert tokenizer.vocab_size <= 400
  ids = tokenizer.encode(TEXT)
  assert tokenizer.decode(ids) == TEXT
  assert len(ids) < len(TEXT) / 3
  assert tokenizer.decode(tokenizer.encode('火')) == '火'  # As bytes.
  assert new_tokenizer.train(data).model == tokenizer.model


def test_chats_get_the_tokens_of_turns(tmp_path):
  file = tmp_path / 'chats.jsonl'
  chat = [
    {'role': 'user', 'content': 'Who are you?'},
    {'role': 'assistant', 'content': 'A train.'},
  ]
  file.write_text((json.dumps({'messages': chat}) + '\n') * 30)
  tokenizer = new_tokenizer.train(
    DataConfig(path=str(file), tokenizer='new:320')
  )
  assert {'<|turn>', '<turn|>'} <= set(tokenizer.control_tokens)


@pytest.mark.parametrize('size', ['', 'many', '-4', '0', '3.5', '9999999'])
def test_sizes_that_are_none(size, text_file):
  data = DataConfig(path=str(text_file), tokenizer=f'new:{size}')
  with pytest.raises(DataError, match='a number of pieces, as in new:4096'):
    new_tokenizer.train(data)


def test_too_few_pieces(text_file):
  data = DataConfig(path=str(text_file), tokenizer='new:100')
  with pytest.raises(DataError, match='100 pieces are too few.* are 2[89]'):
    new_tokenizer.train(data)


def make_config(text_file, steps, pieces):
  config = configs.load_config(MICRO)
  return dataclasses.replace(
    config,
    model=dataclasses.replace(
      config.model, attention_pattern=('global',), vocab_size=400
    ),
    data=dataclasses.replace(
      config.data, path=str(text_file), tokenizer=f'new:{pieces}'
    ),
    train=dataclasses.replace(
      config.train, steps=steps, checkpoint_every=1, evaluate_every=100
    ),
  )


def test_a_run_has_its_own_and_goes_on_with_it(text_file, tmp_path, capsys):
  config = make_config(text_file, 1, 400)
  assert train.train(config, str(tmp_path)) == 0
  output = capsys.readouterr().out
  assert 'The tokenizer is trained on this text:' in output
  assert 'sample:\n' in output and 'ROMEO' not in output
  model = (tmp_path / 'tokenizer.model').read_bytes()
  assert dg.load(str(tmp_path)).tokenizer.decode([300]) is not None
  assert train.train(make_config(text_file, 2, 400), str(tmp_path)) == 0
  assert (tmp_path / 'tokenizer.model').read_bytes() == model


def test_a_network_with_too_few_ids_is_refused(text_file, tmp_path):
  config = make_config(text_file, 1, 420)
  config = dataclasses.replace(
    config, model=dataclasses.replace(config.model, vocab_size=330)
  )
  with pytest.raises(configs.ConfigError, match='vocab_size = 330: raise it'):
    train.train(config, str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_the_prompt_of_samples_is_the_users_or_of_the_users_text(text_file):
  config = make_config(text_file, 1, 400)
  tokenizer = new_tokenizer.train(config.data)
  text = corpus.load_corpus(config.data, tokenizer, 8)

  def prompt(sample_prompt, **data):
    changed = dataclasses.replace(
      config,
      train=dataclasses.replace(config.train, sample_prompt=sample_prompt),
      data=dataclasses.replace(config.data, **data),
    )
    return quality.sample_prompt(changed, text, tokenizer)

  default = configs.TrainConfig.sample_prompt
  start = tokenizer.decode(prompt(default))
  assert start and text.heldout_texts[0].startswith(start)
  assert tokenizer.decode(prompt(default, path='')) == default
  assert tokenizer.decode(prompt('Der Zug')) == 'Der Zug'
  assert prompt('') == []


def test_another_text_with_the_shipped_tokenizer_is_told(text_file):
  config = make_config(text_file, 1, 400)
  config = dataclasses.replace(
    config, data=dataclasses.replace(config.data, tokenizer='')
  )
  tokenizer = companions.load_tokenizer(
    dataclasses.replace(
      config, model=dataclasses.replace(config.model, vocab_size=2048)
    )
  )
  text = corpus.load_corpus(config.data, tokenizer, 8)
  (line,) = notices.of_tokenizer(config, text)
  assert 'of Shakespeare: 1.' in line and 'new:2048' in line
