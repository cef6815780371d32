r"""The best of several answers to a puzzle, as the network itself judges them.

  python -m experiments.sudoku.best_of --workdir=runs/sudoku9 \
      --puzzles=runs/sudoku9/heldout.jsonl --tries=40 --name=best_of_9x9

The sampler of the run answers each puzzle. One more pass looks at the finished
canvas, with nothing else to go by, and gives what it thinks of it:

  sum over the canvas of  log p(what stands there | canvas)

A puzzle whose sum is below `--sure` is put to the network again as another one,
by a symmetry of Sudoku (`make_puzzles.Symmetry`), until a sum is above it or
there were `--tries`. The answer with the largest sum is kept. All that is used
of the rules are these symmetries: no answer is held against them, or against
the solution. Writes NAME.json beside this file (--output).
"""

from collections.abc import Callable
import dataclasses
import json
import math
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import diffusiongemma as dg
from experiments import machine
from experiments import plots
from experiments.sudoku import make_puzzles
from experiments.sudoku import solve

# Of right answers to 300 other puzzles 99 % were above it, of wrong ones none;
# of those that `best_of_9x9.json` counts, one.
SURE = -0.003


def make_judge(run: dg.Run) -> Callable:
  """(cache, tokens_BL) -> the sums, float32 [B]."""
  model = dg.Denoiser(run.config.model, lower_once=True)

  @jax.jit
  def judge(params, cache, tokens_BL):
    given = {'params': params}
    h_BLD = model.apply(given, tokens_BL, None, cache, method='denoise')
    log_p_BLV = jax.nn.log_softmax(model.apply(given, h_BLD, method='logits'))
    own_BL1 = jnp.take_along_axis(log_p_BLV, tokens_BL[:, :, None], axis=-1)
    return jnp.sum(own_BL1, axis=(1, 2))

  return lambda cache, tokens_BL: judge(run.params, cache, tokens_BL)


class Posed(NamedTuple):
  """A puzzle as another one, by a symmetry.

  Attributes:
    prompt: what the network reads.
    meaning_V: what each token of its answer stands for.
    place_L: where on its canvas each place of the puzzle's own is.
  """

  prompt: str
  meaning_V: np.ndarray
  place_L: np.ndarray

  def read(self, tokens_L: np.ndarray) -> np.ndarray:
    """The answer to the puzzle itself."""
    return self.meaning_V[tokens_L[self.place_L]]


def pose(run: dg.Run, prompt: str, symmetry: make_puzzles.Symmetry) -> Posed:
  symbols = np.array([solve.EMPTY, *map(str, range(1, len(symmetry.digits)))])
  grid = symmetry.apply(np.searchsorted(symbols, list(prompt)))
  ids = np.array([run.tokenizer.encode(symbol)[0] for symbol in symbols])
  meaning_V = np.arange(run.tokenizer.vocab_size)
  meaning_V[ids[symmetry.digits]] = ids
  place_L = np.arange(run.config.diffusion.canvas_length)
  place_L[: len(prompt)] = np.argsort(symmetry.cells)
  return Posed(''.join(symbols[grid]), meaning_V, place_L)


def answer(
  run: dg.Run,
  solver: Callable,
  judge: Callable,
  prompts: list[str],
  seed: int,
  batch_size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(tokens_ML, sums_M, passes_M) of one answer to each prompt, the judge's
  pass among them."""
  padding = prompts[-1:] * (-len(prompts) % batch_size)
  batches = solve.split([*prompts, *padding], batch_size)
  caches = [solve.read(run, batch) for batch in batches]
  tokens_ML, steps_M = solve.solve_all(solver, caches, seed)
  sums = [
    judge(cache, jnp.asarray(tokens_BL))
    for cache, tokens_BL in zip(
      caches, solve.split(tokens_ML, batch_size), strict=True
    )
  ]
  kept = slice(len(prompts))
  return tokens_ML[kept], np.concatenate(sums)[kept], steps_M[kept] + 1


def measure(
  run: dg.Run,
  prompts: list[str],
  responses: list[str],
  tries: int,
  sure: float,
  batch_size: int,
) -> list[dict]:
  """A record after each try, until the network is sure of all: what `score`
  gives for the best answers so far, `unsure`, the number of puzzles that would
  be tried again, and `steps`, the mean number of passes of a puzzle."""
  M, L = len(prompts), run.config.diffusion.canvas_length
  solver = solve.make_solver(run, run.config.diffusion)
  judge = make_judge(run)
  best_ML, sums_M = np.zeros((M, L), np.int32), np.full(M, -np.inf)
  steps_M = np.zeros(M)
  rules = make_puzzles.Rules(math.isqrt(len(prompts[0])))
  records, open_U = [], np.arange(M)
  while len(open_U) and (seed := len(records)) < tries:
    rng = np.random.default_rng(seed)
    symmetries = [
      make_puzzles.draw_symmetry(rules, rng)
      if seed
      else make_puzzles.no_symmetry(rules)
      for _ in open_U
    ]
    posed = [
      pose(run, prompts[index], symmetry)
      for index, symmetry in zip(open_U, symmetries, strict=True)
    ]
    tokens_UL, sums_U, steps_U = answer(
      run, solver, judge, [p.prompt for p in posed], seed, batch_size
    )
    tokens_UL = np.stack(
      [p.read(row_L) for p, row_L in zip(posed, tokens_UL, strict=True)]
    )
    steps_M[open_U] += steps_U
    is_better_U = sums_U > sums_M[open_U]
    better_U = open_U[is_better_U]
    best_ML[better_U] = tokens_UL[is_better_U]
    sums_M[better_U] = sums_U[is_better_U]
    open_U = np.flatnonzero(sums_M < sure)
    records.append(
      {
        'tries': seed + 1,
        **solve.score(
          solve.answers(run.tokenizer, best_ML), prompts, responses
        ),
        'unsure': len(open_U),
        'steps': float(np.mean(steps_M)),
      }
    )
    print(json.dumps(records[-1]), flush=True)
  return records


def main() -> None:
  parser = solve.make_parser(__doc__)
  parser.add_argument('--tries', type=plots.positive, default=40)
  parser.add_argument(
    '--sure', type=float, default=SURE, help='a sum that needs no other try'
  )
  parser.add_argument('--output', type=pathlib.Path, default=solve.FOLDER)
  parser.add_argument('--name', required=True, help='of the file written')
  given = parser.parse_args()
  started = time.time()
  run, prompts, responses = solve.open_run(given)
  if len(prompts[0]) not in {size**2 for size in make_puzzles.BOX}:
    sys.exit('Symmetries are known of puzzles of 6 x 6 and of 9 x 9 cells.')
  results = {
    'puzzles': len(prompts),
    'run': solve.describe_run(run, given.workdir),
    'sampler': dataclasses.asdict(run.config.diffusion),
    'sure': given.sure,
    'best_of': measure(
      run, prompts, responses, given.tries, given.sure, given.batch_size
    ),
    **machine.describe(),
    'seconds': round(time.time() - started),
    'command': machine.command('experiments.sudoku.best_of'),
  }
  given.output.mkdir(parents=True, exist_ok=True)
  machine.write(results, given.output / f'{given.name}.json')


if __name__ == '__main__':
  main()
