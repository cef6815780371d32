"""Heads on GPUs, in Triton: the kernels of `ops.heads`.

project: a program computes some rows of one head of q, k or v: the product with
quantised weights, the norm and the rotation.
norm_and_rotate: only the norm and the rotation, of given heads.
"""

from collections.abc import Container
from collections.abc import Sequence
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
from diffusiongemma.ops.gpu.attention import LONGEST_HEAD
from diffusiongemma.ops.gpu.attention import blocks_of

_NORMED = 16  # Rows of a head that a program of `norm_and_rotate` has.


def supports(x_TD: jax.Array, weights: Sequence[Any]) -> bool:
  """Whether `project` supports these quantised weights [D, N, H]."""
  D, _, H = weights[0].shape
  groups = {w.scales.shape[0] for w in weights}
  inputs = products.block(D // max(groups))
  return (
    len(groups) == 1
    and few_bits.supports(weights[0].values.dtype)
    and pl.next_power_of_2(H) == H
    and 2 * products.SMALLEST <= H <= LONGEST_HEAD
    and min(math.gcd(len(x_TD), blocks_of(H).head_rows), inputs)
    >= products.SMALLEST
  )


@dispatch.in_32_bits
def project(
  x_TD: jax.Array,
  weights: dict[str, Any],
  norms: dict[str, jax.Array],
  cos_sin_TF: tuple[jax.Array, jax.Array],
  *,
  epsilon: float,
  interpret: bool = False,
) -> dict[str, jax.Array]:
  """Heads of q, k and v, normed, q and k rotated: each [T, N, H].

  Args:
    x_TD: rows.
    weights: quantised matrices [D, N, H] of q, k and v; if 'v' is absent, v is
      the unnormalised k.
    norms: scales [H] of the norms of q and k; v has none.
    cos_sin_TF: cosines and sines of the angles, [T, H / 2].
    epsilon: of the norms.
    interpret: whether to run on any device, slowly.
  """
  (T, D), H = x_TD.shape, weights['q'].shape[2]
  *_, head_rows, warps = blocks_of(H)
  rows = math.gcd(T, head_rows)
  matrices, out_shapes, heads = [], [], 0
  names: list[str] = []
  for name, w in weights.items():
    count = w.shape[1]
    parts = (w.values.reshape(1, D, -1), w.scales.reshape(1, -1, count * H))
    targets = _targets(name, weights)
    matrices.append((parts, [norms.get(target) for target in targets]))
    shape = jax.ShapeDtypeStruct((T, count, H), x_TD.dtype)
    out_shapes.append([shape] * len(targets))
    names += targets
    heads += count
  outputs = pl.pallas_call(
    functools.partial(
      _project,
      rows=rows,
      block_in=products.block(D // weights['q'].scales.shape[0]),
      epsilon=epsilon,
      interpret=interpret,
    ),
    grid=(heads, T // rows),
    out_shape=out_shapes,
    compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=3),
    interpret=interpret,
    name='heads',
  )(x_TD, matrices, cos_sin_TF)
  return dict(zip(names, jax.tree.leaves(outputs), strict=True))


def _targets(name: str, names: Container[str]) -> tuple[str, ...]:
  """The heads computed from product `name`, if there are products `names`."""
  return ('k', 'v') if name == 'k' and 'v' not in names else (name,)


def _project(
  x_ref,
  matrices_ref,
  cos_sin_ref,
  *made_refs,
  rows,
  block_in,
  epsilon,
  interpret,
):
  which = pl.ds(pl.program_id(1) * rows, rows)
  start = 0
  for (parts, norms), outs in zip(matrices_ref, made_refs, strict=True):
    _, count, H = outs[0].shape
    head = pl.program_id(0) - start
    start += count

    @pl.when((head >= 0) & (head < count))
    def _(parts=parts, norms=norms, outs=outs, head=head, H=H):
      halves = [pl.ds(head * H, H // 2), pl.ds(head * H + H // 2, H // 2)]
      made = products.block_products(
        *(x_ref, which, 0, [(*parts, half) for half in halves]),
        shape=(rows, H // 2),
        block_in=block_in,
        dtype=x_ref.dtype,
        transposed=True,
        interpret=interpret,
      )
      _finish(made, which, head, norms, outs, cos_sin_ref, epsilon)


def _finish(halves, which, head, norms, outs, cos_sin_ref, epsilon):
  """Norms rows of a head, given as the float32 halves of its axis, rotates them
  if the norm has a scale, and writes them."""
  H = outs[0].shape[2]
  low, high = pl.ds(0, H // 2), pl.ds(H // 2, H // 2)
  squares = sum(jnp.sum(half * half, axis=1) for half in halves)
  factor = jax.lax.rsqrt(squares / H + epsilon)[:, None]
  for norm_ref, out_ref in zip(norms, outs, strict=True):
    first, second = (half * factor for half in halves)
    if norm_ref is not None:
      first, second = first * norm_ref[low], second * norm_ref[high]
      cos, sin = (ref[which, :] for ref in cos_sin_ref)
      first, second = first * cos - second * sin, second * cos + first * sin
    out_ref[which, head, low] = first.astype(out_ref.dtype)
    out_ref[which, head, high] = second.astype(out_ref.dtype)


def supports_norm_and_rotate(q_TNH: jax.Array) -> bool:
  """Whether `norm_and_rotate` supports heads of this shape."""
  T, _, H = q_TNH.shape
  return (
    pl.next_power_of_2(H) == H
    and 2 * products.SMALLEST <= H <= LONGEST_HEAD
    and T % _NORMED == 0
  )


@dispatch.in_32_bits
def norm_and_rotate(
  heads: dict[str, jax.Array],
  norms: dict[str, jax.Array],
  cos_sin_TF: tuple[jax.Array, jax.Array],
  *,
  epsilon: float,
  interpret: bool = False,
) -> dict[str, jax.Array]:
  """Heads of q, k and v, normed, q and k rotated: each [T, N, H].

  Args:
    heads: products of q and k, and of v unless they are those of k.
    norms: see `project`, also for the arguments below.
    cos_sin_TF: see there.
    epsilon: see there.
    interpret: see there.
  """
  T, _, H = heads['q'].shape
  # In the order in which XLA merges their products.
  heads = {name: heads[name] for name in ('q', 'k', 'v') if name in heads}
  scales, out_shapes = [], []
  names: list[str] = []
  for name, x_TNH in heads.items():
    targets = _targets(name, heads)
    names += targets
    scales.append([norms.get(target) for target in targets])
    out_shapes.append(
      [jax.ShapeDtypeStruct(x_TNH.shape, x_TNH.dtype)] * len(targets)
    )
  x_TNH = jnp.concatenate([x.reshape(T, -1) for x in heads.values()], axis=1)
  x_TNH = x_TNH.reshape(T, -1, H)
  outputs = pl.pallas_call(
    functools.partial(_norm_and_rotate_rows, epsilon=epsilon),
    grid=(x_TNH.shape[1], T // _NORMED),
    out_shape=out_shapes,
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name='norm_and_rotate',
  )(x_TNH, scales, cos_sin_TF)
  return dict(zip(names, jax.tree.leaves(outputs), strict=True))


def _norm_and_rotate_rows(x_ref, scales_ref, cos_sin_ref, *made_refs, epsilon):
  which = pl.ds(pl.program_id(1) * _NORMED, _NORMED)
  place, H, start = pl.program_id(0), x_ref.shape[2], 0
  for norms, outs in zip(scales_ref, made_refs, strict=True):
    count, head = outs[0].shape[1], place - start
    start += count

    @pl.when((head >= 0) & (head < count))
    def _(norms=norms, outs=outs, head=head):
      halves = [
        x_ref[which, place, pl.ds(begin, H // 2)].astype(jnp.float32)
        for begin in (0, H // 2)
      ]
      _finish(halves, which, head, norms, outs, cos_sin_ref, epsilon)
