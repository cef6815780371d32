"""Typed configuration: one frozen dataclass per concern, all in `Config`.

A config file is Python with a `get_config()` that returns a `Config`; the
command line changes single fields of it (`--config.train.steps=100`).
Instances are frozen, hashable values: changed with `dataclasses.replace`,
usable as static arguments of `jax.jit`; `fields.py` sets them by name.
"""

import dataclasses
import difflib
import importlib.util
import os
import pathlib
from typing import Any
from typing import Literal

from diffusiongemma import fields
from diffusiongemma import paths
from diffusiongemma.fields import ConfigError
from diffusiongemma.fields import field

# A link in a checkout, a folder where the package is installed.
CONFIGS = pathlib.Path(__file__).parent / 'configs'


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The image encoder (defaults of the released model)."""

  embed_dim: int = field(1152, 'features of a patch')
  num_layers: int = field(27, 'layers', at_least=0)
  num_heads: int = field(16, 'query heads')
  num_kv_heads: int = field(16, 'key and value heads')
  head_dim: int = field(
    72, 'features of a head', multiple_of=(4, 'rotary pairs of two axes')
  )
  mlp_dim: int = field(4304, 'hidden features of an MLP')
  patch_size: int = field(16, 'pixels a side of a patch')
  pooling_kernel: int = field(3, 'patches a side that are pooled to one token')
  position_table_size: int = field(10240, 'positions per axis in the table')
  rope_theta: float = field(100.0, 'base of the rotary frequencies')
  norm_epsilon: float = field(1e-6, 'added to the mean square in RMSNorm')
  standardize: bool = field(True, 'whether outputs are standardised')
  soft_tokens_per_image: int = field(280, 'most tokens of an image')
  bidirectional: bool = field(
    True, 'whether the tokens of an image see each other in local layers'
  )
  image_token_id: int = field(
    258880, "placeholder of each of an image's tokens in a prompt", at_least=0
  )
  begin_image_token_id: int = field(255999, 'precedes them', at_least=0)
  end_image_token_id: int = field(258882, 'follows them', at_least=0)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network (defaults are the text part of the released 26B-A4B)."""

  vocab_size: int = field(262144, 'tokens in the vocabulary (V)')
  embed_dim: int = field(2816, 'features of a token (D)')
  attention_pattern: tuple[Literal['local', 'global'], ...] = field(
    (('local',) * 5 + ('global',)) * 5, 'the kind of each layer'
  )
  num_heads: int = field(16, 'query heads (N)')
  num_kv_heads: int = field(8, 'key and value heads of local layers (K)')
  head_dim: int = field(
    256,
    'features of a head in local layers (H)',
    multiple_of=(2, 'rotary pairs'),
  )
  num_global_kv_heads: int = field(2, 'key and value heads of global layers')
  global_head_dim: int = field(
    512, 'features of a head in global layers', multiple_of=(2, 'rotary pairs')
  )
  sliding_window: int = field(1024, 'tokens that a local layer sees')
  local_rope_theta: float = field(1e4, 'base of the rotary frequencies, local')
  global_rope_theta: float = field(
    1e6, 'base of the rotary frequencies, global'
  )
  global_rotary_fraction: float = field(
    0.25,
    'fraction of the features that is rotated in global layers',
    at_least=0,
    at_most=1,
  )
  mlp_dim: int = field(2112, 'hidden features of the MLP that all tokens share')
  num_experts: int = field(128, 'experts of a layer (E)')
  experts_per_token: int = field(8, 'experts that a token goes to (k)')
  expert_dim: int = field(704, 'hidden features of an expert')
  context_length: int = field(262144, 'most tokens of a text')
  logit_softcap: float = field(
    30.0, 'bound of the logits, by tanh; 0: none', at_least=0
  )
  norm_epsilon: float = field(1e-6, 'added to the mean square in RMSNorm')
  vision: VisionConfig | None = field(
    None, 'the image encoder; None: the network reads text only'
  )
  dtype: Literal['float32', 'bfloat16'] = field(
    'bfloat16', 'type of activations and products'
  )
  param_dtype: Literal['float32', 'bfloat16'] = field(
    'float32', 'type of the parameters'
  )

  @property
  def image_encoder(self) -> VisionConfig:
    """`vision`. Raises `ConfigError` if the network reads text only."""
    if self.vision is None:
      raise ConfigError('This network reads text only; it can see no picture.')
    return self.vision


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
  """The sampler (defaults of the released model)."""

  canvas_length: int = field(256, 'tokens that are denoised together')
  max_denoising_steps: int = field(48, 'most steps of a canvas', free=True)
  t_min: float = field(0.4, 'temperature of the last step', free=True)
  t_max: float = field(0.8, 'temperature of the first step', free=True)
  strategy: Literal[
    'entropy_bound', 'confidence', 'top_k_confident', 'ancestral'
  ] = field('entropy_bound', 'which predictions a step accepts', free=True)
  entropy_bound: float = field(
    0.1,
    'largest total entropy, in nats, of the tokens accepted together, all but '
    'the least certain one',
    at_least=0,
    free=True,
  )
  accept_confidence: float = field(
    0.9,
    "least probability that the strategy 'confidence' accepts",
    at_most=1,
    free=True,
  )
  stability_threshold: int = field(
    1,
    'a canvas ends when its most probable tokens stayed the same for this many '
    'steps',
    at_least=0,
    free=True,
  )
  confidence_threshold: float = field(
    0.005,
    'and the mean entropy, in nats per token, is below this',
    at_least=0,
    free=True,
  )
  stop_token_ids: tuple[int, ...] = field(
    (1, 106, 50), 'tokens that end a text'
  )
  pad_token_id: int = field(0, 'fills unused positions', at_least=0)
  bos_token_id: int = field(2, 'begins a text', at_least=0)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The text.

  A line of `.jsonl` or `.json` is `{"text": ...}`, or `{"prompt": ...,
  "response": ...}`, or `{"messages": [...]}`, a chat, or another form that
  `training/lines.py` lists. Only the response, or the messages of the
  assistant, are trained on. The shipped corpus has its own held-out plays.
  """

  path: str = field(
    '',
    'file, folder or glob of .txt, .jsonl and .json; empty: the shipped '
    'Shakespeare',
    is_path=True,
    free=True,
  )
  heldout_path: str = field(
    '', 'the same for held-out text', is_path=True, free=True
  )
  heldout_every: int = field(
    20, 'without heldout_path, every n-th document is held out', free=True
  )
  on_error: Literal['stop', 'skip'] = field(
    'stop',
    "on a line that can't be used: stop the run, or skip and count the line",
    free=True,
  )
  tokenizer: str = field(
    '',
    'SentencePiece model or tokenizer.json; new:4096 trains one of so many '
    'pieces on the text; empty: the shipped one, or that of train.init_from',
    is_path=True,
    free=True,
  )
  sequence_length: int = field(1024, 'tokens of a row')
  batch_size: int = field(8, 'rows of a step')
  packing: bool = field(
    False, "whether short texts share rows; they don't see each other"
  )
  seed: int = field(0, 'of the order of the texts', at_least=0, below=2**63)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The optimiser.

  Adafactor has no momentum, and factored second moments for parameters with two
  axes of 128 or more; Muon orthogonalises the steps of matrices and is Adam
  elsewhere, with Nesterov momentum (https://arxiv.org/abs/2502.16982). The rate
  rises over `warmup_steps`, then falls as a cosine to `final_rate_fraction` of
  its peak, or stays constant.
  """

  kind: Literal['adam', 'adafactor', 'muon'] = field('adam', 'the optimiser')
  peak_learning_rate: float = field(1.5e-4, 'largest rate', free=True)
  schedule: Literal['cosine', 'constant'] = field(
    'cosine', 'the rate after warmup_steps', free=True
  )
  warmup_steps: int = field(
    100, 'steps over which the rate rises', at_least=0, free=True
  )
  final_rate_fraction: float = field(
    0.1,
    'last rate of the cosine, as a fraction of the peak',
    at_least=0,
    at_most=1,
    free=True,
  )
  b1: float = field(
    0.95, "decay of Adam's mean, and Muon's momentum", at_least=0, below=1
  )
  b2: float = field(0.99, "decay of Adam's mean square", at_least=0, below=1)
  epsilon: float = field(1e-8, 'bounds the steps of the smallest gradients')
  weight_decay: float = field(
    1e-4,
    'decoupled decay of matrices: this times the rate, per step',
    at_least=0,
    free=True,
  )
  clip_norm: float = field(1.0, 'largest norm of the gradient', free=True)
  freeze: tuple[str, ...] = field(
    (), 'patterns such as */router/* of parameters that are not trained'
  )


