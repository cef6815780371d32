"""Where numbers go, and what of them is kept."""

import io
import json
import os

import disk
import numpy as np
from rich import console as rich_console

from diffusiongemma.training import metrics


def test_metrics_without_room_cost_no_run(tmp_path, caplog):
  """Nor does what is left of them go."""
  path = tmp_path / 'metrics.jsonl'
  line = json.dumps({'step': 5, 'loss': 1.0}) + '\n'
  path.write_text(line * 100)
  with disk.full_disk(1000):
    writer = metrics.MetricsWriter(str(tmp_path), 10)
    writer.write(15, {'loss': np.float32(2.0)})
    writer.write_text(15, 'text')
    writer.close()
  assert 'Metrics are not recorded: File too large' in caplog.text.replace(
    '[Errno 27] ', ''
  )
  assert path.read_text() == line * 100 and len(os.listdir(tmp_path)) == 1


def test_metrics_of_unsaved_steps_are_dropped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(
    ''.join(json.dumps({'step': s, 'loss': 1.0}) + '\n' for s in (5, 10, 15))
    + '{"step": 20, "lo'
  )
  writer = metrics.MetricsWriter(str(tmp_path), 10)
  writer.write(15, {'loss': np.float32(2.0)})
  writer.close()
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line['step'] for line in lines] == [5, 10, 15]
  assert lines[-1]['loss'] == 2.0


def test_the_bar_says_how_far_and_what(monkeypatch):
  """Also where the terminal is narrow."""
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  console = rich_console.Console(file=terminal, width=40)
  monkeypatch.setattr(metrics.rich_console, 'Console', lambda **_: console)
  numbers = {'loss': 1.5, 'loss_denoise': 1.0, 'loss_ar': 0.5}
  with metrics.Progress(20000, 0) as progress:
    progress.show(12000, {**numbers, 'tokens_per_second': 1e6}, 60)
    with progress.doing('saving'):
      progress._bar.refresh()
      assert 'saving' in console.file.getvalue()
    console.file.truncate(0)
    progress._bar.refresh()
  shown = console.file.getvalue()
  assert 'step 12000/20000' in shown and 'loss 1.5' in shown
  assert 'saving' not in shown


def test_colours_asked_for_make_no_bar_in_a_pipe(monkeypatch, capsys):
  """Notebooks set FORCE_COLOR for the processes that they start."""
  monkeypatch.setenv('FORCE_COLOR', '1')
  numbers = {
    'loss': 1.0,
    'loss_denoise': 0.5,
    'loss_ar': 0.5,
    'tokens_per_second': 7.0,
  }
  with metrics.Progress(20, 0) as progress:
    progress.show(10, numbers, 60.0)
  assert capsys.readouterr().out.startswith('step 10/20  loss 1.000')
