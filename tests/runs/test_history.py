"""What a run goes on with other values of is noted."""

import json
import pathlib

import disk
import pytest

from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma.runs import companions
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.runs import history

MICRO = str(pathlib.Path(__file__).parents[1] / 'micro_config.py')


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def run(tmp_path):
  """(its config, its folder)."""
  config, folder = configs.load_config(MICRO), tmp_path / 'run'
  tokenizer = companions.load_tokenizer(config)
  workdirs.claim(str(folder), config, tokenizer)
  return config, folder


def test_changes_are_noted_with_their_step(run):
  config, folder = run
  assert history.go_on(str(folder), config, 1) == config
  assert not (folder / 'history.jsonl').exists()
  other = fields.override(config, 'train.steps', '90')
  assert history.go_on(str(folder), other, 2) == config
  assert workdirs.read_config(str(folder)) == other
  history.go_on(str(folder), config, 3)
  lines = (folder / 'history.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert [(r['step'], r['field'], r['old'], r['new']) for r in records] == [
    (2, 'config.train.steps', 60, 90),
    (3, 'config.train.steps', 90, 60),
  ]


def test_settings_that_can_not_be_noted_leave_all_as_it_was(run):
  config, folder = run
  before = contents(folder)
  other = fields.override(config, 'train.steps', '9')
  failure = pytest.raises(workdirs.WorkdirError, match='that have changed')
  with disk.full_disk(10), failure:
    history.go_on(str(folder), other, 2)
  assert contents(folder) == before
