"""Compiles a config for devices that are not attached; estimates its costs.

  plan(config, 'v5p:4x4x4')                     the training step
  plan(config, 'h100', program='sample')        one denoising step and its loop

Memory and collectives are those of the program that XLA compiles for the
topology. FLOPs are counted in the traced program, before it is partitioned: all
products, in loops times the number of iterations. Times are a roofline:

  t >= max(FLOPs / peak, bytes / bandwidth, bytes sent / link)     per device

an estimate that has not yet been compared with measurements.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.resources
import math
import os
import re
import time
from typing import Any
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.interpreters import partial_eval
import jax.numpy as jnp
from jax.sharding import Mesh
import packaging.requirements

from diffusiongemma import config as configs
from diffusiongemma import ops
from diffusiongemma.config import Config
from diffusiongemma.devices import memory
from diffusiongemma.devices import sharding
from diffusiongemma.diffusion import sampler
from diffusiongemma.errors import Error
from diffusiongemma.generation import engine
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import denoiser
from diffusiongemma.model import parameters
from diffusiongemma.ops import dispatch
from diffusiongemma.tools import hlo
from diffusiongemma.training import step as steps


class PlanError(Error, ValueError):
  """A topology that can't be compiled for; the message says what is missing."""


class TooLarge(PlanError):
  """A program that does not fit according to the compiler, whose message is
  included."""


class Chip(NamedTuple):
  """Specifications of a device, from its vendor.

  Attributes:
    memory: bytes.
    flops: peak of bfloat16 products, in FLOP/s.
    bandwidth: of the memory, in bytes/s.
    link: to all neighbours together, in bytes/s per direction.
  """

  memory: float
  flops: float
  bandwidth: float
  link: float


# From the vendors' pages: cloud.google.com/tpu/docs, nvidia.com. A device of
# tpu7x is half a chip. Links: ICI of TPUs, NVLink of GPUs.
CHIPS = {
  'v5e': Chip(16 * 2**30, 197e12, 819e9, 200e9),
  'v5p': Chip(95 * 2**30, 459e12, 2765e9, 600e9),
  'v6e': Chip(32 * 2**30, 918e12, 1640e9, 448e9),
  'tpu7x': Chip(96 * 2**30, 1153e12, 3690e9, 600e9),
  'h100': Chip(80e9, 989e12, 3352e9, 450e9),
  'h200': Chip(141e9, 989e12, 4800e9, 450e9),
}
GPUS_PER_HOST = 8


class Plan(NamedTuple):
  """Costs of a program, per device unless stated otherwise.

  Attributes:
    topology: the requested topology.
    program: 'train' or 'sample'.
    mesh: sizes of its axes.
    devices: number of devices.
    need: bytes of memory.
    limit: bytes that a device has, None if unknown.
    flops: of a step, all devices together.
    bytes_accessed: of memory, in a step; inner loops count once.
    collectives: by kind.
    kernels: number that a GPU launches in a step, inner loops counted once;
      None on other devices.
    compile_seconds: of this compilation, on this machine.
    seconds: of a step, a roofline estimate; None if the chip is unknown.
    bound_by: the limit in the estimate: FLOPs, memory or links.
    tokens: of a training step, or of the sampled canvases.
  """

  topology: str
  program: str
  mesh: dict[str, int]
  devices: int
  need: memory.Need
  limit: int | None
  flops: float
  bytes_accessed: float
  collectives: dict[str, hlo.Collective]
  kernels: int | None
  compile_seconds: float
  seconds: float | None
  bound_by: str | None
  tokens: int

  @property
  def fits(self) -> bool | None:
    """Whether the program fits in memory; None if unknown."""
    return None if self.limit is None else self.need.peak <= self.limit

  @property
  def tokens_per_second(self) -> float | None:
    """Estimated tokens per second; for sampling with `sampler.TYPICAL_STEPS`
    steps per canvas, without prefill and commit."""
    if self.seconds is None:
      return None
    passes = sampler.TYPICAL_STEPS if self.program == 'sample' else 1
    return self.tokens / (passes * self.seconds)


