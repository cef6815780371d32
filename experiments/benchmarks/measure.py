"""Speed on this machine beside `transformers`, in a file and a picture.

  python -m experiments.benchmarks.measure \\
      --out=experiments/benchmarks/cpu.json

runs `--mode=benchmark` with configs/reference.py, a process of its own, and
draws, beside the file, how a denoising step grows with the context and with the
batch.
"""

import argparse
import math
import pathlib

import matplotlib.figure

from experiments import machine
from experiments import plots

GRID = '1x256,2x256,4x256,8x256,1x1024,1x4096,1x8192,1x16384,1x32768'
# Name in the results -> (label, colour, marker).
PROGRAMS = {
  'step_seconds': ('diffusiongemma', '#1f5fa8', 'o'),
  'peer_step_seconds': ('transformers', '#c2571a', 's'),
  'compiled_peer_step_seconds': (
    'transformers, compiled by torch',
    '#7a4fa3',
    'D',
  ),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', required=True, help='JSON file to write')
  parser.add_argument('--grid', default=GRID)
  given = parser.parse_args()
  results = machine.run_main(
    '--mode=benchmark',
    '--config=configs/reference.py',
    f'--grid={given.grid}',
  )
  machine.write(results, given.out)
  draw(results, pathlib.Path(given.out).with_suffix('.png'))


def draw(results: dict, path: pathlib.Path) -> None:
  """Seconds a step over the context at the least batch, and over the batch at
  the least context."""
  rows = results['sampling']
  figure = matplotlib.figure.Figure((9, 3.6), dpi=150, layout='constrained')
  axes = figure.subplots(1, 2)
  for axis, grows, fixed, label in (
    (axes[0], 'context', 'batch', 'tokens of context'),
    (axes[1], 'batch', 'context', 'canvases at a time'),
  ):
    least = min(row[fixed] for row in rows)
    along = sorted(
      (row for row in rows if row[fixed] == least), key=lambda row: row[grows]
    )
    for name, (program, colour, marker) in PROGRAMS.items():
      axis.plot(
        [row[grows] for row in along],
        [row.get(name) or math.nan for row in along],
        color=colour,
        marker=marker,
        label=program,
      )
    axis.set_xlabel(f'{label}, {fixed} {least}')
    axis.set_ylim(bottom=0)
    plots.tidy(axis)
  axes[0].set_ylabel('seconds a denoising step')
  figure.legend(
    *axes[0].get_legend_handles_labels(),
    loc='outside lower center',
    ncols=3,
    frameon=False,
  )
  figure.savefig(path)


if __name__ == '__main__':
  main()
