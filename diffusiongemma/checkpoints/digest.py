"""A checksum of an array that does not depend on its sharding.

  word_i  = the bits of element i
  sum_s   = sum_i  mix(word_i ^ mix(i ^ salt_s))   mod 2^32,   s = 1, 2

A sum does not depend on the order, so the devices of an array on several
processes add up their shards, and no process ever holds all of it. The checksum
detects accidents, a flipped bit or a lost block, but not a deliberate change.
`mix` is the finaliser of MurmurHash3 (Appleby, public domain).
"""

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma import powers

_SALTS = (0x9E3779B9, 0x85EBCA6B)
_MOST_WORDS = 2**20  # Words of a host array that are summed at a time.


def digest(array: Any) -> str:
  """32 hexadecimal digits from an array's type, shape and bits.

  A collective if the array is sharded over several processes.
  """
  head = f'{array.dtype} {tuple(array.shape)}'
  if array.dtype == jnp.int4:  # Packed on some platforms, not on others.
    array = array.astype(jnp.int8)
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    sums = np.asarray(_sums_of_array(array))
  else:
    sums = _sums_of_host_array(np.asarray(array))
  text = f'{head} {sums[0]:08x}{sums[1]:08x}'
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def digests(tree: Any) -> dict[str, str]:
  """`{path of array: digest}`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): digest(leaf) for path, leaf in leaves}


def name_of(path: tuple[str, ...]) -> str:
  """The key in `digests` of the array at a path of nested dicts."""
  return jax.tree_util.keystr(tuple(map(jax.tree_util.DictKey, path)))


def _mix(x: jax.Array) -> jax.Array:
  """uint32 to uint32; every bit of the result depends on every bit of x."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _sums(words: jax.Array, index: jax.Array, counts: Any) -> jax.Array:
  """uint32 [2]: the two sums over the words where `counts` is true."""
  return jnp.stack(
    [
      jnp.sum(
        jnp.where(counts, _mix(words ^ _mix(index ^ jnp.uint32(salt))), 0),
        dtype=jnp.uint32,
      )
      for salt in _SALTS
    ]
  )


@jax.jit
def _sums_of_array(x: jax.Array) -> jax.Array:
  """The sums of a sharded array; elements of up to four bytes."""
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  size = x.dtype.itemsize
  words = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * size}'))
  index = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    stride = jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
    index += stride * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return _sums(words.astype(jnp.uint32), index, True)


@jax.jit
def _sums_of_piece(words: jax.Array, start: jax.Array, count: jax.Array):
  position = jnp.arange(len(words), dtype=jnp.uint32)
  return _sums(words, start + position, position < count)


def _sums_of_host_array(array: np.ndarray) -> np.ndarray:
  """The sums of a host array, piece by piece; an element of eight bytes is two
  words."""
  array = np.ascontiguousarray(array).reshape(-1)
  word_bytes = min(array.dtype.itemsize, 4)
  words = array.view(np.dtype(f'uint{8 * word_bytes}'))
  total = np.zeros(2, np.uint32)
  # A power of two, so that many shapes share few programs.
  size = min(_MOST_WORDS, powers.smallest_power_of_two(max(256, len(words))))
  for start in range(0, len(words), size):
    piece = np.zeros(size, np.uint32)
    count = min(size, len(words) - start)
    piece[:count] = words[start : start + count]
    first = np.uint32(start % 2**32)
    total += np.asarray(_sums_of_piece(piece, first, np.uint32(count)))
  return total
