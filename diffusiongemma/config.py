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
  pooling_kernel: int = field(3, 'patches a side of what becomes one token')
  position_table_size: int = field(10240, 'positions with an embedding, a side')
  rope_theta: float = field(100.0, 'base of the rotary frequencies')
  norm_epsilon: float = field(1e-6, 'added to the mean square in RMSNorm')
  standardize: bool = field(True, 'whether outputs are standardised')
  soft_tokens_per_image: int = field(280, 'most tokens of an image')
  bidirectional: bool = field(
    True, 'whether the tokens of an image see each other in local layers'
  )
  image_token_id: int = field(
    258880, "stands for each of an image's tokens in a prompt", at_least=0
  )
  begin_image_token_id: int = field(255999, 'comes before them', at_least=0)
  end_image_token_id: int = field(258882, 'comes after them', at_least=0)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network (defaults are the text part of the released 26B-A4B)."""

  vocab_size: int = field(262144, 'tokens that there are')
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
    'part of the features that turns in global layers',
    at_least=0,
    at_most=1,
  )
  mlp_dim: int = field(2112, 'hidden features of the MLP that all tokens share')
  num_experts: int = field(128, 'experts of a layer (E)')
  experts_per_token: int = field(8, 'experts that a token goes to (k)')
  expert_dim: int = field(704, 'hidden features of an expert')
  context_length: int = field(262144, 'most tokens of a text')
  logit_softcap: float = field(
    30.0, 'logits stay below it, by tanh; 0 lets them be', at_least=0
  )
  norm_epsilon: float = field(1e-6, 'added to the mean square in RMSNorm')
  vision: VisionConfig | None = field(
    None, 'the image encoder; without, it reads text alone'
  )
  dtype: Literal['float32', 'bfloat16'] = field(
    'bfloat16', 'type that is computed in'
  )
  param_dtype: Literal['float32', 'bfloat16'] = field(
    'float32', 'type of the parameters'
  )

  @property
  def image_encoder(self) -> VisionConfig:
    """`vision` of a network that has it. Raises `ConfigError`."""
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
    'most nats of all but the least certain of the tokens accepted together',
    at_least=0,
    free=True,
  )
  accept_confidence: float = field(
    0.9,
    'probability from which the strategy confidence accepts',
    at_most=1,
    free=True,
  )
  stability_threshold: int = field(
    1,
    'a canvas ends when its most probable tokens stayed the same so many steps',
    at_least=0,
    free=True,
  )
  confidence_threshold: float = field(
    0.005,
    'and their mean entropy, in nats, is below this',
    at_least=0,
    free=True,
  )
  stop_token_ids: tuple[int, ...] = field(
    (1, 106, 50), 'tokens that end a text'
  )
  pad_token_id: int = field(0, 'fills what is not used', at_least=0)
  bos_token_id: int = field(2, 'begins a text', at_least=0)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The text.

  A line of `.jsonl` or `.json` is `{"text": ...}`, or `{"prompt": ...,
  "response": ...}`, or `{"messages": [...]}`, a chat, and other forms that
  `training/lines.py` lists: only the response, or what the assistant says, is
  learnt. The shipped corpus has its own held-out plays.
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
    "what a line that can't be used does: stop the run, or be left out and "
    'counted',
    free=True,
  )
  tokenizer: str = field(
    '',
    'SentencePiece model or tokenizer.json; empty: the shipped one, or that of '
    'train.init_from',
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
  """How the parameters are changed.

  Adafactor is without momentum, and without second moments of what has two axes
  of 128 or more; Muon makes the steps of matrices orthogonal and is Adam
  elsewhere, with Nesterov's momentum (https://arxiv.org/abs/2502.16982). The
  rate rises over `warmup_steps`, then falls as a cosine to
  `final_rate_fraction` of its peak, or stays.
  """

  kind: Literal['adam', 'adafactor', 'muon'] = field('adam', 'the optimiser')
  peak_learning_rate: float = field(1.5e-4, 'largest rate', free=True)
  schedule: Literal['cosine', 'constant'] = field(
    'cosine', 'how the rate goes on after warmup_steps', free=True
  )
  warmup_steps: int = field(
    100, 'steps over which the rate rises', at_least=0, free=True
  )
  final_rate_fraction: float = field(
    0.1,
    'last rate of the cosine, as a part of its peak',
    at_least=0,
    at_most=1,
    free=True,
  )
  b1: float = field(
    0.95, "decay of Adam's mean, and Muon's momentum", at_least=0, below=1
  )
  b2: float = field(0.99, "decay of Adam's mean square", at_least=0, below=1)
  epsilon: float = field(1e-8, 'keeps steps of the smallest gradients short')
  weight_decay: float = field(
    1e-4,
    'by this times the rate matrices decay, decoupled',
    at_least=0,
    free=True,
  )
  clip_norm: float = field(1.0, 'longest gradient', free=True)
  freeze: tuple[str, ...] = field(
    (), 'patterns such as */router/* of parameters that stay as they are'
  )


def _axis(default: int, what: str) -> int:
  """A field of the mesh."""
  return field(default, what, special={-1: 'what is left'}, free=True)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices lie along each axis of the mesh, see `sharding.py`; one of
  them may be -1, which takes the rest."""

  data: int = _axis(-1, 'devices with rows of their own')
  fsdp: int = _axis(
    1, 'devices with rows of their own that share the parameters'
  )
  tensor: int = _axis(1, 'devices that share heads and hidden features')
  expert: int = _axis(1, 'devices that share the experts')


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adaptation: W + (alpha / rank) A B, of which only A and B are
  learnt.

  Source: Hu et al., https://arxiv.org/abs/2106.09685.
  """

  rank: int = field(0, 'features of A and B; 0 learns W itself', at_least=0)
  alpha: float = field(16.0, 'scale of A B, times the rank')
  targets: tuple[str, ...] = field(
    ('*/attention/*', '*/shared_mlp/*'),
    'patterns of the matrices that are adapted; experts are */experts/*',
  )


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
  """Parameters of few bits, for sampling: 8 bits (integers, or floats of the
  type e4m3) have a scale for each output, 4 bits one for each `group_size`
  inputs."""

  experts: Literal['none', 'int8', 'int4', 'fp8'] = field('none', 'the experts')
  linears: Literal['none', 'int8', 'int4', 'fp8'] = field(
    'none', 'the matrices of attention and MLPs'
  )
  embedding: Literal['none', 'int8'] = field('none', "the vocabulary's table")
  group_size: int = field(64, 'inputs that share a scale of 4 bits')


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The training run.

  With `init_from`, `config.model` and `config.diffusion` are what they are
  there. `loo_ce` is for likelihoods (`diffusion/likelihood.py`), and the
  sampler takes its logits, which leave out what a token tells of itself, as
  they are. With a `self_conditioning_probability` of up to one half and an even
  number of rows a device, most rows that are not self-conditioned make no
  guess. A step whose loss or gradient is not finite, or, with a `spike_factor`,
  whose gradient is so many times longer than those before, is left out.
  """

  steps: int = field(1000, 'steps in all', free=True)
  seed: int = field(0, 'of parameters and noise', at_least=0, below=2**63)
  init_from: str = field(
    '', 'folder of a run or of Hugging Face to start from', is_path=True
  )
  objective: Literal['ce', 'loo_ce', 'ar'] = field(
    'ce',
    'denoising; the same, leaving out what a token tells of itself; from left '
    'to right alone',
  )
  canvases: Literal['one', 'all'] = field(
    'one', 'of a row, those that are denoised in a step'
  )
  self_conditioning_probability: float = field(
    0.5, 'part of the rows that are self-conditioned', at_least=0, at_most=1
  )
  self_conditioning_passes: int = field(
    1,
    'most passes that a row is self-conditioned on; more than one is for a '
    'sampler that makes many',
  )
  ar_loss_weight: float = field(
    1.0,
    'weight of the loss from left to right; 0 leaves the last canvas unread',
    at_least=0,
  )
  accumulate_steps: int = field(
    1, 'parts that a batch is worked through in', free=True
  )
  remat: Literal['none', 'dots', 'full'] = field(
    'none',
    'what the backward pass computes again instead of keeping it: nothing, all '
    'but products with dense matrices, all',
    free=True,
  )
  ema_decay: float = field(
    0.0,
    'of the running mean of the parameters, which checkpoints then hold for '
    'sampling; 0: none',
    at_least=0,
    below=1,
  )
  max_bad_steps: int = field(
    5, 'steps left out in a row after which the run stops', free=True
  )
  spike_factor: float = field(
    0.0,
    'a gradient so many times longer than those before is left out',
    above=1,
    special={0: 'off'},
    free=True,
  )
  log_every: int = field(10, 'steps from line to line of the log', free=True)
  evaluate_every: int = field(
    500, 'steps from evaluation to evaluation', free=True
  )
  evaluate_batches: int = field(8, 'batches of an evaluation', free=True)
  sample_every: int = field(500, 'steps from sample to sample', free=True)
  sample_prompt: str = field(
    'ROMEO.\n', 'what samples go on from; empty: no samples', free=True
  )
  checkpoint_every: int = field(
    500, 'steps from checkpoint to checkpoint', free=True
  )
  keep_checkpoints: int = field(2, 'newest checkpoints that stay', free=True)
  stops_when_unsaved: bool = field(
    False,
    'whether a save that fails, on a full disk, stops the run; else the next '
    'one is tried',
    free=True,
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that `python -m diffusiongemma.main` needs to know.

  A run may go on with other values of the fields that are `free`: how far it
  goes and how fast it learns, what is told and kept of it, how its samples are
  written, where and in what pieces it is computed (the same, but for rounding),
  where its text lies (examples and tokenizers are compared). Why the others of
  a group stay is said here.
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
    'how the parameters are changed',
    fixed="the optimiser's state follows from it",
  )
  lora: LoraConfig = field(
    LoraConfig(), 'low-rank adapters', fixed='the adapters are of this form'
  )
  mesh: MeshConfig = field(MeshConfig(), 'how many devices share what')
  quantization: QuantizationConfig = field(
    QuantizationConfig(),
    'parameters of few bits, for sampling',
    fixed='the parameters are stored so',
  )
  train: TrainConfig = field(
    TrainConfig(),
    'the training run',
    fixed='it says what is learnt, or from what on',
  )


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


def find_config(name: str) -> str:
  """The file of a config: `name` is a path, or that of one in `configs/`,
  without its `.py`. Raises `ConfigError`."""
  shipped = {path.stem: str(path) for path in sorted(CONFIGS.glob('*.py'))}
  if name in shipped:
    return shipped[name]
  if os.path.isfile(name):
    return name
  stem = os.path.basename(name).removesuffix('.py')
  nearest = difflib.get_close_matches(stem, shipped, n=1, cutoff=0.5)
  hint = f' Did you mean {nearest[0]!r}?' if nearest else ''
  raise ConfigError(
    f'No config file at {name!r}, and by name there are '
    f'{", ".join(shipped)}.{hint}'
  )


def load_config(name: str) -> Config:
  """What `get_config()` of a Python file returns, which is still to be
  validated; `name` is its path, or its name in `configs/`."""
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
  """Raises `ConfigError` naming the first field that can't be used."""
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
  """The part of `validate` that the sampler alone can see."""
  fields.check(diffusion, 'config.diffusion')
  if diffusion.t_min > diffusion.t_max:
    raise ConfigError('config.diffusion.t_min is above config.diffusion.t_max.')


def _validate_lora(config: Config) -> None:
  """The part of `validate` that is about what adapters leave out."""
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
