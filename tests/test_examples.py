"""Every example runs, and its notebook has the same text and code."""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[1] / 'examples'
sys.path.insert(0, str(FOLDER))

import make_notebooks  # noqa: E402


@pytest.fixture(scope='module')
def results(tmp_path_factory):
  """A future of each script's process, two at a time."""
  environment = {
    **os.environ,
    'PYTHONPATH': str(FOLDER.parent),
    'TMPDIR': str(tmp_path_factory.mktemp('examples')),
    'STEPS': '20',
    'MPLBACKEND': 'agg',
  }
  environment.pop('RUN', None)

  def run(name):
    return subprocess.run(
      [sys.executable, FOLDER / f'{name}.py'],
      capture_output=True,
      env=environment,
      text=True,
      check=False,
    )

  with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
    yield {name: pool.submit(run, name) for name in make_notebooks.NAMES}


@pytest.mark.parametrize('name', make_notebooks.NAMES)
def test_script_runs(name, results):
  done = results[name].result()
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
  assert done.stdout.strip()


@pytest.mark.parametrize('name', make_notebooks.NAMES)
def test_notebook_is_that_of_the_script(name):
  assert make_notebooks.same_cells(name), (
    f'python examples/make_notebooks.py {name}'
  )


@pytest.mark.parametrize('name', make_notebooks.NAMES)
def test_notebook_is_executed_and_small(name):
  path = FOLDER / f'{name}.ipynb'
  notebook = json.loads(path.read_text())
  assert path.stat().st_size < 200_000
  code = [c for c in notebook['cells'] if c['cell_type'] == 'code']
  assert [c['execution_count'] for c in code] == list(range(1, len(code) + 1))
  assert any(c['outputs'] for c in code)


def test_every_script_is_listed():
  scripts = {path.stem for path in FOLDER.glob('*.py')}
  assert scripts == {*make_notebooks.NAMES, 'make_notebooks', 'small'}
