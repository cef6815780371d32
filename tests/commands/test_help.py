"""What `--help` says, and the table of fields in BUILD.md."""

import pathlib
import subprocess
import sys

import pytest

import diffusiongemma
from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma import main
from diffusiongemma.commands import help as help_lib

PACKAGE = pathlib.Path(diffusiongemma.__file__).parent
BUILD = PACKAGE.parent / 'BUILD.md'

# The package without what its `__init__` imports.
BARE = """
import sys, types
package = types.ModuleType('diffusiongemma')
package.__path__ = [sys.argv.pop(1)]
sys.modules['diffusiongemma'] = package
from diffusiongemma import main
try:
  main.parse_flags(sys.argv)
except SystemExit as stopped:
  assert not stopped.code
heavy = {'jax', 'numpy', 'flax', 'rich', 'orbax'} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_comes_in_a_moment():
  """What a mode runs is imported when it is run."""
  done = subprocess.run(
    [sys.executable, '-c', BARE, str(PACKAGE), '--help'],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('The command line.')


def test_every_mode_and_flag_is_told(capsys):
  with pytest.raises(SystemExit) as stopped:
    main.parse_flags(['main', '--help'])
  text = capsys.readouterr().out
  assert stopped.value.code == 0
  for mode in main.MODES:
    assert f'--mode={mode} ' in text
  shared, _, sample = text.partition('Flags of --mode=sample:')
  sample = sample.partition('Flags of --mode=')[0]
  assert '--workdir:' in shared and '--prompt:' not in shared
  assert '--prompt:' in sample and '--topology:' not in sample
  assert 'config.train' not in text.partition('Flags')[2]
  assert max(map(len, text.splitlines())) <= 80


def test_all_fields_are_told_with_their_defaults(capsys):
  with pytest.raises(SystemExit):
    main.parse_flags(['main', '--helpfull'])
  lines = capsys.readouterr().out.splitlines()
  group, told = '', []
  for line in lines:
    if line.startswith('--config.'):
      group = line[2:].partition('.*')[0]
    elif group and line[:3].strip() and '=' in line:
      told.append(f'{group}.{line.strip()}')
  names = {line.partition('=')[0] for line in told}
  assert names == {leaf.name for leaf in fields.leaves(configs.Config())}
  assert len(names) == len(told)
  assert 'config.train.steps=1000' in told
  assert 'config.optimizer.freeze=()' in told
  assert 'config.model.vision.num_layers=27' in told
  assert max(map(len, lines)) <= 80


def test_the_table_in_build_is_that_of_the_config():
  page = BUILD.read_text('utf-8')
  assert help_lib.with_table(page) == page, (
    'run: python -m diffusiongemma.commands.help BUILD.md'
  )
  stale = page.replace('| `train.steps` | `1000`', '| `train.steps` | `999`')
  assert help_lib.with_table(stale) == page != stale
  with pytest.raises(ValueError, match='<!-- fields -->'):
    help_lib.with_table('no marks')
