"""Every attention mask of the model, as data. True: the query sees the key.

A mask needs positions only. Prefill of `a b c d`, window W = 2 (rows are
queries, columns keys); on the right, `b c` are soft tokens of one image:

      global      local       image   global      local
    a x . . .   a x . . .           a x . . .   a x . . .    a text row sees
    b x x . .   b x x . .           b x x x .   b x x x .    nothing after
    c x x x .   c . x x .           c x x x .   c . x x .    itself, so right
    d x x x x   d . . x x           d x x x x   d . . x x    padding is unseen

Denoising the canvas `1 2 3` after the prefix `a b c d`, W = 3:

      a b c d 1 2 3                 a b c d 1 2 3
    1 x x x x x x x   global      1 . . x x x x x   local: the last W - 1 of
    2 x x x x x x x               2 . . x x x x x   the prefix, the same for
    3 x x x x x x x               3 . . x x x x x   every canvas position

Training on every canvas of a text at once, here `c d` and `e f` after the
prompt `a b`: the noisy `1 2` and `3 4` each see the clean text before them.

      a b c d e f 1 2 3 4
    1 x x . . . . x x . .
    2 x x . . . . x x . .
    3 x x x x . . . . x x
    4 x x x x . . . . x x

Prefill of two documents packed into a row, `a b` and `c d e`; a canvas after
`d` would see `c d` and itself:

      a b c d e
    a x . . . .
    b x x . . .
    c . . x . .
    d . . x x .
    e . . x x x
"""

import flax
import jax
import jax.numpy as jnp


class Mask(flax.struct.PyTreeNode):
  """An attention mask, and what is known of its structure.

  Attributes:
    seen_BLS: bool, True: the query sees the key. L may be 1, for a mask that is
      the same for all queries.
    window: if query i is known to see only keys i - window < j <= i, that
      window (L for all keys before it); else None.
    filled_B: int32, number of leading slots of the cache that are filled; None
      without a cache.
  """

  seen_BLS: jax.Array
  filled_B: jax.Array | None = None
  window: int | None = flax.struct.field(pytree_node=False, default=None)


def prefill_mask(
  start_B: jax.Array,
  cached_BS: jax.Array,
  num_queries: int,
  window: int | None,
  image_BP: jax.Array | None = None,
  first_BP: jax.Array | None = None,
) -> Mask:
  """Causal mask [B, P, S + P] over the cache, then the new tokens themselves.

  Args:
    start_B: int32, position of the first new token.
    cached_BS: int32, position held by each slot of the cache, negative where
      empty; S may be 0.
    num_queries: P.
    window: keys that a query sees, itself included; None is all (global).
    image_BP: int32, the image of each new token, -1 for text.
      Tokens of one image see each other, whatever the window.
    first_BP: int32, the first position that each new token may see.
  """
  new_BP = start_B[:, None] + jnp.arange(num_queries)[None, :]
  key_B1S = jnp.concatenate([cached_BS, new_BP], axis=1)[:, None, :]
  query_BP1 = new_BP[:, :, None]
  mask_BPS = (key_B1S >= 0) & (key_B1S <= query_BP1)
  if window is not None:
    mask_BPS &= key_B1S > query_BP1 - window
  if image_BP is not None:
    text_BS = jnp.full_like(cached_BS, -1)
    image_B1S = jnp.concatenate([text_BS, image_BP], axis=1)[:, None, :]
    mask_BPS |= (image_BP[:, :, None] == image_B1S) & (image_B1S >= 0)
  if first_BP is not None:
    mask_BPS &= key_B1S >= first_BP[:, :, None]
  is_afresh = cached_BS.shape[1] == 0 and image_BP is None
  return Mask(
    mask_BPS,
    _filled(cached_BS),
    (window or num_queries) if is_afresh else None,
  )


def denoise_mask(
  start_BK: jax.Array,
  cached_BS: jax.Array,
  canvas_length: int,
  window: int | None,
  first_BK: jax.Array | None = None,
) -> Mask:
  """Mask of canvases, which see the text before them and themselves.

  A local layer sees the last W - 1 tokens before the canvas (as many as the
  cache of the Hugging Face implementation holds; Google's mask has W).

  Args:
    start_BK: int32, position of the first token of each canvas.
    cached_BS: int32, position held by each slot of the cache, negative where
      empty. It may hold tokens after a canvas.
    canvas_length: C.
    window: W; None is all (global).
    first_BK: int32, the first position that each canvas may see.

  Returns:
    [B, 1, S + C] for a single canvas, whose tokens all see the same keys; else
    [B, K * C, S + K * C], where no canvas sees another.
  """
  (B, K), C = start_BK.shape, canvas_length
  key_B1S, start_BK1 = cached_BS[:, None, :], start_BK[:, :, None]
  prefix_BKS = (key_B1S >= 0) & (key_B1S < start_BK1)
  if window is not None:
    prefix_BKS &= key_B1S >= start_BK1 - (window - 1)
  if first_BK is not None:
    prefix_BKS &= key_B1S >= first_BK[:, :, None]
  if K == 1:
    prefix_BLS, own_BLL = prefix_BKS, jnp.ones((B, 1, C), bool)
  else:
    canvas_L = jnp.arange(K * C) // C
    own_BLL = jnp.tile(canvas_L[:, None] == canvas_L, (B, 1, 1))
    prefix_BLS = jnp.repeat(prefix_BKS, C, axis=1)
  seen_BLS = jnp.concatenate([prefix_BLS, own_BLL], axis=-1)
  return Mask(seen_BLS, _filled(cached_BS))


def _filled(cached_BS: jax.Array) -> jax.Array | None:
  """`Mask.filled_B`; a cache fills its slots in order."""
  if not cached_BS.shape[1]:
    return None
  return jnp.sum(cached_BS >= 0, axis=1, dtype=jnp.int32)
