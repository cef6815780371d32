"""What a training step carries: parameters, optimiser state and step."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from diffusiongemma.model import denoiser


@flax.struct.dataclass
class TrainState:
  """All that changes from step to step.

  Attributes:
    params: nested dict of arrays.
    opt_state: the optimiser's.
    step: int32, steps done.
  """

  params: Any
  opt_state: Any
  step: jax.Array


def init_train_state(
  model: denoiser.Denoiser,
  optimizer: optax.GradientTransformation,
  seed: int,
) -> TrainState:
  """A fresh state; the same seed gives the same parameters."""
  params = denoiser.init_params(model, jax.random.key(seed))
  opt_state = jax.jit(optimizer.init)(params)
  return TrainState(params, opt_state, jnp.zeros((), jnp.int32))
