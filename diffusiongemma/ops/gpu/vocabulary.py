"""The pass over the vocabulary on GPUs: the kernels of `vocabulary.look_at`.

A program of the first kernel multiplies a block of rows with a block of the
table and, while the logits are in registers, applies softcap and temperature
and computes maximum, exponentials and sums. It writes the exponentials in the
type of the rows; logits in float32 are never written. Programs don't wait for
each other, so each block of columns has its own maximum. Between the kernels
all are rescaled to the maximum of their row; the second kernel multiplies them
with the same part of the table.

Sizes of blocks, warps and stages are the fastest measured on an H200
(`experiments/benchmarks/NOTES.md`).
"""

import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from diffusiongemma.ops import dispatch
from diffusiongemma.ops.gpu import few_bits
from diffusiongemma.ops.gpu import matmul as products
from diffusiongemma.ops.weights import Quantized
from diffusiongemma.ops.weights import values_and_scales

# Exponentials of a chunk, 128 MB of bfloat16. Chunks that fit the cache would
# save a second read of the table, but need a hundred launches.
CHUNK_ELEMENTS = 2**26
_ROWS = _COLUMNS = _WIDTH = 128
_SPLITS = 8  # Splits of the summed columns, to have enough programs.


def supports(h_RD: jax.Array, table_VD: Any, size: int, bin_size: int) -> bool:
  """Whether the kernels support chunks of `size` rows of the table."""
  D = table_VD.shape[1]
  groups = 1
  if isinstance(table_VD, Quantized):
    groups = table_VD.scales.shape[1]
    if not (table_VD.is_own and few_bits.supports(table_VD.values.dtype)):
      return False
  elif table_VD.dtype not in products.FLOATS:
    return False
  columns = math.gcd(size, _COLUMNS)
  blocks = (math.gcd(len(h_RD), _ROWS), columns, math.gcd(D, _WIDTH))
  is_large = min(blocks) >= products.SMALLEST
  return is_large and columns % bin_size == 0 and groups == 1


@dispatch.in_32_bits
def look_at(
  carry: tuple[jax.Array, ...],
  h_RD: jax.Array,
  table_VD: Any,
  temperature_R: jax.Array,
  start: jax.Array,
  *,
  size: int,
  softcap: float,
  bin_size: int,
  interpret: bool = False,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, jax.Array]]:
  """See `vocabulary.look_at`; with `interpret`, on any device, slowly."""
  max_R, weighted_R, argmax_R, mean_RD = carry
  p_Rc, max_Rb, weighted_Rb, argmax_Rb, bins_RbX = _statistics(
    *(h_RD, table_VD, temperature_R, start),
    size=size,
    softcap=softcap,
    bin_size=bin_size,
    interpret=interpret,
  )
  here_R, best_R1 = jnp.max(max_Rb, axis=1), jnp.argmax(max_Rb, axis=1)[:, None]
  first_R = start + jnp.take_along_axis(argmax_Rb, best_R1, axis=1)[:, 0]
  argmax_R = jnp.where(here_R > max_R, first_R, argmax_R)
  new_max_R = jnp.maximum(max_R, here_R)
  shrink_R = jnp.exp(max_R - new_max_R)
  shrink_Rb = jnp.exp(max_Rb - new_max_R[:, None])
  bins_RbX = bins_RbX * shrink_Rb[:, :, None]
  weighted_R = weighted_R * shrink_R + jnp.sum(weighted_Rb * shrink_Rb, axis=1)
  part_RD = _mean(p_Rc, shrink_Rb, table_VD, start, interpret=interpret)
  mean_RD = mean_RD * shrink_R[:, None] + part_RD
  carry = new_max_R, weighted_R, argmax_R, mean_RD
  return carry, (bins_RbX.reshape(len(h_RD), -1), new_max_R)


