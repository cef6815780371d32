"""Paths with `~`, and such that are not local, wherever one is given."""

import dataclasses
import json
import os

import pytest

import diffusiongemma as dg
from diffusiongemma import config as configs
from diffusiongemma import paths
from diffusiongemma.text import tokenizer as tokenizers
from diffusiongemma.training import corpus
from diffusiongemma.training import train

BUCKET = 'gs://bucket/run'


@pytest.mark.parametrize(
  'path', [BUCKET, 's3://b', 'https://a/b', 'gs:/bucket']
)
def test_what_is_not_local_is_refused(path):
  with pytest.raises(configs.ConfigError, match='^--workdir: .* no local path'):
    paths.local(path, '--workdir')


@pytest.mark.parametrize('path', ['a/b', 'a:b', './gs:/b', '/a', 'C:/a', ''])
def test_what_is_local_stays(path):
  assert paths.local(path) == path


def test_the_home_of_nobody_is_refused():
  with pytest.raises(configs.ConfigError, match='--workdir: there is no home'):
    paths.local('~nobody-of-this-name/x', '--workdir')


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A home folder, which is the folder that one stands in too."""
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize(
  'call',
  [
    lambda: dg.load(BUCKET),
    lambda: dg.convert(BUCKET, 'out'),
    lambda: dg.convert('in', BUCKET),
    lambda: dg.export(BUCKET, 'out'),
    lambda: dg.export('in', BUCKET),
    lambda: dg.quantize(BUCKET, 'o', dg.QuantizationConfig(experts='int8')),
    lambda: dg.quantize('i', BUCKET, dg.QuantizationConfig(experts='int8')),
    lambda: train.train(dg.Config(), BUCKET),
    lambda: corpus.read_documents(BUCKET, corpus.stop),
    lambda: tokenizers.load_tokenizer(BUCKET),
  ],
)
def test_every_function_refuses_before_it_writes(home, call):
  with pytest.raises(configs.ConfigError, match='no local path'):
    call()
  assert not os.listdir(home)


@pytest.mark.parametrize(
  'field',
  ['data.path', 'data.heldout_path', 'data.tokenizer', 'train.init_from'],
)
def test_fields_are_named(field):
  group, name = field.split('.')
  config = dg.Config()
  part = dataclasses.replace(getattr(config, group), **{name: BUCKET})
  config = dataclasses.replace(config, **{group: part})
  with pytest.raises(configs.ConfigError, match=f'config.{field}: .* no local'):
    configs.validate(config)


def test_the_home_folder(home):
  (home / 'x.txt').write_text('text')
  (document,) = corpus.read_documents('~/x.txt', corpus.stop)
  assert document.text == 'text'
  with pytest.raises(tokenizers.TokenizerError, match=str(home)):
    tokenizers.load_tokenizer('~/t.model')
  folder = home / 'run'
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps({'train': {'step': 1}}))
  with pytest.raises(ValueError, match=f'{folder}.*Did you mean'):
    dg.load('~/run')
