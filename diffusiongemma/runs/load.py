"""A network read whole, to use: of a run, its adapters merged, or of a folder.

run = load('runs/tiny')
run.config, run.params, run.tokenizer
"""

import dataclasses
import os
from typing import NamedTuple

from diffusiongemma import paths
from diffusiongemma.checkpoints import native
from diffusiongemma.config import Config
from diffusiongemma.runs import WorkdirError
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.runs import huggingface_folder
from diffusiongemma.runs import source as sources
from diffusiongemma.text import tokenizer as tokenizers


class Run(NamedTuple):
  """A network that can be used.

  Attributes:
    config: all of its settings.
    tokenizer: the one it was trained with; None where it came without.
    step: training steps done here.
    params: parameters of the network, a nested dict of arrays.
    chat_template: Jinja, where one came with it.
  """

  config: Config
  tokenizer: tokenizers.Tokenizer | None
  step: int
  params: dict
  chat_template: str | None = None


def load(
  path: str,
  config: Config | None = None,
  sharding: native.ShardingOf | None = None,
  verify: bool = True,
) -> Run:
  """Reads a run, or a Hugging Face folder.

  The adapters of a run with `config.lora` are added to what they adapt, which
  is loaded too.

  Args:
    path: what training or conversion had as `--workdir`, or a folder with
      Hugging Face's config.json and safetensors.
    config: settings to use instead of its own, for another sampler.
    sharding: where each array goes; without, to the first device.
    verify: compares the digests of a run's arrays, so that a flipped bit is
      an error. Hugging Face's files have none.

  Raises:
    ConfigError: the path is not local, or `config` wants parameters of other
      bits than a run has.
    WorkdirError: there is nothing to load, or adapters were trained on other
      weights.
    CheckpointError: what is there is damaged or of another kind.
  """
  source = sources.open_source(path, config)
  restored = source.restore(sharding, verify)
  return Run(
    source.config,
    source.tokenizer(),
    restored.step,
    restored.params,
    source.chat_template(),
  )


def adopt(config: Config, workdir: str) -> Config:
  """The config of a run in `workdir` that starts from the weights in
  `config.train.init_from`: network and sampler are theirs, but for the types.
  A run that has started has them itself.

  Raises:
    WorkdirError, CheckpointError: there is no network.
  """
  folder = paths.local(config.train.init_from, 'config.train.init_from')
  folder = os.path.abspath(folder)
  if workdirs.is_claimed(workdir):
    theirs = workdirs.read_config(workdir)
  elif huggingface_folder.is_huggingface(folder) or workdirs.is_claimed(folder):
    source = sources.open_source(folder)
    sources.check_not_quantized(source)
    theirs = source.config
  else:
    raise WorkdirError(
      f'config.train.init_from: {folder} is neither a run nor a Hugging Face '
      'folder.'
    )
  model = dataclasses.replace(
    theirs.model,
    dtype=config.model.dtype,
    param_dtype=config.model.param_dtype,
  )
  train = dataclasses.replace(config.train, init_from=folder)
  return dataclasses.replace(
    config, model=model, diffusion=theirs.diffusion, train=train
  )


def load_base(config: Config, sharding: native.ShardingOf) -> dict:
  """The parameters that a run starts from, as they are stored; see `load`."""
  return load(config.train.init_from, sharding=sharding).params
