"""Where a GPU's time goes: what is made of what a profiler saw."""

import pytest

from experiments.benchmarks import canvas


def test_kernels_that_differ_in_a_number_are_one():
  seen = [('fusion_3', 2.0), ('gate', 5.0), ('fusion.12', 1.0), ('fusion', 0.5)]
  gate, fusion = canvas.by_name(iter(seen))
  assert gate == {
    'name': 'gate',
    'count': 1,
    'seconds': 5.0,
    'median_seconds': 5.0,
  }
  assert (fusion['name'], fusion['count']) == ('fusion', 3)
  assert (fusion['seconds'], fusion['median_seconds']) == (3.5, 1.0)


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
  out = tmp_path / 'canvas.json'
  monkeypatch.setattr('sys.argv', ['canvas', f'--out={out}'])
  with pytest.raises(SystemExit, match='Only GPUs are seen'):
    canvas.main()
  assert not out.exists()
