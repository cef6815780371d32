"""Maps functions over chunks of positions, because all logits would not fit.

A chunk is some positions of all rows, [B, size, ...]. Not for differentiation:
the residuals of all chunks would be stored.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Number of logits of a chunk (128 MB in float32).
CHUNK_LOGITS = 2**25
# Rows of hidden states in one streaming pass over the vocabulary.
PASS_ROWS = 1024


def in_chunks(
  chunk: Callable[..., Any], size: int, *given_BL: jax.Array
) -> Any:
  """Maps a function of arrays [B, size, ...] over [B, L, ...]."""
  return scan(lambda _, arrays: (None, chunk(*arrays)), None, given_BL, size)[1]


def chunk_size(logits_fn: Callable[..., Any], h_BLD: jax.Array) -> int:
  """Number of positions, of all rows, whose logits fit CHUNK_LOGITS on each
  device of the mesh; with only some of the rows, devices would idle."""
  B, L, D = h_BLD.shape
  row = jax.ShapeDtypeStruct((1, 1, D), h_BLD.dtype)
  V = jax.eval_shape(logits_fn, row).shape[-1]
  devices = max(1, jax.sharding.get_abstract_mesh().size)
  return min(L, max(1, CHUNK_LOGITS * devices // (V * B)))


def scan(
  step: Callable[..., Any], carry: Any, given_BL: tuple[Any, ...], size: int
):
  """`lax.scan` of (carry, arrays [B, size, ...]) -> (carry, arrays like them)
  over [B, L, ...]. The last chunk is padded with zeros; their results are not
  returned, but enter the carry."""
  L = given_BL[0].shape[1]
  if size == L:
    return step(carry, given_BL)
  count = -(-L // size)

  def split(x):
    padding = [(0, 0), (0, count * size - L)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, padding).reshape(len(x), count, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(len(x), -1, *x.shape[3:])[:, :L]

  carry, results = jax.lax.scan(step, carry, jax.tree.map(split, given_BL))
  return carry, jax.tree.map(join, results)
