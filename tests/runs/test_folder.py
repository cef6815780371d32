"""A folder belongs to one run, which may go on with some other values."""

import dataclasses
import pathlib

import pytest

from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma.runs import companions
from diffusiongemma.runs import folder as workdirs

MICRO = str(pathlib.Path(__file__).parents[1] / 'micro_config.py')


@pytest.fixture(scope='module')
def config():
  """That of a run of one layer."""
  config = configs.load_config(MICRO)
  model = dataclasses.replace(config.model, attention_pattern=('global',))
  return dataclasses.replace(config, model=model)


@pytest.fixture
def claimed(config, tmp_path):
  """The folder of a run that has not begun."""
  folder = str(tmp_path / 'run')
  workdirs.claim(folder, config, companions.load_tokenizer(config))
  return folder


def test_workdir_of_another_config_is_refused(config, claimed):
  tokenizer = companions.load_tokenizer(config)
  free = dataclasses.replace(config.train, log_every=1, keep_checkpoints=9)
  same = dataclasses.replace(config, train=free)
  workdirs.claim(claimed, same, tokenizer)
  other = fields.override(config, 'data.batch_size', '4')
  other = fields.override(other, 'train.seed', '3')
  with pytest.raises(workdirs.WorkdirError) as caught:
    workdirs.claim(claimed, other, tokenizer)
  assert 'config.data.batch_size: 2 there, 4 here' in str(caught.value)
  assert 'config.train.seed: 0 there, 3 here' in str(caught.value)
  assert str(caught.value).count(' here') == 2
  seeing = dataclasses.replace(config.model, vision=configs.VisionConfig())
  other = dataclasses.replace(config, model=seeing)
  with pytest.raises(workdirs.WorkdirError, match='config.model.vision'):
    workdirs.claim(claimed, other, tokenizer)


def test_what_may_not_change_is_refused_with_its_reason(config, claimed):
  tokenizer = companions.load_tokenizer(config)
  for name, value, reason in (
    ('model.num_experts', '8', 'the parameters are those of this network'),
    ('data.packing', 'true', 'the order of the data follows from it'),
    ('optimizer.kind', 'muon', "the optimiser's state follows from it"),
    ('train.objective', 'ar', 'it says what is learnt, or from which weights'),
    ('diffusion.canvas_length', '4', 'the network has learnt with it'),
    ('lora.rank', '2', 'the adapters are of this form'),
    ('quantization.experts', 'int8', 'the parameters are stored so'),
  ):
    with pytest.raises(workdirs.WorkdirError) as caught:
      other = fields.override(config, name, value)
      workdirs.claim(claimed, other, tokenizer)
    assert f'config.{name}: ' in str(caught.value)
    assert f'here ({reason})' in str(caught.value)
    assert f'config.train.init_from={claimed}' in str(caught.value)
