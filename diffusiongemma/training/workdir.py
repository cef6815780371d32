"""The folder of a run: its config, its tokenizer, its checkpoints.

  WORKDIR/config.json  tokenizer.model  checkpoints/  metrics.jsonl  events...

A folder belongs to one config: another is refused, field by field, and what
is in it is enough to sample from it anywhere.
"""

import contextlib
import json
import os
import pathlib
from typing import NamedTuple

import jax

from diffusiongemma import config as configs
from diffusiongemma.checkpoints import native
from diffusiongemma.config import Config
from diffusiongemma.model import denoiser
from diffusiongemma.text import tokenizer as tokenizers
from diffusiongemma.training import optimizer as optimizers
from diffusiongemma.training import train_state

# Fields that don't change what is learnt: a run may go on with other values.
FREE_FIELDS = (
  'config.train.log_every',
  'config.train.evaluate_every',
  'config.train.evaluate_batches',
  'config.train.sample_every',
  'config.train.sample_prompt',
  'config.train.checkpoint_every',
  'config.train.keep_checkpoints',
)


class WorkdirError(ValueError):
  """A working directory that can't be used for this; the message says why."""


def claim(
  workdir: str, config: Config, tokenizer: tokenizers.Tokenizer
) -> None:
  """Makes `workdir` this run's, or checks that it already is.

  Raises:
    WorkdirError: it can't be written, or holds the run of another config.
  """
  folder = pathlib.Path(workdir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / 'config.json').exists():
      _write_atomically(folder / 'tokenizer.model', tokenizer.model)
      text = json.dumps(configs.to_dict(config), indent=2)
      _write_atomically(folder / 'config.json', text.encode())
      return
    tokenizer_there = (folder / 'tokenizer.model').read_bytes()
  except OSError as error:
    raise WorkdirError(
      f'{workdir} cannot be used: {error.strerror}. Give another --workdir.'
    ) from error
  there, here = configs.flatten(read_config(workdir)), configs.flatten(config)
  differences = [
    f'  {name}: {there[name]!r} there, {here[name]!r} here'
    for name in here
    if name not in FREE_FIELDS and here[name] != there[name]
  ]
  if tokenizer_there != tokenizer.model:
    differences.append('  the contents of the tokenizer file')
  if differences:
    raise WorkdirError(
      f'{workdir} holds a run of another config:\n'
      + '\n'.join(differences)
      + '\nGive another --workdir, or the same values to go on with that run.'
    )


def read_config(workdir: str) -> Config:
  """The config of the run in `workdir`. Raises `WorkdirError`."""
  path = pathlib.Path(workdir) / 'config.json'
  try:
    return configs.from_dict(json.loads(path.read_text()))
  except FileNotFoundError:
    raise WorkdirError(
      f'{workdir} holds no run (there is no config.json). Train one first: '
      f'python -m diffusiongemma.main --config=configs/tiny.py '
      f'--workdir={workdir}'
    ) from None
  except (OSError, ValueError, TypeError, AttributeError) as error:
    raise WorkdirError(f'{path} cannot be read: {error}') from error


def load_tokenizer(config: Config, workdir: str = '') -> tokenizers.Tokenizer:
  """The config's tokenizer (or the copy in a run's `workdir`), checked.

  Raises:
    ConfigError: its vocabulary or special ids are not those of the config.
  """
  copy = os.path.join(workdir, 'tokenizer.model') if workdir else ''
  tokenizer = tokenizers.load_tokenizer(copy or config.data.tokenizer)
  model, diffusion = config.model, config.diffusion
  for name, wanted, found in (
    ('model.vocab_size', model.vocab_size, tokenizer.vocab_size),
    ('diffusion.pad_token_id', diffusion.pad_token_id, tokenizer.pad_id),
    ('diffusion.bos_token_id', diffusion.bos_token_id, tokenizer.bos_id),
  ):
    if wanted != found:
      raise configs.ConfigError(
        f'config.{name} is {wanted}; that of the tokenizer is {found}.'
      )
  if tokenizer.eos_id not in diffusion.stop_token_ids:
    raise configs.ConfigError(
      f'config.diffusion.stop_token_ids lacks {tokenizer.eos_id}, which ends '
      "the tokenizer's documents."
    )
  return tokenizer


def abstract_state(config: Config) -> train_state.TrainState:
  """Shapes and types of a run's state, with nothing computed."""
  model = denoiser.Denoiser(config.model)
  optimizer = optimizers.make_optimizer(config.optimizer, config.train.steps)
  return jax.eval_shape(
    lambda: train_state.init_train_state(model, optimizer, config.train.seed)
  )


class Run(NamedTuple):
  """A trained run.

  Attributes:
    config: all of its settings.
    tokenizer: the one it was trained with.
    step: training steps done.
    params: parameters of the network, a nested dict of arrays.
  """

  config: Config
  tokenizer: tokenizers.Tokenizer
  step: int
  params: dict


def load(workdir: str, config: Config | None = None) -> Run:
  """Reads the newest whole checkpoint of the run in `workdir`.

  Args:
    workdir: what training was given as `--workdir`.
    config: settings to use instead of the run's own, for another sampler.

  Raises:
    WorkdirError: there is no run, or no finished checkpoint of it.
    CheckpointError: all of its checkpoints are damaged.
  """
  config = config or read_config(workdir)
  tokenizer = load_tokenizer(config, workdir)
  return Run(config, tokenizer, *load_params(workdir, config))


def load_params(workdir: str, config: Config) -> tuple[int, dict]:
  """(step, parameters) of the newest whole checkpoint of a run.

  Raises:
    WorkdirError: there is none.
    CheckpointError: all of them are damaged.
  """
  directory = checkpoint_dir(workdir)
  restored = None
  if os.path.isdir(directory):
    with contextlib.closing(native.open_checkpoints(directory)) as manager:
      params = abstract_state(config).params
      restored = native.restore_newest(manager, params)
  if restored is None:
    raise WorkdirError(f'{workdir} has no finished checkpoint yet.')
  return restored.step, restored.params


def checkpoint_dir(workdir: str) -> str:
  """Where a run's checkpoints are; Orbax wants an absolute path."""
  return os.path.join(os.path.abspath(workdir), 'checkpoints')


def _write_atomically(path: pathlib.Path, content: bytes) -> None:
  """Writes beside `path` and renames: it is whole or as it was before."""
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_bytes(content)
  os.replace(temporary, path)
