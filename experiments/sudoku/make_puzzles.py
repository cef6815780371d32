"""Sudoku puzzles with one solution each, and a tokenizer for them.

  python experiments/sudoku/make_puzzles.py --size=6 --folder=runs/sudoku6
  python experiments/sudoku/make_puzzles.py --size=9 --folder=runs/sudoku9

writes FOLDER/{train,heldout}.jsonl, lines of {"prompt": cells row by row, "."
where empty, "response": the solution}, and FOLDER/sudoku.model. The same
--seed writes the same bytes.

A puzzle is a random full grid from which cells are taken, in random order, as
long as the solution stays unique. Training puzzles are made from fewer such
base puzzles by the symmetries of Sudoku, which keep the solution unique; held
out ones are base puzzles of their own, left as they are. "Unseen" means that
no held-out puzzle is a training puzzle, up to a renaming of the digits. It
does not mean that its solution was never seen: of 6x6 grids there are few.
"""

import argparse
import io
import json
import os
import sys
import time
from typing import NamedTuple

import numpy as np
import sentencepiece

BOX = {6: (2, 3), 9: (3, 3)}  # Rows and columns of a box.
GIVENS = {6: (10, 18), 9: (26, 36)}  # Fewest and most.


class Rules:
  """The cells of an N x N grid and the three units that each lies in."""

  def __init__(self, size: int):
    rows, columns = BOX[size]
    self.size = size
    self.row, self.column = np.divmod(np.arange(size**2), size)
    self.box = self.row // rows * (size // columns) + self.column // columns
    # As lists: single Python numbers are read faster from them.
    self.units = list(
      zip(
        self.row.tolist(),
        (size + self.column).tolist(),
        (2 * size + self.box).tolist(),
        strict=True,
      )
    )


def solutions(
  rules: Rules,
  cells: list[int],
  limit: int = 2,
  rng: np.random.Generator | None = None,
) -> list[list[int]]:
  """Up to `limit` solutions of a puzzle, 0 where empty.

  The cell with the fewest candidates is tried first; with `rng`, its
  candidates in random order.
  """
  everything = (1 << rules.size) - 1
  taken = [0] * (3 * rules.size)  # Digits of each unit, as bits.
  cells = list(cells)
  for cell, digit in enumerate(cells):
    if digit:
      for unit in rules.units[cell]:
        if taken[unit] >> (digit - 1) & 1:
          return []
        taken[unit] |= 1 << (digit - 1)
  empty = [cell for cell, digit in enumerate(cells) if not digit]
  found = []

  def search():
    best, fewest, candidates = -1, rules.size + 1, 0
    for cell in empty:
      if not cells[cell]:
        a, b, c = rules.units[cell]
        free = everything & ~(taken[a] | taken[b] | taken[c])
        count = free.bit_count()
        if count < fewest:
          best, fewest, candidates = cell, count, free
          if count < 2:
            break
    if best < 0:
      found.append(list(cells))
      return
    digits = [d for d in range(rules.size) if candidates >> d & 1]
    if rng is not None and len(digits) > 1:
      digits = rng.permutation(digits).tolist()
    for digit in digits:
      cells[best] = digit + 1
      for unit in rules.units[best]:
        taken[unit] |= 1 << digit
      search()
      for unit in rules.units[best]:
        taken[unit] &= ~(1 << digit)
      cells[best] = 0
      if len(found) >= limit:
        return

  search()
  return found


