"""Matrix products on GPUs: the loops of `experts.grouped_matmul`, and products
with one quantised matrix.

A program of the kernel has one tile of rows and one block of outputs, loops
over the inputs and multiplies with blocks of the expert's matrix, bf16 or
quantised, which are converted to bf16 in registers (`few_bits`); the scale of a
group is applied to the group's partial sum. For the gradient of the matrices, a
program has a block of one of them and loops over the expert's tiles.

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

from diffusiongemma.ops import activation
from diffusiongemma.ops import dispatch
from diffusiongemma.ops.gpu import few_bits
from diffusiongemma.ops.weights import Quantized
from diffusiongemma.ops.weights import values_and_scales

SMALLEST = 16  # Triton multiplies no smaller blocks.
BLOCK = 64
_MOST_INPUTS = 128
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)  # Of unquantised weights.


def supports(weights_EFD: Any, tile: int, parts: int = 1) -> bool:
  """Whether the kernels support these weights, whose outputs have `parts`
  parts."""
  _, F, D = weights_EFD.shape
  inputs, smallest = D, SMALLEST
  if isinstance(weights_EFD, Quantized):
    if not (weights_EFD.scales_transposed and weights_EFD.is_own):
      return False
    if not few_bits.supports(weights_EFD.values.dtype):
      return False
    inputs = D // weights_EFD.num_groups
    if weights_EFD.values.dtype == jnp.int4:
      smallest *= 2  # The halves of its pairs are multiplied separately.
  elif weights_EFD.dtype not in FLOATS:
    return False
  return min(tile, block(F // parts)) >= SMALLEST and block(inputs) >= smallest


@dispatch.in_32_bits
def multiply_tiles(
  x_TD: jax.Array,
  weights_EFD: jax.Array | Quantized,
  groups: Any,
  transposed: bool = False,
  interpret: bool = False,
) -> jax.Array:
  """Each tile times its expert's matrix [F, D] transposed: [T, F]; with
  `transposed`, the matrix is not transposed.

  Rows of unused tiles are arbitrary. With `interpret` it runs on any device,
  slowly.
  """
  return _call(
    *(x_TD, [values_and_scales(weights_EFD)]),
    *(groups.expert_of_tile, groups.end_E),
    transposed=transposed,
    interpret=interpret,
    name='grouped_matmul',
  )


@dispatch.in_32_bits
def gate_tiles(
  x_MD: jax.Array,
  gate_up_EFD: jax.Array | Quantized,
  groups: Any,
  k: int,
  interpret: bool = False,
) -> jax.Array:
  """The hidden layer of the experts: [T, F]; the matrices [2F, D] have the gate
  first. The kernel gathers the tokens x itself; the routed rows of `groups` are
  the k choices of each token."""
  matrix, F = values_and_scales(gate_up_EFD), gate_up_EFD.shape[1] // 2
  return _call(
    *(x_MD, [matrix, matrix], groups.expert_of_tile, groups.end_E),
    row_T=groups.row_T,
    rows_per_token=k,
    offsets=(0, F),
    interpret=interpret,
    name='grouped_gate',
  )


@dispatch.in_32_bits
def multiply(
  x_TD: jax.Array,
  values_DF: jax.Array,
  scales_XF: jax.Array,
  interpret: bool = False,
) -> jax.Array:
  """x W, [T, F], with the values and the scales of a quantised W [D, F]."""
  return _call(
    *(x_TD, [(values_DF[None], scales_XF[None])], *_one_group(x_TD)),
    transposed=True,
    interpret=interpret,
    name='quantized_matmul',
  )


@dispatch.in_32_bits
def gate(
  x_TD: jax.Array,
  gate_DF: tuple[jax.Array, jax.Array],
  up_DF: tuple[jax.Array, jax.Array],
  interpret: bool = False,
) -> jax.Array:
  """GeGLU of x with two quantised matrices, each (values, scales): [T, F]."""
  matrices = [
    (values[None], scales[None]) for values, scales in (gate_DF, up_DF)
  ]
  return _call(
    *(x_TD, matrices, *_one_group(x_TD)),
    transposed=True,
    interpret=interpret,
    name='quantized_gate',
  )


def supports_one(
  x_TD: jax.Array, values_DF: jax.Array, num_groups: int
) -> bool:
  """Whether `multiply` and `gate` support these operands."""
  D, F = values_DF.shape
  blocks = (_tile(len(x_TD)), block(F), block(D // num_groups))
  return min(blocks) >= SMALLEST and few_bits.supports(values_DF.dtype)


def _one_group(x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(expert_of_tile, end_E) for a single matrix."""
  tiles = len(x_TD) // _tile(len(x_TD))
  return jnp.zeros((tiles,), jnp.int32), jnp.full((1,), tiles, jnp.int32)


