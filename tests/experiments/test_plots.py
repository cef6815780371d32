"""Loss curves: what is read, what is drawn, what is refused."""

import json
import math
import sys

import numpy as np
import pytest

from experiments import plots


def write_run(folder, metrics, ending=''):
  folder.mkdir(parents=True)
  lines = [json.dumps(record) + '\n' for record in metrics]
  (folder / 'metrics.jsonl').write_text(''.join(lines) + ending)
  return str(folder)


def training(step, loss=1.0, denoise=0.5):
  return {
    'step': step,
    'loss': loss,
    'loss_ar': loss - denoise,
    'loss_denoise': denoise,
    'gradient_norm': 2.0,
  }


def heldout(step):
  return {'step': step, 'heldout_loss_ar': 0.6, 'heldout_loss_corrupted': 1.1}


def run_main(monkeypatch, *arguments):
  monkeypatch.setattr(sys, 'argv', ['plots.py', *map(str, arguments)])
  plots.main()


@pytest.mark.parametrize('options', [[], ['--smooth=3', '--log_x']])
def test_runs_are_drawn(tmp_path, monkeypatch, options):
  first = write_run(
    tmp_path / 'a' / 'run', [training(i) for i in (10, 20)] + [heldout(20)]
  )
  second = write_run(tmp_path / 'b' / 'run', [training(i) for i in (5, 15, 25)])
  drawn = {}
  draw = plots.draw

  def spy(runs, *rest):
    drawn.update(runs)
    draw(runs, *rest)

  monkeypatch.setattr(plots, 'draw', spy)
  output = tmp_path / 'new' / 'losses.png'
  run_main(
    monkeypatch, first, second, first + '/', f'--output={output}', *options
  )
  assert output.read_bytes().startswith(b'\x89PNG')
  assert list(drawn) == ['a/run', 'b/run']
  assert [r['step'] for r in drawn['b/run']] == [5, 15, 25]


def test_a_half_written_last_line_is_left_out(tmp_path):
  records = [training(10), training(20)]
  for index, ending in enumerate(('{"step": 30, "lo', '{"step"', '3', '\xff')):
    folder = write_run(tmp_path / str(index), records, ending)
    assert plots.read_metrics(folder) == records


def test_series_are_where_they_were_recorded():
  records = [training(10), heldout(10), training(20, loss=math.nan)]
  steps, values = plots.series(records, 'loss')
  np.testing.assert_array_equal(steps, [10, 20])
  np.testing.assert_array_equal(values, [1, math.nan])
  assert [len(x) for x in plots.series(records, 'no such')] == [0, 0]


def test_what_a_run_is_not_trained_on_is_not_drawn():
  runs = {
    'both': [training(10), heldout(10)],
    'ar': [training(10, denoise=0.0), heldout(10)],
    'other': [{'step': 3, 'tokens_per_second': 9.0}],
  }
  loss, denoise, corrupted, ar, *_ = [
    [label for label, *_ in plots._find(panel, runs)] for panel in plots.PANELS
  ]
  assert loss == ar == ['both', 'ar']
  assert denoise == corrupted == ['both']


def test_running_mean():
  line = np.arange(9.0)
  np.testing.assert_allclose(plots.running_mean(line, 5), line)
  values = np.array([0, 3, math.nan, 9, math.nan, math.nan, math.nan])
  np.testing.assert_allclose(
    plots.running_mean(values, 3), [0, 1.5, 6, 9, 9, math.nan, math.nan]
  )
  np.testing.assert_array_equal(plots.running_mean(values, 1), values)
  assert plots.running_mean(np.array([]), 3).shape == (0,)


def test_labels():
  assert plots.labels(['/x/a/run', '/x/b/run/', '/x/a/other']) == [
    'a/run',
    'b/run',
    'other',
  ]
  assert plots.labels(['/run', '/x/run']) == ['/run', 'x/run']


def test_many_runs_have_their_own_colours():
  for count in (1, 8, 20):
    colours = {tuple(colour) for colour in plots._colours(count)}
    assert len(colours) == count


def test_errors_are_one_line(tmp_path, monkeypatch):
  good = write_run(tmp_path / 'good', [training(10)])
  broken = write_run(tmp_path / 'broken', [training(10)], '{"step\n{"step": 3}')
  empty = write_run(tmp_path / 'empty', [])
  other = write_run(tmp_path / 'other', [{'step': 1, 'speed': 2.0}])
  words = write_run(tmp_path / 'words', [{'step': 1, 'loss': 'x'}, training(2)])
  picture = f'--output={tmp_path / "losses.png"}'
  for arguments, message in (
    ([good, tmp_path / 'none', picture], 'none/metrics.jsonl cannot be read'),
    ([tmp_path / 'good/metrics.jsonl', picture], 'cannot be read: Not a dir'),
    ([broken, picture], 'line 2 is no record'),
    ([words, picture], 'line 1 is no record'),
    ([empty, picture], 'no record yet'),
    ([other, picture], 'No run has any of: loss'),
    ([good, f'--output={tmp_path}/x.nothing'], 'nothing'),
    ([good, f'--output={good}/metrics.jsonl/x.png'], 'metrics.jsonl'),
  ):
    with pytest.raises(SystemExit) as stopped:
      run_main(monkeypatch, *arguments)
    # A text as the code: it goes to stderr, and the exit code is 1.
    assert message in stopped.value.code
    assert '\n' not in stopped.value.code
  assert not (tmp_path / 'losses.png').exists()
