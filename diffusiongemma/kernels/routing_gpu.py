"""What is between router and experts on GPUs: twins of `moe.choose` and
`grouped_matmul.make_groups`.

Few numbers and many small steps, which here are one kernel each. Programs of
the layout don't wait for each other: each counts all rows for itself.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

_ROWS = 16
_COUNTED = 128  # Rows that a program of the layout has, and looks at at a time.


def suits(logits_TE: jax.Array) -> bool:
  """Whether the kernel can be used."""
  T, E = logits_TE.shape
  return pl.next_power_of_2(E) == E and math.gcd(T, _ROWS) == _ROWS


def choose(
  logits_TE: jax.Array,
  scale_E: jax.Array,
  k: int,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """See `moe.choose`; with `interpret` on any device, slowly."""
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
    # Of several, the first.
    here = jnp.where(left == top[:, None], expert, left.shape[1])
    best = jnp.min(here, axis=1)
    left = jnp.where(expert == best[:, None], -jnp.inf, left)
    tops.append(top)
    chosen.append(best)
  # What all experts have in common cancels out.
  parts = [jnp.exp(top - tops[0]) for top in tops]
  total = sum(parts)
  for index, (part, best) in enumerate(zip(parts, chosen, strict=True)):
    scale = scale_ref[best].astype(jnp.float32)
    weights_ref[rows, index] = part / total * scale
    experts_ref[rows, index] = best


def suits_layout(num_rows: int, num_experts: int) -> bool:
  """Whether `lay_out` can be used. Each row meets all others."""
  is_power = pl.next_power_of_2(num_experts) == num_experts
  return is_power and num_rows % _COUNTED == 0 and num_rows <= 2**14


def lay_out(
  expert_R: jax.Array, num_experts: int, tile: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """(slot_R, row_T, expert_of_tile, end_E) of `grouped_matmul.Groups`; with
  `interpret` on any device, slowly."""
  R = len(expert_R)
  num_tiles = -(-R // tile) + num_experts
  numbers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  padding_T = jnp.full((num_tiles * tile,), R, jnp.int32)
  slot_R, row_T, expert_of_tile, end_E = pl.pallas_call(
    functools.partial(_lay_out, tile=tile),
    grid=(R // _COUNTED,),
    out_shape=(
      numbers(R),
      numbers(num_tiles * tile),
      numbers(num_tiles),
      numbers(num_experts),
    ),
    input_output_aliases={1: 1},
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name='lay_out_experts',
  )(expert_R, padding_T)
  return slot_R, row_T, expert_of_tile, end_E


def _lay_out(
  expert_ref, _, slot_ref, row_ref, expert_of_tile_ref, end_ref, *, tile
):
  (R,), (E,), (T,) = expert_ref.shape, end_ref.shape, row_ref.shape
  program = pl.program_id(0)
  mine = pl.ds(program * _COUNTED, _COUNTED)
  expert_m, row_m = expert_ref[mine], program * _COUNTED + _iota(_COUNTED)
  expert_E = _iota(E)

  def count(i, state):
    count_E, rank_m = state
    expert_c = expert_ref[pl.ds(i * _COUNTED, _COUNTED)]
    row_c = i * _COUNTED + _iota(_COUNTED)
    count_E += _sum(expert_E[:, None] == expert_c[None, :])
    before_mc = row_c[None, :] < row_m[:, None]
    rank_m += _sum((expert_m[:, None] == expert_c[None, :]) & before_mc)
    return count_E, rank_m

  zeros = jnp.zeros((E,), jnp.int32), jnp.zeros((_COUNTED,), jnp.int32)
  count_E, rank_m = jax.lax.fori_loop(0, R // _COUNTED, count, zeros)
  tiles_E = (count_E + tile - 1) // tile
  is_before_EE = expert_E[None, :] <= expert_E[:, None]
  end_E = jnp.sum(jnp.where(is_before_EE, tiles_E[None, :], 0), axis=1)
  start_E = (end_E - tiles_E) * tile
  is_mine_mE = expert_m[:, None] == expert_E[None, :]
  start_m = jnp.sum(jnp.where(is_mine_mE, start_E[None, :], 0), axis=1)
  # The rows of no expert go nowhere.
  slot_m = jnp.where(expert_m < E, start_m + rank_m, T)
  slot_ref[mine] = slot_m
  plgpu.store(row_ref.at[slot_m], row_m, mask=slot_m < T)

  @pl.when(program == 0)
  def _():
    end_ref[:] = end_E

    def name_tiles(i, carry):
      index_t = i * _COUNTED + _iota(_COUNTED)
      # Tiles past the last group are padding; they may meet any expert.
      expert_t = jnp.minimum(_sum(index_t[:, None] >= end_E[None, :]), E - 1)
      where = expert_of_tile_ref.at[pl.ds(i * _COUNTED, _COUNTED)]
      plgpu.store(where, expert_t, mask=index_t < T // tile)
      return carry

    jax.lax.fori_loop(0, pl.cdiv(T // tile, _COUNTED), name_tiles, 0)


def _iota(size: int) -> jax.Array:
  return jax.lax.broadcasted_iota(jnp.int32, (size,), 0)


def _sum(seen: jax.Array) -> jax.Array:
  """How many of each row."""
  return jnp.sum(seen.astype(jnp.int32), axis=1)
