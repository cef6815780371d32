"""How much is right after how many steps, for each strategy of the sampler.

  python -m experiments.sampling_quality.measure --workdir=runs/sudoku \\
      --puzzles=runs/sudoku6/heldout.jsonl

solves held-out puzzles (`experiments/sudoku`) with every strategy and every
budget of steps, with self-conditioning and without, and writes results.json and
curves.png beside this file. A puzzle counts as solved when every cell is right.
Rows that have converged before the budget is used up stop; `steps` is what they
used, on average.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
import time

import matplotlib.figure
import numpy as np

import diffusiongemma as dg
from diffusiongemma.checkpoints import CheckpointError
from experiments import machine
from experiments import plots
from experiments.sudoku import solve

BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
FOLDER = pathlib.Path(__file__).parent
# Line, and what else it is told by than its colour.
LOOKS = {
  'entropy_bound': ('entropy bound', '#1f5fa8', 'o'),
  'confidence': ('confidence', '#c2571a', 's'),
  'top_k_confident': ('top-k confident', '#2c7a3f', '^'),
  'ancestral': ('ancestral', '#7a4fa3', 'D'),
}


def measure(run, prompts, responses, budgets, batch_size, seed) -> list[dict]:
  """One record for each way of sampling and budget."""
  caches = [
    solve.read(run, batch) for batch in solve.split(prompts, batch_size)
  ]
  records = []
  for self_conditioning, strategy, budget in itertools.product(
    (True, False), dg.strategies.STRATEGIES, budgets
  ):
    diffusion = dataclasses.replace(
      run.config.diffusion, strategy=strategy, max_denoising_steps=budget
    )
    solver = solve.make_solver(run, diffusion, self_conditioning)
    tokens_ML, steps_M = solve.solve_all(solver, caches, seed)
    texts = solve.answers(run.tokenizer, tokens_ML)
    records.append(
      {
        'self_conditioning': self_conditioning,
        'strategy': strategy,
        'budget': budget,
        **solve.score(texts, prompts, responses),
        'steps': float(np.mean(steps_M)),
      }
    )
    print(json.dumps(records[-1]), flush=True)
  return records


def draw(records: list[dict], title: str, path: pathlib.Path) -> None:
  """Share of solved puzzles over the budget of steps."""
  figure = matplotlib.figure.Figure((10, 4.2), dpi=150, layout='constrained')
  axes = figure.subplots(1, 2, sharey=True)
  for axis, on in zip(axes, (True, False), strict=True):
    for strategy, (name, colour, marker) in LOOKS.items():
      line = [
        r
        for r in records
        if r['strategy'] == strategy and r['self_conditioning'] == on
      ]
      axis.plot(
        [r['budget'] for r in line],
        [100 * r['solved'] for r in line],
        color=colour,
        marker=marker,
        markersize=5,
        label=name,
      )
    axis.set_title(f'{"with" if on else "without"} self-conditioning')
    axis.set_xscale('log', base=2)
    axis.xaxis.set_major_formatter('{x:g}')
    axis.set_xlabel('most denoising passes')
    plots.tidy(axis)
  axes[0].set_ylabel('puzzles solved, %')
  axes[0].set_ylim(-2, 102)
  axes[1].legend(frameon=False, loc='lower right')
  figure.suptitle(title, x=0.01, ha='left')
  figure.savefig(path)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--puzzles', required=True)
  parser.add_argument('--count', type=int, default=1000)
  parser.add_argument('--batch_size', type=int, default=250)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--output', type=pathlib.Path, default=FOLDER)
  given = parser.parse_args()
  try:
    prompts, responses = solve.read_puzzles(given.puzzles, given.count)
    run = solve.load(given.workdir, prompts)
  except (OSError, ValueError, CheckpointError) as error:
    sys.exit(str(error))
  started = time.time()
  records = measure(
    run, prompts, responses, BUDGETS, given.batch_size, given.seed
  )
  results = {
    'puzzles': len(prompts),
    'training_steps': run.step,
    'seed': given.seed,
    'sampler': dataclasses.asdict(run.config.diffusion),
    **machine.describe(),
    'seconds': round(time.time() - started),
    'records': records,
  }
  given.output.mkdir(parents=True, exist_ok=True)
  machine.write(results, given.output / 'results.json')
  title = f'{len(prompts)} unseen puzzles, a network after {run.step} steps'
  draw(records, title, given.output / 'curves.png')


if __name__ == '__main__':
  main()
