"""Loads a whole network: a run, adapters (merged), or a Hugging Face folder.

run = load('runs/tiny')
run.config, run.params, run.tokenizer
"""

import dataclasses
import os
from typing import Any

import jax

from diffusiongemma import paths
from diffusiongemma.checkpoints import native
from diffusiongemma.config import Config
from diffusiongemma.devices import runtime
from diffusiongemma.ops.weights import Params
from diffusiongemma.runs import WorkdirError
from diffusiongemma.runs import companions
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.runs import huggingface_folder
from diffusiongemma.runs import source as sources
from diffusiongemma.text import tokenizer as tokenizers


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Run:
  """A loaded network.

  Attributes:
    config: all of its settings.
    maybe_tokenizer: the tokenizer it was trained with, None without one.
    step: training steps of the run; 0 for a Hugging Face folder.
    params: parameters of the network, a nested dict of arrays.
    chat_template: Jinja, None without one.
  """

  config: Config
  maybe_tokenizer: tokenizers.Tokenizer | None
  step: int
  params: Params
  chat_template: str | None = None

  @property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer it was trained with. Raises `WorkdirError` without one."""
    if self.maybe_tokenizer is None:
      raise companions.no_tokenizer('The run')
    return self.maybe_tokenizer

  def replace(self, **changes: Any) -> 'Run':
    """This run with other fields."""
    return dataclasses.replace(self, **changes)

  def __repr__(self) -> str:
    """Three lines: the network, its parameters, its tokenizer."""
    model, leaves = self.config.model, jax.tree.leaves(self.params)
    kinds = ', '.join(sorted({str(x.dtype) for x in leaves}))
    size = sum(x.size for x in leaves)
    megabytes = sum(x.nbytes for x in leaves) / 1e6
    tokens = 'no tokenizer'
    if self.maybe_tokenizer is not None:
      tokens = self.maybe_tokenizer.file_name
    return (
      f'Run after {self.step:,} steps: {len(model.attention_pattern)} layers '
      f'of width {model.embed_dim:,}, context {model.context_length:,}\n'
      f'  {size:,} numbers in {megabytes:,.1f} MB ({kinds})\n'
      f'  {model.vocab_size:,} tokens ({tokens}), canvases of '
      f'{self.config.diffusion.canvas_length}'
    )


def load(
  path: str | os.PathLike[str],
  config: Config | None = None,
  sharding: native.ShardingOf | None = None,
  verify: bool = True,
) -> Run:
  """Reads a run, or a Hugging Face folder.

  The adapters of a run with `config.lora` are merged into their base weights,
  which are loaded too. Programs that are compiled from then on are kept on
  disk: see `runtime.keep_compilations`.

  Args:
    path: the `--workdir` of training or conversion; a folder with Hugging
      Face's config.json and safetensors; a GGUF file; or a name: 'sudoku' and
      'stories' come with the package, 'org/name' and 'org/name@revision' are on
      the Hugging Face Hub.
    config: settings to use instead of its own, for another sampler.
    sharding: sharding of each array; None is the first device.
    verify: whether to compare the digests of a run's arrays, so that a flipped
      bit is an error. Hugging Face's files have no digests.

  Raises:
    ConfigError: the path is not local, or `config.quantization` is not that of
      the stored parameters.
    WorkdirError: there is nothing to load, or adapters were trained on other
      weights.
    CheckpointError: the checkpoint is damaged or of another kind.
  """
  runtime.keep_compilations()
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
  `config.train.init_from`: network, quantisation and sampler are those of the
  weights, except for the types. A run that has started has them in its own
  config.

  Raises:
    WorkdirError, CheckpointError: there is no network.
  """
  folder = paths.local(config.train.init_from, 'config.train.init_from')
  folder = os.path.abspath(sources.locate(folder))
  if os.path.isfile(folder):
    raise WorkdirError(
      f'config.train.init_from: {folder} is a file. Make a run of it, '
      f'--mode=convert --hf_dir={folder} --workdir=NEW, and start from NEW.'
    )
  if workdirs.is_claimed(workdir):
    theirs = workdirs.read_config(workdir)
  elif huggingface_folder.is_huggingface(folder) or workdirs.is_claimed(folder):
    source = sources.open_source(folder)
    sources.check_trainable(source, bool(config.lora.rank))
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
    config,
    model=model,
    diffusion=theirs.diffusion,
    quantization=theirs.quantization,
    train=train,
  )


def load_base(config: Config, sharding: native.ShardingOf) -> Params:
  """The parameters that a run starts from, as they are stored; see `load`."""
  return load(config.train.init_from, sharding=sharding).params
