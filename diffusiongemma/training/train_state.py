"""The training state, and its items in a checkpoint.

item params      for sampling: the parameters, or their moving average
item opt_state   the rest: optimiser, health, parameters if there is an average

With `config.lora`, "the parameters" are the adapters; the weights that they
adapt are not part of the state.
"""

from typing import Any

import flax
from flax import traverse_util
import jax
import jax.numpy as jnp
import optax

from diffusiongemma import ops
from diffusiongemma.checkpoints import native
from diffusiongemma.config import Config
from diffusiongemma.devices import sharding
from diffusiongemma.model import denoiser
from diffusiongemma.model import lora
from diffusiongemma.model import parameters
from diffusiongemma.ops.weights import Params
from diffusiongemma.runs import source as sources
from diffusiongemma.training import optimizer as optimizers


class Health(flax.struct.PyTreeNode):
  """Statistics of good and skipped steps.

  Attributes:
    mean_norm: float32, moving average of the gradient norm of good steps.
    bad_in_row: int32, steps skipped since the last good one.
    bad: int32, steps skipped.
  """

  mean_norm: jax.Array
  bad_in_row: jax.Array
  bad: jax.Array


class TrainState(flax.struct.PyTreeNode):
  """Everything that changes from step to step.

  Attributes:
    params: nested dict of the trained arrays.
    opt_state: state of the optimiser.
    health: statistics of skipped steps.
    step: int32, steps done, skipped ones included.
    ema: moving average of `params`, None if it is off.
  """

  params: Any
  opt_state: Any
  health: Health
  step: jax.Array
  ema: Any = None


def fresh_params_at(config: Config, where: native.ShardingOf) -> Params:
  """Random parameters, sharded as `where` says."""
  abstract = denoiser.abstract_params(config.model)
  shardings = jax.tree.map(
    lambda x: x.sharding, sharding.placed(abstract, where)
  )
  return jax.jit(
    lambda: denoiser.fresh_params(config), out_shardings=shardings
  )()


def init_train_state(
  config: Config, params: Params | None = None
) -> TrainState:
  """The state before the first step, with these parameters or random ones. The
  state holds `params` itself, not a copy."""
  if params is None:
    params = denoiser.fresh_params(config)
  if config.lora.rank:
    _, adapter_key = jax.random.split(jax.random.key(config.train.seed))
    params = lora.init_adapters(config.lora, params, adapter_key)
  optimizer = optimizers.make_optimizer(config)
  # A buffer for each: all of them are donated to the first step.
  bad_in_row, bad, step = (jnp.zeros((), jnp.int32) for _ in range(3))
  return TrainState(
    params,
    jax.jit(optimizer.init)(params),
    Health(jnp.zeros(()), bad_in_row, bad),
    step,
    _in_float32(params) if config.train.ema_decay else None,
  )


def abstract_state(config: Config) -> TrainState:
  """Shapes and types of a run's state; nothing is computed."""
  return jax.eval_shape(lambda: init_train_state(config))


def _in_float32(params: Params) -> Params:
  """A float32 copy, in which small changes are not rounded away."""
  return jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)


def abstract_base(config: Config) -> Params | None:
  """Shapes and types of the weights that adapters adapt; None if the run has no
  adapters."""
  if not config.lora.rank:
    return None
  base = denoiser.abstract_params(config.model)
  if not parameters.has_stored(config.quantization):
    return parameters.abstract_quantized(config.quantization, base)
  types = sources.open_source(config.train.init_from).arrays().types
  stored = parameters.from_stored(traverse_util.unflatten_dict(types))
  is_leaf = lambda w: isinstance(w, ops.weights.Leaf)
  return jax.tree.map(
    lambda w, plain: w if is_leaf(w) else plain, stored, base, is_leaf=is_leaf
  )


def network_params(
  config: Config, learnt: Params, base: Params | None
) -> Params:
  """The parameters of the network: `learnt`, or with `config.lora` the `base`
  with the adapters `learnt`."""
  return learnt if base is None else lora.attach(config.lora, base, learnt)


def apply_gradients(
  config: Config,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  gradients: Params,
  loss: jax.Array,
) -> tuple[TrainState, jax.Array]:
  """The state after a step, and the norm of its gradient.

  If the loss or the gradient is not finite, or the gradient is a spike, only
  the counts change.
  """
  train, health = config.train, state.health
  norm = optax.global_norm(optimizers.to_float32(gradients))
  good = jnp.isfinite(norm) & jnp.isfinite(loss)
  if train.spike_factor:
    known = health.mean_norm > 0
    good &= ~known | (norm <= train.spike_factor * health.mean_norm)
  updates, opt_state = optimizer.update(
    gradients, state.opt_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  ema = state.ema
  if ema is not None:
    ema = optax.incremental_update(
      optimizers.to_float32(params), ema, 1 - train.ema_decay
    )
  mean_norm = jnp.where(
    health.mean_norm > 0, 0.99 * health.mean_norm + 0.01 * norm, norm
  )
  zero = jnp.zeros((), jnp.int32)
  moved = state.replace(
    params=params,
    opt_state=opt_state,
    ema=ema,
    health=Health(mean_norm, zero, health.bad),
  )
  stayed = state.replace(
    health=Health(health.mean_norm, health.bad_in_row + 1, health.bad + 1)
  )
  state = jax.tree.map(lambda a, b: jnp.where(good, a, b), moved, stayed)
  return state.replace(step=state.step + 1), norm


def to_items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
  """(`params`, `opt_state`) as a checkpoint holds them."""
  rest = {'optimizer': state.opt_state, 'health': state.health}
  if state.ema is None:
    return state.params, rest
  return state.ema, {**rest, 'params': state.params}


def from_items(step: int, params: Params, rest: dict[str, Any]) -> TrainState:
  """The inverse of `to_items`."""
  return TrainState(
    rest.get('params', params),
    rest['optimizer'],
    rest['health'],
    jnp.asarray(step, jnp.int32),
    params if 'params' in rest else None,
  )
