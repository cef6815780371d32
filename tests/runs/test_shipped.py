"""The networks that come with the package, as a user finds them."""

import dataclasses
import os
import pathlib
import re

import numpy as np
import pytest

import diffusiongemma as dg
from diffusiongemma import config as configs
from diffusiongemma.runs import WorkdirError
from diffusiongemma.runs import load
from diffusiongemma.runs import shipped
from experiments.stories import make

VOCABULARY = {
  re.sub(r'[^a-z]', '', word.lower())
  for story in make.make_stories(1500, seed=2)
  for word in make.words(story)
} | {''}
MOST_BYTES = 4_000_000
NAMES = ['stories', 'sudoku']
# Not among the puzzles that were learnt.
PUZZLES = (
  '.5.42.2.1.36..265.5......24....651.2',
  '6.1.343.21..2.45.........35.4.4.6.51',
  '...1...13.......2.5.24162.164..64251',
  '4...1....5....64.3.5....1.........21',
  '...416...5.3.14....2..5.4.3..1.62...',
  '1..36........254.3...52.2516....3..1',
)


def snapshot(folder):
  return {
    path: path.stat().st_mtime_ns for path in pathlib.Path(folder).rglob('*')
  }


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def test_they_are_few_and_small():
  assert shipped.names() == NAMES
  for name in NAMES:
    files = [p for p in (shipped.FOLDER / name).rglob('*') if p.is_file()]
    assert sum(file.stat().st_size for file in files) < MOST_BYTES
    here = {str(p.relative_to(shipped.FOLDER / name)) for p in files}
    assert {'README.md', 'config.json', 'metrics.jsonl'} <= here
    # It has the path of the machine that it was made on.
    assert not [name for name in here if 'commit_success' in name]


@pytest.mark.parametrize('name', NAMES)
def test_a_name_is_enough(name, nowhere):
  before = snapshot(shipped.FOLDER)
  run = dg.load(name)
  assert run.step > 0 and run.tokenizer.vocab_size
  assert snapshot(shipped.FOLDER) == before
  assert os.listdir() == []


def test_sudokus_are_solved(nowhere):
  run = dg.load('sudoku')
  rows = dg.generate(run, list(PUZZLES), max_new_tokens=36)
  for puzzle, row in zip(PUZZLES, rows, strict=True):
    assert all(p in ('.', s) for p, s in zip(puzzle, row.text, strict=True))
    grid = np.array([int(digit) for digit in row.text]).reshape(6, 6)
    boxes = grid.reshape(3, 2, 2, 3).swapaxes(1, 2).reshape(6, 6)
    for lines in (grid, grid.T, boxes):
      assert (np.sort(lines) == np.arange(1, 7)).all(), (puzzle, row.text)


def test_stories_are_told(nowhere):
  """Sentences of words that were learnt, to an end of their own."""
  run = dg.load('stories')
  stories = dg.generate(
    run, ['Once upon a time', 'One day, '], max_new_tokens=208
  )
  for story in stories:
    told = make.words(story.text)
    assert 40 < len(told) < 200
    assert story.text.rstrip().endswith(('.', '!', '?', '"'))
    plain = [re.sub(r'[^a-z]', '', word.lower()) for word in told]
    strange = set(plain) - VOCABULARY
    assert len(strange) < len(told) / 20, strange


def test_a_folder_of_the_user_counts_more(nowhere):
  os.mkdir('sudoku')
  with pytest.raises(
    WorkdirError, match='^sudoku holds no run.*package: stories, sudoku'
  ):
    dg.load('sudoku')


def test_only_names_are_names(nowhere):
  for path in ('sudoku/', './sudoku', 'Sudoku', '..', ''):
    assert shipped.find(path) == path


def test_they_can_be_adapted(nowhere):
  config = configs.Config(
    lora=configs.LoraConfig(rank=2),
    train=configs.TrainConfig(init_from='sudoku'),
  )
  adopted = load.adopt(config, 'tuned')
  assert adopted.train.init_from == str(shipped.FOLDER / 'sudoku')
  assert adopted.quantization == dg.load('sudoku').config.quantization
  whole = dataclasses.replace(config, lora=configs.LoraConfig())
  with pytest.raises(WorkdirError, match='train adapters of them'):
    load.adopt(whole, 'tuned')
