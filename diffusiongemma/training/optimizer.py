"""Adam, Adafactor or Muon behind a clip of the global norm; frozen parameters.

rate(n): linear from 0 over `warmup_steps`, then a cosine from the peak down
to `final_rate_fraction` of it at the last step, or constant.

All state is float32, whatever the type of the parameters: a sum in bfloat16
stops growing at 256 times its increments, and a moving average never decays.
"""

import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from diffusiongemma import config as configs
from diffusiongemma.config import Config
from diffusiongemma.config import OptimizerConfig
from diffusiongemma.model import lora
from diffusiongemma.model import parameters
from diffusiongemma.ops.weights import Params


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Learning rate as a function of the step."""
  peak = config.peak_learning_rate
  warmup = min(config.warmup_steps, steps)
  if config.schedule == 'constant':
    return optax.join_schedules(
      [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)],
      [warmup],
    )
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=peak,
    warmup_steps=warmup,
    decay_steps=max(steps, warmup + 1),
    end_value=peak * config.final_rate_fraction,
  )


def make_optimizer(run: Config) -> optax.GradientTransformation:
  """The optimiser of a run. Only matrices decay; frozen parameters have no
  state."""
  config, frozen = run.optimizer, frozen_patterns(run)
  learn = _in_float32(
    optax.chain(
      _clip_by_global_norm(config.clip_norm),
      _make_rule(config),
      optax.add_decayed_weights(config.weight_decay, _is_matrix),
      optax.scale_by_learning_rate(make_schedule(config, run.train.steps)),
    )
  )
  if not frozen:
    return learn
  return optax.multi_transform(
    {'learn': learn, 'freeze': optax.set_to_zero()},
    lambda params: jax.tree.map(
      lambda frozen: 'freeze' if frozen else 'learn',
      is_frozen(params, frozen),
    ),
  )


def _in_float32(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """`inner` with gradients and parameters in float32. So are its state and its
  updates; `optax.apply_updates` rounds once, after the addition."""

  def init(params):
    return inner.init(to_float32(params))

  def update(gradients, state, params):
    return inner.update(to_float32(gradients), state, to_float32(params))

  return optax.GradientTransformation(init, update)


def to_float32(tree: Any) -> Any:
  """The arrays of a tree in float32."""
  return optax.tree.cast(tree, jnp.float32)


def _clip_by_global_norm(largest: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm` as one factor: with its `select` between plain
  and clipped gradients, XLA writes the latter to memory and reads both."""

  def clip(gradients, params):
    del params
    factor = jnp.minimum(1.0, largest / optax.global_norm(gradients))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)

  return optax.stateless(clip)


def _make_rule(config: OptimizerConfig) -> optax.GradientTransformation:
  """Gradients to update directions, before the sign and the learning rate."""
  if config.kind == 'adam':
    return optax.scale_by_adam(config.b1, config.b2, config.epsilon)
  if config.kind == 'adafactor':
    # Its epsilon is added to a square and must not underflow in float32.
    epsilon = max(config.epsilon**2, 1e-30)
    return optax.scale_by_factored_rms(epsilon=epsilon)
  descend = optax.contrib.muon(
    1.0,
    beta=config.b1,
    adam_b1=config.b1,
    adam_b2=config.b2,
    eps=config.epsilon,
    muon_weight_dimension_numbers=_matrix_axes,
    # Steps of the same RMS as Adam's, so that learning rates carry over.
    consistent_rms=0.2,
  )
  return optax.chain(descend, optax.scale(-1.0))


def frozen_patterns(run: Config) -> tuple[str, ...]:
  """Patterns of the parameters that a run does not train; vision is always
  among them, since no training data has images."""
  if run.lora.rank:
    return ()  # All adapters are trained.
  vision = ('vision/*',) if run.model.vision else ()
  return run.optimizer.freeze + vision


def is_frozen(params: Params, patterns: tuple[str, ...]) -> dict[str, Any]:
  """True for each parameter that matches a pattern, in the tree of `params`.

  Patterns are shell globs over paths such as `layer_00/router/proj`.

  Raises:
    ConfigError: a pattern matches nothing.
  """
  path_of = jax.tree_util.tree_map_with_path(
    lambda keys, _: '/'.join(key.key for key in keys), params
  )
  paths = jax.tree.leaves(path_of)
  for pattern in patterns:
    if not fnmatch.filter(paths, pattern):
      raise configs.ConfigError(
        f'config.optimizer.freeze: {pattern!r} names no parameter; they are '
        f'named like {paths[0]!r} and {paths[-1]!r}.'
      )
  return jax.tree.map(
    lambda path: any(fnmatch.fnmatchcase(path, p) for p in patterns), path_of
  )


def stop_frozen(run: Config, params: Params) -> Params:
  """`params` with `stop_gradient` on the frozen ones, so that their gradients
  are not computed."""
  patterns = frozen_patterns(run)
  if not patterns:
    return params
  return jax.tree.map(
    lambda x, frozen: jax.lax.stop_gradient(x) if frozen else x,
    params,
    is_frozen(params, patterns),
  )


def _is_matrix(params: Params) -> dict[str, Any]:
  return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)


def _matrix_axes(params: Params) -> dict[str, Any]:
  """Axes of the matrices that Muon orthogonalises; None for parameters that use
  Adam: vectors, the embedding and the router."""

  def axes(keys, x):
    path = tuple(key.key for key in keys)
    of_adapter = lora.matrix_axes(path, jnp.ndim(x))
    if of_adapter:
      return optax.contrib.MuonDimensionNumbers(*of_adapter)
    row = parameters.find(path)
    if row is None or not row.is_orthogonal:
      return None
    return optax.contrib.MuonDimensionNumbers(row.inputs, row.outputs)

  return jax.tree_util.tree_map_with_path(axes, params)
