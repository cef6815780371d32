"""Adam with decoupled weight decay behind a clip of the global norm.

rate(n): linear from 0 over `warmup_steps`, then a cosine from the peak down
to `final_rate_fraction` of it at the last step, or constant.
"""

import jax
import jax.numpy as jnp
import optax

from diffusiongemma.config import OptimizerConfig


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


def make_optimizer(
  config: OptimizerConfig, steps: int
) -> optax.GradientTransformation:
  """The optimiser of a run of `steps` steps. Only matrices decay."""
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      make_schedule(config, steps),
      b1=config.b1,
      b2=config.b2,
      eps=config.epsilon,
      weight_decay=config.weight_decay,
      mask=lambda params: jax.tree.map(lambda x: jnp.ndim(x) > 1, params),
    ),
  )
