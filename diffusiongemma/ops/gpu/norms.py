"""Norms on GPUs: the kernel of `ops.norms.add_and_norm`.

A program has one row, which stays in registers until all its results are
written. Rows are padded to a power of two.
"""

from collections.abc import Sequence
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from diffusiongemma.ops import dispatch

_LONGEST = 2**14


def supports(x: jax.Array) -> bool:
  """Whether a row [D] fits into a program."""
  return 32 <= x.shape[-1] <= _LONGEST


@dispatch.in_32_bits
def add_and_norm(
  x_TD: jax.Array,
  y_TD: jax.Array,
  scale_D: jax.Array,
  scales: Sequence[jax.Array],
  dtypes: Sequence[jnp.dtype],
  epsilon: float,
  interpret: bool = False,
) -> tuple[jax.Array, list[jax.Array]]:
  """See `norms.add_and_norm`; with `interpret`, on any device, slowly."""
  T, D = x_TD.shape
  h_TD, *normed = pl.pallas_call(
    functools.partial(
      _add_and_norm, width=pl.next_power_of_2(D), epsilon=epsilon
    ),
    grid=(T,),
    out_shape=[
      jax.ShapeDtypeStruct((T, D), dtype) for dtype in (x_TD.dtype, *dtypes)
    ],
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name='add_and_norm',
  )(x_TD, y_TD, scale_D, list(scales))
  return h_TD, normed


def _add_and_norm(
  x_ref, y_ref, scale_ref, scales_ref, h_ref, *normed_refs, width, epsilon
):
  row, D = pl.program_id(0), x_ref.shape[1]
  position = jax.lax.broadcasted_iota(jnp.int32, (width,), 0)

  def read(ref):
    return plgpu.load(ref, mask=position < D, other=0)

  def unit(x):
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x) / D + epsilon)

  x, y = (read(ref.at[row, position]) for ref in (x_ref, y_ref))
  y = unit(y) * read(scale_ref.at[position]).astype(jnp.float32)
  h = x + y.astype(x.dtype)
  plgpu.store(h_ref.at[row, position], h, mask=position < D)
  h = unit(h)
  for scale_ref, normed_ref in zip(scales_ref, normed_refs, strict=True):
    normed = h * read(scale_ref.at[position]).astype(jnp.float32)
    normed = normed.astype(normed_ref.dtype)
    plgpu.store(normed_ref.at[row, position], normed, mask=position < D)
