r"""The best of several answers to a puzzle, as the network itself judges them.

  python -m experiments.sudoku.best_of --workdir=runs/sudoku9 \
      --puzzles=runs/sudoku9/heldout.jsonl --tries=3 --name=best_of_9x9

The sampler of the run answers each puzzle `--tries` times, each time with
another seed. After each, one more pass looks at the finished canvas, with
nothing else to go by, and gives what it thinks of it:

  sum over the canvas of  log p(what stands there | canvas)

The answer with the largest sum so far is kept. Neither the rules nor the
solution is asked. Writes NAME.json beside this file (--output).
"""

from collections.abc import Callable
import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

import diffusiongemma as dg
from diffusiongemma.training import workdir as workdirs
from experiments import machine
from experiments import plots
from experiments.sudoku import solve


def make_judge(run: workdirs.Run) -> Callable:
  """(cache, tokens_BL) -> the sums, float32 [B]."""
  model = dg.Denoiser(run.config.model)

  @jax.jit
  def judge(params, cache, tokens_BL):
    given = {'params': params}
    h_BLD = model.apply(given, tokens_BL, None, cache, method='denoise')
    log_p_BLV = jax.nn.log_softmax(model.apply(given, h_BLD, method='logits'))
    own_BL1 = jnp.take_along_axis(log_p_BLV, tokens_BL[:, :, None], axis=-1)
    return jnp.sum(own_BL1, axis=(1, 2))

  return lambda cache, tokens_BL: judge(run.params, cache, tokens_BL)


def keep_best(best, tokens_ML: np.ndarray, sums_M: np.ndarray):
  """(tokens, sums), of each row those with the larger sum; of equal ones the
  earlier. `best` is None before the first."""
  if best is None:
    return tokens_ML, sums_M
  is_better_M = sums_M > best[1]
  return (
    np.where(is_better_M[:, None], tokens_ML, best[0]),
    np.where(is_better_M, sums_M, best[1]),
  )


def measure(
  run: workdirs.Run,
  prompts: list[str],
  responses: list[str],
  tries: int,
  batch_size: int,
) -> list[dict]:
  """A record for the best of 1, 2, ... answers; `steps` are all passes that a
  puzzle took, those of the judge too."""
  batches = solve.split(prompts, batch_size)
  caches = [solve.read(run, batch) for batch in batches]
  solver = solve.make_solver(run, run.config.diffusion)
  judge = make_judge(run)
  records, best, steps = [], None, 0.0
  for seed in range(tries):
    tokens_ML, steps_M = solve.solve_all(solver, caches, seed)
    sums_M = np.concatenate(
      [
        np.asarray(judge(cache, jnp.asarray(tokens_BL)))
        for cache, tokens_BL in zip(
          caches, solve.split(tokens_ML, batch_size), strict=True
        )
      ]
    )
    best = keep_best(best, tokens_ML, sums_M)
    steps += float(np.mean(steps_M)) + 1
    texts = solve.answers(run.tokenizer, best[0])
    facts = solve.score(texts, prompts, responses)
    records.append({'tries': seed + 1, **facts, 'steps': steps})
    print(json.dumps(records[-1]), flush=True)
  return records


def main() -> None:
  parser = solve.make_parser(__doc__)
  parser.add_argument('--tries', type=plots.positive, default=3)
  parser.add_argument('--output', type=pathlib.Path, default=solve.FOLDER)
  parser.add_argument('--name', required=True, help='of the file written')
  given = parser.parse_args()
  started = time.time()
  run, prompts, responses = solve.open_run(given)
  results = {
    'puzzles': len(prompts),
    'run': solve.describe_run(run, given.workdir),
    'sampler': dataclasses.asdict(run.config.diffusion),
    'best_of': measure(run, prompts, responses, given.tries, given.batch_size),
    **machine.describe(),
    'seconds': round(time.time() - started),
    'command': machine.command('experiments.sudoku.best_of'),
  }
  given.output.mkdir(parents=True, exist_ok=True)
  machine.write(results, given.output / f'{given.name}.json')


if __name__ == '__main__':
  main()
