"""Output of a run's metrics: a file, TensorBoard and the terminal.

`metrics.jsonl` has one JSON object per line, `{"step": 10, "loss": ...}`; the
same numbers go to TensorBoard. Standard output gets a progress bar, or plain
lines if it is not a terminal. A full disk loses metrics, but not the run.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import json
import pathlib
import time

from absl import logging
import numpy as np
from rich import console as rich_console
from rich import progress as rich_progress
from rich import table as rich_table

from diffusiongemma.checkpoints import folder as folders
from diffusiongemma.runs.folder import BAD_STEPS
from diffusiongemma.runs.folder import METRICS


class MetricsWriter:
  """Appends to `metrics.jsonl` and to TensorBoard events in `workdir`.

  One process of a job is `recording`; the others write nothing.
  """

  def __init__(self, workdir: str, first_step: int, recording: bool = True):
    self._recording = recording
    if not recording:
      return
    import tensorboardX  # Slow if torch is installed, which it imports then.

    self._path = pathlib.Path(workdir) / METRICS
    self._bad_steps = pathlib.Path(workdir) / BAD_STEPS
    self._failed, self._events = False, None
    with self._telling_once():
      _drop_lines_after(self._path, first_step)
      _drop_lines_after(self._bad_steps, first_step)
      self._events = tensorboardX.SummaryWriter(
        str(workdir), purge_step=first_step + 1 if first_step else None
      )

  def write(self, step: int, numbers: Mapping[str, float]) -> None:
    """Records the numbers of one step under their names."""
    if not self._recording:
      return
    numbers = {name: float(value) for name, value in numbers.items()}
    with self._telling_once():
      with self._path.open('a') as stream:
        stream.write(json.dumps({'step': step, **numbers}) + '\n')
      if self._events is not None:
        for name, value in numbers.items():
          self._events.add_scalar(name, value, step)

  def write_bad_step(self, record: Mapping[str, float]) -> None:
    """Records a skipped step."""
    if not self._recording:
      return
    with self._telling_once(), self._bad_steps.open('a') as stream:
      stream.write(json.dumps(record) + '\n')

  def write_text(self, step: int, text: str) -> None:
    """Shows a sample in TensorBoard."""
    if not self._recording or self._events is None:
      return
    with self._telling_once():
      # Verbatim: TensorBoard reads Markdown, where four spaces mark code.
      lines = ['    ' + line for line in text.split('\n')]
      self._events.add_text('sample', '\n'.join(lines), step)

  @contextlib.contextmanager
  def _telling_once(self):
    """Logs the first failure and suppresses all of them."""
    try:
      yield
    except OSError as error:
      if not self._failed:
        logging.error('Metrics are not recorded: %s.', error)
      self._failed = True

  def close(self) -> None:
    """Flushes the events."""
    if not self._recording or self._events is None:
      return
    try:
      self._events.close()
    except OSError as error:
      logging.error('TensorBoard events are incomplete: %s.', error)


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
  """Removes the lines of steps after `step`, which a killed run recorded but
  did not save, and an incomplete last line."""
  if not path.exists():
    return
  remaining = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)['step'] <= step:
        remaining.append(line + '\n')
    except (ValueError, KeyError, TypeError):
      continue
  folders.replace_file(path, ''.join(remaining).encode())


class Stopwatch:
  """Measures where the time of a run goes; time that is not attributed to
  anything else counts as steps."""

  def __init__(self):
    self._start = self._lap = time.perf_counter()
    self._seconds = dict.fromkeys(
      ('start', 'data', 'checkpoints', 'evaluation'), 0.0
    )

  @contextlib.contextmanager
  def spent_on(self, what: str):
    """Attributes the time inside to `what`; of these, only waiting for data
    counts in laps."""
    before = time.perf_counter()
    yield
    seconds = time.perf_counter() - before
    self._seconds[what] += seconds
    if what != 'data':
      self._lap += seconds

  def lap(self) -> float:
    """Seconds of steps since the last lap."""
    now = time.perf_counter()
    seconds, self._lap = now - self._lap, now
    return seconds

  def summary(self) -> str:
    """One line about the whole run."""
    total = time.perf_counter() - self._start
    steps = total - sum(self._seconds.values())
    others = ', '.join(f'{k} {v:.1f} s' for k, v in self._seconds.items())
    return (
      f'Goodput {100 * steps / total:.0f} %: steps {steps:.1f} s of '
      f'{total:.1f} s; {others}'
    )


class Progress:
  """Progress of a run in the terminal: a bar, or plain lines, or `quiet`.

  Use as a context manager; `print` writes above the bar.
  """

  def __init__(self, total_steps: int, first_step: int, quiet: bool = False):
    self._console = rich_console.Console(quiet=quiet)
    self._total = total_steps
    self._bar = None
    # Not `is_terminal`: FORCE_COLOR, which notebooks set for what they start,
    # asks for colours and makes that true (rich 15).
    if self._console.file.isatty():
      self._bar = rich_progress.Progress(
        rich_progress.TextColumn(
          'step {task.completed:.0f}/{task.total:.0f}',
          table_column=rich_table.Column(
            no_wrap=True, min_width=len(f'step {total_steps}/{total_steps}')
          ),
        ),
        rich_progress.BarColumn(bar_width=None),
        rich_progress.TextColumn(
          '{task.fields[numbers]}',
          table_column=rich_table.Column(no_wrap=True, overflow='ellipsis'),
        ),
        rich_progress.TimeRemainingColumn(
          table_column=rich_table.Column(no_wrap=True, min_width=7)
        ),
        console=self._console,
        expand=True,
      )
      self._task = self._bar.add_task(
        'train', total=total_steps, completed=first_step, numbers='compiling'
      )

  def __enter__(self):
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *unused):
    if self._bar is not None:
      self._bar.stop()

  def advance(self, step: int) -> None:
    """Moves the bar."""
    if self._bar is not None:
      self._bar.update(self._task, completed=step)

  @contextlib.contextmanager
  def doing(self, what: str) -> Iterator[None]:
    """Shows what the run does instead of its numbers: 'saving'."""
    if self._bar is None:
      yield
      return
    numbers = self._bar.tasks[0].fields['numbers']
    self._bar.update(self._task, numbers=what, refresh=True)
    try:
      yield
    finally:
      self._bar.update(self._task, numbers=numbers)

  def show(self, step: int, numbers: Mapping[str, float], eta: float) -> None:
    """Shows losses (nats per token), tokens/s and, in plain lines, `eta`, in
    seconds."""
    text = (
      f'loss {numbers["loss"]:.3f} (denoise {numbers["loss_denoise"]:.3f}, '
      f'AR {numbers["loss_ar"]:.3f})  '
      f'{numbers["tokens_per_second"]:,.0f} tokens/s'
    )
    if self._bar is not None:
      self._bar.update(self._task, completed=step, numbers=text)
    else:
      minutes, seconds = divmod(int(eta), 60)
      self.print(
        f'step {step}/{self._total}  {text}  {minutes}:{seconds:02d} left'
      )

  def print(self, text: str) -> None:
    """Writes lines above the bar."""
    self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def average(collected: list[Mapping[str, np.ndarray]]) -> dict[str, float]:
  """Mean of each number over the steps collected."""
  return {
    name: float(np.mean([np.asarray(numbers[name]) for numbers in collected]))
    for name in collected[0]
  }
