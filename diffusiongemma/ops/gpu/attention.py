"""Attention on GPUs, in Triton: the kernel of `ops.attention`.

attend: a program has some queries of the heads that share a key, loops over
blocks of keys, part after part, and rescales its sums as the maximum grows, so
that scores exist only in registers. If there are too few queries to keep a GPU
busy, programs share the keys of a query, and their results are combined. Empty
slots of a cache are skipped.

Sizes of blocks, warps and stages are the fastest measured on an H200
(`experiments/benchmarks/NOTES.md`).
"""

from collections.abc import Sequence
import functools
import itertools
import math
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from diffusiongemma import powers
from diffusiongemma.ops import dispatch
from diffusiongemma.ops.gpu import matmul as products

LONGEST_HEAD = 512
# Number of scores (32 MB of float32) up to which XLA is used for heads of 512.
# It was faster with 5 million; more were not measured.
_FEW_SCORES = 2**23
_MOST_SPLITS = 4
_PROGRAMS = 256  # About enough to keep a GPU busy.
_PUT_TOGETHER = 4  # Heads of a query that a program of `_put_together` has.


class _Blocks(NamedTuple):
  """Block sizes for heads of some length.

  Attributes:
    rows: queries of a program of `attend`, times the heads that share a key.
    keys: keys of a block.
    head_rows: rows of a program of `project`.
    head_warps: warps of a program of `project`.
  """

  rows: int
  keys: int
  head_rows: int
  head_warps: int


def blocks_of(head_dim: int) -> _Blocks:
  """The block sizes; fewer queries of longer heads fit into registers."""
  return _Blocks(64, 32, 64, 4) if head_dim <= 256 else _Blocks(32, 64, 64, 8)


def supports(
  q_BLNH: jax.Array, parts: Sequence[tuple[jax.Array, jax.Array]]
) -> bool:
  """Whether the kernel supports these operands."""
  _, L, N, H = q_BLNH.shape
  group = N // parts[0][0].shape[2]
  lengths = [k_BSKH.shape[1] for k_BSKH, _ in parts if k_BSKH.shape[1]]
  scores = math.prod(q_BLNH.shape[:3]) * sum(lengths)
  is_wide = q_BLNH.dtype.itemsize > 2  # Two such blocks do not fit.
  return (
    pl.next_power_of_2(H) == H <= LONGEST_HEAD
    and not (H == LONGEST_HEAD and (scores <= _FEW_SCORES or is_wide))
    and pl.next_power_of_2(group) == group
    and min(H, group * _queries(L, H, group), *lengths) >= products.SMALLEST
  )


