"""Trained networks that come with the package, opened by their names.

  load('sudoku')    --workdir=sudoku    --source=sudoku

Each is a quantised run, networks/NAME in the package. A file or folder of this
name in the working directory counts more.
"""

import os
import pathlib

FOLDER = pathlib.Path(__file__).resolve().parents[1] / 'networks'


def names() -> list[str]:
  """The names of the networks that come with the package."""
  return sorted(path.parent.name for path in FOLDER.glob('*/config.json'))


def find(path: str) -> str:
  """The folder of the network of this name; `path` itself if it exists or is no
  such name."""
  if path in names() and not os.path.lexists(path):
    return str(FOLDER / path)
  return path
