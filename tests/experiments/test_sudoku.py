"""Puzzles have one solution, and what is unseen was not seen."""

import json

import numpy as np
import pytest

from diffusiongemma.text import tokenizer as tokenizers
from experiments.sudoku import make_puzzles as puzzles

RULES = {size: puzzles.Rules(size) for size in (6, 9)}

# From Wikipedia's article on Sudoku.
KNOWN = (
  '530070000600195000098000060800060003400803001700020006060000280000419005'
  '000080079'
)
KNOWN_SOLUTION = (
  '534678912672195348198342567859761423426853791713924856961537284287419635'
  '345286179'
)


def cells(text):
  return [int(c) for c in text]


def is_solution(size, solution):
  """By the definition: every row, column and box has every digit."""
  grid = np.array(solution).reshape(size, size)
  rows, columns = puzzles.BOX[size]
  boxes = grid.reshape(size // rows, rows, size // columns, columns)
  boxes = boxes.transpose(0, 2, 1, 3).reshape(size, size)
  digits = np.arange(1, size + 1)
  return all(
    (np.sort(units, axis=1) == digits).all() for units in (grid, grid.T, boxes)
  )


def test_known_puzzles():
  solve = lambda text: puzzles.solutions(RULES[9], cells(text))
  assert solve(KNOWN) == [cells(KNOWN_SOLUTION)]
  assert len(solve('0' * 81)) == 2  # As many as were asked for.
  assert solve('55' + '0' * 79) == []
  assert solve(KNOWN[:2] + '1' + KNOWN[3:]) == []  # No clash, no solution.
  # Two digits that can be swapped in two rows of one band.
  swapped = [i for i, c in enumerate(KNOWN_SOLUTION) if c in '12']
  open_ = ''.join(
    '0' if i in swapped else c for i, c in enumerate(KNOWN_SOLUTION)
  )
  assert len(solve(open_)) == 2


def test_all_solutions_are_found():
  """Counted by brute force: the ways to fill the last two rows of a 6x6."""
  import itertools

  (grid,) = puzzles.solutions(RULES[6], [0] * 36, 1)
  open_ = grid[:24] + [0] * 12
  count = sum(
    is_solution(6, grid[:24] + list(a) + list(b))
    for a in itertools.permutations(range(1, 7))
    for b in itertools.permutations(range(1, 7))
    if all(x != y for x, y in zip(a, b, strict=True))
    and set(a[:3]) | set(b[:3]) == set(range(1, 7))
  )
  assert len(puzzles.solutions(RULES[6], open_, limit=10**6)) == count > 1


@pytest.mark.parametrize('size', [6, 9])
def test_puzzles_have_one_solution(size):
  train, heldout = puzzles.make_puzzles(size, 30, 8, 3, seed=0)
  assert (len(train), len(heldout)) == (30, 8)
  fewest, most = puzzles.GIVENS[size]
  for puzzle, solution in train + heldout:
    assert fewest <= sum(map(bool, puzzle)) <= most
    assert is_solution(size, list(solution))
    assert all(a in (0, b) for a, b in zip(puzzle, solution, strict=True))
    assert puzzles.solutions(RULES[size], list(puzzle)) == [list(solution)]


@pytest.mark.parametrize('size', [6, 9])
def test_variants_are_puzzles_of_their_own(size):
  rng = np.random.default_rng(1)
  base = np.array(puzzles.make_puzzle(RULES[size], rng))
  seen, transposed = set(), 0
  for _ in range(30):
    symmetry = puzzles.draw_symmetry(RULES[size], rng)
    puzzle, solution = symmetry.apply(base)
    seen.add(puzzle.tobytes())
    assert is_solution(size, solution)
    found = puzzles.solutions(RULES[size], puzzle.tolist())
    assert found == [solution.tolist()]
    rows, base_rows = (
      np.sort((grid > 0).reshape(size, size).sum(axis=1))
      for grid in (puzzle, base[0])
    )
    transposed += (rows != base_rows).any()
  assert len(seen) > 25
  assert (transposed > 0) == (size == 9), 'only square boxes can be turned'
  assert (puzzles.no_symmetry(RULES[size]).apply(base) == base).all()


def test_nothing_held_out_is_trained_on():
  """Also when the two streams of random numbers meet the same puzzles."""
  train, heldout = puzzles.make_puzzles(6, 300, 40, 3, seed=1)
  assert len(dict(train)) == 300
  unseen = {puzzles.renamed(puzzle) for puzzle, _ in heldout}
  assert len(unseen) == 40
  assert not unseen & {puzzles.renamed(puzzle) for puzzle, _ in train}
  assert puzzles.renamed(bytes([0, 5, 3, 5, 0])) == bytes([0, 1, 2, 1, 0])


def test_training_puzzles_that_are_held_out_are_left_out(monkeypatch):
  one = puzzles.make_puzzle(RULES[6], np.random.default_rng(0))
  two = puzzles.make_puzzle(RULES[6], np.random.default_rng(1))
  made = iter([one, one, one, two])
  monkeypatch.setattr(puzzles, 'make_puzzle', lambda rules, rng: next(made))
  train, heldout = puzzles.make_puzzles(6, 1, 1, 1, seed=0)
  assert heldout == [tuple(map(bytes, one))]
  assert train == [tuple(map(bytes, two))]


def test_everything_follows_from_the_seed():
  make = lambda seed: puzzles.make_puzzles(6, 20, 3, 2, seed)
  assert make(5) == make(5) != make(6)


@pytest.mark.parametrize('size', [6, 9])
def test_one_piece_a_character(size):
  tokenizer = tokenizers.SentencePieceTokenizer(puzzles.make_tokenizer(size))
  text = ('.' + '123456789'[:size]) * 2
  ids = tokenizer.encode(text)
  assert len(ids) == len(text) and tokenizer.decode(ids) == text
  assert tokenizer.pieces(ids) == list(text)
  assert tokenizer.vocab_size == 5 + size


def test_lines():
  line = puzzles.to_line(bytes([0, 1, 2]), bytes([3, 1, 2]))
  assert json.loads(line) == {'prompt': '.12', 'response': '312'}