def _queries(length: int, head_dim: int, group: int) -> int:
  """Queries of a program, if `group` heads share a key."""
  return math.gcd(length, max(1, blocks_of(head_dim).rows // group))


@dispatch.in_32_bits
def attend(
  q_BLNH: jax.Array,
  parts: Sequence[tuple[jax.Array, jax.Array]],
  mask_BLS: jax.Array,
  filled_B: jax.Array | None = None,
  interpret: bool = False,
) -> jax.Array:
  """See `attention.attend`; with `interpret`, on any device, slowly."""
  B, L, N, H = q_BLNH.shape
  K = parts[0][0].shape[2]
  is_part = [k_BSKH.shape[1] > 0 for k_BSKH, _ in parts]
  parts = list(itertools.compress(parts, is_part))
  filled = [
    filled_B if i == 0 else None for i, held in enumerate(is_part) if held
  ]
  queries, most = _queries(L, H, N // K), blocks_of(H).keys
  keys = [min(most, powers.largest_power_of_two(k.shape[1])) for k, _ in parts]
  programs = L // queries * K * B
  splits = max(1, min(_MOST_SPLITS, _PROGRAMS // programs))
  blocks = (k.shape[1] // n for (k, _), n in zip(parts, keys, strict=True))
  splits = min(splits, sum(blocks))
  kernel = functools.partial(
    _attend, queries=queries, group=N // K, keys=keys, splits=splits
  )
  # For the longest heads, two stages fit only on Hopper.
  num_stages = 2 if H < LONGEST_HEAD or dispatch.has_hopper() else 1
  array = jax.ShapeDtypeStruct
  out_SBLNH, top_SBLN, total_SBLN = pl.pallas_call(
    kernel,
    grid=(L // queries, K, B * splits),
    out_shape=(
      array((splits, B, L, N, H), jnp.float32 if splits > 1 else q_BLNH.dtype),
      *[array((splits, B, L, N), jnp.float32)] * 2,
    ),
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=num_stages),
    interpret=interpret,
    name='attention',
  )(q_BLNH, parts, mask_BLS.astype(jnp.int8), filled)
  if splits == 1:
    return out_SBLNH[0]
  heads = math.gcd(N, _PUT_TOGETHER)
  return pl.pallas_call(
    functools.partial(_put_together, heads=heads),
    grid=(B, L, N // heads),
    out_shape=array(q_BLNH.shape, q_BLNH.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name='put_together',
  )(out_SBLNH, top_SBLN, total_SBLN)


def _put_together(out_ref, top_ref, total_ref, made_ref, *, heads):
  """Combines the results of programs that share the keys of a query."""
  row, query = pl.program_id(0), pl.program_id(1)
  where = (row, query, pl.ds(pl.program_id(2) * heads, heads))
  splits = range(out_ref.shape[0])
  tops = [top_ref[split, *where] for split in splits]
  most = functools.reduce(jnp.maximum, tops)
  weights = [
    total_ref[split, *where] * jnp.exp(tops[split] - most) for split in splits
  ]
  combined = sum(
    out_ref[split, *where, :] * weights[split][:, None] for split in splits
  )
  made_ref[*where, :] = (combined / sum(weights)[:, None]).astype(
    made_ref.dtype
  )


def _attend(
  q_ref,
  parts_ref,
  mask_ref,
  filled_ref,
  out_ref,
  top_ref,
  total_ref,
  *,
  queries,
  group,
  keys,
  splits,
):
  first = pl.program_id(0) * queries
  kv_head = pl.program_id(1)
  row, split = pl.program_id(2) // splits, pl.program_id(2) % splits
  where = (row, pl.ds(first, queries), pl.ds(kv_head * group, group))
  rows, H = queries * group, q_ref.shape[3]
  q = q_ref[*where, :].reshape(rows, H)
  same_for_all = mask_ref.shape[1] == 1
  lowest = jnp.finfo(jnp.float32).min
  state = (
    jnp.full((rows,), -jnp.inf, jnp.float32),
    jnp.zeros((rows,), jnp.float32),
    jnp.zeros((rows, H), jnp.float32),
  )
  counts = []
  for (k_ref, _), filled, size in zip(parts_ref, filled_ref, keys, strict=True):
    S = k_ref.shape[1]
    if filled is not None:
      S = jnp.minimum(S, filled[row])
    counts.append((S + size - 1) // size)
  # The range of this program among the blocks of all parts.
  mine = [(split + i) * sum(counts) // splits for i in (0, 1)]
  start = before = 0
  for (k_ref, v_ref), size, count in zip(parts_ref, keys, counts, strict=True):
    S = k_ref.shape[1]

    def step(i, state, k_ref=k_ref, v_ref=v_ref, S=S, size=size, start=start):
      top, total, out = state
      # The last block may overlap the one before; the overlap is masked below.
      begin = jnp.minimum(i * size, S - size)
      here = pl.ds(begin, size)
      scores = jnp.dot(
        q, k_ref[row, here, kv_head, :].T, preferred_element_type=jnp.float32
      )
      looked = pl.ds(0, 1) if same_for_all else pl.ds(first, queries)
      seen = mask_ref[row, looked, pl.ds(start + begin, size)] != 0
      seen = jnp.broadcast_to(seen[:, None, :], (seen.shape[0], group, size))
      if same_for_all:
        seen = jnp.broadcast_to(seen, (queries, group, size))
      scores = jnp.where(seen.reshape(rows, size), scores, lowest)
      if S % size:
        position = begin + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(position >= i * size, scores, -jnp.inf)
      new_top = jnp.maximum(top, jnp.max(scores, axis=1))
      shrink = jnp.exp(top - new_top)
      weights = jnp.exp(scores - new_top[:, None])
      values = v_ref[row, here, kv_head, :]
      part = jnp.dot(
        weights.astype(values.dtype), values, preferred_element_type=jnp.float32
      )
      total = total * shrink + jnp.sum(weights, axis=1)
      return new_top, total, out * shrink[:, None] + part

    begin, end = (jnp.clip(block - before, 0, count) for block in mine)
    state = jax.lax.fori_loop(begin, end, step, state)
    start, before = start + S, before + count
  top, total, out = state
  # A program may have no block.
  mean = out / jnp.where(total > 0, total, 1.0)[:, None]
  out = mean.astype(out_ref.dtype)
  out_ref[split, *where, :] = out.reshape(queries, group, H)
  top_ref[split, *where] = top.reshape(queries, group)
  total_ref[split, *where] = total.reshape(queries, group)
