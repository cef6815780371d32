"""Imports only point down: the order of the package's parts."""

import ast
import pathlib

import pytest

import diffusiongemma

PACKAGE = pathlib.Path(diffusiongemma.__file__).parent
# From the ground up: a part imports those before it, and itself.
ORDER = (
  'config errors fields paths powers assets networks version',
  'ops',
  'model diffusion configs',
  'devices',
  'text',
  'generation',
  'checkpoints',
  'runs',
  'training',
  'api',
  'tools',
  'commands',
  'main',
)


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


def parts() -> set[str]:
  """All there are: files and folders at the top of the package."""
  return {
    path.stem
    for path in PACKAGE.iterdir()
    if (path.is_dir() or path.suffix == '.py') and not path.name.startswith('_')
  }


def test_every_part_has_a_place():
  assert parts() == {part for level in ORDER for part in level.split()}


@pytest.mark.parametrize('level', range(len(ORDER)))
def test_imports_point_down(level):
  """Two parts of one level know nothing of each other."""
  below = {part for lower in ORDER[:level] for part in lower.split()}
  ground = set(ORDER[0].split())
  for part in ORDER[level].split():
    paths = sorted(PACKAGE.glob(f'{part}/**/*.py'))
    paths += PACKAGE.glob(f'{part}.py')
    for path in paths:
      allowed = below | {part} | (ground if part in ground else set())
      above = imported(path) - allowed
      assert not above, f'{path.relative_to(PACKAGE)} imports {sorted(above)}'
