"""The pass over the vocabulary on GPUs: the twin of `vocabulary.look_at`.

A program of the first kernel multiplies a block of rows with a block of the
table and, while the logits are in registers, takes softcap, temperature,
maximum, exponentials and sums. It writes the exponentials in the type of the
rows, for the second kernel to multiply with the same part of the table; logits
in float32 are never written. Programs don't wait for each other, so that each
block of columns has a maximum of its own.
"""

import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from diffusiongemma.kernels import grouped_matmul_gpu as products
from diffusiongemma.kernels import quantized

# Exponentials that exist at a time, 128 MB of bfloat16. What the cache could
# hold would spare reading the table twice, but be walked in a hundred launches.
CHUNK_ELEMENTS = 2**26
_ROWS = 128


def suits(h_RD: jax.Array, table_VD: Any, size: int, bin_size: int) -> bool:
  """Whether the kernels can look at `size` rows of the table at a time."""
  columns = products.block(size)
  smallest = min(math.gcd(len(h_RD), _ROWS), columns, _block_in(table_VD))
  return smallest >= products.SMALLEST and columns % bin_size == 0


def look_at(
  carry: tuple[jax.Array, ...],
  h_RD: jax.Array,
  table_VD: Any,
  temperature: jax.Array,
  start: jax.Array,
  *,
  size: int,
  softcap: float,
  bin_size: int,
  interpret: bool = False,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, jax.Array]]:
  """See `vocabulary.look_at`; with `interpret` on any device, slowly."""
  max_R, sum_R, weighted_R, argmax_R, mean_RD = carry
  p_Rc, max_Rb, weighted_Rb, argmax_Rb, bins_RbX = _statistics(
    *(h_RD, table_VD, temperature, start),
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
  sum_R = sum_R * shrink_R + jnp.sum(bins_RbX, axis=(1, 2))
  weighted_R = weighted_R * shrink_R + jnp.sum(weighted_Rb * shrink_Rb, axis=1)
  part_RD = _mean(p_Rc, shrink_Rb, table_VD, start, interpret=interpret)
  mean_RD = mean_RD * shrink_R[:, None] + part_RD
  carry = new_max_R, sum_R, weighted_R, argmax_R, mean_RD
  return carry, (bins_RbX.reshape(len(h_RD), -1), new_max_R)


def _statistics(
  h_RD, table_VD, temperature, start, *, size, softcap, bin_size, interpret
):
  """(exp(x - max) [R, size], and for each block of columns: max, the sum of
  x exp(x - max), the place of the maximum, sums of bins [R, b, bins])."""
  R, columns = len(h_RD), products.block(size)
  rows, blocks = math.gcd(R, _ROWS), size // columns
  values, scales = _parts(table_VD)
  of_block = lambda *more, dtype=jnp.float32: jax.ShapeDtypeStruct(
    (R, blocks, *more), dtype
  )
  kernel = functools.partial(
    _look,
    rows=rows,
    columns=columns,
    block_in=_block_in(table_VD),
    softcap=softcap,
    bin_size=bin_size,
  )
  return pl.pallas_call(
    kernel,
    # Programs side by side read the same part of the table.
    grid=(R // rows, blocks),
    out_shape=(
      jax.ShapeDtypeStruct((R, size), h_RD.dtype),
      of_block(),
      of_block(),
      of_block(dtype=jnp.int32),
      of_block(columns // bin_size),
    ),
    compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
    interpret=interpret,
    name='vocabulary_statistics',
  )(start[None], temperature[None], h_RD, values, scales)


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
  block_in,
  softcap,
  bin_size,
):
  block = pl.program_id(1)
  which = pl.ds(pl.program_id(0) * rows, rows)
  first = block * columns
  groups = 1 if scales_ref is None else scales_ref.shape[2]
  (x,) = products.block_products(
    *(h_ref, which, 0),
    [(table_ref, scales_ref, pl.ds(start_ref[0] + first, columns))],
    shape=(rows, columns),
    block_in=block_in,
    group_size=h_ref.shape[1] // groups,
  )
  if softcap:
    x = softcap * jnp.tanh(x / softcap)
  x = x / temperature_ref[0]
  most = jnp.max(x, axis=1)
  p = jnp.exp(x - most[:, None])
  place = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  place = jnp.min(jnp.where(x == most[:, None], place, columns), axis=1)
  p_ref[which, pl.ds(first, columns)] = p.astype(p_ref.dtype)
  max_ref[which, block] = most
  weighted_ref[which, block] = jnp.sum(p * x, axis=1)
  argmax_ref[which, block] = first + place
  bins = p.reshape(rows, columns // bin_size, bin_size)
  bins_ref[which, block, :] = jnp.sum(bins, axis=2)


def _mean(p_Rc, shrink_Rb, table_VD, start, *, interpret) -> jax.Array:
  """The exponentials, rescaled, times the part of the table that starts at
  `start`: float32 [R, D]."""
  (R, size), (_, D) = p_Rc.shape, table_VD.shape
  rows = math.gcd(R, products.BLOCK)
  values, scales = _parts(table_VD)
  width = _block_in(table_VD)
  kernel = functools.partial(
    _add_up, rows=rows, columns=size // shrink_Rb.shape[1], width=width
  )
  return pl.pallas_call(
    kernel,
    grid=(R // rows, D // width),
    out_shape=jax.ShapeDtypeStruct((R, D), jnp.float32),
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
    interpret=interpret,
    name='vocabulary_mean',
  )(start[None], p_Rc, shrink_Rb, values, scales)


def _add_up(
  start_ref,
  p_ref,
  shrink_ref,
  table_ref,
  scales_ref,
  out_ref,
  *,
  rows,
  columns,
  width,
):
  which = pl.ds(pl.program_id(0) * rows, rows)
  column = pl.program_id(1) * width
  inputs = pl.ds(column, width)

  def step(block, total):
    p = p_ref[which, pl.ds(block * columns, columns)]
    p = (p * shrink_ref[which, block][:, None]).astype(p.dtype)
    tokens = pl.ds(start_ref[0] + block * columns, columns)
    part = table_ref[0, tokens, inputs]
    if scales_ref is not None:
      group = column * scales_ref.shape[2] // out_ref.shape[1]
      scale = scales_ref[0, tokens, group].astype(jnp.float32)
      part = part.astype(jnp.float32) * scale[:, None]
    part = part.astype(p.dtype)
    return total + jnp.dot(p, part, preferred_element_type=jnp.float32)

  total = jnp.zeros((rows, width), jnp.float32)
  total = jax.lax.fori_loop(0, p_ref.shape[1] // columns, step, total)
  out_ref[which, inputs] = total


def _parts(table_VD: Any) -> tuple[jax.Array, jax.Array | None]:
  """Values and scales as those of the only matrix of several."""
  return jax.tree.map(lambda x: x[None], quantized.parts(table_VD))


def _block_in(table_VD: Any) -> int:
  """Inputs that are looked at together: they share a scale."""
  _, D = table_VD.shape
  _, scales = _parts(table_VD)
  return products.block(D if scales is None else D // scales.shape[2])