def make_puzzle(
  rules: Rules, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
  """(puzzle, its one solution); as many givens as GIVENS allows."""
  fewest, most = GIVENS[rules.size]
  while True:
    (solution,) = solutions(rules, [0] * rules.size**2, 1, rng)
    wanted = int(rng.integers(fewest, most + 1))
    puzzle, count = list(solution), rules.size**2
    for cell in rng.permutation(rules.size**2).tolist():
      if count == wanted:
        return puzzle, solution
      digit, puzzle[cell] = puzzle[cell], 0
      if len(solutions(rules, puzzle)) == 1:
        count -= 1
      else:
        puzzle[cell] = digit


class Symmetry(NamedTuple):
  """What makes another puzzle of one, and another solution of its solution:
  digits are renamed; bands, stacks, rows in a band and columns in a stack
  change places; where boxes are square, rows and columns do.

  Attributes:
    digits: [N + 1], the new name of each; 0, of an empty cell, stays.
    cells: [N * N], the cell that comes to each place.
  """

  digits: np.ndarray
  cells: np.ndarray

  def apply(self, grid: np.ndarray) -> np.ndarray:
    """Of grids as rows of cells, [..., N * N]."""
    return self.digits[grid[..., self.cells]]


def no_symmetry(rules: Rules) -> Symmetry:
  """The one that changes nothing."""
  return Symmetry(np.arange(rules.size + 1), np.arange(rules.size**2))


def draw_symmetry(rules: Rules, rng: np.random.Generator) -> Symmetry:
  """One of all, at random."""
  size, (rows, columns) = rules.size, BOX[rules.size]
  digits = np.array([0, *(1 + rng.permutation(size))])
  cells = np.arange(size**2).reshape(size, size)
  cells = cells[_shuffled(size, rows, rng)][:, _shuffled(size, columns, rng)]
  if rows == columns and rng.integers(2):
    cells = cells.T
  return Symmetry(digits, cells.reshape(-1))


def _shuffled(size: int, group: int, rng: np.random.Generator) -> np.ndarray:
  """0..size-1 with its groups in random order, and each group too."""
  lines = np.arange(size).reshape(-1, group)
  lines = rng.permutation(lines)
  return rng.permuted(lines, axis=1).reshape(-1)


def renamed(puzzle: bytes) -> bytes:
  """The puzzle with its digits numbered as they come."""
  names = {0: 0}
  return bytes(names.setdefault(digit, len(names)) for digit in puzzle)


def make_puzzles(
  size: int, num_train: int, num_heldout: int, variants: int, seed: int
):
  """(training, held-out) puzzles: lists of (puzzle, solution), as bytes."""
  rules = Rules(size)
  heldout_seed, base_seed, vary_seed = np.random.SeedSequence(seed).spawn(3)
  rng = np.random.default_rng(heldout_seed)
  heldout = {}
  while len(heldout) < num_heldout:
    puzzle, solution = make_puzzle(rules, rng)
    heldout.setdefault(renamed(bytes(puzzle)), (bytes(puzzle), bytes(solution)))
  base_rng = np.random.default_rng(base_seed)
  vary_rng = np.random.default_rng(vary_seed)
  train, told = {}, time.monotonic()
  while len(train) < num_train:
    base = np.array(make_puzzle(rules, base_rng))
    pairs = [base]
    pairs += [
      draw_symmetry(rules, vary_rng).apply(base) for _ in range(variants - 1)
    ]
    for puzzle, solution in pairs:
      puzzle = bytes(puzzle.tolist())
      if renamed(puzzle) not in heldout and len(train) < num_train:
        train.setdefault(puzzle, bytes(solution.tolist()))
    if time.monotonic() > told + 20:
      told = time.monotonic()
      print(f'{len(train)} of {num_train} puzzles', file=sys.stderr)
  return list(train.items()), list(heldout.values())


def to_line(puzzle: bytes, solution: bytes) -> str:
  """One line of JSON."""
  prompt = ''.join(map(str, puzzle)).replace('0', '.')
  response = ''.join(map(str, solution))
  return json.dumps({'prompt': prompt, 'response': response}) + '\n'


def make_tokenizer(size: int) -> bytes:
  """A SentencePiece model with one piece a character."""
  model = io.BytesIO()
  symbols = ['.', *map(str, range(1, size + 1))]
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([''.join(symbols)] * 9),
    model_writer=model,
    model_type='char',
    vocab_size=4 + len(symbols),
    character_coverage=1.0,
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    normalization_rule_name='identity',
    pad_id=0,
    eos_id=1,
    bos_id=2,
    unk_id=3,
    pad_piece='<pad>',
    eos_piece='<eos>',
    bos_piece='<bos>',
    minloglevel=2,
  )
  return model.getvalue()


def write(path: str, content: bytes) -> None:
  """All of a file or nothing."""
  with open(path + '.tmp', 'wb') as file:
    file.write(content)
  os.replace(path + '.tmp', path)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--size', type=int, choices=BOX, default=6)
  parser.add_argument('--folder', required=True, help='where to write')
  parser.add_argument('--train', type=_positive, default=200_000)
  parser.add_argument('--heldout', type=_positive, default=1000)
  parser.add_argument(
    '--variants', type=_positive, default=10, help='of each base puzzle'
  )
  parser.add_argument('--seed', type=int, default=0)
  given = parser.parse_args()
  train, heldout = make_puzzles(
    given.size, given.train, given.heldout, given.variants, given.seed
  )
  os.makedirs(given.folder, exist_ok=True)
  write(os.path.join(given.folder, 'sudoku.model'), make_tokenizer(given.size))
  for name, puzzles in (('train', train), ('heldout', heldout)):
    text = ''.join(to_line(*puzzle) for puzzle in puzzles)
    write(os.path.join(given.folder, f'{name}.jsonl'), text.encode())
  print(f'{len(train)} puzzles and {len(heldout)} held out in {given.folder}')


def _positive(text: str) -> int:
  number = int(text)
  if number < 1:
    raise argparse.ArgumentTypeError(f'{number} is not positive')
  return number


if __name__ == '__main__':
  main()
