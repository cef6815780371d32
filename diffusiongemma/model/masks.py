"""Every attention mask of the model, as data. True: the query sees the key.

Slot j of the cache holds the token at position j, so a mask needs lengths
only. Prefill of `a b c d`, window W = 2 (rows are queries, columns keys):

      global       local          a row sees nothing after itself, so the
    a x . . .    a x . . .        right padding of a shorter prompt is seen
    b x x . .    b x x . .        by padding alone
    c x x x .    c . x x .
    d x x x x    d . . x x

Denoising the canvas `1 2 3` after the prefix `a b c d`, W = 3:

      a b c d 1 2 3                 a b c d 1 2 3
    1 x x x x x x x   global      1 . . x x x x x   local: the last W - 1 of
    2 x x x x x x x               2 . . x x x x x   the prefix, the same for
    3 x x x x x x x               3 . . x x x x x   every canvas position
"""

import jax
import jax.numpy as jnp


def prefill_mask(
  start_B: jax.Array, num_queries: int, num_keys: int, window: int | None
) -> jax.Array:
  """Causal mask [B, P, S] of queries at positions `start_B + 0 .. P-1`.

  Args:
    start_B: int32, position of the first query.
    num_queries: P.
    num_keys: S, slots of the cache.
    window: keys a query sees, itself included; None is all (global).
  """
  query_BP1 = start_B[:, None, None] + jnp.arange(num_queries)[None, :, None]
  key_11S = jnp.arange(num_keys)[None, None, :]
  mask_BPS = key_11S <= query_BP1
  if window is not None:
    mask_BPS &= key_11S > query_BP1 - window
  return mask_BPS


def prefix_mask(
  length_B: jax.Array, num_keys: int, window: int | None
) -> jax.Array:
  """What a canvas sees of its prefix: [B, 1, S], the same for all L queries.

  A local layer keeps the last W - 1 tokens (the cache of the Hugging Face
  implementation does; Google's mask keeps W).
  """
  key_11S = jnp.arange(num_keys)[None, None, :]
  length_B11 = length_B[:, None, None]
  mask_B1S = key_11S < length_B11
  if window is not None:
    mask_B1S &= key_11S >= length_B11 - (window - 1)
  return mask_B1S


def denoise_mask(
  length_B: jax.Array, num_keys: int, canvas_length: int, window: int | None
) -> jax.Array:
  """The prefix, then the whole canvas: [B, 1, S + L]."""
  prefix_B1S = prefix_mask(length_B, num_keys, window)
  canvas_B1L = jnp.ones((length_B.shape[0], 1, canvas_length), bool)
  return jnp.concatenate([prefix_B1S, canvas_B1L], axis=-1)
