"""Applies fields of a command line, such as `--config.train.steps=100`, to the
config of a file or of a run.
"""

import dataclasses

import jax

from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma import ops
from diffusiongemma.devices import sharding
from diffusiongemma.runs import companions
from diffusiongemma.runs import load as load_lib


def parse(arguments: list[str], flags: list[str]) -> dict[str, str]:
  """`{'train.steps': '100'}` from the remaining arguments of a command line.

  Args:
    arguments: the arguments that are not flags.
    flags: names of all flags, for messages.

  Raises:
    ConfigError: an argument sets no field.
  """
  overrides, rest = {}, list(arguments)
  while rest:
    argument = rest.pop(0)
    name, equals, value = argument.lstrip('-').partition('=')
    if not argument.startswith('--config.'):
      if argument.startswith('-'):
        known = [f'--{flag}' for flag in flags]
        name = fields.unknown_name(argument.partition('=')[0], known)
        raise configs.ConfigError(name)
      raise configs.ConfigError(
        f'{argument!r} stands alone; flags look like --name=value.'
      )
    if not equals:
      if not rest:
        raise configs.ConfigError(f'{argument} needs a value: {argument}=...')
      value = rest.pop(0)
    overrides[name.removeprefix('config.')] = value
  return overrides


def apply(overrides: dict[str, str], config: configs.Config) -> configs.Config:
  """The config with these fields set. Raises `ConfigError`."""
  for field, text in overrides.items():
    config = fields.override(config, field, text)
  return config


def load_config(
  path: str, workdir: str, overrides: dict[str, str]
) -> configs.Config:
  """The validated config of a file for a run in `workdir`; for a run that
  starts from weights, see `load.adopt`.

  Raises:
    ConfigError, WorkdirError, CheckpointError: it can't be used.
  """
  config = apply(overrides, configs.load_config(path))
  if config.train.init_from:
    adopted = load_lib.adopt(config, workdir)
    # Overrides of the command line apply to the adopted config, too.
    rest = {k: v for k, v in overrides.items() if k != 'train.init_from'}
    config = apply(rest, adopted)
    _check_network(config, adopted, config.train.init_from)
    if config.quantization != adopted.quantization:
      raise configs.ConfigError(
        'config.quantization is that of the weights in '
        f'{config.train.init_from}; --mode=quantize makes others of them.'
      )
  configs.validate(config)
  return config


def load_run(
  folder: str, own: configs.Config, overrides: dict[str, str]
) -> load_lib.Run:
  """Loads a run or a Hugging Face folder for sampling, with `overrides` applied
  to `own`, its config: on a mesh if they set one, with its parameters arranged
  for this device.

  Raises:
    ConfigError, WorkdirError, CheckpointError: it can't be used.
  """
  config = apply(overrides, own)
  configs.validate(config)
  _check_network(config, own, folder)
  where = None
  if any(field.startswith('mesh.') for field in overrides):
    mesh = sharding.make_mesh(config.mesh)
    sharding.validate(config, tuple(mesh.shape.values()), batch=False)
    jax.set_mesh(mesh)
    where = sharding.parameter_sharding(mesh)
  run = load_lib.load(folder, config, where)
  if run.maybe_tokenizer is None:
    raise companions.no_tokenizer(folder)
  return run.replace(params=ops.weights.arrange(run.params, donate=True))


def _check_network(
  config: configs.Config, own: configs.Config, folder: str
) -> None:
  """Raises `ConfigError` if the network is not that of the folder."""
  trained = dataclasses.replace(
    own.model, dtype=config.model.dtype, param_dtype=config.model.param_dtype
  )
  if config.model != trained:
    raise configs.ConfigError(
      f'The network of {folder} is trained: config.model cannot be changed, '
      'except for its types.'
    )
