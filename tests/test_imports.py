"""Imports only point down: the order of the package's parts."""

import ast
import pathlib

import pytest

import diffusiongemma

PACKAGE = pathlib.Path(diffusiongemma.__file__).parent
# What each part may import beside itself and the ground floor.
BELOW = {
  'kernels': set(),
  'checkpoints': set(),
  'sharding': set(),
  'model': {'kernels'},
  'diffusion': {'kernels'},
  'text': {'model', 'diffusion', 'sharding', 'checkpoints'},
  'training': {'text', 'model', 'diffusion', 'sharding', 'checkpoints'},
}
GROUND = {
  'config',
  'fields',
  'memory',
  'paths',
  'powers',
  'processes',
  'assets',
}


def imported(path: pathlib.Path) -> set[str]:
  """Parts of the package that a file imports."""
  parts = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == 'diffusiongemma':
      parts |= {name.name for name in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      root, _, rest = node.module.partition('.')
      if root == 'diffusiongemma':
        parts.add(rest.split('.')[0])
  return parts


@pytest.mark.parametrize('part', BELOW)
def test_a_part_knows_nothing_above_it(part):
  paths = sorted(PACKAGE.glob(f'{part}/**/*.py')) or [PACKAGE / f'{part}.py']
  for path in paths:
    above = imported(path) - BELOW[part] - GROUND - {part}
    assert not above, f'{path.relative_to(PACKAGE)} imports {sorted(above)}'


def test_the_ground_floor_stands_alone():
  for part in GROUND - {'assets'}:
    above = imported(PACKAGE / f'{part}.py') - GROUND
    assert not above, f'{part}.py imports {sorted(above)}'
