"""The Python in README.md and BUILD.md runs as it is written there.

`dg.load` gives a small random network, which knows turns.
"""

import pathlib
import re

import pytest

import diffusiongemma as dg

ROOT = pathlib.Path(__file__).resolve().parents[1]


def blocks(name: str) -> list[str]:
  """The blocks of Python in a page, those with pictures left out."""
  text = (ROOT / name).read_text()
  found = re.findall(r'(?ms)^```python\n(.*?)^```', text)
  return [block for block in found if 'pictures' not in block]


@pytest.mark.parametrize('name', ['README.md', 'BUILD.md'])
def test_python_of_the_page_runs(name, chat_run, monkeypatch, capsys):
  monkeypatch.setattr(dg, 'load', lambda path: chat_run)
  variables = {}
  assert blocks(name)
  for block in blocks(name):
    exec(block, variables)
  assert capsys.readouterr().out
