"""Routing on GPUs: the kernels of `routing.choose` and `routing.make_groups`.

Many small steps on few numbers, fused into few kernels. The layout takes two:
programs can't wait for each other, and the slot of a row depends on the counts
of all programs. Counts are products with zeros and ones, which are exact on
matrix units.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from diffusiongemma.ops import dispatch

_ROWS = 16
_COUNTED = 128  # Rows of a program of the layout.


def supports(logits_TE: jax.Array) -> bool:
  """Whether the kernel supports these operands."""
  T, E = logits_TE.shape
  is_known = logits_TE.dtype in (jnp.float32, jnp.bfloat16)
  is_power = pl.next_power_of_2(E) == E
  return is_known and is_power and math.gcd(T, _ROWS) == _ROWS


@dispatch.in_32_bits
def choose(
  logits_TE: jax.Array,
  scale_E: jax.Array,
  k: int,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """See `routing.choose`; with `interpret`, on any device, slowly."""
  T, _ = logits_TE.shape
  return pl.pallas_call(
    functools.partial(_choose, k=k),
    grid=(T // _ROWS,),
    out_shape=(
      jax.ShapeDtypeStruct((T, k), jnp.float32),
      jax.ShapeDtypeStruct((T, k), jnp.int32),
    ),
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name='choose_experts',
  )(logits_TE, scale_E)


def _choose(logits_ref, scale_ref, weights_ref, experts_ref, *, k):
  rows = pl.ds(pl.program_id(0) * _ROWS, _ROWS)
  left = logits_ref[rows, :]
  expert = jax.lax.broadcasted_iota(jnp.int32, left.shape, 1)
  tops, chosen = [], []
  for _ in range(k):
    top = jnp.max(left, axis=1)
    # Ties by index.
    here = jnp.where(left == top[:, None], expert, left.shape[1])
    best = jnp.min(here, axis=1)
    left = jnp.where(expert == best[:, None], -jnp.inf, left)
    tops.append(top)
    chosen.append(best)
  # Only the differences between logits matter.
  exponentials = [jnp.exp(top - tops[0]) for top in tops]
  total = sum(exponentials)
  for index, (exponential, best) in enumerate(
    zip(exponentials, chosen, strict=True)
  ):
    scale = scale_ref[best].astype(jnp.float32)
    weights_ref[rows, index] = exponential / total * scale
    experts_ref[rows, index] = best


def supports_layout(num_rows: int, num_experts: int) -> bool:
  """Whether `lay_out` supports these sizes; each program reads the counts of
  all others."""
  is_power = pl.next_power_of_2(num_experts) == num_experts
  num_blocks = num_rows // _COUNTED
  return (
    is_power
    and num_experts >= 16  # The smallest block of a product.
    and num_rows % _COUNTED == 0
    and pl.next_power_of_2(num_blocks) == num_blocks <= _COUNTED
  )


@dispatch.in_32_bits
def lay_out(
  expert_R: jax.Array, num_experts: int, tile: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """(slot_R, row_T, expert_of_tile, end_E) of `routing.Groups`; with
  `interpret` on any device, slowly."""
  (R,), E = expert_R.shape, num_experts
  num_tiles, num_blocks = -(-R // tile) + E, R // _COUNTED
  numbers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  call = functools.partial(
    pl.pallas_call,
    grid=(num_blocks,),
    compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
    interpret=interpret,
  )
  rank_R, count_bE, padding_T = call(
    _count,
    out_shape=(numbers(R), numbers(num_blocks, E), numbers(num_tiles * tile)),
    name='count_experts',
  )(expert_R)
  return tuple(
    call(
      functools.partial(_lay_out, tile=tile),
      out_shape=(
        numbers(R),
        numbers(num_tiles * tile),
        numbers(num_tiles),
        numbers(E),
      ),
      input_output_aliases={3: 1},
      name='lay_out_experts',
    )(expert_R, rank_R, count_bE, padding_T)
  )


def _count(expert_ref, rank_ref, count_ref, row_ref):
  """Counts the rows of each expert in a block, and those before each row; fills
  the tiles with padding."""
  (num_blocks, E), (T,) = count_ref.shape, row_ref.shape
  program = pl.program_id(0)

  def clear(i, carry):
    block = program + i * num_blocks
    where = pl.ds(block * _COUNTED, _COUNTED)
    padding = jnp.full((_COUNTED,), expert_ref.shape[0], jnp.int32)
    inside = block * _COUNTED + _iota(_COUNTED) < T
    plgpu.store(row_ref.at[where], padding, mask=inside)
    return carry

  jax.lax.fori_loop(0, pl.cdiv(T, _COUNTED * num_blocks), clear, 0)
  mine = pl.ds(program * _COUNTED, _COUNTED)
  is_mine_mE = expert_ref[mine][:, None] == _iota(E)[None, :]
  is_before_mm = _iota(_COUNTED)[None, :] < _iota(_COUNTED)[:, None]
  before_mE = jnp.dot(
    is_before_mm.astype(jnp.bfloat16),
    is_mine_mE.astype(jnp.bfloat16),
    preferred_element_type=jnp.float32,
  )
  rank_m = jnp.sum(jnp.where(is_mine_mE, before_mE, 0.0), axis=1)
  rank_ref[mine] = rank_m.astype(jnp.int32)
  count_ref[program, :] = jnp.sum(is_mine_mE.astype(jnp.int32), axis=0)


def _lay_out(
  expert_ref,
  rank_ref,
  count_ref,
  _,
  slot_ref,
  row_ref,
  expert_of_tile_ref,
  end_ref,
  *,
  tile,
):
  (num_blocks, E), (T,) = count_ref.shape, row_ref.shape
  program, num_tiles = pl.program_id(0), expert_of_tile_ref.shape[0]
  mine = pl.ds(program * _COUNTED, _COUNTED)
  expert_m = expert_ref[mine]
  count_bE = count_ref[:, :]
  is_before_b = _iota(num_blocks) < program
  before_E = jnp.sum(jnp.where(is_before_b[:, None], count_bE, 0), axis=0)
  tiles_E = (jnp.sum(count_bE, axis=0) + tile - 1) // tile
  is_before_EE = _iota(E)[:, None] <= _iota(E)[None, :]
  end_E = jnp.sum(jnp.where(is_before_EE, tiles_E[:, None], 0), axis=0)
  start_E = (end_E - tiles_E) * tile + before_E
  is_mine_mE = expert_m[:, None] == _iota(E)[None, :]
  start_m = jnp.sum(jnp.where(is_mine_mE, start_E[None, :], 0), axis=1)
  # Rows of experts elsewhere get no slot.
  slot_m = jnp.where(expert_m < E, start_m + rank_ref[mine], T)
  slot_ref[mine] = slot_m
  row_m = program * _COUNTED + _iota(_COUNTED)
  plgpu.store(row_ref.at[slot_m], row_m, mask=slot_m < T)

  @pl.when(program == 0)
  def _():
    end_ref[:] = end_E

    def name_tiles(i, carry):
      index_t = i * _COUNTED + _iota(_COUNTED)
      is_past_tE = index_t[:, None] >= end_E[None, :]
      expert_t = jnp.sum(is_past_tE.astype(jnp.int32), axis=1)
      # Tiles past the last group are padding, with an arbitrary expert.
      plgpu.store(
        expert_of_tile_ref.at[pl.ds(i * _COUNTED, _COUNTED)],
        jnp.minimum(expert_t, E - 1),
        mask=index_t < num_tiles,
      )
      return carry

    jax.lax.fori_loop(0, pl.cdiv(num_tiles, _COUNTED), name_tiles, 0)


def _iota(size: int) -> jax.Array:
  return jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
