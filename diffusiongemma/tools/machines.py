"""What one machine can do with a network, by arithmetic: nothing is compiled.

  memory  = weights in their types + KV cache + temporaries
  a pass >= max(FLOPs / peak, bytes of the weights / bandwidth)
  tokens/s = canvas / ((passes + 1) * a pass), one pass for the commit

Sizes are exact: they are those of the arrays, or of their shards on the mesh of
the commands. Temporaries and times are estimates; what was measured stands
beside them. `plan` compiles the programs themselves.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re
from typing import Any
from typing import NamedTuple

from flax import traverse_util
import jax

from diffusiongemma.config import Config
from diffusiongemma.config import ConfigError
from diffusiongemma.config import LoraConfig
from diffusiongemma.config import MeshConfig
from diffusiongemma.config import ModelConfig
from diffusiongemma.config import QuantizationConfig
from diffusiongemma.devices import memory
from diffusiongemma.devices import sharding
from diffusiongemma.diffusion import sampler
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import denoiser
from diffusiongemma.model import lora
from diffusiongemma.model import parameters
from diffusiongemma.ops.weights import Params
from diffusiongemma.tools import plan
from diffusiongemma.tools.plan import Chip

# Beside those of `plan.CHIPS`; bfloat16 products that add in float32, without
# sparsity. From nvidia.com.
CHIPS = {
  **plan.CHIPS,
  'a100-40': Chip(40e9, 312e12, 1555e9, 300e9),
  'a100-80': Chip(80e9, 312e12, 2039e9, 300e9),
  'l4': Chip(24e9, 121e12, 300e9, 32e9),
  'rtx3090': Chip(24e9, 71e12, 936e9, 32e9),
  'rtx4090': Chip(24e9, 165e12, 1008e9, 32e9),
  'rtx5090': Chip(32e9, 209e12, 1792e9, 64e9),
}
WEIGHTS = {
  'bf16': QuantizationConfig(),
  'int8': QuantizationConfig(experts='int8', linears='int8', embedding='int8'),
  'int4': QuantizationConfig(experts='int4', linears='int8'),
  'int4, embedding int8': QuantizationConfig(
    experts='int4', linears='int8', embedding='int8'
  ),
}
# What is fine-tuned: the weights that get adapters, or None for all weights.
TUNED = {
  'LoRA': 'bf16',
  'QLoRA, int8': 'int8',
  'QLoRA, int4': 'int4',
  'all weights': None,
}
# Of a plan that was compiled for an H100, int4, batch 1.
SAMPLING_TEMPORARIES = 0.3e9
LORA = LoraConfig(rank=16)
# Activations of training with remat = full: those of the plan h100-26b-lora, of
# 4 rows of 1,024 tokens.
TRAINING_TEMPORARIES = 4.2e9
ROWS, PLANNED_TOKENS = 4, 4096
USABLE = 0.95  # Of the memory; XLA and the driver have the rest.
DOWNLOAD = 100e6  # Bytes/s: about 1 Gbit/s.
CONTEXTS = (1024, 4096, 8192, 32768, 131072, 262144)
# tokens/s that were measured: RESULTS.md has the conditions.
MEASURED = {('h200', 'int4'): 1157, ('h200', 'int8'): 988}
HUB = 'google/diffusiongemma-26B-A4B-it'


class Machine(NamedTuple):
  """Devices of one kind.

  Attributes:
    name: as it was asked for.
    kind: of `CHIPS`.
    devices: how many.
    chip: one of them.
  """

  name: str
  kind: str
  devices: int
  chip: Chip

  @property
  def is_tpu(self) -> bool:
    """Whether it takes the extra `tpu`, and not `cuda13`."""
    return self.kind in ('v5e', 'v5p', 'v6e', 'tpu7x')

  @property
  def usable(self) -> float:
    """Bytes of one device that a program can have."""
    return USABLE * self.chip.memory

  @property
  def mesh_config(self) -> MeshConfig:
    """Up to eight devices along `tensor`, which divides the most; the others
    along `expert`."""
    tensor = math.gcd(self.devices, 8)
    return MeshConfig(data=1, tensor=tensor, expert=self.devices // tensor)

  @property
  def mesh(self) -> jax.sharding.AbstractMesh:
    """The mesh of these devices, which need not exist."""
    sizes = sharding.mesh_shape(self.mesh_config, self.devices)
    return jax.sharding.AbstractMesh(sizes, sharding.AXES)


class Sampling(NamedTuple):
  """Sampling with weights of one precision.

  Attributes:
    name: of `WEIGHTS`.
    quantization: what the name stands for.
    weights: bytes on each device, the image encoder's included.
    context: the longest that fits, 0 if none does.
    seconds: of a pass, by the roofline.
    tokens_per_second: by the roofline.
    measured: tokens/s, where it was measured on such a device.
  """

  name: str
  quantization: QuantizationConfig
  weights: float
  context: int
  seconds: float
  tokens_per_second: float
  measured: int | None


def find(name: str) -> Machine:
  """The machine of a name: 'h100', 'v5e-8', 'rtx4090-2'.

  Raises:
    ConfigError: there is none.
  """
  kind, devices = name.lower(), 1
  if kind not in CHIPS and (match := re.fullmatch(r'(.+)-(\d{1,4})', kind)):
    kind, devices = match[1], int(match[2])
  if kind not in CHIPS or not devices:
    raise ConfigError(
      f'There is no machine {name!r}; there are {", ".join(CHIPS)}, and '
      'several of them as h100-8.'
    )
  return Machine(name, kind, devices, CHIPS[kind])


def sampling(config: Config, machine: Machine) -> Iterator[Sampling]:
  """Sampling with each precision of `WEIGHTS`, one text at a time.

  Raises:
    ConfigError: so many devices can't divide the network.
  """
  model, mesh = config.model, machine.mesh
  sharding.validate(config, tuple(mesh.shape.values()), batch=False)
  for name, quantization in WEIGHTS.items():
    stored = sharding.with_sharding(_stored(model, quantization), mesh)
    weights = memory.bytes_on_a_device(stored)
    free = machine.usable - weights - SAMPLING_TEMPORARIES
    fits = [
      length
      for length in CONTEXTS
      if length <= model.context_length
      and cache_bytes(model, length, mesh) <= free
    ]
    seconds = pass_seconds(config, machine, stored)
    passes = sampler.TYPICAL_STEPS + 1
    yield Sampling(
      name,
      quantization,
      weights,
      max(fits, default=0),
      seconds,
      config.diffusion.canvas_length / (passes * seconds),
      MEASURED.get((machine.kind, name)) if machine.devices == 1 else None,
    )


@functools.cache
def _stored(model: ModelConfig, quantization: QuantizationConfig) -> Params:
  """Shapes of the parameters, bfloat16 where they are not quantised."""
  flat = traverse_util.flatten_dict(denoiser.abstract_params(model))
  whole = traverse_util.unflatten_dict(
    {path: x.update(dtype='bfloat16') for path, x in flat.items()}
  )
  return parameters.abstract_quantized(quantization, whole)


@functools.cache
def cache_bytes(
  model: ModelConfig, context: int, mesh: jax.sharding.AbstractMesh
) -> int:
  """Of the keys and values of one text, on each device."""
  cache = jax.eval_shape(lambda: kv_cache.init_cache(model, 1, context))
  return memory.bytes_on_a_device(
    sharding.cache_with_sharding(cache, model, mesh)
  )


def pass_seconds(config: Config, machine: Machine, params: Params) -> float:
  """At least so long takes a denoising pass over one canvas.

  All experts are read, and the embedding twice: for the logits, and for the
  self-conditioning.
  """
  model, C = config.model, config.diffusion.canvas_length
  parts = parameters.by_part(
    {name: tree for name, tree in params.items() if name != 'vision'}
  )
  size = {part: memory.bytes_on_a_device(tree) for part, tree in parts.items()}
  read = sum(size.values()) + size['parameters: embedding']
  count = {
    part: sum(math.prod(w.shape) for w in tree.values())
    for part, tree in parts.items()
  }
  share = model.experts_per_token / model.num_experts
  active = (
    count['parameters: linears']
    + share * count['parameters: experts']
    + 2 * count['parameters: embedding']
  )
  chip = machine.chip
  return max(
    2 * active * C / (machine.devices * chip.flops), read / chip.bandwidth
  )


class Training(NamedTuple):
  """Fine-tuning with one kind of parameters that are learnt.

  Attributes:
    name: a key of `TUNED`.
    arrays: bytes of weights, gradients and optimiser on each device.
    temporaries: bytes of activations on each device, estimated.
    learnt: parameters that are learnt.
    fits: whether a device has the memory.
  """

  name: str
  arrays: float
  temporaries: float
  learnt: int
  fits: bool

  @property
  def need(self) -> float:
    """Bytes on each device."""
    return self.arrays + self.temporaries


def training(config: Config, machine: Machine) -> Iterator[Training]:
  """Fine-tuning with `remat = full` on batches of `PLANNED_TOKENS`."""
  mesh, model = machine.mesh, config.model
  sizes = {
    name: sharding.with_sharding(_stored(model, quantization), mesh)
    for name, quantization in WEIGHTS.items()
  }
  whole = sizes['bf16']
  adapters = lora.abstract_adapters(LORA, whole)
  # Rows are divided along `expert` alone.
  temporaries = TRAINING_TEMPORARIES / mesh.shape['expert']
  for name, weights in TUNED.items():
    if weights is None:
      learnt, arrays = whole, 8 * memory.bytes_on_a_device(whole)
    else:
      # float32: the adapter, its gradient and two moments.
      learnt, own = adapters, 16 * _count(adapters)
      arrays = memory.bytes_on_a_device(sizes[weights]) + own
    fits = arrays + temporaries <= machine.usable
    yield Training(name, arrays, temporaries, _count(learnt), fits)


def _count(tree: Any) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def commands(
  machine: Machine, chosen: Sampling | None, learnt: str | None
) -> list[str]:
  """What to type, in order, to write with the network and to fine-tune it;
  `learnt` is the name of a `Training`."""
  extra = 'tpu' if machine.is_tpu else 'cuda13'
  main = 'python -m diffusiongemma.main'
  lines = [f"pip install '.[{extra}]' huggingface_hub"]
  lines.append(f'hf download {HUB} --local-dir=IN')
  mesh = ''.join(
    f' --config.mesh.{axis}={size}'
    for axis, size in machine.mesh.shape.items()
    if size > 1
  )
  folders = {
    name: name.partition(',')[0].upper() if _fields(quantization) else 'IN'
    for name, quantization in WEIGHTS.items()
  }
  adapted = learnt and TUNED[learnt]
  for name, quantization in WEIGHTS.items():
    used = name == adapted or (chosen is not None and name == chosen.name)
    if used and (fields := _fields(quantization)):
      few = f'--workdir={folders[name]} {fields}'
      lines.append(f'{main} --mode=quantize --source=IN {few}')
  if chosen is not None:
    folder = folders[chosen.name]
    source = '--hf_dir=IN' if folder == 'IN' else f'--workdir={folder}'
    lines.append(f'{main} --mode=sample {source}{mesh} --prompt="Hello"')
  if adapted:
    lines += [
      f'{main} --config=lora --config.train.init_from={folders[adapted]} '
      '--config.data.path=chats.jsonl '
      f'--config.data.batch_size={ROWS} --workdir=TUNED{mesh}',
      f'{main} --mode=sample --workdir=TUNED{mesh} --prompt="Hello"',
      f'{main} --mode=export --workdir=TUNED --hf_dir=OUT',
    ]
  return lines


def _fields(quantization: QuantizationConfig) -> str:
  """The flags that set it."""
  plain = QuantizationConfig()
  return ' '.join(
    f'--config.quantization.{name}={getattr(quantization, name)}'
    for name in ('experts', 'linears', 'embedding')
    if getattr(quantization, name) != getattr(plain, name)
  )


def to_json(config: Config, machine: Machine) -> dict[str, Any]:
  """All of it as plain values; sizes in bytes, times in seconds."""
  samplings = list(sampling(config, machine))
  trainings = list(training(config, machine))
  chosen = best(samplings)
  return {
    'machine': machine.name,
    'devices': machine.devices,
    'memory_bytes': machine.chip.memory,
    'download_bytes': _download_bytes(config),
    'sampling': [
      {**s._asdict(), 'quantization': dataclasses.asdict(s.quantization)}
      for s in samplings
    ],
    'training': [{**t._asdict(), 'need': t.need} for t in trainings],
    'training_tokens': PLANNED_TOKENS,
    'commands': commands(machine, chosen, most_exact(trainings)),
  }


def best(samplings: list[Sampling]) -> Sampling | None:
  """The most exact weights with which 8,192 tokens fit; else those with the
  longest context, if any."""
  able = [s for s in samplings if s.context >= 8192]
  able = able or sorted(samplings, key=lambda s: -s.context)[:1]
  return able[0] if able and able[0].context else None


def most_exact(trainings: list[Training]) -> str | None:
  """The name of the adapters that fit, of the most exact weights."""
  able = [t.name for t in trainings if t.fits and TUNED[t.name]]
  return able[0] if able else None


def _download_bytes(config: Config) -> int:
  return memory.bytes_on_a_device(_stored(config.model, WEIGHTS['bf16']))


def to_text(config: Config, machine: Machine) -> str:
  """The same in lines, for a person."""
  values = to_json(config, machine)
  size = values['download_bytes']
  count = 'one device' if machine.devices == 1 else f'{machine.devices} devices'
  lines = [
    f'{machine.name}: {count} of {machine.chip.memory / 1e9:.0f} GB. By '
    'arithmetic; nothing was run or compiled.',
    '',
    f'Download  {size / 1e9:.1f} GB, {size / DOWNLOAD / 60:.0f} minutes at '
    f'{DOWNLOAD / 1e6:.0f} MB/s; a copy with few bits takes its own size',
    '',
    'Sampling, one text at a time',
    '  weights                  a device    context    tokens/s',
  ]
  for s in values['sampling']:
    context = f'{s["context"]:,}' if s['context'] else 'no room'
    speed = f'{s["tokens_per_second"]:>8,.0f} at most' if s['context'] else ''
    if s['measured']:
      speed += f'; measured {s["measured"]:,} (with bfloat16 linears)'
    lines.append(
      f'  {s["name"]:<22} {s["weights"] / 1e9:8.1f} GB {context:>10}  {speed}'
    )
  lines += [
    '',
    f'Fine-tuning, {PLANNED_TOKENS:,} tokens a step, remat = full',
    '  learnt                   a device',
  ]
  for t in values['training']:
    verdict = 'fits' if t['fits'] else 'no room'
    lines.append(
      f'  {t["name"]:<22} {t["need"] / 1e9:8.1f} GB  {verdict} '
      f'({t["learnt"] / 1e6:,.0f} M parameters)'
    )
  lines += ['', 'Commands', *(f'  {line}' for line in values['commands'])]
  return '\n'.join(lines)
