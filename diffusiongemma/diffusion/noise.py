"""The forward process: tokens become uniform noise.

  q(z_t | x) = alpha(t) 1[z = x] + (1 - alpha(t)) / V,    alpha(t) = 1 - t

A corrupted position may draw the token that it had. At t = 1 no information is
left, and the canvas is a sample of the prior.
"""

import jax
import jax.numpy as jnp


def noise_schedule(t: jax.Array) -> jax.Array:
  """alpha(t): the probability that a token is kept at time t in [0, 1]."""
  return 1.0 - t


def prior_canvas(
  key: jax.Array, shape: tuple[int, ...], vocab_size: int
) -> jax.Array:
  """Uniformly random tokens, int32."""
  return jax.random.randint(key, shape, 0, vocab_size, jnp.int32)


def uniform_from_nearer_end(
  key: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
  """Uniform numbers in [0, 1], relative to the nearer end: float32 in
  [-1/2, 1/2].

  x >= 0 means x, and x < 0 means 1 + x. Both ends have the full precision of
  float32, down to 2^-64; `jax.random.uniform` has steps of 2^-23.
  """
  high, low = jax.random.bits(key, (2, *shape), jnp.uint32)
  distance = (high >> 1).astype(jnp.float32) * 2.0**-32
  distance += low.astype(jnp.float32) * 2.0**-64
  return jnp.where(high & 1, -distance, distance)


def corrupt(
  key: jax.Array, tokens_BL: jax.Array, t_BL: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
  """Samples z_t given x.

  Args:
    key: one key; every row and position draws its own noise.
    tokens_BL: int32, the clean canvas.
    t_BL: float32 in [0, 1], the time of each position, or [B, 1] of each row.
    vocab_size: V.

  Returns:
    (noisy canvas int32 [B, L], bool [B, L] of the redrawn positions).
  """
  keep_key, noise_key = jax.random.split(key)
  uniforms_BL = jax.random.uniform(keep_key, tokens_BL.shape, jnp.float32)
  corrupted_BL = uniforms_BL >= noise_schedule(t_BL)
  noise_BL = prior_canvas(noise_key, tokens_BL.shape, vocab_size)
  return jnp.where(corrupted_BL, noise_BL, tokens_BL), corrupted_BL
