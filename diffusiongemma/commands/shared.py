"""Flags of several modes, and the folders and configs that they name."""

import os
import pathlib
import signal
import sys
import typing
from typing import Any

from absl import flags

from diffusiongemma import paths
from diffusiongemma.config import Config
from diffusiongemma.config import ConfigError

if typing.TYPE_CHECKING:
  from diffusiongemma.runs.load import Run

_PATHS: list[str] = []  # Names of the flags that are paths.


def path(flag: flags.FlagHolder[Any]) -> flags.FlagHolder[Any]:
  """Registers a flag whose value is a path or a list of paths, for
  `find_paths`."""
  _PATHS.append(flag.name)
  return flag


CONFIG = path(
  flags.DEFINE_string(
    'config',
    None,
    'Name of a shipped config (tiny), or a Python file with get_config().',
  )
)
WORKDIR = path(
  flags.DEFINE_string(
    'workdir',
    None,
    'Folder of the run, or the name of a shipped one (sudoku, stories). '
    'Default: runs/<name of the config>.',
  )
)
HF_DIR = path(
  flags.DEFINE_string(
    'hf_dir',
    None,
    'The Hugging Face folder or GGUF file to read, or a name on the hub of '
    'safetensors, org/name or org/name@revision; export: to write.',
  )
)
FORMAT = flags.DEFINE_enum('format', 'text', ['text', 'json'], 'What to print.')
BATCH_SIZE = flags.DEFINE_integer(
  'batch_size',
  None,
  'Texts that are written together. Default: 8 of --prompts, 1 in a plan.',
  lower_bound=1,
)

# The modes that take a flag of this file; one without a row is for all modes.
TAKEN_BY = {
  'config': ('train', 'evaluate', 'sample', 'plan', 'benchmark'),
  'hf_dir': ('evaluate', 'sample', 'convert', 'export'),
  'batch_size': ('sample', 'plan'),
  'format': ('sample', 'evaluate', 'plan', 'benchmark'),
}


def find_paths() -> None:
  """Expands the flags registered with `path`. Raises `ConfigError`."""
  for flag in map(flags.FLAGS.__getitem__, _PATHS):
    name = f'--{flag.name}'
    if isinstance(flag.value, list):
      flag.value = [paths.local(path, name) for path in flag.value]
    elif flag.value:
      flag.value = paths.local(flag.value, name)


def workdir() -> str:
  """The folder of the run. Raises `ConfigError`."""
  if WORKDIR.value:
    return WORKDIR.value
  if not CONFIG.value:
    raise ConfigError('Name the run: --workdir=runs/tiny.')
  return os.path.join('runs', pathlib.Path(CONFIG.value).stem)


def load_config(overrides: dict[str, str]) -> Config:
  """The config that `--config` names, with `overrides` applied.

  Raises:
    ConfigError, WorkdirError, CheckpointError: it can't be used.
  """
  from diffusiongemma.runs import overrides as overrides_lib

  if not CONFIG.value:
    raise ConfigError(
      'Say what to train: --config=configs/tiny.py, or another config file.'
    )
  return overrides_lib.load_config(CONFIG.value, workdir(), overrides)


def load_run(overrides: dict[str, str]) -> 'Run':
  """Loads the run or the Hugging Face folder to sample from or to evaluate.

  Raises:
    ConfigError, WorkdirError, CheckpointError: it can't be used.
  """
  from diffusiongemma.runs import folder as workdirs
  from diffusiongemma.runs import overrides as overrides_lib
  from diffusiongemma.runs import source as sources

  if HF_DIR.value and WORKDIR.value:
    raise ConfigError('Give --workdir or --hf_dir, not both.')
  if HF_DIR.value:
    folder = sources.locate(HF_DIR.value)
    own = sources.open_source(folder).config
  else:
    folder = sources.locate(workdir())
    own = workdirs.read_config(folder)
  return overrides_lib.load_run(folder, own, overrides)


def both_folders(mode: str, overrides: dict[str, str]) -> tuple[str, str]:
  """(hf_dir, workdir) of a conversion, which takes no overrides. Raises
  `ConfigError`."""
  require(mode, '--hf_dir is the Hugging Face folder, --workdir ours', HF_DIR)
  require(mode, '--hf_dir is the Hugging Face folder, --workdir ours', WORKDIR)
  if overrides:
    raise ConfigError(
      f'--mode={mode} takes no --config; the checkpoint has its own.'
    )
  end_on_signals()
  return HF_DIR.value, WORKDIR.value


def require(mode: str, why: str, flag: flags.FlagHolder[Any]) -> None:
  """Raises `ConfigError` unless the flag is given."""
  if not flag.value:
    raise ConfigError(f'--mode={mode} needs --{flag.name}: {why}.')


def end_on_signals() -> None:
  """Exits on SIGINT and SIGTERM in the ordinary way, so that files of a stopped
  conversion are removed."""
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: sys.exit(128 + number))
