"""Sampler strategies: plain functions from a prediction to the next canvas.

  strategy(config, canvas_BL, prediction, time, drawn)
    -> (canvas_BL, accepted_BL, draft_BL | None)

A draft is the text so far. None means the most probable tokens, and that a row
may converge; with another draft all steps are made.

Step n of N..1 goes from time t = n/N to s = (n-1)/N; rows may be at different
steps, see `sampling.Time`. The first three accept some positions, which take
their sample, and redraw all others; positions accepted before have no
privilege. Pinned positions have negative confidence and entropy 0. `ancestral`
follows the reverse process itself:

  q(x_s | x_t, x_0) ~ q(x_t | x_s) q(x_s | x_0),   x_0 = sample
  q(x_s | x_0) = alpha_s 1[x_s = x_0] + (1 - alpha_s) / V,   alpha_t = 1 - t
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusiongemma import fields
from diffusiongemma.config import ConfigError
from diffusiongemma.config import DiffusionConfig

Strategy = Callable[..., tuple[jax.Array, jax.Array, jax.Array | None]]


def entropy_bound(config: DiffusionConfig, canvas_BL, prediction, time, drawn):
  """Accepts the k lowest entropies for which the sum of all but the largest is
  at most `config.entropy_bound` nats, a bound on how much the accepted tokens
  can depend on each other. One is always accepted.

  Source: Ben-Hamu et al., https://arxiv.org/abs/2505.24857.
  """
  del canvas_BL, time
  order_BL = jnp.argsort(prediction.entropy_BL, axis=-1)
  sorted_BL = jnp.take_along_axis(prediction.entropy_BL, order_BL, axis=-1)
  kept_BL = jnp.cumsum(sorted_BL, axis=-1) - sorted_BL <= config.entropy_bound
  accepted_BL = jnp.take_along_axis(kept_BL, _rank(order_BL), axis=-1)
  return renoise(accepted_BL, prediction, drawn)


def confidence(config: DiffusionConfig, canvas_BL, prediction, time, drawn):
  """Accepts positions whose most probable token has at least the probability
  `config.accept_confidence`, and always the most confident one."""
  del canvas_BL, time
  best_BL = _rank(_most_confident_first(prediction)) == 0
  accepted_BL = prediction.confidence_BL >= config.accept_confidence
  return renoise(accepted_BL | best_BL, prediction, drawn)


def top_k_confident(
  config: DiffusionConfig, canvas_BL, prediction, time, drawn
):
  """Accepts the most confident positions; their number grows linearly with the
  steps, to all at the last."""
  del config, canvas_BL
  n_B1, N_B1 = time
  free_B1 = jnp.sum(prediction.confidence_BL >= 0, axis=-1, keepdims=True)
  k_B1 = -(-free_B1 * (N_B1 - n_B1 + 1) // N_B1)
  accepted_BL = _rank(_most_confident_first(prediction)) < k_B1
  return renoise(accepted_BL, prediction, drawn)


def ancestral(config: DiffusionConfig, canvas_BL, prediction, time, drawn):
  """Draws from the posterior of the uniform process, exactly if the network is
  exact: each position takes its sample, keeps its token, or is redrawn.

  Positions that hold their sample are accepted. The canvas itself is the draft,
  at the end a sample of the text, and no row stops early.
  """
  del config
  (n_B1, N_B1), V = time, drawn.vocab_size
  s, t = (n_B1 - 1) / N_B1, n_B1 / N_B1
  kept = (1 - t) / (1 - s)  # alpha_t / alpha_s, the share kept from s to t.
  same_BL = prediction.sample_BL == canvas_BL
  # The posterior as a mixture of x_t, x_0 and the uniform distribution over
  # all V tokens, each weight times V.
  anew = (1 - kept) * s
  take_BL = jnp.where(same_BL, 0.0, (1 - kept) * (1 - s))
  stay_BL = kept * s + jnp.where(
    same_BL, V * kept * (1 - s) + (1 - kept) * (1 - s), 0.0
  )
  point_BL = drawn.choice_BL * (anew + take_BL + stay_BL)
  next_BL = jnp.where(point_BL < take_BL, prediction.sample_BL, drawn.tokens_BL)
  stays_BL = (point_BL >= take_BL) & (point_BL < take_BL + stay_BL)
  next_BL = jnp.where(stays_BL, canvas_BL, next_BL)
  return next_BL, next_BL == prediction.sample_BL, next_BL


STRATEGIES = {
  'entropy_bound': entropy_bound,
  'confidence': confidence,
  'top_k_confident': top_k_confident,
  'ancestral': ancestral,
}


def find(name: str) -> Strategy:
  """The strategy of this name. Raises `ConfigError` if there is none."""
  if name not in STRATEGIES:
    raise ConfigError(
      f'{fields.unknown_name(name, list(STRATEGIES))} There are '
      f'{", ".join(STRATEGIES)}.'
    )
  return STRATEGIES[name]


def renoise(accepted_BL: jax.Array, prediction, drawn):
  """The next canvas: samples where accepted, new uniform tokens elsewhere."""
  canvas_BL = jnp.where(accepted_BL, prediction.sample_BL, drawn.tokens_BL)
  return canvas_BL, accepted_BL, None


def _most_confident_first(prediction) -> jax.Array:
  """Positions sorted by confidence, ties by position."""
  return jnp.argsort(-prediction.confidence_BL, axis=-1)


def _rank(order_BL: jax.Array) -> jax.Array:
  """The rank of each position in an order."""
  return jnp.argsort(order_BL, axis=-1)
