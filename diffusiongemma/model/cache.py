"""The key-value cache: an argument and a return value, never hidden state.

  slot s of S holds the token at the newest position p with  p = s  (mod S)

A global layer has a slot for every token; a local layer has W slots and
overwrites the oldest, so that its memory does not grow with the text. Prefill
and commit write, each row at its own length; denoising only reads.
"""

import flax
import jax
import jax.numpy as jnp

from diffusiongemma import config as configs
from diffusiongemma.config import ModelConfig

# The length of a row for which the cache had no room: its text is lost, and
# nothing can be appended.
OVERFLOWED = -(2**30)


class KVCache(flax.struct.PyTreeNode):
  """One [B, S, K, H] pair per layer (S, K and H differ between layer kinds).

  Attributes:
    k: keys after norm and rotary, one array per layer.
    v: values after norm, one array per layer.
    length_B: int32, tokens read by each row; `OVERFLOWED` after a call for
      which there was no room.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  length_B: jax.Array


def init_cache(config: ModelConfig, batch_size: int, capacity: int) -> KVCache:
  """An empty cache for texts of up to `capacity` tokens. Raises `ConfigError`
  if `config` is not a `ModelConfig`."""
  configs.check_kind(config, ModelConfig)

  def empty(kind):
    heads, dim = kv_shape(config, kind)
    slots = capacity
    if kind == 'local':
      slots = min(config.sliding_window, capacity)
    return jnp.zeros((batch_size, slots, heads, dim), config.dtype)

  # A buffer for each, so that the cache can be donated.
  k, v = (tuple(map(empty, config.attention_pattern)) for _ in 'kv')
  return KVCache(k, v, jnp.zeros((batch_size,), jnp.int32))


def grow(config: ModelConfig, cache: KVCache, capacity: int) -> KVCache:
  """The cache with room for texts of at least `capacity` tokens.

  A layer with fewer slots than its window has a slot for every token, so that
  no token changes its slot.
  """
  empty = jax.eval_shape(
    lambda: init_cache(config, len(cache.length_B), capacity)
  )

  def pad(old_BSKH, new_BSKH):
    more = max(0, new_BSKH.shape[1] - old_BSKH.shape[1])
    return jnp.pad(old_BSKH, ((0, 0), (0, more), (0, 0), (0, 0)))

  return cache.replace(
    k=jax.tree.map(pad, cache.k, empty.k),
    v=jax.tree.map(pad, cache.v, empty.v),
  )


def room(config: ModelConfig, cache: KVCache) -> int | None:
  """Most tokens of a text in the cache; None if unlimited, because all layers
  are local and hold their windows."""
  slots = [
    k_BSKH.shape[1]
    for k_BSKH, kind in zip(cache.k, config.attention_pattern, strict=True)
    if kind == 'global' or k_BSKH.shape[1] < config.sliding_window
  ]
  return min(slots, default=None)


def advance(
  config: ModelConfig, cache: KVCache, length_B: jax.Array
) -> jax.Array:
  """int32 [B], the length of each row after `length_B` more tokens, or
  `OVERFLOWED`."""
  longer_B = cache.length_B + length_B.astype(jnp.int32)
  most = room(config, cache)
  if most is None:
    return longer_B
  fits_B = (cache.length_B >= 0) & (longer_B <= most)
  return jnp.where(fits_B, longer_B, OVERFLOWED)


def kv_shape(config: ModelConfig, kind: str) -> tuple[int, int]:
  """(K, H) of a 'local' or 'global' layer."""
  if kind == 'global':
    return config.num_global_kv_heads, config.global_head_dim
  return config.num_kv_heads, config.head_dim


def slot_positions(length_B: jax.Array, num_slots: int) -> jax.Array:
  """Position of the token in each slot, [B, S]; negative where empty."""
  newest_B1 = length_B[:, None] - 1
  age_BS = (newest_B1 - jnp.arange(num_slots)[None, :]) % num_slots
  return newest_B1 - age_BS


def write(
  slots_BSKH: jax.Array,
  new_BPKH: jax.Array,
  start_B: jax.Array,
  length_B: jax.Array,
) -> jax.Array:
  """Writes the first `length_B` of P new entries at positions `start_B`...

  If there are more entries than slots, the last are kept. Padding is not
  written.
  """
  slot_BP = slots_for(start_B, length_B, new_BPKH.shape[1], slots_BSKH.shape[1])

  @jax.vmap  # So that the partitioner sees independent rows.
  def put(slots_SKH, slot_P, new_PKH):
    return slots_SKH.at[slot_P].set(new_PKH, mode='drop', unique_indices=True)

  return put(slots_BSKH, slot_BP, new_BPKH.astype(slots_BSKH.dtype))


def slots_for(
  start_B: jax.Array, length_B: jax.Array, num_new: int, num_slots: int
) -> jax.Array:
  """The slot of each new token, [B, P], unique within a row.

  Padding, and tokens that later ones would overwrite, get slots past the end.
  """
  index_1P = jnp.arange(num_new)[None, :]
  kept_BP = index_1P < length_B[:, None]
  kept_BP &= index_1P >= length_B[:, None] - num_slots
  slot_BP = (start_B[:, None] + index_1P) % num_slots
  return jnp.where(kept_BP, slot_BP, num_slots + index_1P)