def plan(
  config: Config,
  topology: str,
  program: str = 'train',
  *,
  batch_size: int = 1,
  context: int = 8192,
) -> Plan:
  """Compiles `program` for `topology`.

  Args:
    config: network, mesh, and for training data and optimiser.
    topology: 'v5e:4x4', 'v5p:4x4x4', 'v6e:8x8', 'tpu7x:4x4x4', 'h100', 'h200',
      'h100x8' (one host), 'h100x16' (two), or 'local'.
    program: 'train' is a training step; 'sample' is the loop that writes a
      canvas, where a step is a denoising pass.
    batch_size: for sampling; for training it is in the config.
    context: context length for sampling.

  Raises:
    PlanError: the plugin for the topology is missing.
    ConfigError: there is no such topology, or the mesh does not match the
      devices or the network.
  """
  kind, devices = _devices(topology)
  mesh = sharding.make_mesh(config.mesh, devices)
  shape = tuple(mesh.shape.values())
  sharding.validate(config, shape, batch=program == 'train')
  if program == 'train':
    trace = functools.partial(steps.trace_step, config, mesh.abstract_mesh)
    lower = functools.partial(_lower_training, config, mesh)
    tokens = config.data.batch_size * config.data.sequence_length
  else:
    arguments = (config, batch_size, context)
    trace = functools.partial(_lower_sampling, *arguments, None)
    lower = functools.partial(_lower_sampling, *arguments, mesh)
    tokens = batch_size * config.diffusion.canvas_length
  flops = count_flops(trace())
  start = time.perf_counter()
  with lowering_for(mesh):
    lowered, inputs = lower()
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' in str(error):
        raise TooLarge(_too_large(error, topology)) from error
      raise PlanError(_why_not(error, topology)) from error
  seconds = time.perf_counter() - start
  need = memory.need_of(compiled, inputs)
  chip = CHIPS.get(kind)
  limit = int(chip.memory) if chip else memory.available(devices[0])
  text = compiled.as_text()
  collectives = hlo.collectives(text)
  on_gpu = devices[0].platform in ('gpu', 'cuda')
  costs = compiled.cost_analysis() or {}
  accessed = max(costs.get('bytes accessed', 0.0), sum(need.arrays.values()))
  estimate = bound_by = None
  if chip:
    times = {
      'FLOPs': flops / len(devices) / chip.flops,
      'memory': accessed / chip.bandwidth,
      'links': sum(kind.bytes for kind in collectives.values()) / chip.link,
    }
    bound_by = max(times, key=times.__getitem__)
    estimate = times[bound_by]
  return Plan(
    topology,
    program,
    dict(mesh.shape),
    len(devices),
    need,
    limit,
    flops,
    accessed,
    collectives,
    hlo.count_kernels(text) if on_gpu else None,
    seconds,
    estimate,
    bound_by,
    tokens,
  )


@contextlib.contextmanager
def lowering_for(mesh: Mesh) -> Iterator[None]:
  """Traces in the block are for the devices of a mesh, which need not exist."""
  platform = mesh.devices.flat[0].platform
  with (
    jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
    dispatch.compiling_for({'gpu': 'cuda'}.get(platform, platform)),
  ):
    yield