def _statistics(
  h_RD, table_VD, temperature_R, start, *, size, softcap, bin_size, interpret
):
  """(exp(x - max) [R, size], and for each block of columns: max, the sum of
  x exp(x - max), the argmax, sums of bins [R, b, bins])."""
  R, columns = len(h_RD), math.gcd(size, _COLUMNS)
  rows, blocks = math.gcd(R, _ROWS), size // columns
  values, scales_V = _parts(table_VD)
  of_block = lambda *more, dtype=jnp.float32: jax.ShapeDtypeStruct(
    (R, blocks, *more), dtype
  )
  kernel = functools.partial(
    _look,
    rows=rows,
    columns=columns,
    softcap=softcap,
    bin_size=bin_size,
    interpret=interpret,
  )
  return pl.pallas_call(
    kernel,
    # Consecutive programs read the same part of the table.
    grid=(R // rows, blocks),
    out_shape=(
      jax.ShapeDtypeStruct((R, size), h_RD.dtype),
      of_block(),
      of_block(),
      of_block(dtype=jnp.int32),
      of_block(columns // bin_size),
    ),
    compiler_params=_compiler_params(h_RD.dtype),
    interpret=interpret,
    name='vocabulary_statistics',
  )(
    *(start[None], temperature_R, h_RD, values[None]),
    None if scales_V is None else scales_V[None, None],
  )


def _look(
  start_ref,
  temperature_ref,
  h_ref,
  table_ref,
  scales_ref,
  p_ref,
  max_ref,
  weighted_ref,
  argmax_ref,
  bins_ref,
  *,
  rows,
  columns,
  softcap,
  bin_size,
  interpret,
):
  block = pl.program_id(1)
  which = pl.ds(pl.program_id(0) * rows, rows)
  first = block * columns
  (x,) = products.block_products(
    *(h_ref, which, 0),
    [(table_ref, scales_ref, pl.ds(start_ref[0] + first, columns))],
    shape=(rows, columns),
    block_in=products.block(h_ref.shape[1]),
    dtype=h_ref.dtype,
    interpret=interpret,
  )
  if softcap:
    x = softcap * jnp.tanh(x / softcap)
  x = x / temperature_ref[which][:, None]
  most = jnp.max(x, axis=1)
  p = jnp.exp(x - most[:, None])
  index = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  index = jnp.min(jnp.where(x == most[:, None], index, columns), axis=1)
  p_ref[which, pl.ds(first, columns)] = p.astype(p_ref.dtype)
  max_ref[which, block] = most
  weighted_ref[which, block] = jnp.sum(p * x, axis=1)
  argmax_ref[which, block] = first + index
  bins = p.reshape(rows, columns // bin_size, bin_size)
  bins_ref[which, block, :] = jnp.sum(bins, axis=2)


def _mean(p_Rc, shrink_Rb, table_VD, start, *, interpret) -> jax.Array:
  """The exponentials, rescaled, times the part of the table that starts at
  `start`: float32 [R, D]."""
  (R, size), (_, D) = p_Rc.shape, table_VD.shape
  values, scales_V = _parts(table_VD)
  p_Rbc = p_Rc.reshape(*shrink_Rb.shape, -1) * shrink_Rb[:, :, None]
  if scales_V is not None:
    scales_c = jax.lax.dynamic_slice_in_dim(scales_V, start, size)
    p_Rbc *= scales_c.reshape(*p_Rbc.shape[1:]).astype(jnp.float32)
  p_Rc = p_Rbc.astype(p_Rc.dtype).reshape(R, size)
  rows, width = math.gcd(R, _ROWS), math.gcd(D, _WIDTH)
  columns = products.block(size)
  splits = math.gcd(size // columns, _SPLITS)
  kernel = functools.partial(
    _add_up, rows=rows, columns=columns, width=width, interpret=interpret
  )
  parts_SRD = pl.pallas_call(
    kernel,
    grid=(R // rows, D // width, splits),
    out_shape=jax.ShapeDtypeStruct((splits, R, D), jnp.float32),
    compiler_params=_compiler_params(p_Rc.dtype),
    interpret=interpret,
    name='vocabulary_mean',
  )(start[None], p_Rc, values)
  return jnp.sum(parts_SRD, axis=0)


def _compiler_params(dtype: jnp.dtype) -> plgpu.CompilerParams:
  # More stages of float32 do not fit.
  num_stages = 4 if dtype.itemsize < 4 else 2
  return plgpu.CompilerParams(num_warps=8, num_stages=num_stages)


def _add_up(
  start_ref, p_ref, table_ref, out_ref, *, rows, columns, width, interpret
):
  which = pl.ds(pl.program_id(0) * rows, rows)
  inputs = pl.ds(pl.program_id(1) * width, width)
  split, splits = pl.program_id(2), out_ref.shape[0]
  blocks = p_ref.shape[1] // columns // splits

  def step(i, total):
    first = (split * blocks + i) * columns
    p = p_ref[which, pl.ds(first, columns)]
    tokens = pl.ds(start_ref[0] + first, columns)
    (part,) = few_bits.weights(table_ref[tokens, inputs], p.dtype, interpret)
    return total + jnp.dot(p, part, preferred_element_type=jnp.float32)

  total = jnp.zeros((rows, width), jnp.float32)
  out_ref[split, which, inputs] = jax.lax.fori_loop(0, blocks, step, total)


def _parts(table_VD: Any) -> tuple[jax.Array, jax.Array | None]:
  """(values, the scale of each row or None)."""
  values, scales = values_and_scales(table_VD)
  return values, None if scales is None else scales[:, 0]
