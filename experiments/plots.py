"""Loss curves of runs, side by side, from their metrics.jsonl.

  python experiments/plots.py runs/sudoku runs/sudoku_ar --output=losses.png

One panel a quantity, one colour a run; solid lines are training, dashed ones
held-out text. With --smooth=5 a line is the mean of 5 records on end, over a
pale line of all of them. The held-out denoising loss is that of corrupted
positions alone, and has a panel of its own.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import sys
from typing import NamedTuple

import matplotlib
import matplotlib.figure
import matplotlib.lines
import matplotlib.ticker
import numpy as np

COLOURS = (
  '#1f5fa8',
  '#c2571a',
  '#2c7a3f',
  '#7a4fa3',
  '#b0304a',
  '#2a8c94',
  '#8a6d1c',
  '#5b5f66',
)
HELDOUT = {'linestyle': '--', 'marker': 'o', 'markersize': 3.5}


class MetricsError(ValueError):
  """Metrics that can't be read or drawn; the message says why."""


class Panel(NamedTuple):
  """A quantity.

  Attributes:
    title, unit: what it is called.
    training, heldout: its names in the records.
    learnt_as: the training loss without which it means nothing.
    log_y: whether its axis is logarithmic.
  """

  title: str
  unit: str
  training: str | None
  heldout: str | None = None
  learnt_as: str | None = None
  log_y: bool = False


PANELS = (
  Panel('loss', 'nats per token', 'loss'),
  Panel('denoising loss', 'nats per token', 'loss_denoise'),
  Panel(
    'denoising loss of corrupted positions',
    'nats per token',
    None,
    'heldout_loss_corrupted',
    'loss_denoise',
  ),
  Panel('AR loss', 'nats per token', 'loss_ar', 'heldout_loss_ar'),
  Panel('gradient norm', 'before clipping', 'gradient_norm', log_y=True),
  Panel('learning rate', '', 'learning_rate'),
)


def read_metrics(folder: str) -> list[dict[str, float]]:
  """The records of a run, by step.

  The last line may be half of one: the run is writing it, or was killed.

  Raises:
    MetricsError: there is no such file, another line is no record, or there
      is no record at all.
  """
  path = pathlib.Path(folder) / 'metrics.jsonl'
  try:
    lines = path.read_text(errors='replace').splitlines()
  except OSError as error:
    raise MetricsError(f'{path} cannot be read: {error.strerror}.') from error
  records = []
  for number, line in enumerate(lines, 1):
    try:
      record = {name: float(value) for name, value in json.loads(line).items()}
      record['step'] = int(record['step'])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
      if number < len(lines):
        raise MetricsError(f'{path}: line {number} is no record.') from None
    else:
      records.append(record)
  if not records:
    raise MetricsError(f'{path} has no record yet.')
  return sorted(records, key=lambda record: record['step'])


def series(
  records: list[dict[str, float]], name: str | None
) -> tuple[np.ndarray, np.ndarray]:
  """(steps, values) of one metric, where it was recorded."""
  pairs = [(r['step'], r[name]) for r in records if name in r]
  steps, values = np.array(pairs, float).reshape(-1, 2).T
  return steps, values