def _call(
  x,
  matrices,
  expert_of_tile,
  end_E,
  row_T=None,
  rows_per_token=1,
  offsets=None,
  *,
  transposed=False,
  interpret,
  name,
):
  """Each tile times its expert's part of a matrix, or GeGLU of two.

  Args:
    x: [T, inputs]; with `row_T`, tokens [M, inputs].
    matrices: one or two of (values [E, outputs, inputs], scales [E, groups,
      outputs] or None).
    expert_of_tile: int32 [T / tile].
    end_E: int32, end of each expert's tiles.
    row_T: int32, the routed row in each row of the tiles, with `rows_per_token`
      routed rows per token; too large for padding.
    rows_per_token: see above.
    offsets: first output of each of the two products; they may be parts of the
      same matrix.
    transposed: whether values are [E, inputs, outputs].
    interpret: whether to run on any device.
    name: of the kernel.
  """
  values, scales = matrices[0]
  T, inputs = len(x if row_T is None else row_T), x.shape[1]
  tile = T // len(expert_of_tile)
  outputs = values.shape[2 if transposed else 1]
  if offsets is not None:
    outputs -= offsets[-1]
  groups = 1 if scales is None else scales.shape[1]
  block_out = block(outputs)
  is_paired = values.dtype == jnp.int4 and not transposed
  is_paired &= x.dtype == jnp.bfloat16
  kernel = functools.partial(
    _multiply,
    tile=tile,
    block_in=block_of_inputs(inputs, groups),
    block_out=block_out,
    rows_per_token=rows_per_token,
    offsets=offsets or (0,) * len(matrices),
    transposed=transposed,
    interpret=interpret,
  )
  out_shape = jax.ShapeDtypeStruct((T, outputs), x.dtype)
  # More stages of float32 do not fit.
  num_stages = 3 if x.dtype.itemsize < 4 else 1
  if is_paired:
    x = few_bits.in_pairs(x)
    matrices = [(few_bits.in_pairs(v), scales) for v, scales in matrices]
  return pl.pallas_call(
    kernel,
    grid=(outputs // block_out, T // tile),
    out_shape=out_shape,
    compiler_params=plgpu.CompilerParams(
      num_warps=max(1, min(4, tile // (16 if is_paired else 8))),
      num_stages=num_stages,
    ),
    interpret=interpret,
    name=name,
  )(expert_of_tile, end_E, row_T, x, matrices)


def _multiply(
  expert_ref,
  end_ref,
  row_ref,
  x_ref,
  matrices_ref,
  out_ref,
  *,
  tile,
  block_in,
  block_out,
  rows_per_token,
  offsets,
  transposed,
  interpret,
):
  index = pl.program_id(1)
  rows, first = pl.ds(index * tile, tile), pl.program_id(0) * block_out

  @pl.when(index < end_ref[end_ref.shape[0] - 1])
  def _():
    taken = rows
    if row_ref is not None:
      taken = jnp.minimum(row_ref[rows] // rows_per_token, x_ref.shape[0] - 1)
    made = block_products(
      *(x_ref, taken),
      expert_ref[index],
      [
        (*parts, pl.ds(first + offset, block_out))
        for parts, offset in zip(matrices_ref, offsets, strict=True)
      ],
      shape=(tile, block_out),
      block_in=block_in,
      dtype=out_ref.dtype,
      transposed=transposed,
      interpret=interpret,
    )
    total = made[0] if len(made) == 1 else activation.geglu(*made)
    out_ref[rows, pl.ds(first, block_out)] = total.astype(out_ref.dtype)


def block_products(
  x_ref,
  rows,
  expert,
  parts,
  *,
  shape: tuple[int, int],
  block_in: int,
  dtype: jnp.dtype,
  transposed: bool = False,
  interpret: bool,
) -> list[jax.Array]:
  """Some rows times some outputs of one or more matrices, in float32. For use
  inside of kernels.

  Args:
    x_ref: [T, inputs], or pairs of them.
    rows: indices of T.
    expert: index of the matrix.
    parts: for each product, a reference to the values [E, outputs, inputs], or
      pairs of these, one to the scales [E, groups, outputs] or None, and the
      indices of outputs. All have the same number of groups.
    shape: (number of rows, number of outputs).
    block_in: inputs that are multiplied at a time, of one group.
    dtype: of the operands of the products.
    transposed: whether matrices are [E, inputs, outputs].
    interpret: whether to run on any device.
  """
  width = block_in if x_ref.dtype == dtype else block_in // 2
  steps = x_ref.shape[1] // width
  groups = 1 if parts[0][1] is None else parts[0][1].shape[1]

  def scales(i):
    """Scales of a block of inputs, for each product."""
    group = jnp.minimum(i, steps - 1) * groups // steps
    return [
      scales_ref[expert, group, outputs] for _, scales_ref, outputs in parts
    ]

  def step(i, state):
    totals, factors = state
    inputs = pl.ds(i * width, width)
    x = few_bits.rows(x_ref[rows, inputs], interpret)
    found = []
    for index, (weights_ref, _, outputs) in enumerate(parts):
      where = (inputs, outputs) if transposed else (outputs, inputs)
      w = few_bits.weights(weights_ref[expert, *where], dtype, interpret)
      product = sum(
        jnp.dot(
          half,
          of_w if transposed else of_w.T,
          preferred_element_type=jnp.float32,
        )
        for half, of_w in zip(x, w, strict=True)
      )
      total = totals[index]
      if groups > 1:
        factor = factors[index].astype(jnp.float32)[None, :]
        found.append(few_bits.add_product(total, product, factor, interpret))
      else:
        found.append(total + product)
    # Read a step ahead: the compiler prefetches only operands of products.
    return found, scales(i + 1) if groups > 1 else []

  zeros = [jnp.zeros(shape, jnp.float32) for _ in parts]
  start = (zeros, scales(0) if groups > 1 else [])
  totals, _ = jax.lax.fori_loop(0, steps, step, start)
  if groups > 1 or parts[0][1] is None:
    return totals
  return [
    total * factor.astype(jnp.float32)[None, :]
    for total, factor in zip(totals, scales(0), strict=True)
  ]


@dispatch.in_32_bits
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
  """Rows of a tile, if all use the same matrix."""
  return math.gcd(rows, 2 * BLOCK)


def block(size: int) -> int:
  """The largest power of two up to `BLOCK` that divides `size`."""
  return math.gcd(size, BLOCK)


def block_of_inputs(inputs: int, groups: int) -> int:
  """Number of inputs that are multiplied at a time."""
  return math.gcd(inputs // groups, _MOST_INPUTS)
