"""Matrix products on GPUs: twins of the loops in `grouped_matmul`, and products
with one quantised matrix.

A program of the kernel has one tile of rows and one block of outputs, walks
over the inputs and multiplies with what it reads of the expert's matrix, bf16
or few bits, which become bf16 in registers; the scale of a group is applied to
the group's partial sum. For the gradient of the matrices a program has a block
of one of them and walks over the expert's tiles.
"""

import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from diffusiongemma.kernels import quantized

SMALLEST = 16  # Triton multiplies no smaller blocks.
BLOCK = 64


def suits(weights_EFD: Any, tile: int) -> bool:
  """Whether the kernels can multiply with these weights."""
  _, F, D = weights_EFD.shape
  inputs = D
  if isinstance(weights_EFD, quantized.Quantized):
    inputs = D // weights_EFD.scales.shape[-1]
  return min(tile, block(F), block(inputs)) >= SMALLEST


def multiply_tiles(
  x_TD: jax.Array,
  weights_EFD: jax.Array | quantized.Quantized,
  groups: Any,
  transposed: bool = False,
  interpret: bool = False,
) -> jax.Array:
  """Each tile times its expert's matrix [F, D] transposed, or as it is: [T, F].

  Rows of tiles that are not used hold anything. With `interpret` it runs on
  any device, slowly.
  """
  weights, scales = weights_EFD, None
  if isinstance(weights_EFD, quantized.Quantized):
    weights, scales = weights_EFD.values, weights_EFD.scales
  return _call(
    *(x_TD, weights, scales, groups.expert_of_tile, groups.used[None]),
    transposed=transposed,
    interpret=interpret,
    name='grouped_matmul',
  )


def multiply(
  x_TD: jax.Array,
  values_DF: jax.Array,
  scales_XF: jax.Array,
  interpret: bool = False,
) -> jax.Array:
  """x W, [T, F], with the values and the scales of a quantised W [D, F]."""
  tiles = len(x_TD) // _tile(len(x_TD))
  return _call(
    *(x_TD, values_DF[None], scales_XF[None]),
    *(jnp.zeros((tiles,), jnp.int32), jnp.full((1,), tiles, jnp.int32)),
    transposed=True,
    interpret=interpret,
    name='quantized_matmul',
  )


def suits_one(x_TD: jax.Array, values_DF: jax.Array, num_groups: int) -> bool:
  """Whether `multiply` can."""
  D, F = values_DF.shape
  return min(_tile(len(x_TD)), block(F), block(D // num_groups)) >= SMALLEST


def _call(
  x_TD, weights, scales, expert_of_tile, used, *, transposed, interpret, name
):
  T, inputs = x_TD.shape
  tile = T // len(expert_of_tile)
  outputs = weights.shape[2 if transposed else 1]
  group_size = inputs
  if scales is not None:
    group_size //= scales.shape[1 if transposed else 2]
  block_in, block_out = block(group_size), block(outputs)
  kernel = functools.partial(
    _multiply,
    tile=tile,
    block_in=block_in,
    block_out=block_out,
    group_size=group_size,
    transposed=transposed,
  )
  return pl.pallas_call(
    kernel,
    grid=(outputs // block_out, T // tile),
    out_shape=jax.ShapeDtypeStruct((T, outputs), x_TD.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
    interpret=interpret,
    name=name,
  )(expert_of_tile, used, x_TD, weights, scales)


def _multiply(
  expert_ref,
  used_ref,
  x_ref,
  weights_ref,
  scales_ref,
  out_ref,
  *,
  tile,
  block_in,
  block_out,
  group_size,
  transposed,
):
  index = pl.program_id(1)
  rows = pl.ds(index * tile, tile)
  outputs = pl.ds(pl.program_id(0) * block_out, block_out)

  @pl.when(index < used_ref[0])
  def _():
    total = block_product(
      *(x_ref, weights_ref, scales_ref, rows, expert_ref[index], outputs),
      block_in=block_in,
      group_size=group_size,
      transposed=transposed,
    )
    out_ref[rows, outputs] = total.astype(out_ref.dtype)


def block_product(
  x_ref,
  weights_ref,
  scales_ref,
  rows,
  expert,
  outputs,
  *,
  block_in: int,
  group_size: int,
  transposed: bool = False,
) -> jax.Array:
  """Some rows times some outputs of one matrix, in float32. For kernels.

  Args:
    x_ref: [T, inputs].
    weights_ref: [E, outputs, inputs], or with `transposed` the other way round.
    scales_ref: the same with a scale for each group of inputs, or None.
    rows: a slice of T.
    expert: index of the matrix.
    outputs: a slice of the outputs.
    block_in: inputs that are multiplied at a time; divides `group_size`.
    group_size: inputs that share a scale.
    transposed: how matrices lie.
  """

  def step(i, total):
    inputs = pl.ds(i * block_in, block_in)
    where = (inputs, outputs) if transposed else (outputs, inputs)
    x = x_ref[rows, inputs]
    w = weights_ref[expert, *where].astype(x.dtype)
    part = jnp.dot(
      x, w if transposed else w.T, preferred_element_type=jnp.float32
    )
    if scales_ref is not None:
      group = i * block_in // group_size
      where = (group, outputs) if transposed else (outputs, group)
      part *= scales_ref[expert, *where].astype(jnp.float32)[None, :]
    return total + part

  total = jnp.zeros((rows.size, outputs.size), jnp.float32)
  return jax.lax.fori_loop(0, x_ref.shape[1] // block_in, step, total)


def add_tiles(
  d_TF: jax.Array, x_TD: jax.Array, groups: Any, interpret: bool = False
) -> jax.Array:
  """The sums of d^T x over the tiles of each expert: float32 [E, F, D]."""
  E, F, D = groups.end_E.shape[0], d_TF.shape[1], x_TD.shape[1]
  block_F, block_D = block(F), block(D)
  return pl.pallas_call(
    functools.partial(_add, tile=groups.tile, block_F=block_F, block_D=block_D),
    grid=(E, F // block_F, D // block_D),
    out_shape=jax.ShapeDtypeStruct((E, F, D), jnp.float32),
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpret,
    name='grouped_matmul_gradient',
  )(groups.end_E, d_TF, x_TD)


def _add(end_ref, d_ref, x_ref, out_ref, *, tile, block_F, block_D):
  expert = pl.program_id(0)
  columns_F = pl.ds(pl.program_id(1) * block_F, block_F)
  columns_D = pl.ds(pl.program_id(2) * block_D, block_D)

  def step(index, total):
    rows = pl.ds(index * tile, tile)
    d, x = d_ref[rows, columns_F], x_ref[rows, columns_D]
    return total + jnp.dot(d.T, x, preferred_element_type=jnp.float32)

  before = end_ref[jnp.maximum(expert - 1, 0)]
  start = jnp.where(expert > 0, before, 0)
  total = jnp.zeros((block_F, block_D), jnp.float32)
  total = jax.lax.fori_loop(start, end_ref[expert], step, total)
  out_ref[expert, columns_F, columns_D] = total


def _tile(rows: int) -> int:
  """Rows of a tile where all meet the same matrix."""
  return math.gcd(rows, 2 * BLOCK)


def block(size: int) -> int:
  """The largest power of two up to `BLOCK` that divides `size`."""
  return math.gcd(size, BLOCK)
