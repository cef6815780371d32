"""Matrix products on TPUs: the loops of `experts.grouped_matmul`, and products
with one quantised matrix.

A step of the grid has one tile of rows and a block of outputs, with all their
inputs, of its expert's matrix. The index of the block is prefetched to scalar
memory, so that the next block is copied while this one is multiplied. Tiles of
an expert are consecutive and share its block; unused tiles have the index of
the last used one, so that nothing is copied for them. Quantised values are
converted to the type of the rows in fast memory; a scale for all inputs is
applied to the product, and scales of groups are spread over their inputs by a
product with zeros and ones, which is exact.
"""

import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from diffusiongemma.ops import activation
from diffusiongemma.ops import dispatch
from diffusiongemma.ops.weights import Quantized
from diffusiongemma.ops.weights import values_and_scales

LANES = 128
SMALLEST_TILE = 16  # Rows of a bfloat16 register.
LARGEST_BLOCK = 12 * 2**20  # Bytes of a block of a matrix; two are held.
ONE_BLOCK = 2 * 2**20  # The same if all rows use one matrix.
MOST_ROWS = 256  # Of a tile, if all use the same matrix.
FAST_MEMORY = 48 * 2**20  # Bytes; 64 MB is the least that TPUs have.
CHUNK = 512  # Inputs multiplied at once.
_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
_QUANTIZED = (jnp.int8, jnp.int4, jnp.float8_e4m3fn)