def running_mean(values: np.ndarray, count: int) -> np.ndarray:
  """Mean of up to `count` values around each, NaN left out.

  As many before as after, so that a falling curve is not drawn too late; the
  first and the last value stay as they are.
  """
  smooth = []
  for index in range(len(values)):
    reach = min(count // 2, index, len(values) - 1 - index)
    around = values[index - reach : index + reach + 1]
    around = around[~np.isnan(around)]
    smooth.append(around.mean() if len(around) else math.nan)
  return np.array(smooth)


def labels(folders: list[str]) -> list[str]:
  """The shortest end of each path that no other path has."""
  paths = [pathlib.Path(os.path.abspath(folder)).parts for folder in folders]
  result = []
  for index, path in enumerate(paths):
    others, length = paths[:index] + paths[index + 1 :], 1
    while length < len(path) and any(
      other[-length:] == path[-length:] for other in others
    ):
      length += 1
    result.append(os.path.join(*path[-length:]))
  return result


def tidy(axis) -> None:
  """The look of every picture here: a pale grid, no box."""
  axis.grid(alpha=0.25)
  axis.spines[['top', 'right']].set_visible(False)


def draw(
  runs: dict[str, list[dict[str, float]]],
  path: pathlib.Path,
  smooth: int = 1,
  log_x: bool = False,
) -> None:
  """Draws the records of each run, by its label, to a picture at `path`.

  Raises:
    MetricsError: no run has any of the quantities.
    OSError, ValueError: the picture can't be written, or not in that format.
  """
  shown = [(panel, found) for panel in PANELS if (found := _find(panel, runs))]
  if not shown:
    names = ', '.join(filter(None, (panel.training for panel in PANELS)))
    raise MetricsError(f'No run has any of: {names}.')
  columns = min(2, len(shown))
  rows = -(-len(shown) // columns)
  figure = matplotlib.figure.Figure(
    (5.2 * columns, 0.6 + 3.1 * rows), dpi=150, layout='constrained'
  )
  colours = dict(zip(runs, _colours(len(runs)), strict=True))
  any_heldout = False
  for place, (panel, found) in enumerate(shown, 1):
    axis = figure.add_subplot(rows, columns, place)
    for label, training, heldout in found:
      _draw_curves(axis, training, heldout, colours[label], smooth)
    has_heldout = any(len(steps) for *_, (steps, _) in found)
    any_heldout |= has_heldout
    axis.set_title(panel.title)
    _label(axis, panel, log_x)
    if place > len(shown) - columns:
      axis.set_xlabel('training steps')
  handles = _legend(colours, any_heldout)
  figure.legend(
    handles=handles,
    loc='outside upper center',
    ncols=len(handles) if len(handles) < 6 else 4,
    frameon=False,
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)


def _find(panel: Panel, runs: dict[str, list[dict[str, float]]]) -> list:
  """[(label, training series, held-out series)] of the runs that have them.

  A loss that is zero throughout is one that the run is not trained on; what
  held-out text says of it then means nothing.
  """
  found = []
  for label, records in runs.items():
    training = series(records, panel.training)
    heldout = series(records, panel.heldout)
    _, learnt = series(records, panel.learnt_as or panel.training)
    untrained = len(learnt) and not learnt.any()
    if not untrained and (len(training[0]) or len(heldout[0])):
      found.append((label, training, heldout))
  return found


def _draw_curves(axis, training, heldout, colour, smooth: int) -> None:
  steps, values = training
  if smooth > 1:
    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    values = running_mean(values, smooth)
  axis.plot(steps, values, color=colour, linewidth=1.4)
  axis.plot(*heldout, color=colour, linewidth=1.2, **HELDOUT)


def _label(axis, panel: Panel, log_x: bool) -> None:
  axis.set_ylabel(panel.unit)
  if log_x:
    axis.set_xscale('log')
    axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
  axis.xaxis.set_major_formatter('{x:,g}')
  if panel.log_y:
    axis.set_yscale('log')
    axis.yaxis.set_major_formatter('{x:g}')
    axis.yaxis.set_minor_formatter(
      matplotlib.ticker.LogFormatter(minor_thresholds=(1.5, 0.5))
    )
  tidy(axis)


def _legend(colours: dict[str, str], has_heldout: bool) -> list:
  """Runs by colour, then what solid and dashed mean."""
  line = functools.partial(matplotlib.lines.Line2D, [], [])
  handles = [line(color=c, label=label) for label, c in colours.items()]
  if has_heldout:
    grey = COLOURS[-1]
    handles.append(line(color=grey, label='training'))
    handles.append(line(color=grey, label='held out', **HELDOUT))
  return handles


def _colours(count: int) -> list:
  """A colour for each run; past the named ones, steps of a colour map."""
  if count <= len(COLOURS):
    return list(COLOURS[:count])
  return list(matplotlib.colormaps['turbo'](np.linspace(0.05, 0.95, count)))


def positive(text: str) -> int:
  """What argparse takes for a number of things."""
  number = int(text)
  if number < 1:
    raise argparse.ArgumentTypeError(f'{number} is not positive')
  return number


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('folders', nargs='+', metavar='DIR', help='of a run')
  parser.add_argument(
    '--output', type=pathlib.Path, default=pathlib.Path('losses.png')
  )
  parser.add_argument(
    '--smooth', type=positive, default=1, help='records in a running mean'
  )
  parser.add_argument('--log_x', action='store_true')
  given = parser.parse_args()
  folders = list({os.path.realpath(f): f for f in given.folders}.values())
  try:
    runs = {
      label: read_metrics(folder)
      for label, folder in zip(labels(folders), folders, strict=True)
    }
    draw(runs, given.output, given.smooth, given.log_x)
  except (OSError, ValueError) as error:
    sys.exit(str(error))
  print(f'{given.output} written')


if __name__ == '__main__':
  main()
