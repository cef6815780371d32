"""One training step: gradients, update, and compilation.

  state, metrics = train_step(state, batch)       jitted, the state donated

Everything random is a function of the seed and the step. The step is compiled
for a mesh from shapes only, so that its memory is known before anything is
allocated, also for devices that are not attached.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import Mesh

from diffusiongemma import ops
from diffusiongemma.config import Config
from diffusiongemma.devices import memory
from diffusiongemma.devices import sharding
from diffusiongemma.diffusion import loss
from diffusiongemma.generation import network as network_lib
from diffusiongemma.model import moe
from diffusiongemma.ops.weights import Params
from diffusiongemma.training import data
from diffusiongemma.training import objectives
from diffusiongemma.training import optimizer as optimizers
from diffusiongemma.training import train_state


def make_train_step(
  config: Config, shardings: Any = None, rows_at_once: int | None = None
):
  """The jitted (state, batch, base) -> (state, metrics) of a run.

  The state is donated: use the returned one. It is sharded by `shardings`; the
  metrics are replicated. For `rows_at_once` see `compute_gradients`.
  """
  optimizer = optimizers.make_optimizer(config)
  objective = objectives.find(config.train.objective)
  seed = jax.random.key(config.train.seed)
  out_shardings = shardings and (shardings, None)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=out_shardings)
  def train_step(state, batch, base=None):
    key = jax.random.fold_in(seed, state.step)
    drawn = objective.draw(key, batch, config)
    gradients, metrics = compute_gradients(
      config, state.params, batch, drawn, base, rows_at_once
    )
    state, norm = train_state.apply_gradients(
      config, optimizer, state, gradients, metrics['loss']
    )
    metrics['gradient_norm'] = norm
    metrics['bad_steps'] = state.health.bad
    metrics['bad_in_row'] = state.health.bad_in_row
    return state, metrics

  return train_step


def abstract_state(config: Config, mesh: Mesh) -> train_state.TrainState:
  """Shapes, types and shardings of a run's state."""
  return sharding.with_sharding(train_state.abstract_state(config), mesh)


def lower_step(
  config: Config, abstract: train_state.TrainState, mesh: Mesh
) -> tuple[jax.stages.Lowered, dict[str, Any]]:
  """(the lowered training step for a mesh, its abstract inputs by group); to be
  called within `jax.set_mesh(mesh)`. Nothing is allocated."""
  return _lower(_step_of(config, abstract), config, abstract, mesh)


def _step_of(config: Config, abstract: train_state.TrainState):
  """The jitted training step, its state sharded as `abstract` is."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return make_train_step(config, shardings)


def _lower(train_step, config, abstract, mesh):
  """`lower_step` of this function."""
  base = train_state.abstract_base(config)
  base = sharding.with_sharding(base, mesh)
  batch = data.abstract_batch(config.data, config.diffusion.canvas_length)
  by_row = sharding.batch_sharding(mesh)
  batch = jax.tree.map(lambda x: x.update(sharding=by_row), batch)
  lowered = train_step.lower(abstract, batch, base)
  inputs = {
    'parameters': (base, abstract.params),
    'optimiser and counts': (abstract.opt_state, abstract.health),
    'running mean': abstract.ema,
    'batch': batch,
  }
  return lowered, {k: v for k, v in inputs.items() if jax.tree.leaves(v)}


def trace_step(config: Config, mesh: AbstractMesh) -> Any:
  """The training step as a jaxpr, for the whole batch on one device, with as
  many self-conditioning passes as on all devices of the mesh together."""
  abstract = train_state.abstract_state(config)
  base = train_state.abstract_base(config)
  batch = data.abstract_batch(config.data, config.diffusion.canvas_length)
  with jax.sharding.use_abstract_mesh(mesh):
    rows = _rows_at_once(config, config.data.batch_size)
  step = make_train_step(config, rows_at_once=rows)
  return jax.make_jaxpr(step)(abstract, batch, base)


def _rows_at_once(config: Config, batch_size: int) -> int:
  """Rows of a batch that each device of the mesh processes at once."""
  rows = batch_size // config.train.accumulate_steps
  with sharding.activate(config.model, rows):
    return rows // ops.parallel.parts('batch')


def compile_step(
  config: Config, abstract: train_state.TrainState, mesh: Mesh
) -> Callable[..., Any]:
  """The training step, compiled for the mesh's devices; see `make_train_step`.

  Raises:
    ConfigError: the step does not fit in their memory; the message is a table.
  """
  limit = memory.available(mesh.local_devices[0])
  size = memory.bytes_on_a_device(abstract)
  memory.check(memory.Need({'parameters and optimiser': size}, 0, size), limit)
  train_step = _step_of(config, abstract)
  lowered, inputs = _lower(train_step, config, abstract, mesh)
  memory.check(memory.need_of(lowered.compile(), inputs), limit)
  # Not the compiled program, which on a CPU refuses the committed int4 arrays
  # of a quantised base (jax 0.10.2). The jitted function has it in its cache.
  return train_step


def compute_gradients(
  config: Config,
  params: Params,
  batch: dict[str, Any],
  drawn: loss.Noise,
  base: Params | None = None,
  rows_at_once: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Gradients and metrics of a batch, accumulated over micro-batches.

  Micro-batches use the noise of the whole batch and divide by its counts, so
  that the mean of their losses and gradients is that of the whole batch. Only
  rows that a device processes at once can share a self-conditioning pass:
  `rows_at_once` rows, by default those of a device of this mesh.
  """
  train, objective = config.train, objectives.find(config.train.objective)
  num_parts = train.accumulate_steps
  counts = jax.tree.map(lambda n: n / num_parts, loss.count(batch, drawn))
  rows = rows_at_once or _rows_at_once(config, len(drawn.start_BK))
  drawn = drawn.replace(group_size=math.gcd(drawn.group_size, rows))

  def loss_fn(params, batch, drawn):
    params = optimizers.stop_frozen(config, params)
    params = train_state.network_params(config, params, base)
    network = network_lib.bind(config, params, train.remat)
    value, metrics = objective.loss(network, batch, drawn, counts, config)
    routings = metrics.pop('auxiliary')
    metrics.update(moe.routing_statistics(routings, batch['length_B']))
    return value, metrics

  gradient_fn = jax.grad(loss_fn, has_aux=True)
  if num_parts == 1:
    return gradient_fn(params, batch, drawn)

  def add_part(total, part):
    new = gradient_fn(params, *part)
    new = optimizers.to_float32(new)
    return jax.tree.map(lambda a, b: a + b / num_parts, total, new), None

  split = jax.tree.map(
    lambda x: jnp.reshape(x, (num_parts, -1, *x.shape[1:])), (batch, drawn)
  )
  first = jax.tree.map(lambda x: x[0], split)
  shapes = jax.eval_shape(gradient_fn, params, *first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
  total, _ = jax.lax.scan(add_part, zeros, split)
  return total
