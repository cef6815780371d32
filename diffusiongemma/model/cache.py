"""The key-value cache: an argument and a return value, never hidden state.

Slot j of layer i holds the key and value of the token at position j. Prefill
and commit write at each row's own length; denoising only reads. What lies
past a row's length is padding that no mask lets through.
"""

import flax
import jax
import jax.numpy as jnp

from diffusiongemma.config import ModelConfig


@flax.struct.dataclass
class KVCache:
  """One [B, S, K, H] pair per layer (K and H differ between layer kinds).

  Attributes:
    k: keys after norm and rotary, one array per layer.
    v: values after norm, one array per layer.
    length_B: int32, tokens held by each row.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  length_B: jax.Array

  @property
  def capacity(self) -> int:
    """S, the slots of a row."""
    return self.k[0].shape[1]


def init_cache(config: ModelConfig, batch_size: int, capacity: int) -> KVCache:
  """An empty cache of `capacity` token slots a row."""

  def empty(kind):
    heads, dim = kv_shape(config, kind)
    return jnp.zeros((batch_size, capacity, heads, dim), config.dtype)

  layers = tuple(empty(kind) for kind in config.attention_pattern)
  return KVCache(layers, layers, jnp.zeros((batch_size,), jnp.int32))


def kv_shape(config: ModelConfig, kind: str) -> tuple[int, int]:
  """(K, H) of a 'local' or 'global' layer."""
  if kind == 'global':
    return config.num_global_kv_heads, config.global_head_dim
  return config.num_kv_heads, config.head_dim


def write(
  slots_BSKH: jax.Array, new_BPKH: jax.Array, start_B: jax.Array
) -> jax.Array:
  """Puts P new entries at slots `start_B + 0 .. P-1` of each row.

  The caller provides room: past the end, `dynamic_update_slice` would move
  the block to the left.
  """

  def write_row(slots_SKH, new_PKH, start):
    return jax.lax.dynamic_update_slice(slots_SKH, new_PKH, (start, 0, 0))

  new_BPKH = new_BPKH.astype(slots_BSKH.dtype)
  return jax.vmap(write_row)(slots_BSKH, new_BPKH, start_B)
