"""A checksum of an array that does not depend on where its parts lie.

  word_i  = the bits of element i
  sum_s   = sum_i  mix(word_i ^ mix(i ^ salt_s))   mod 2^32,   s = 1, 2

Sums are the same in any order, so where an array lies on several processes its
devices add up their parts, and no process ever holds it whole. It is for
accidents, a flipped bit or a lost block, and no protection from who wants to
deceive.
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
_MOST_WORDS = 2**20  # Of an array on the host that are looked at at a time.


def digest(array: Any) -> str:
  """32 hexadecimal digits from an array's type, shape and bits.

  For an array that lies on several processes this is collective.
  """
  head = f'{array.dtype} {tuple(array.shape)}'
  if array.dtype == jnp.int4:  # Packed by some, and by others not.
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
  """The name that `digests` gives the array at a path of nested dicts."""
  return jax.tree_util.keystr(tuple(map(jax.tree_util.DictKey, path)))


def _mix(x: jax.Array) -> jax.Array:
  """uint32 to uint32, every bit of which depends on every bit."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _sums(words: jax.Array, index: jax.Array, counts: Any) -> jax.Array:
  """uint32 [2]: the two sums over the words that count."""
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
  """The sums of an array wherever it lies; elements of up to four bytes."""
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
  place = jnp.arange(len(words), dtype=jnp.uint32)
  return _sums(words, start + place, place < count)


def _sums_of_host_array(array: np.ndarray) -> np.ndarray:
  """The same sums, piece by piece; of eight bytes, both halves are words."""
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