def _axis(default: int, what: str) -> int:
  """A field of the mesh."""
  return field(default, what, special={-1: 'the remaining devices'}, free=True)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices lie along each axis of the mesh, see `sharding.py`; one
  axis may be -1 and takes the remaining devices."""

  data: int = _axis(-1, 'devices with rows of their own')
  fsdp: int = _axis(
    1, 'devices with rows of their own that share the parameters'
  )
  tensor: int = _axis(1, 'devices that share heads and hidden features')
  expert: int = _axis(1, 'devices that share the experts')


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adaptation: W + (alpha / rank) A B; only A and B are trained.

  Source: Hu et al., https://arxiv.org/abs/2106.09685.
  """

  rank: int = field(0, 'rank of A B; 0 trains W itself', at_least=0)
  alpha: float = field(16.0, 'scale of A B, times the rank')
  targets: tuple[str, ...] = field(
    ('*/attention/*', '*/shared_mlp/*'),
    'patterns of the matrices with adapters; experts are */experts/*',
  )


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
  """Quantised parameters, for sampling: 8 bits (integers, or floats of the type
  e4m3) with a scale per output, 4 bits with a scale per `group_size` inputs;
  'stored' are those of another tool, each as it was."""

  experts: Literal['none', 'int8', 'int4', 'fp8', 'stored'] = field(
    'none', 'the experts'
  )
  linears: Literal['none', 'int8', 'int4', 'fp8', 'stored'] = field(
    'none', 'the matrices of attention and MLPs'
  )
  embedding: Literal['none', 'int8', 'stored'] = field(
    'none', "the vocabulary's table"
  )
  group_size: int = field(64, 'inputs that share a scale, of 4 bits')


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The training run.

  With `init_from`, `config.model` and `config.diffusion` are those of that
  folder. `loo_ce` is for likelihoods (`diffusion/likelihood.py`); the sampler
  uses its leave-one-out logits as they are. With a
  `self_conditioning_probability` of up to one half and an even number of rows
  per device, most rows that are not self-conditioned make no pass without
  gradient. A step is skipped whose loss or gradient is not finite or, with a
  `spike_factor`, whose gradient norm is that many times the norms before.
  """

  steps: int = field(1000, 'training steps in total', free=True)
  seed: int = field(0, 'of parameters and noise', at_least=0, below=2**63)
  init_from: str = field(
    '', 'folder of a run or of Hugging Face to start from', is_path=True
  )
  objective: Literal['ce', 'loo_ce', 'ar'] = field(
    'ce',
    'denoising; leave-one-out denoising, without the evidence of a token about '
    'itself; left to right only',
  )
  canvases: Literal['one', 'all'] = field(
    'one', 'canvases per row that are denoised in a step'
  )
  self_conditioning_probability: float = field(
    0.5, 'fraction of the rows that are self-conditioned', at_least=0, at_most=1
  )
  self_conditioning_passes: int = field(
    1,
    'most passes that a row is self-conditioned on; more than one suits a '
    'sampler with many passes',
  )
  ar_loss_weight: float = field(
    1.0,
    'weight of the left-to-right loss; with 0 the last canvas is not read',
    at_least=0,
  )
  accumulate_steps: int = field(1, 'micro-batches of a step', free=True)
  remat: Literal['none', 'dots', 'full'] = field(
    'none',
    'what the backward pass recomputes instead of storing: nothing, all but '
    'products with dense matrices, everything',
    free=True,
  )
  ema_decay: float = field(
    0.0,
    'decay of the moving average of the parameters, which checkpoints hold for '
    'sampling; 0: none',
    at_least=0,
    below=1,
  )
  max_bad_steps: int = field(
    5, 'consecutive skipped steps after which the run stops', free=True
  )
  spike_factor: float = field(
    0.0,
    'skips a step whose gradient norm is this many times the norms before',
    above=1,
    special={0: 'off'},
    free=True,
  )
  log_every: int = field(10, 'steps between log lines', free=True)
  evaluate_every: int = field(500, 'steps between evaluations', free=True)
  evaluate_batches: int = field(8, 'batches of an evaluation', free=True)
  sample_every: int = field(500, 'steps between samples', free=True)
  sample_prompt: str = field(
    'ROMEO.\n',
    'prompt of the samples; empty: no samples. The default is for the shipped '
    'text; for others it is the beginning of a held-out text',
    free=True,
  )
  checkpoint_every: int = field(500, 'steps between checkpoints', free=True)
  keep_checkpoints: int = field(2, 'newest checkpoints to keep', free=True)
  stops_when_unsaved: bool = field(
    False,
    'whether a failed save (a full disk) stops the run; otherwise it goes on '
    'to the next save',
    free=True,
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """All settings.

  A run may be resumed with other values of the fields that are `free`: number
  of steps and learning rate, logging and checkpoints, sampling, mesh and
  micro-batches (the same result but for rounding), paths of the text (examples
  and tokenizers are compared). `fixed` says why the other fields of a group
  must stay.
  """

  model: ModelConfig = field(
    ModelConfig(),
    'the network',
    fixed='the parameters are those of this network',
  )
  diffusion: DiffusionConfig = field(
    DiffusionConfig(), 'the sampler', fixed='the network has learnt with it'
  )
  data: DataConfig = field(
    DataConfig(), 'the text', fixed='the order of the data follows from it'
  )
  optimizer: OptimizerConfig = field(
    OptimizerConfig(),
    'the optimiser',
    fixed="the optimiser's state follows from it",
  )
  lora: LoraConfig = field(
    LoraConfig(), 'low-rank adapters', fixed='the adapters are of this form'
  )
  mesh: MeshConfig = field(MeshConfig(), 'how many devices share what')
  quantization: QuantizationConfig = field(
    QuantizationConfig(),
    'quantised parameters, for sampling',
    fixed='the parameters are stored so',
  )
  train: TrainConfig = field(
    TrainConfig(),
    'the training run',
    fixed='it says what is learnt, or from which weights',
  )


def check_kind(value: Any, kind: type, name: str = 'config') -> None:
  """Raises `ConfigError` for an argument that is not a `kind`; for a whole
  `Config`, the message names the part that is."""
  if isinstance(value, kind):
    return
  actual = value if isinstance(value, type) else type(value)
  remedy = ''
  if isinstance(value, Config):
    field_of = {
      type(part): part_name for part_name, part in vars(value).items()
    }
    remedy = f': give {name}.{field_of[kind]}' if kind in field_of else ''
  raise ConfigError(
    f'{name} must be a {kind.__name__}, it is a {actual.__name__}{remedy}.'
  )


def find_config(name: str) -> str:
  """Path of a config file; `name` is a path, or the name of a file in
  `configs/` without `.py`. Raises `ConfigError`."""
  shipped = {path.stem: str(path) for path in sorted(CONFIGS.glob('*.py'))}
  if name in shipped:
    return shipped[name]
  if os.path.isfile(name):
    return name
  stem = os.path.basename(name).removesuffix('.py')
  nearest = difflib.get_close_matches(stem, shipped, n=1, cutoff=0.5)
  hint = f' Did you mean {nearest[0]!r}?' if nearest else ''
  raise ConfigError(
    f'No config file at {name!r}; the shipped ones are '
    f'{", ".join(shipped)}.{hint}'
  )


def load_config(name: str) -> Config:
  """Calls `get_config()` of a Python file; the result is not yet validated.
  `name` is its path, or its name in `configs/`."""
  path = find_config(name)
  spec = importlib.util.spec_from_file_location('_config_file', path)
  if spec is None or spec.loader is None:
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
  """Raises `ConfigError` that names the first invalid field."""
  fields.check(config)
  model, diffusion, data = config.model, config.diffusion, config.data
  validate_diffusion(diffusion)
  for name, value in fields.paths(config).items():
    paths.local(value, name)
  if not model.attention_pattern:
    raise ConfigError('config.model.attention_pattern names no layer.')
  heads = {
    'model.num_kv_heads': (model.num_kv_heads, model.num_heads),
    'model.num_global_kv_heads': (model.num_global_kv_heads, model.num_heads),
  }
  if vision := model.vision:
    heads['model.vision.num_kv_heads'] = (vision.num_kv_heads, vision.num_heads)
  for name, (kv_heads, count) in heads.items():
    if kv_heads and count % kv_heads:
      group = name.rpartition('.')[0]
      raise ConfigError(
        f'config.{name} = {kv_heads} must divide '
        f'config.{group}.num_heads = {count}.'
      )
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
  if data.sequence_length > model.context_length:
    raise ConfigError(
      f'config.data.sequence_length = {data.sequence_length} is more than '
      f'config.model.context_length = {model.context_length}.'
    )
  if config.train.init_from and data.tokenizer:
    raise ConfigError(
      'config.data.tokenizer must be empty: the tokenizer is that of '
      'config.train.init_from.'
    )
  if data.batch_size % config.train.accumulate_steps:
    raise ConfigError(
      f'config.train.accumulate_steps = {config.train.accumulate_steps} must '
      f'divide config.data.batch_size = {data.batch_size}.'
    )
  if list(dataclasses.asdict(config.mesh).values()).count(-1) > 1:
    raise ConfigError('config.mesh: only one axis can be -1.')
  if config.lora.rank:
    _validate_lora(config)


def validate_diffusion(diffusion: DiffusionConfig) -> None:
  """The part of `validate` for the sampler's own fields."""
  fields.check(diffusion, 'config.diffusion')
  if diffusion.t_min > diffusion.t_max:
    raise ConfigError('config.diffusion.t_min is above config.diffusion.t_max.')


def _validate_lora(config: Config) -> None:
  """The part of `validate` for settings that adapters exclude."""
  if not config.lora.targets:
    raise ConfigError('config.lora.targets names no matrix.')
  if config.optimizer.freeze:
    raise ConfigError(
      'config.optimizer.freeze must be empty with config.lora: nothing but '
      'the adapters is learnt.'
    )
  if config.optimizer.kind == 'muon':
    raise ConfigError(
      "config.optimizer.kind = 'muon' is for whole matrices; adapters take "
      "'adam' or 'adafactor'."
    )
