"""Watch a Sudoku being solved.

The network `sudoku` comes with the package: 0.8 million parameters, trained on
two CPU cores. The puzzle is its prompt, the solution one canvas, and all cells
are denoised at once. The givens are pinned: they keep their digit from the
first canvas on.

Command:  python examples/solve_sudoku.py
  PUZZLE=36_CHARACTERS solves another one: digits 1 to 6, a dot for an empty
  cell, row by row. On a terminal each pass is shown as it comes; PAUSE=0 shows
  them at full speed. PICTURE=FILE.svg saves what is seen.
Expected: the noise turns into a valid solution in a few passes.
"""

# %%
import contextlib
import os
import time

import jax
import numpy as np
from rich import columns
from rich import console as consoles
from rich import live
from rich import text as texts

import diffusiongemma as dg

SIZE, BOX = 6, (2, 3)
PUZZLE = os.environ.get('PUZZLE', '1...6..4..3.3.4.2.........3..64....5')
PAUSE = float(os.environ.get('PAUSE', '0.8'))
run = dg.load('sudoku')
print(run)

# %% [markdown]
# `pinned` holds tokens by their position on the canvas; `on_step` is called
# before the first denoising pass and after each.

# %%
tokens = [run.tokenizer.bos_id, *run.tokenizer.encode(PUZZLE)]
assert len(tokens) == 1 + SIZE * SIZE, 'a puzzle has 36 digits and dots'
givens = {i: tokens[1 + i] for i, cell in enumerate(PUZZLE) if cell != '.'}


def solve(on_step=None):
  """The digits of the canvas."""
  written = dg.generate_tokens(
    *(run.config, run.params, [tokens], jax.random.key(0)),
    run.config.diffusion.canvas_length,
    pinned=[givens],
    on_step=on_step,
  )
  return run.tokenizer.decode(written.rows[0].tokens)


# %% [markdown]
# A cell is bold if it is given, green once the sampler has accepted it, and dim
# while it is noise.


# %%
def draw(passes, digits, is_settled):
  """A picture of the canvas after so many passes."""
  picture = texts.Text(no_wrap=True)
  for i in range(SIZE * SIZE):
    row, column = divmod(i, SIZE)
    if column == 0 and row and row % BOX[0] == 0:
      picture.append('──────┼──────\n', 'bright_black')
    style = 'green' if is_settled[i] else 'bright_black'
    picture.append(f' {digits[i]}', 'bold' if i in givens else style)
    if column == SIZE - 1:
      picture.append('\n')
    elif column % BOX[1] == BOX[1] - 1:
      picture.append('│', 'bright_black')
  state = 'noise' if passes == 0 else f'pass {passes}'
  count = int(np.sum(is_settled)) - len(givens)
  done = f'{count} of {SIZE * SIZE - len(givens)}'
  return picture.append(f'{state}, {done}\n', 'cyan')


def to_digits(tokens_L):
  """A character for each cell; other tokens than digits are dots."""
  pieces = (run.tokenizer.decode([int(t)]) for t in tokens_L[: SIZE * SIZE])
  return [piece if piece in '123456' and piece else '.' for piece in pieces]


pictures: list[texts.Text] = []
console = consoles.Console(highlight=False, record=True)
screen = live.Live(console=console, auto_refresh=False, transient=True)


def on_step(passes, state):
  """Draws the canvas; in the end, what is written is the draft."""
  is_last = bool(state.is_frozen_B[0])
  shown_BL = state.draft_BL if is_last else state.canvas_BL
  is_settled = np.asarray(state.accepted_BL[0] | is_last)[: SIZE * SIZE]
  is_settled = is_settled | np.isin(np.arange(SIZE * SIZE), [*givens])
  pictures.append(draw(passes, to_digits(shown_BL[0]), is_settled))
  if console.is_terminal:
    screen.update(pictures[-1], refresh=True)
    time.sleep(PAUSE)


with screen if console.is_terminal else contextlib.nullcontext():
  solution = solve(on_step)
console.print(columns.Columns(pictures, padding=(0, 4)))

# %% [markdown]
# Whether it is right: every row, column and box has each digit once, and no
# given was changed.

# %%
grid = np.array([int(digit) for digit in solution]).reshape(SIZE, SIZE)
split = grid.reshape(SIZE // BOX[0], BOX[0], SIZE // BOX[1], BOX[1])
boxes = split.swapaxes(1, 2).reshape(SIZE, SIZE)
lines = np.concatenate([grid, grid.T, boxes])
is_right = (np.sort(lines) == np.arange(1, SIZE + 1)).all()
keeps = all(solution[i] == PUZZLE[i] for i in givens)
verdict = 'Solved' if is_right and keeps else 'Not solved'
print(f'{verdict} in {len(pictures) - 1} passes: {solution}')
if path := os.environ.get('PICTURE'):
  console.save_svg(path, title='A Sudoku, all cells at once')