def _devices(topology: str) -> tuple[str, list[Any]]:
  """(kind of chip, descriptions of the devices)."""
  if topology == 'local':
    return 'local', jax.devices()
  kind, _, shape = topology.partition(':')
  gpu = re.fullmatch(r'(h100|h200)(?:x(\d+))?', topology)
  try:
    if gpu:
      number = int(gpu[2] or 1)
      hosts = max(1, number // GPUS_PER_HOST)
      if number > GPUS_PER_HOST and number % GPUS_PER_HOST:
        raise configs.ConfigError(
          f'{topology}: more than {GPUS_PER_HOST} GPUs come in hosts of '
          f'{GPUS_PER_HOST}.'
        )
      kind = gpu[1]
      # Without a driver, cuPTI can't say its version, and the plugin refuses
      # to initialise: findings/jax_cuda_plugin_without_driver.sh.
      os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
      target = importlib.resources.files('diffusiongemma.assets')
      description = topologies.get_topology_desc(
        '',
        'cuda',
        target_config=(target / f'{kind}.textproto').read_text(),
        topology=f'{hosts}x{number // hosts}x1',
      )
    elif kind in CHIPS and re.fullmatch(r'\d+(x\d+)+', shape):
      _check_libtpu()
      # There is no TPU here whose metadata could be queried.
      os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
      description = topologies.get_topology_desc(
        platform='tpu', topology_name=topology
      )
    else:
      raise configs.ConfigError(
        f'There is no topology {topology!r}; there are v5e:4x4, v5p:4x4x4, '
        'v6e:8x8, tpu7x:4x4x4, h100, h200, h100x8, h100x16 and local.'
      )
  except (configs.ConfigError, PlanError):
    raise
  except Exception as error:  # A missing plugin can raise anything.
    raise PlanError(_why_not(error, topology)) from error
  return kind, list(description.devices)


def _why_not(error: Exception, topology: str) -> str:
  """The message for a topology that can't be compiled for."""
  extra = 'cuda13' if topology.startswith(('h100', 'h200')) else 'tpu'
  reason = (str(error).splitlines() or [type(error).__name__])[0]
  return (
    f'{topology} cannot be compiled for here: {reason[:300]}\n'
    f"If the plugin is missing: pip install '.[{extra}]' where this project is."
  )


def _check_libtpu() -> None:
  """Raises `PlanError` for a version of libtpu that this jax does not support:
  a newer one fails or hangs inside of the compiler."""
  try:
    installed = importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:
    return
  wanted = [
    requirement
    for requirement in map(
      packaging.requirements.Requirement,
      importlib.metadata.requires('jax') or (),
    )
    if requirement.name == 'libtpu'
  ]
  if all(installed in requirement.specifier for requirement in wanted):
    return
  raise PlanError(
    f'libtpu {installed} is installed, but jax {jax.__version__} supports '
    f'libtpu{wanted[0].specifier}: '
    f"pip install 'jax[tpu]=={jax.__version__}'."
  )


def _too_large(error: Exception, topology: str) -> str:
  """The compiler's reason, without its list of buffers."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return f'{topology}: does not fit. The compiler: ' + ' '.join(lines[:3])


def _lower_training(config: Config, mesh: Mesh) -> Any:
  """(the training step lowered for a mesh, its inputs by group)."""
  return steps.lower_step(config, steps.abstract_state(config, mesh), mesh)


def _lower_sampling(
  config: Config, batch_size: int, context: int, mesh: Mesh | None
) -> Any:
  """The same for the loop that writes a canvas; without a mesh, its jaxpr."""
  model = config.model

  def inputs():
    params = denoiser.fresh_params(config)
    if model.vision is not None:
      params = {k: v for k, v in params.items() if k != 'vision'}
    cache = kv_cache.init_cache(model, batch_size, context)
    keys_B = sampler.row_keys(jax.random.key(0), batch_size)
    return params, cache, keys_B, jnp.zeros((batch_size,), jnp.bool_)

  params, cache, keys_B, done_B = jax.eval_shape(inputs)
  dtype = jnp.dtype(model.dtype)
  params = jax.tree.map(lambda x: x.update(dtype=dtype), params)
  parameters.check_not_stored(config.quantization)
  params = parameters.abstract_quantized(config.quantization, params)
  text = dataclasses.replace(
    config, model=dataclasses.replace(model, vision=None)
  )
  if mesh is None:
    return jax.make_jaxpr(engine.denoise_canvas, static_argnums=0)(
      text, params, cache, keys_B, done_B
    )
  params = sharding.with_sharding(params, mesh)
  cache = sharding.cache_with_sharding(cache, model, mesh)
  lowered = engine.denoise_canvas.lower(text, params, cache, keys_B, done_B)
  return lowered, {**parameters.by_part(params), 'cache': cache}


def count_flops(closed: Any) -> float:
  """FLOPs of all products in a jaxpr: 2 for each multiplication and addition.

  A scan counts times its length, a while loop once; a `cond` counts its most
  expensive branch, a choice by platform the plain implementation. Products of
  experts include padding rows. Unused results, such as gradients of frozen
  parameters, are removed, as by XLA.
  """
  jaxpr = getattr(closed, 'jaxpr', closed)
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  total = 0.0
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == 'dot_general':
      total += _flops_of_dot(eqn)
    elif name in ('jit', 'pjit') and params['name'] in FLOPS_OF:
      total += FLOPS_OF[params['name']](*(v.aval for v in eqn.invars))
    elif name == 'scan':
      total += params['length'] * count_flops(params['jaxpr'])
    elif name == 'cond':
      branches = params['branches']
      # A choice by platform names platforms; the last branch is the default.
      if params.get('branches_platforms'):
        branches = branches[-1:]
      total += max(map(count_flops, branches))
    else:
      for value in params.values():
        for inner in value if isinstance(value, (tuple, list)) else (value,):
          if hasattr(inner, 'eqns') or hasattr(inner, 'jaxpr'):
            total += count_flops(inner)
  return total


def _flops_of_dot(eqn) -> float:
  (contracted, _), _ = eqn.params['dimension_numbers']
  left, out = eqn.invars[0].aval, eqn.outvars[0].aval
  summed = math.prod(left.shape[axis] for axis in contracted)
  return 2.0 * math.prod(out.shape) * summed


# FLOPs of products of tiles, by the name of the jitted function.
FLOPS_OF: dict[str, Callable[..., float]] = {
  ops.experts.MULTIPLY: lambda x, w, *_: (
    2.0 * x.shape[0] * w.shape[1] * w.shape[2]
  ),
  ops.experts.ADD: lambda d, x, *_: 2.0 * x.shape[0] * d.shape[1] * x.shape[1],
}


def smaller(config: Config, program: str) -> list[tuple[str, Config]]:
  """Changes that need less memory, the smallest first: (what, the config)."""
  changes: list[tuple[str, Config]] = []
  if program == 'sample':
    return changes
  change = dataclasses.replace
  policies = ['none', *denoiser.KEPT]
  for remat in policies[policies.index(config.train.remat) + 1 :]:
    config = change(config, train=change(config.train, remat=remat))
    changes.append((f'config.train.remat={remat}', config))
  mesh = config.mesh
  if mesh.data == -1 or mesh.data % 2 == 0:
    data = -1 if mesh.data == -1 else mesh.data // 2
    more = change(mesh, fsdp=2 * mesh.fsdp, data=data)
    changes.append((f'config.mesh.fsdp={more.fsdp}', change(config, mesh=more)))
  if config.data.batch_size % 2 == 0:
    size = config.data.batch_size // 2
    less = change(config, data=change(config.data, batch_size=size))
    changes.append((f'config.data.batch_size={size}', less))
  return changes


def nearest_fit(config: Config, topology: str, program: str) -> str | None:
  """The first change of `smaller` with which the program fits, found by
  compiling; None if none is enough."""
  for what, changed in smaller(config, program):
    try:
      if plan(changed, topology, program).fits:
        return what
    except (configs.ConfigError, TooLarge):
      continue
  return None


def to_json(made: Plan) -> dict[str, Any]:
  """The plan as plain values; sizes in bytes, times in seconds."""
  return {
    'topology': made.topology,
    'program': made.program,
    'mesh': made.mesh,
    'devices': made.devices,
    'fits': made.fits,
    'peak_bytes': made.need.peak,
    'limit_bytes': made.limit,
    'array_bytes': made.need.arrays,
    'temporary_bytes': made.need.temporaries,
    'flops': made.flops,
    'bytes_accessed': made.bytes_accessed,
    'collectives': {
      kind: dataclasses.asdict(collective)
      for kind, collective in made.collectives.items()
    },
    'kernels': made.kernels,
    'compile_seconds': round(made.compile_seconds, 1),
    'estimated_seconds': made.seconds,
    'estimate_bound_by': made.bound_by,
    'estimated_tokens_per_second': made.tokens_per_second,
    'tokens': made.tokens,
  }


def to_text(made: Plan) -> str:
  """The plan as text for the terminal."""
  shape = ' x '.join(f'{axis} {size}' for axis, size in made.mesh.items())
  verdict = {True: 'fits', False: 'does not fit', None: 'unknown'}
  step = 'step of training' if made.program == 'train' else 'denoising step'
  lines = [
    f'{made.topology}: {made.devices} devices, {shape}; compiled in '
    f'{made.compile_seconds:.0f} s',
    '',
    'Memory of each device',
    memory.table(made.need, made.limit),
    f'  {verdict[made.fits]}',
    '',
    f'Each {step}',
    f'  FLOPs, all devices       {made.flops / 1e12:10.3f} T',
    f'  bytes from memory, each  {made.bytes_accessed / 1e9:10.3f} GB',
  ]
  for kind, collective in made.collectives.items():
    lines.append(
      f'  {kind:<18} {collective.count:5d} {collective.bytes / 1e9:10.3f} GB, '
      f'the largest {collective.largest / 1e9:.3f} GB'
    )
  if made.kernels is not None:
    lines.append(f'  kernels                  {made.kernels:10d}')
  if made.seconds:
    at = ''
    if made.program == 'sample':
      at = f' at {sampler.TYPICAL_STEPS} steps per canvas'
    lines.append(
      f'  estimate, not measured: {1e3 * made.seconds:.2f} ms, bound by '
      f'{made.bound_by}; {made.tokens_per_second:,.0f} tokens/s{at}'
    )
  return '\n'.join(lines)