def supports(
  weights_EFD: Any, tile: int, parts: int = 1, transposed: bool = False
) -> bool:
  """Whether the kernels support these weights, whose outputs have `parts`
  parts."""
  is_quantized = isinstance(weights_EFD, Quantized)
  if tile % SMALLEST_TILE:
    return False
  if is_quantized and (
    transposed or not weights_EFD.scales_transposed or not weights_EFD.is_own
  ):
    return False
  values, _ = values_and_scales(weights_EFD)
  if values.dtype not in (_QUANTIZED if is_quantized else _FLOATS):
    return False
  _, F, D = values.shape
  outputs, inputs = (D, F) if transposed else (F // parts, D)
  row = parts * inputs * values.dtype.itemsize
  return _block_out(outputs, row, LARGEST_BLOCK) is not None


def supports_one(x_TD: jax.Array, values_DF: jax.Array) -> bool:
  """Whether `multiply` supports these operands."""
  D, F = values_DF.shape
  block_out = _block_out(F, D * values_DF.dtype.itemsize, ONE_BLOCK)
  return (
    values_DF.dtype in _QUANTIZED
    and _tile(len(x_TD)) % SMALLEST_TILE == 0
    and block_out is not None
  )


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
  return _call_grouped(
    *(x_TD, weights_EFD, groups),
    parts=1,
    transposed=transposed,
    interpret=interpret,
    name='grouped_matmul',
  )


@dispatch.in_32_bits
def gate_tiles(
  x_TD: jax.Array,
  gate_up_EFD: jax.Array | Quantized,
  groups: Any,
  interpret: bool = False,
) -> jax.Array:
  """The hidden layer of the experts: GeGLU of each tile, [T, F]; the matrices
  [2F, D] have the gate first."""
  return _call_grouped(
    *(x_TD, gate_up_EFD, groups),
    parts=2,
    transposed=False,
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
  tiles = len(x_TD) // _tile(len(x_TD))
  return _call(
    *(x_TD, values_DF[None, None], scales_XF[None, None]),
    *(jnp.zeros((tiles,), jnp.int32), jnp.full((1,), tiles, jnp.int32)),
    inputs_first=True,
    largest_block=ONE_BLOCK,
    interpret=interpret,
    name='quantized_matmul',
  )


def _tile(rows: int) -> int:
  """Rows of a tile, if all use the same matrix."""
  return math.gcd(rows, MOST_ROWS)


def _call_grouped(x, weights, groups, *, parts, transposed, interpret, name):
  values, scales = values_and_scales(weights)
  E, outputs, inputs = values.shape
  values = values.reshape(E, parts, outputs // parts, inputs)
  if scales is not None:
    scales = scales.reshape(E, -1, parts, outputs // parts)
    scales = jnp.swapaxes(scales, 1, 2)
  return _call(
    *(x, values, scales, groups.expert_of_tile, groups.end_E),
    inputs_first=transposed,
    largest_block=LARGEST_BLOCK,
    interpret=interpret,
    name=name,
  )


def _call(
  x,
  values,
  scales,
  expert_of_tile,
  end_E,
  *,
  inputs_first,
  largest_block,
  interpret,
  name,
):
  """Each tile times its expert's matrix, or GeGLU of it with two.

  Args:
    x: [T, inputs].
    values: [E, parts, outputs, inputs], with one or two parts.
    scales: [E, parts, groups, outputs], or None.
    expert_of_tile: int32 [T / tile].
    end_E: int32, end of each expert's tiles.
    inputs_first: whether values are [E, parts, inputs, outputs].
    largest_block: most bytes of a block of a matrix.
    interpret: whether to run on any device.
    name: of the kernel.
  """
  rows, columns = values.shape[2:]
  if columns % LANES and not rows % LANES:
    # This is their layout in memory, so that the transposition is free.
    values, inputs_first = jnp.swapaxes(values, 2, 3), not inputs_first
  parts = values.shape[1]
  outputs, inputs = values.shape[2:][:: -1 if inputs_first else 1]
  tile = len(x) // len(expert_of_tile)
  row = parts * inputs * values.dtype.itemsize
  block_out = _block_out(outputs, row, largest_block)

  def rows_at(block, index, expert_ref, end_ref):
    del block, expert_ref
    return _used(index, end_ref), 0

  def out_at(block, index, expert_ref, end_ref):
    del expert_ref
    return _used(index, end_ref), block

  def columns_at(block, index, expert_ref, end_ref):
    return expert_ref[_used(index, end_ref)], 0, 0, block

  def matrix_at(block, index, expert_ref, end_ref):
    return expert_ref[_used(index, end_ref)], 0, block, 0

  if inputs_first:
    matrix = pl.BlockSpec((1, parts, inputs, block_out), columns_at)
  else:
    matrix = pl.BlockSpec((1, parts, block_out, inputs), matrix_at)
  operands = [x, values]
  in_specs = [pl.BlockSpec((tile, inputs), rows_at), matrix]
  if scales is not None:
    shape = (1, parts, scales.shape[2], block_out)
    operands.append(scales)
    in_specs.append(pl.BlockSpec(shape, columns_at))
  return pl.pallas_call(
    functools.partial(_multiply, inputs_first=inputs_first),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(pl.cdiv(outputs, block_out), len(x) // tile),
      in_specs=in_specs,
      out_specs=pl.BlockSpec((tile, block_out), out_at),
    ),
    out_shape=jax.ShapeDtypeStruct((len(x), outputs), x.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'),
      vmem_limit_bytes=FAST_MEMORY,
    ),
    interpret=interpret,
    name=name,
  )(expert_of_tile, end_E, *operands)


def _used(index, end_ref):
  """The tile itself if it is used, else the last used one."""
  return jnp.minimum(index, jnp.maximum(end_ref[end_ref.shape[0] - 1] - 1, 0))


def _multiply(expert_ref, end_ref, x_ref, values_ref, *refs, inputs_first):
  del expert_ref
  *scales_refs, out_ref = refs
  inputs, parts = x_ref.shape[1], values_ref.shape[1]
  chunk = _divisor(inputs, CHUNK) or inputs
  has_groups = bool(scales_refs) and scales_refs[0].shape[2] > 1

  @pl.when(pl.program_id(1) < end_ref[end_ref.shape[0] - 1])
  def _():
    def step(i, totals):
      taken = pl.ds(i * chunk, chunk)
      x = x_ref[:, taken]
      return [
        total + _dot(x, matrix(part, i, taken), 1, 0 if inputs_first else 1)
        for part, total in enumerate(totals)
      ]

    def matrix(part, i, taken):
      where = (taken, slice(None)) if inputs_first else (slice(None), taken)
      w = values_ref[0, part, *where]
      if not has_groups:
        return w.astype(x_ref.dtype)
      scales = scales_refs[0][0, part]
      spread = _spread(scales, i * chunk, chunk, inputs, inputs_first)
      return (w.astype(jnp.float32) * spread).astype(x_ref.dtype)

    totals = [jnp.zeros(out_ref.shape, jnp.float32)] * parts
    totals = jax.lax.fori_loop(0, inputs // chunk, step, totals)
    if scales_refs and not has_groups:
      totals = [
        total * scales_refs[0][0, part].astype(jnp.float32)
        for part, total in enumerate(totals)
      ]
    out = totals[0] if parts == 1 else activation.geglu(*totals)
    out_ref[...] = out.astype(out_ref.dtype)


def _spread(scales_GO, first, count, inputs, inputs_first):
  """Scales of `count` inputs from `first`, in float32, from those of their
  groups: [O, count], or [count, O]."""
  shape = (len(scales_GO), count)
  group_size = inputs // len(scales_GO)
  input_of = first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  group = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  is_its = (input_of // group_size == group).astype(scales_GO.dtype)
  return _dot(*(is_its, scales_GO)[:: 1 if inputs_first else -1], 0, 0)


def _dot(x, w, x_axis, w_axis):
  """The product that sums over these axes, in float32."""
  exact = x.dtype == jnp.float32
  return jax.lax.dot_general(
    x,
    w,
    (((x_axis,), (w_axis,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )


@dispatch.in_32_bits
def add_tiles(
  d_TF: jax.Array, x_TD: jax.Array, groups: Any, interpret: bool = False
) -> jax.Array:
  """The sums of d^T x over the tiles of each expert: float32 [E, F, D]."""
  E, F, D, tile = len(groups.end_E), d_TF.shape[1], x_TD.shape[1], groups.tile
  block_F, block_D = _divisor(F, CHUNK) or F, _divisor(D, CHUNK) or D
  sums_EFD = pl.pallas_call(
    _add,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(F // block_F, D // block_D, len(x_TD) // tile),
      in_specs=[
        pl.BlockSpec(
          (tile, block_F), lambda f, d, t, expert, end: (_used(t, end), f)
        ),
        pl.BlockSpec(
          (tile, block_D), lambda f, d, t, expert, end: (_used(t, end), d)
        ),
      ],
      out_specs=pl.BlockSpec(
        (1, block_F, block_D),
        lambda f, d, t, expert, end: (expert[_used(t, end)], f, d),
      ),
    ),
    out_shape=jax.ShapeDtypeStruct((E, F, D), jnp.float32),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=FAST_MEMORY,
    ),
    interpret=interpret,
    name='grouped_matmul_gradient',
  )(groups.expert_of_tile, groups.end_E, d_TF, x_TD)
  has_tiles_E = jnp.diff(groups.end_E, prepend=0) > 0
  return jnp.where(has_tiles_E[:, None, None], sums_EFD, 0.0)


def _add(expert_ref, end_ref, d_ref, x_ref, out_ref):
  index = pl.program_id(2)
  is_used = index < end_ref[end_ref.shape[0] - 1]
  before = expert_ref[jnp.maximum(index - 1, 0)]
  is_first = (index == 0) | (expert_ref[index] != before)

  @pl.when(is_used & is_first)
  def _():
    out_ref[...] = jnp.zeros_like(out_ref)

  @pl.when(is_used)
  def _():
    out_ref[0] += _dot(d_ref[...], x_ref[...], 0, 0)


def _block_out(outputs: int, row: int, largest_block: int) -> int | None:
  """Outputs of a block, at `row` bytes each, in blocks of about equal size;
  None if even the smallest block is too large."""
  if outputs * row <= largest_block:
    return outputs
  most = largest_block // row // LANES * LANES
  if not most:
    return None
  return pl.cdiv(pl.cdiv(outputs, pl.cdiv(outputs, most)), LANES) * LANES


def _divisor(size: int, limit: int) -> int | None:
  """The largest divisor up to `limit` that is a multiple of `LANES`."""
  most = min(size, limit) // LANES
  fitting = [n for n in range(1, most + 1) if size % (n * LANES) == 0]
  return fitting[-1] * LANES if fitting else None
