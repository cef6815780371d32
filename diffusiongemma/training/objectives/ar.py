"""Left-to-right loss only; the denoiser is not trained.

loss = ar_loss_weight * read_text    (diffusion/loss.py)
"""

from typing import Any

import jax
import jax.numpy as jnp

from diffusiongemma.config import Config
from diffusiongemma.diffusion import loss as loss_lib
from diffusiongemma.training.objectives import ce

DENOISES, LEAVES_ONE_OUT = False, False
draw = ce.draw


def loss(
  network: loss_lib.Network,
  batch: dict[str, Any],
  drawn: loss_lib.Noise,
  counts: loss_lib.Counts,
  config: Config,
) -> tuple[jax.Array, dict[str, Any]]:
  """The autoregressive loss of one batch, see `objectives`; metrics as those
  of `ce`."""
  del drawn
  C, weight = config.diffusion.canvas_length, config.train.ar_loss_weight
  loss_lib.check_batch(batch, C)
  loss_ar, _, auxiliary = loss_lib.read_text(network, batch, C, counts)
  zero = jnp.zeros((), jnp.float32)
  value = zero + weight * loss_ar
  metrics = {
    'loss': value,
    'loss_denoise': zero,
    'loss_ar': loss_ar,
    'accuracy': zero,
    'auxiliary': auxiliary,
  }
  return value, metrics
