"""What is installed: the package, its configs and a console script."""

import configparser
import importlib
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def test_the_console_script_is_there():
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  scripts = setup['options.entry_points']['console_scripts'].strip()
  name, _, target = scripts.partition(' = ')
  module, _, function = target.partition(':')
  assert name == 'diffusiongemma'
  assert callable(getattr(importlib.import_module(module), function))


def test_configs_are_found_where_the_wheel_is_installed(tmp_path):
  pytest.importorskip('setuptools', '77', 'setuptools builds the wheel')
  source = tmp_path / 'source'
  source.mkdir()
  for name in ('setup.cfg', 'pyproject.toml', 'LICENSE', 'README.md'):
    shutil.copy(ROOT / name, source)
  for name in ('configs', 'diffusiongemma'):
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
  build = [sys.executable, '-m', 'pip', 'wheel', str(source), '--no-deps', '-q']
  build += ['--no-build-isolation', '--no-index', '-w', str(tmp_path)]
  subprocess.run(build, check=True)
  (wheel,) = tmp_path.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
    archive.extractall(tmp_path / 'site')
  for path in (ROOT / 'configs').glob('*.py'):
    assert f'diffusiongemma/configs/{path.name}' in names
  assert 'diffusiongemma/py.typed' in names
  networks = ROOT / 'diffusiongemma' / 'networks'
  for path in filter(pathlib.Path.is_file, networks.rglob('*')):
    assert f'diffusiongemma/networks/{path.relative_to(networks)}' in names
  assert not [n for n in names if n.startswith(('configs/', 'tests/'))]
  script = (
    'import diffusiongemma, sys\n'
    'from diffusiongemma import config\n'
    'assert diffusiongemma.__file__.startswith(sys.argv[1])\n'
    'config.validate(config.load_config("tiny"))\n'
    'config.validate(config.load_config("sudoku9"))\n'
    'diffusiongemma.load("sudoku")\n'
  )
  subprocess.run(
    [sys.executable, '-c', script, str(tmp_path / 'site')],
    env={**os.environ, 'PYTHONPATH': str(tmp_path / 'site')},
    cwd=tmp_path,
    check=True,
  )
