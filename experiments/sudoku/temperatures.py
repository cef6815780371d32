r"""How warm a trained network is to be sampled: solved puzzles by temperature.

  python experiments/sudoku/make_puzzles.py --size=6 --folder=runs/other6 \
      --seed=7 --train=10
  python -m experiments.sudoku.temperatures --workdir=runs/sudoku \
      --puzzles=runs/other6/heldout.jsonl

The temperature, which goes from `t_max` at the first step to `t_min` at the
last, divides the logits of a step before a token is drawn, and before the
network is told what it thought (the soft embedding). Training tells it at 1.
Puzzles must be others than those that a result is reported on. Writes
temperatures_NAME.json beside this file.
"""

import dataclasses
import json
import pathlib

import numpy as np

from experiments import machine
from experiments.sudoku import solve

FOLDER = pathlib.Path(__file__).parent
# (first step, last step); the released network's are 0.8 and 0.4.
TEMPERATURES = (
  (0.8, 0.4),
  (1.0, 1.0),
  (1.2, 1.2),
  (1.4, 1.4),
  (1.6, 1.2),
  (1.6, 1.6),
  (1.8, 1.8),
  (2.0, 1.6),
  (2.0, 2.0),
)


def main() -> None:
  parser = solve.make_parser(__doc__)
  parser.add_argument('--name', default='6x6', help='of the file written')
  given = parser.parse_args()
  run, prompts, responses = solve.open_run(given)
  caches = [
    solve.read(run, batch) for batch in solve.split(prompts, given.batch_size)
  ]
  records = []
  for t_max, t_min in TEMPERATURES:
    diffusion = dataclasses.replace(
      run.config.diffusion, t_min=t_min, t_max=t_max
    )
    tokens_ML, steps_M = solve.solve_all(
      solve.make_solver(run, diffusion), caches, 0
    )
    texts = solve.answers(run.tokenizer, tokens_ML)
    records.append(
      {
        't_max': t_max,
        't_min': t_min,
        **solve.score(texts, prompts, responses),
        'steps': float(np.mean(steps_M)),
      }
    )
    print(json.dumps(records[-1]), flush=True)
  results = {
    'puzzles': len(prompts),
    'run': solve.describe_run(run, given.workdir),
    'temperatures': records,
    **machine.describe(),
    'command': machine.command('experiments.sudoku.temperatures'),
  }
  machine.write(results, FOLDER / f'temperatures_{given.name}.json')


if __name__ == '__main__':
  main()
