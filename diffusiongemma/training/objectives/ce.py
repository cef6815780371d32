"""Denoising loss plus a weighted left-to-right loss.

  loss = denoising_loss + ar_loss_weight * read_text    (diffusion/loss.py)

This is a loss: neither a likelihood nor a bound of one.
"""

from typing import Any

import jax

from diffusiongemma.config import Config
from diffusiongemma.diffusion import loss as loss_lib

DENOISES, LEAVES_ONE_OUT = True, False


def draw(
  key: jax.Array, batch: dict[str, Any], config: Config
) -> loss_lib.Noise:
  """Every random choice of a batch."""
  train = config.train
  return loss_lib.draw_noise(
    key,
    batch,
    config.diffusion.canvas_length,
    config.model.vocab_size,
    train.self_conditioning_probability,
    train.canvases,
    train.self_conditioning_passes,
  )


def loss(
  network: loss_lib.Network,
  batch: dict[str, Any],
  drawn: loss_lib.Noise,
  counts: loss_lib.Counts,
  config: Config,
  leave_one_out: bool = LEAVES_ONE_OUT,
) -> tuple[jax.Array, dict[str, Any]]:
  """The joint loss of one batch, see `objectives`.

  Returns:
    (loss in nats per token, metrics): `loss_denoise` and `loss_ar`, in nats per
    token; `accuracy`, the share of corrupted positions whose argmax is right.
  """
  C, weight = config.diffusion.canvas_length, config.train.ar_loss_weight
  loss_lib.check_batch(batch, C)
  loss_ar, cache, auxiliary = loss_lib.read_text(
    network, batch, C, counts, is_learnt=bool(weight)
  )
  loss_denoise, accuracy = loss_lib.denoising_loss(
    network, cache, batch, drawn, counts, leave_one_out
  )
  value = loss_denoise + weight * loss_ar
  metrics = {
    'loss': value,
    'loss_denoise': loss_denoise,
    'loss_ar': loss_ar,
    'accuracy': accuracy,
    'auxiliary': auxiliary,
  }
  return value, metrics
