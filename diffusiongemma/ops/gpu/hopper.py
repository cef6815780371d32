"""Products with quantised experts on Hopper GPUs (H100, H200), for few rows
per expert: faster than the kernels of `ops.gpu.matmul`.

One warp group of a program copies blocks of weights, scales and rows into
shared memory, as far ahead as there is room. The others, the workers, convert
weights to bf16 in their registers and multiply on the left, W x^T: a matrix
unit takes 64 outputs at a time, but as few as 8 rows, so that each weight is
used once for all rows of an expert, up to 32. Workers differ in their outputs
(gate or up) or in their inputs; their results are combined in shared memory.
While the matrix unit multiplies, the worker converts the next weights.
Programs, one per multiprocessor, take blocks of outputs in turn until all are
done.

A matrix unit needs two adjacent inputs in a register. A register of int4 has
eight values, of which a mask yields the first and the fifth, the second and the
sixth, and so on. These are treated as adjacent where rows are copied anyway,
for gate and up: the rows are copied in that order (`in_order_of_int4`). Rows
that are in place already would have to be rewritten.

Sizes are the fastest measured on an H200 (`experiments/benchmarks/NOTES.md`),
except for two: the number of products without a loop is limited by registers,
and the down projection of int8 has one stage more than was the fastest, because
stages are held longer now.
"""

import functools
import math
from typing import Any
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import triton
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import llvm
import numpy as np

from diffusiongemma.ops import activation
from diffusiongemma.ops import dispatch
from diffusiongemma.ops.weights import Quantized

_BLOCK = 64  # Outputs, and inputs, that a worker multiplies at a time.
_ROWS = 32  # Rows of an expert that are multiplied at a time.
_PROGRAMS = 132  # Multiprocessors of an H100 (SXM) and an H200.
_WORKERS = 4
_WORKER_REGISTERS, _LOADER_REGISTERS = 104, 40
_ROW = plgpu.Layout.WGMMA.reduce(1)


class _Plan(NamedTuple):
  """The partition of the work.

  Attributes:
    columns: blocks of outputs that a program has at a time.
    splits: number of workers that share the inputs of a block of outputs.
    depth: blocks of inputs that a worker has at a time.
    stages: number of these in shared memory.
    at_once: number of these that a worker multiplies without a loop.
  """

  columns: int
  splits: int
  depth: int
  stages: int
  at_once: int

  @property
  def width(self) -> int:
    """Inputs that all workers have at a time."""
    return self.splits * self.depth * _BLOCK


def _plan(dtype: jnp.dtype, inputs: int, is_gated: bool) -> _Plan:
  few = dtype == jnp.int4
  if not is_gated:
    return _Plan(4, 1, 1, 8 if few else 5, at_once=4)
  if few and inputs % (4 * _BLOCK) == 0:
    return _Plan(2, 2, 2, 4, at_once=1)  # More would need too many registers.
  return _Plan(2, 2, 1, 6, at_once=2 if few else 4)


def supports(
  weights_EFD: Any, tile: int, dtype: jnp.dtype, parts: int = 1
) -> bool:
  """Whether the kernels support rows of this type and these weights, whose
  outputs have `parts` parts."""
  if not isinstance(weights_EFD, Quantized) or not weights_EFD.is_own:
    return False
  _, F, D = weights_EFD.shape
  plan = _plan(weights_EFD.values.dtype, D, parts == 2)
  outputs = _BLOCK if parts == 2 else _BLOCK * plan.columns
  group = D // weights_EFD.num_groups
  return (
    weights_EFD.scales_transposed
    and weights_EFD.axis == -1
    and weights_EFD.values.dtype in (jnp.int4, jnp.int8)
    and dtype == jnp.bfloat16
    and tile == _ROWS
    and F // parts % outputs == 0
    and D % plan.width == 0
    and group % _BLOCK == 0
  )


