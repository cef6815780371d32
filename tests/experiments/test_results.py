"""RESULTS.md is what the JSON files of the measurements say."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / 'experiments' / 'results.py'


def check(script: pathlib.Path) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, script, '--check'],
    capture_output=True,
    text=True,
    check=False,
  )


def test_results_are_those_of_the_json_files():
  done = check(SCRIPT)
  assert done.returncode == 0, done.stderr


def test_another_number_is_found(tmp_path):
  """The check itself works: one digit of the page is changed."""
  (tmp_path / 'experiments').mkdir()
  for file in (ROOT / 'experiments').glob('*/*.json'):
    copy = tmp_path / file.relative_to(ROOT)
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(file.read_bytes())
  script = tmp_path / 'experiments' / 'results.py'
  script.write_bytes(SCRIPT.read_bytes())
  text = (ROOT / 'RESULTS.md').read_text()
  (tmp_path / 'RESULTS.md').write_text(text)
  assert check(script).returncode == 0
  (tmp_path / 'RESULTS.md').write_text(text.replace('99.5 %', '99.6 %'))
  assert check(script).returncode == 1
