"""The loss of an objective, as training computes it, of any network."""

import jax

from diffusiongemma import config as configs
from diffusiongemma.diffusion import loss
from diffusiongemma.training import objectives


def joint_loss(
  network: loss.Network,
  batch: dict,
  drawn: loss.Noise,
  ar_loss_weight: float,
  *,
  objective: str = 'ce',
  counts: loss.Counts | None = None,
) -> tuple[jax.Array, dict]:
  """(loss, metrics) of one batch."""
  C = drawn.canvas_BL.shape[1] // drawn.start_BK.shape[1]
  config = configs.Config(
    diffusion=configs.DiffusionConfig(canvas_length=C),
    train=configs.TrainConfig(
      objective=objective, ar_loss_weight=ar_loss_weight
    ),
  )
  counts = counts or loss.count(batch, drawn)
  compute = objectives.find(objective).loss
  return compute(network, batch, drawn, counts, config)