def multiply_tiles(
  x_TD: jax.Array,
  weights_EFD: Quantized,
  groups: Any,
  interpret: bool = False,
) -> jax.Array:
  """See `ops.gpu.matmul.multiply_tiles`; with `interpret`, on any device, very
  slowly."""
  return _call(x_TD, weights_EFD, groups, False, interpret, 'grouped_matmul')


def gate_tiles(
  x_MD: jax.Array,
  gate_up_EFD: Quantized,
  groups: Any,
  k: int,
  interpret: bool = False,
) -> jax.Array:
  """See `ops.gpu.matmul.gate_tiles`."""
  is_int4 = gate_up_EFD.values.dtype == jnp.int4
  x_TD = _fetch(x_MD, groups, k, is_int4, interpret)
  return _call(x_TD, gate_up_EFD, groups, True, interpret, 'grouped_gate')


def _fetch(x_MD, groups, k, is_int4, interpret):
  """Tokens in the tiled layout, [T, D], in the input order of int4 if the
  weights are int4; unused tiles are arbitrary."""
  (_, D), T = x_MD.shape, len(groups.row_T)
  width = math.gcd(D, 256)
  return pl.pallas_call(
    functools.partial(_fetch_block, width=width, k=k, is_int4=is_int4),
    grid=(T // _ROWS, D // width),
    out_shape=jax.ShapeDtypeStruct((T, D), x_MD.dtype),
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name='fetch_rows',
  )(x_MD, groups.row_T, groups.end_E)


def _fetch_block(x_ref, row_ref, end_ref, out_ref, *, width, k, is_int4):
  tile, first = pl.program_id(0), pl.program_id(1) * width

  @pl.when(tile < end_ref[end_ref.shape[0] - 1])
  def _():
    rows = pl.ds(tile * _ROWS, _ROWS)
    columns = pl.ds(first, width)
    taken = jnp.minimum(row_ref[rows] // k, x_ref.shape[0] - 1)
    x = x_ref[taken, columns]
    out_ref[rows, columns] = in_order_of_int4(x) if is_int4 else x


def in_order_of_int4(x: jax.Array) -> jax.Array:
  """Inputs [..., D] in the order of `_from_int4`: 0, 4, 8, ... of 32 first,
  then 1, 5, 9, ..."""
  x_split = x.reshape(*x.shape[:-1], -1, 8, 4)
  return jnp.swapaxes(x_split, -1, -2).reshape(x.shape)


@plgpu.inline_mgpu(
  arg_types=(plgpu.Layout.WGMMA_UPCAST_4X,),
  return_type=plgpu.ShapeDtypeStruct(
    (_BLOCK, _BLOCK), jnp.bfloat16, layout=plgpu.Layout.WGMMA
  ),
)
def _from_int4(_, w: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
  """Converts a block of int4, outputs first, to bf16 with permuted inputs.

  A register has eight adjacent values. Four bits in the last bits of 0x4300 are
  128 more than their value, and with the sign bit flipped, 8 more than that.
  """
  i32 = ir.IntegerType.get_signless(32)
  pair = ir.VectorType.get((2,), ir.BF16Type.get())
  made = np.empty((1, 4 * w.registers.shape[1], *w.registers.shape[2:]), object)
  for (_, column, *rest), register in np.ndenumerate(w.registers):
    bits = mgpu.utils.bitcast(register, i32)
    for i in range(4):
      moved = arith.shrui(bits, mgpu.c(4 * i, i32)) if i else bits
      found: Any = llvm.inline_asm(
        i32,
        [moved],
        """{
        .reg .b32 more, less;
        lop3.b32 more, $1, 0x000F000F, 0x43084308, 0x6A;
        mov.b32 less, 0x43084308;
        sub.bf16x2 $0, more, less;
        }""",
        '=r,r',
      )
      made[(0, 4 * column + i, *rest)] = mgpu.utils.bitcast(found, pair)
  return mgpu.FragmentedArray(
    _registers=made, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None
  )


def _are_neighbours(num_groups: int, inputs: int) -> bool:
  """Whether the scales of consecutive blocks of inputs are contiguous: one for
  each block, or one for all."""
  return num_groups in (1, inputs // _BLOCK)


@dispatch.in_32_bits
def _call(x_TD, weights_EFD, groups, is_gated, interpret, name):
  """Each tile times its expert's matrix transposed, or GeGLU of the halves."""
  values, scales = weights_EFD.values, weights_EFD.scales
  (T, D), F = x_TD.shape, values.shape[1]
  outputs = F // 2 if is_gated else F
  plan = _plan(values.dtype, D, is_gated)
  columns, splits, _, stages, _ = plan
  bits = jnp.iinfo(values.dtype).bits
  blocks = plan.width // _BLOCK if scales.shape[1] > 1 else 1
  parts = 2 if is_gated else 1  # Runs of outputs that a program has.
  run = columns // parts * _BLOCK
  copies = 1 if _are_neighbours(scales.shape[1], D) else blocks
  scratch = {
    'x_smem': _tiled((stages, _ROWS, plan.width), jnp.bfloat16, 128),
    'w_smem': _tiled(
      (stages, parts, run, plan.width), values.dtype, _BLOCK * bits // 8
    ),
    'scales_smem': plgpu.SMEM((stages, parts, blocks, run), scales.dtype),
    'out_smem': _tiled(
      (1 if is_gated else columns, _ROWS, _BLOCK), x_TD.dtype, 128
    ),
    'loaded': plgpu.Barrier(
      num_arrivals=1 + parts * (1 + copies), num_barriers=stages
    ),
    'used': plgpu.Barrier(num_arrivals=_WORKERS, num_barriers=stages),
  }
  if is_gated:
    scratch['parts_smem'] = _tiled(
      (_WORKERS - 1, _BLOCK, _ROWS), jnp.float32, 128
    )
    scratch['parts_made'] = plgpu.Barrier(num_arrivals=_WORKERS - 1)
    scratch['parts_used'] = plgpu.Barrier()
  if interpret:  # The interpreter can't multiply operands in registers.
    scratch['plain_smem'] = plgpu.SMEM((_WORKERS, _BLOCK, _BLOCK), jnp.bfloat16)
  return plgpu.kernel(
    functools.partial(_multiply, plan=plan, is_gated=is_gated),
    out_type=jax.ShapeDtypeStruct((T, outputs), x_TD.dtype),
    scratch_types=scratch,
    grid=(2 if interpret else _num_programs(),),
    grid_names=('program',),
    num_threads=_WORKERS + 1,
    thread_name='warp_group',
    kernel_name=name,
    interpret=plgpu.InterpretGPUParams() if interpret else None,
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      unsafe_no_auto_barriers=True,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
  )(x_TD, values, scales, groups.expert_of_tile, groups.end_E)


def _num_programs() -> int:
  """The number of multiprocessors of the smallest GPU here."""
  gpus = (d for d in jax.local_devices() if d.platform == 'gpu')
  return min((d.core_count for d in gpus), default=_PROGRAMS)


def _tiled(shape, dtype, swizzle: int):
  """Shared memory in the layout of matrix units."""
  of = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
  tiling = plgpu.TilingTransform((8, 8 * swizzle // of(dtype).bits))
  transforms = (tiling, plgpu.SwizzleTransform(swizzle))
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def _multiply(
  x_ref,
  w_ref,
  scales_ref,
  expert_ref,
  end_ref,
  out_ref,
  *,
  x_smem,
  w_smem,
  scales_smem,
  out_smem,
  loaded,
  used,
  parts_smem=None,
  parts_made=None,
  parts_used=None,
  plain_smem=None,
  plan,
  is_gated,
):
  columns, splits, depth, stages, at_once = plan
  worker = jax.lax.axis_index('warp_group')  # The last one loads.
  program, programs = (
    jax.lax.axis_index('program'),
    jax.lax.axis_size('program'),
  )
  (_, F, D), outputs = w_ref.shape, out_ref.shape[1]
  steps = D // plan.width
  blocks_of_group = D // scales_ref.shape[1] // _BLOCK
  has_groups = scales_ref.shape[1] > 1
  at_a_time = _BLOCK if is_gated else columns * _BLOCK

  def own(column):
    """Position of a worker's outputs: (index of the part, slice of it)."""
    if is_gated:
      return column, pl.ds(0, _BLOCK)
    return 0, pl.ds(column * _BLOCK, _BLOCK)

  def for_each_piece(body):
    """Calls body(expert, first output, first row, number of pieces before) for
    all pieces of this program, in the same order for loader and workers."""
    of_tile = outputs // at_a_time

    def one(i, _):
      # Not `jnp` functions, which a program of one warp can't use.
      place = program + i * programs
      tile = jax.lax.div(place, of_tile)
      first = jax.lax.rem(place, of_tile) * at_a_time
      body(expert_ref[tile], first, tile * _ROWS, i)

    places = end_ref[end_ref.shape[0] - 1] * of_tile
    mine = jax.lax.div(places - program + programs - 1, programs)
    jax.lax.fori_loop(0, mine, one, None)

  def load(expert, first, row, count):
    def step(i, _):
      number = count * steps + i
      stage = jax.lax.rem(number, stages)

      @pl.when(number >= stages)
      def _():
        plgpu.barrier_wait(used.at[stage])

      inputs = pl.ds(i * plan.width, plan.width)
      copy = functools.partial(
        plgpu.copy_gmem_to_smem, barrier=loaded.at[stage]
      )
      _, parts, blocks, run = scales_smem.shape
      for part in range(parts):
        where = pl.ds(first + part * (F // 2), run)
        copy(w_ref.at[expert, where, inputs], w_smem.at[stage, part])
        if _are_neighbours(scales_ref.shape[1], D):
          which = pl.ds(i * blocks if has_groups else 0, blocks)
          copy(scales_ref.at[expert, which, where], scales_smem.at[stage, part])
          continue
        for block in range(blocks):
          which = jax.lax.div(i * splits * depth + block, blocks_of_group)
          copy(
            scales_ref.at[expert, which, where],
            scales_smem.at[stage, part, block],
          )
      copy(x_ref.at[pl.ds(row, _ROWS), inputs], x_smem.at[stage])

    jax.lax.fori_loop(0, steps, step, None)

  is_int4 = w_ref.dtype == jnp.int4
  few_bits = (
    plgpu.Layout.WGMMA_UPCAST_4X if is_int4 else plgpu.Layout.WGMMA_UPCAST_2X
  )

  def weights(stage, column, block):
    """A block of weights in bf16, in registers."""
    where = (stage, *own(column), pl.ds(block * _BLOCK, _BLOCK))
    w = plgpu.layout_cast(w_smem[where], few_bits)
    in_order = is_int4 and is_gated  # The order of the rows.
    if plain_smem is not None:
      plain = w.astype(jnp.bfloat16)
      return in_order_of_int4(plain) if in_order else plain
    if in_order:
      return _from_int4(w)
    return plgpu.layout_cast(w, plgpu.Layout.WGMMA).astype(jnp.bfloat16)

  def multiply(total_ref, w, stage, block):
    """Starts an accumulating product without waiting for it."""
    if plain_smem is not None:
      plain_smem[worker] = w
      w = plain_smem.at[worker]
    rows = x_smem.at[stage, :, pl.ds(block * _BLOCK, _BLOCK)]
    plgpu.wgmma(total_ref, w, rows.T)

  def over_inputs(start, settle, total, split, count):
    """`total = settle(total, start(stage, block))` over blocks of inputs; each
    is settled after the product of the next has been started. A loop ends with
    no product in flight: otherwise the compiler would wait for each."""

    def burst(first, number, total):
      started = None
      for index in range(number):
        stage = jax.lax.rem(count * steps + first + index, stages)
        plgpu.barrier_wait(loaded.at[stage])
        for block in range(depth):
          before = started
          made = start(stage, split * depth + block)
          started = (made, stage, block == depth - 1)
          if before is not None:
            total = finish(total, 1, *before)
      return finish(total, 0, *started)

    def finish(total, others, made, stage, is_last):
      plgpu.wgmma_wait(others)
      if is_last:
        plgpu.barrier_arrive(used.at[stage])
      return settle(total, made)

    total = jax.lax.fori_loop(
      0, steps // at_once, lambda i, t: burst(i * at_once, at_once, t), total
    )
    left = steps % at_once
    return burst(steps - left, left, total) if left else total

  accumulator = plgpu.ACC((_BLOCK, _ROWS))

  def scaled(total, scale):
    scale = scale.astype(jnp.float32)
    return total * jax.lax.broadcast_in_dim(scale, total.shape, [0])

  def sum_of_groups(column, split, count):
    part, rows = own(column)

    def start(stage, block):
      scale = plgpu.layout_cast(scales_smem[stage, part, block, rows], _ROW)
      w = weights(stage, column, block)

      def product(total_ref):
        multiply(total_ref, w, stage, block)
        return plgpu.wgmma_accumulator_load(total_ref, wait_n=None)

      return pl.run_scoped(product, accumulator), scale

    zeros = jnp.zeros((_BLOCK, _ROWS), jnp.float32)
    zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
    settle = lambda total, made: total + scaled(*made)
    return over_inputs(start, settle, zeros, split, count)

  def sum_of_all(column, split, count):
    part, rows = own(column)

    def products(total_ref):
      def start(stage, block):
        multiply(total_ref, weights(stage, column, block), stage, block)
        return plgpu.layout_cast(scales_smem[stage, part, 0, rows], _ROW)

      zeros = jnp.zeros((_BLOCK,), scales_ref.dtype)
      zeros = plgpu.layout_cast(zeros, _ROW)
      scale = over_inputs(start, lambda _, s: s, zeros, split, count)
      return scaled(total_ref[...], scale)

    return pl.run_scoped(products, accumulator)

  def write(made, place, first, row):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    made = made.astype(out_ref.dtype)
    out_smem.at[place].T[...] = plgpu.layout_cast(
      made, plgpu.Layout.WGMMA_TRANSPOSED
    )
    plgpu.commit_smem()
    where = (pl.ds(row, _ROWS), pl.ds(first, _BLOCK))
    plgpu.copy_smem_to_gmem(out_smem.at[place], out_ref.at[where])

  def put_together(total, first, row, count):
    """The first worker sums the results of all and applies GeGLU."""

    @pl.when(worker > 0)
    def _():
      @pl.when(count > 0)
      def _():
        plgpu.barrier_wait(parts_used)

      parts_smem[worker - 1] = total
      plgpu.barrier_arrive(parts_made)

    @pl.when(worker == 0)
    def _():
      plgpu.barrier_wait(parts_made)
      parts = [total]
      for other in range(_WORKERS - 1):
        parts.append(plgpu.layout_cast(parts_smem[other], plgpu.Layout.WGMMA))
      plgpu.barrier_arrive(parts_used)
      gate, up = sum(parts[:splits]), sum(parts[splits:])
      write(activation.geglu(gate, up), 0, first, row)

  def work(expert, first, row, count):
    column, split = worker // splits, worker % splits
    if has_groups:
      total = sum_of_groups(column, split, count)
    else:
      total = sum_of_all(column, split, count)
    if is_gated:
      put_together(total, first, row, count)
    else:
      write(total, column, first + column * _BLOCK, row)

  @pl.when(worker < _WORKERS)
  def _():
    plgpu.set_max_registers(_WORKER_REGISTERS, action='increase')
    for_each_piece(work)
    plgpu.wait_smem_to_gmem(0)

  @pl.when(worker == _WORKERS)
  def _():
    plgpu.set_max_registers(_LOADER_REGISTERS, action='decrease')

    @plgpu.warp_map
    def _(warp):
      @pl.when(warp == 0)
      def _():
        for_each_piece(load)
