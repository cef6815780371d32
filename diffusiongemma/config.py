"""Typed configuration: one frozen dataclass per concern, all in `Config`.

A config file is Python with a `get_config()` that returns a `Config`; the
command line changes single fields of it (`--config.train.steps=100`).
Instances are frozen, hashable values: changed with `dataclasses.replace`,
usable as static arguments of `jax.jit`; `fields.py` sets them by name.
"""

import dataclasses
import importlib.util
import math
import os
from typing import Any
from typing import Literal

from diffusiongemma import fields
from diffusiongemma import paths
from diffusiongemma.fields import ConfigError


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The image encoder (defaults of the released model). Widths are numbers of
  features, `patch_size` is in pixels a side, `pooling_kernel` in patches a
  side; the three ids mark an image's place in a prompt."""

  embed_dim: int = 1152
  num_layers: int = 27
  num_heads: int = 16
  num_kv_heads: int = 16
  head_dim: int = 72
  mlp_dim: int = 4304
  patch_size: int = 16
  pooling_kernel: int = 3
  position_table_size: int = 10240
  rope_theta: float = 100.0
  norm_epsilon: float = 1e-6
  standardize: bool = True
  soft_tokens_per_image: int = 280
  bidirectional: bool = True
  image_token_id: int = 258880
  begin_image_token_id: int = 255999
  end_image_token_id: int = 258882


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network (defaults are the text part of the released 26B-A4B). Widths
  are numbers of features, `sliding_window` is in tokens. Without `vision` it
  reads text alone."""

  vocab_size: int = 262144
  embed_dim: int = 2816
  attention_pattern: tuple[str, ...] = (('local',) * 5 + ('global',)) * 5
  num_heads: int = 16
  num_kv_heads: int = 8
  head_dim: int = 256
  num_global_kv_heads: int = 2
  global_head_dim: int = 512
  sliding_window: int = 1024
  local_rope_theta: float = 1e4
  global_rope_theta: float = 1e6
  global_rotary_fraction: float = 0.25
  mlp_dim: int = 2112
  num_experts: int = 128
  experts_per_token: int = 8
  expert_dim: int = 704
  context_length: int = 262144
  logit_softcap: float = 30.0
  norm_epsilon: float = 1e-6
  vision: VisionConfig | None = None
  dtype: Literal['float32', 'bfloat16'] = 'bfloat16'
  param_dtype: Literal['float32', 'bfloat16'] = 'float32'


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
  """The sampler (defaults of the released model). Temperatures divide the
  logits, entropies are in nats; `accept_confidence` is a probability, for the
  strategy `confidence`."""

  canvas_length: int = 256
  max_denoising_steps: int = 48
  t_min: float = 0.4
  t_max: float = 0.8
  strategy: Literal[
    'entropy_bound', 'confidence', 'top_k_confident', 'ancestral'
  ] = 'entropy_bound'
  entropy_bound: float = 0.1
  accept_confidence: float = 0.9
  stability_threshold: int = 1
  confidence_threshold: float = 0.005
  stop_token_ids: tuple[int, ...] = (1, 106, 50)
  pad_token_id: int = 0
  bos_token_id: int = 2


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The text. An empty `path` is the shipped Shakespeare; otherwise a file, a
  folder or a glob of `.txt`, `.jsonl` and `.json` files (`{"text": ...}`, or
  `{"prompt": ..., "response": ...}`, or `{"messages": [...]}`, a chat, and
  other forms that `training/lines.py` lists: only the response, or what the
  assistant says, is learnt). A line that can't be used stops the run, or with
  `on_error` 'skip' is left out and counted. Without a `heldout_path`, every
  n-th document is held out (n = `heldout_every`); the shipped corpus has its
  own held-out plays. `tokenizer` is a SentencePiece model or a tokenizer.json;
  empty is the shipped one, or that of `train.init_from`. `sequence_length` is
  in tokens. `packing` puts several texts into a row, which don't see each
  other."""

  path: str = ''
  heldout_path: str = ''
  heldout_every: int = 20
  on_error: Literal['stop', 'skip'] = 'stop'
  tokenizer: str = ''
  sequence_length: int = 1024
  batch_size: int = 8
  packing: bool = False
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Adam; Adafactor, without momentum, and without second moments of what has
  two axes of 128 or more; or Muon, which makes the steps of matrices orthogonal
  and is Adam elsewhere, with Nesterov's momentum
  (https://arxiv.org/abs/2502.16982). Matrices decay, decoupled, by the rate
  times `weight_decay`. The rate rises over `warmup_steps`, then falls as a
  cosine to `final_rate_fraction` of its peak, or stays. `freeze` has patterns
  such as `*/router/*` of parameters that stay as they are. `b1` and `b2` are
  Adam's; `b1` is Muon's momentum too. `epsilon` is what keeps steps of the
  smallest gradients short."""

  kind: Literal['adam', 'adafactor', 'muon'] = 'adam'
  peak_learning_rate: float = 1.5e-4
  schedule: Literal['cosine', 'constant'] = 'cosine'
  warmup_steps: int = 100
  final_rate_fraction: float = 0.1
  b1: float = 0.95
  b2: float = 0.99
  epsilon: float = 1e-8
  weight_decay: float = 1e-4
  clip_norm: float = 1.0
  freeze: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices lie along each axis of the mesh, see `sharding.py`; one of
  them may be -1, which takes the rest."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  expert: int = 1


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adaptation: W + (alpha / rank) A B, of which only A and B are
  learnt; `rank` 0 learns W itself. `targets` has patterns of the matrices that
  are adapted; experts are `*/experts/*`.

  Source: Hu et al., https://arxiv.org/abs/2106.09685.
  """

  rank: int = 0
  alpha: float = 16.0
  targets: tuple[str, ...] = ('*/attention/*', '*/shared_mlp/*')


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
  """Parameters of few bits, for sampling: `linears` are the matrices of
  attention and MLPs. 8 bits (integers, or floats of the type e4m3) have a scale
  for each output, 4 bits one for each `group_size` inputs."""

  experts: Literal['none', 'int8', 'int4', 'fp8'] = 'none'
  linears: Literal['none', 'int8', 'int4', 'fp8'] = 'none'
  embedding: Literal['none', 'int8'] = 'none'
  group_size: int = 64


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The training run; every `*_every` is in steps.

  It starts from the weights in the folder `init_from`, of a run or of Hugging
  Face; then `config.model` and `config.diffusion` are what they are there. The
  objective `ar` learns to write from left to right, and not to denoise;
  `loo_ce` is for likelihoods (`diffusion/likelihood.py`), and the sampler takes
  its logits, which leave out what a token tells of itself, as they are. A row
  that is told of its own guess, with `self_conditioning_probability`, is told
  of one after 1 to `self_conditioning_passes` passes: more than one is for a
  sampler that makes many. With a probability of up to one half and an even
  number of rows a device, most rows that are not told make no guess. Without an
  `ar_loss_weight` the text of the last canvas is not read, and the network does
  not learn to write left to right.

  A batch is worked through in `accumulate_steps` parts. With `remat` the
  backward pass computes again what a layer computed, instead of keeping it: all
  of it ('full') or all but the products with dense matrices ('dots'). With an
  `ema_decay`, checkpoints hold the running mean of the parameters, for
  sampling. A step whose loss or gradient is not finite, or, with a
  `spike_factor`, whose gradient is so many times longer than those before, is
  left out; after `max_bad_steps` in a row the run stops. A save that fails, on
  a full disk, is tried again at the next one, unless the run
  `stops_when_unsaved`.
  """

  steps: int = 1000
  seed: int = 0
  init_from: str = ''
  objective: Literal['ce', 'loo_ce', 'ar'] = 'ce'
  canvases: Literal['one', 'all'] = 'one'
  self_conditioning_probability: float = 0.5
  self_conditioning_passes: int = 1
  ar_loss_weight: float = 1.0
  accumulate_steps: int = 1
  remat: Literal['none', 'dots', 'full'] = 'none'
  ema_decay: float = 0.0
  max_bad_steps: int = 5
  spike_factor: float = 0.0
  log_every: int = 10
  evaluate_every: int = 500
  evaluate_batches: int = 8
  sample_every: int = 500
  sample_prompt: str = 'ROMEO.\n'
  checkpoint_every: int = 500
  keep_checkpoints: int = 2
  stops_when_unsaved: bool = False


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that `python -m diffusiongemma.main` needs to know."""

  model: ModelConfig = ModelConfig()
  diffusion: DiffusionConfig = DiffusionConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  lora: LoraConfig = LoraConfig()
  mesh: MeshConfig = MeshConfig()
  quantization: QuantizationConfig = QuantizationConfig()
  train: TrainConfig = TrainConfig()


def check_kind(value: Any, kind: type, name: str = 'config') -> None:
  """Raises `ConfigError` for an argument that is no `kind`, and says which part
  of a whole `Config` is one."""
  if isinstance(value, kind):
    return
  found = value if isinstance(value, type) else type(value)
  remedy = ''
  if isinstance(value, Config):
    parts = {type(part): part_name for part_name, part in vars(value).items()}
    remedy = f': give {name}.{parts[kind]}' if kind in parts else ''
  raise ConfigError(
    f'{name} must be a {kind.__name__}, it is a {found.__name__}{remedy}.'
  )


def load_config(path: str) -> Config:
  """What `get_config()` of the Python file at `path` returns, which is still to
  be validated."""
  if not os.path.isfile(path):
    raise ConfigError(f'No config file at {path!r}.')
  spec = importlib.util.spec_from_file_location('_config_file', path)
  if spec is None:
    raise ConfigError(f'{path!r} is not a Python file (.py).')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
      raise ConfigError(f'{path} has no get_config().')
    config = module.get_config()
  except ConfigError:
    raise
  except (Exception, SystemExit) as error:  # Whatever the user's code raises.
    message = f'{type(error).__name__}: {_with_nearest_field(str(error))}'
    raise ConfigError(f'{path}: {message}') from error
  if not isinstance(config, Config):
    raise ConfigError(
      f'{path}: get_config() returned a {type(config).__name__}, not a Config.'
    )
  return config


def _with_nearest_field(message: str) -> str:
  """Adds the nearest field to Python's 'unexpected keyword argument' error."""
  if 'unexpected keyword argument' not in message:
    return message
  name = message.rsplit("argument '", 1)[-1].split("'", 1)[0]
  return f'{message}. {fields.unknown_name(name, fields.field_names(Config()))}'


def validate(config: Config) -> None:
  """Raises `ConfigError` naming the first field that can't be used."""
  fields.check_types(config, 'config')
  _check_numbers(config, 'config')
  model, diffusion, data = config.model, config.diffusion, config.data
  validate_diffusion(diffusion)
  if not model.attention_pattern:
    raise ConfigError('config.model.attention_pattern names no layer.')
  for kind in model.attention_pattern:
    if kind not in ('local', 'global'):
      raise ConfigError(
        f'config.model.attention_pattern: {kind!r} is neither local nor global.'
      )
  for name, kv_heads in (
    ('num_kv_heads', model.num_kv_heads),
    ('num_global_kv_heads', model.num_global_kv_heads),
  ):
    if model.num_heads % kv_heads:
      raise ConfigError(
        f'config.model.{name} = {kv_heads} must divide '
        f'config.model.num_heads = {model.num_heads}.'
      )
  for name in ('head_dim', 'global_head_dim'):
    if getattr(model, name) % 2:
      raise ConfigError(f'config.model.{name} must be even (rotary pairs).')
  if model.vision:
    _validate_vision(model.vision)
  if model.experts_per_token > model.num_experts:
    raise ConfigError(
      f'config.model.experts_per_token = {model.experts_per_token} is more '
      f'than config.model.num_experts = {model.num_experts}.'
    )
  for name in ('pad_token_id', 'bos_token_id', 'stop_token_ids'):
    ids = getattr(diffusion, name)
    for token in ids if isinstance(ids, tuple) else (ids,):
      if not 0 <= token < model.vocab_size:
        raise ConfigError(
          f'config.diffusion.{name}: {token} is outside the vocabulary of '
          f'{model.vocab_size}.'
        )
  if data.sequence_length < diffusion.canvas_length + 1:
    raise ConfigError(
      f'config.data.sequence_length = {data.sequence_length} must be longer '
      f'than config.diffusion.canvas_length = {diffusion.canvas_length}.'
    )
  for name, path in (
    ('data.path', data.path),
    ('data.heldout_path', data.heldout_path),
    ('data.tokenizer', data.tokenizer),
    ('train.init_from', config.train.init_from),
  ):
    paths.local(path, f'config.{name}')
  for name, seed in (('data', data.seed), ('train', config.train.seed)):
    if seed >= 2**63:
      raise ConfigError(f'config.{name}.seed must be below 2^63.')
  train = config.train
  if config.lora.rank and not config.lora.targets:
    raise ConfigError('config.lora.targets names no matrix.')
  if train.init_from and data.tokenizer:
    raise ConfigError(
      'config.data.tokenizer must be empty: the tokenizer is that of '
      'config.train.init_from.'
    )
  if config.lora.rank and config.optimizer.freeze:
    raise ConfigError(
      'config.optimizer.freeze must be empty with config.lora: nothing but '
      'the adapters is learnt.'
    )
  if config.lora.rank and config.optimizer.kind == 'muon':
    raise ConfigError(
      "config.optimizer.kind = 'muon' is for whole matrices; adapters take "
      "'adam' or 'adafactor'."
    )
  _validate_mesh(config.mesh)
  if data.sequence_length > model.context_length:
    raise ConfigError(
      f'config.data.sequence_length = {data.sequence_length} is more than '
      f'config.model.context_length = {model.context_length}.'
    )
  if 0 < train.spike_factor <= 1:
    raise ConfigError('config.train.spike_factor must be above 1, or 0 (off).')
  if data.batch_size % train.accumulate_steps:
    raise ConfigError(
      f'config.train.accumulate_steps = {train.accumulate_steps} must divide '
      f'config.data.batch_size = {data.batch_size}.'
    )


def validate_diffusion(diffusion: DiffusionConfig) -> None:
  """The part of `validate` that the sampler alone can see."""
  fields.check_types(diffusion, 'config.diffusion')
  _check_numbers(diffusion, 'config.diffusion')
  if diffusion.t_min > diffusion.t_max:
    raise ConfigError('config.diffusion.t_min is above config.diffusion.t_max.')


def _validate_mesh(mesh: MeshConfig) -> None:
  """The part of `validate` that is about devices."""
  sizes = dataclasses.asdict(mesh)
  for name, size in sizes.items():
    if size < 1 and size != -1:
      raise ConfigError(
        f'config.mesh.{name} = {size} must be positive, or -1: what is left.'
      )
  if list(sizes.values()).count(-1) > 1:
    raise ConfigError('config.mesh: only one axis can be -1.')


def _validate_vision(vision: VisionConfig) -> None:
  """The part of `validate` that is about images."""
  if vision.num_heads % vision.num_kv_heads:
    raise ConfigError(
      f'config.model.vision.num_kv_heads = {vision.num_kv_heads} must divide '
      f'config.model.vision.num_heads = {vision.num_heads}.'
    )
  if vision.head_dim % 4:
    raise ConfigError(
      'config.model.vision.head_dim must be a multiple of 4 (rotary pairs of '
      'two axes).'
    )


# Numbers that mean something when they are zero.
_MAY_BE_ZERO = (
  'config.model.logit_softcap',
  'config.model.global_rotary_fraction',
  'config.model.vision.num_layers',
  'config.model.vision.image_token_id',
  'config.model.vision.begin_image_token_id',
  'config.model.vision.end_image_token_id',
  'config.diffusion.entropy_bound',
  'config.diffusion.stability_threshold',
  'config.diffusion.confidence_threshold',
  'config.diffusion.pad_token_id',
  'config.diffusion.bos_token_id',
  'config.data.seed',
  'config.optimizer.warmup_steps',
  'config.optimizer.final_rate_fraction',
  'config.optimizer.b1',
  'config.optimizer.b2',
  'config.optimizer.weight_decay',
  'config.lora.rank',
  'config.train.seed',
  'config.train.self_conditioning_probability',
  'config.train.ar_loss_weight',
  'config.train.ema_decay',
  'config.train.spike_factor',
)

_AT_MOST_ONE = (
  'config.model.global_rotary_fraction',
  'config.diffusion.accept_confidence',
  'config.optimizer.final_rate_fraction',
  'config.train.self_conditioning_probability',
)
_BELOW_ONE = (
  'config.optimizer.b1',
  'config.optimizer.b2',
  'config.train.ema_decay',
)
# What an int32 holds, and with room for sums and products a float32.
_LARGEST = {int: 2**31 - 1, float: 1e30}


def _check_numbers(config: Any, prefix: str) -> None:
  for name, value in fields.flatten(config, prefix).items():
    if name.startswith('config.mesh.'):
      continue  # May be -1.
    positive = name not in _MAY_BE_ZERO
    if isinstance(value, (int, float)) and not isinstance(value, bool):
      if value > 1 and name in _AT_MOST_ONE:
        raise ConfigError(f'{name} must be at most 1, it is {value}.')
      if value >= 1 and name in _BELOW_ONE:
        raise ConfigError(f'{name} must be below 1, it is {value}.')
      most = _LARGEST[type(value)]
      if value > most and not name.endswith('.seed'):
        raise ConfigError(f'{name} must be at most {most:.10g}, it is {value}.')
      if not math.isfinite(value) or value < 0 or (positive and value == 0):
        kind = 'positive' if positive else 'zero or more'
        raise ConfigError(f'{name} must be {kind}, it is {value}.')
