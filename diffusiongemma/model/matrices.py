"""Matrices as products take them: plain, of few bits, or with an adapter.

  x W            W an array, an `experts_cpu.Turned`, a `quantized.Quantized`
  x W + s x A B  a `LowRank`, whose parts are never added up

All of them stand in the same place among the parameters. What must know which
it has is in this file.
"""

import functools
import math
from typing import Any

import flax
from flax import traverse_util
import jax
import jax.numpy as jnp

from diffusiongemma.kernels import activation
from diffusiongemma.kernels import experts_cpu
from diffusiongemma.kernels import grouped_matmul as grouped
from diffusiongemma.kernels import grouped_matmul_gpu as gpu
from diffusiongemma.kernels import grouped_matmul_tpu as tpu
from diffusiongemma.kernels import quantized
from diffusiongemma.model import parallel


@flax.struct.dataclass
class LowRank:
  """A matrix and its adapter, W + scale A B.

  Flax compares the shape of the first field with what it expects. With W of
  axes (in, out), each of which may be several:

  Attributes:
    weight: W; with an axis of experts it is [E, out, in].
    a: [in, rank]; of experts [E, rank, in].
    b: [rank, out]; of experts [E, out, rank].
    scale: a number.
  """

  weight: jax.Array
  a: jax.Array
  b: jax.Array
  scale: float = flax.struct.field(pytree_node=False)

  def __len__(self) -> int:
    return len(self.weight)


Matrix = jax.Array | experts_cpu.Turned | quantized.Quantized | LowRank


def axes_of(
  path: tuple[str, ...], ndim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Which axes of the parameter at `path`, a matrix or one of each expert, are
  its inputs, and which its outputs."""
  if path[-2:-1] == ('experts',):
    return (2,), (1,)
  inputs = 2 if path[-1] == 'o_proj' else 1  # Heads, and what is in each.
  return tuple(range(inputs)), tuple(range(inputs, ndim))


def arrange(params: dict, donate: bool = False) -> dict:
  """The parameters as this device multiplies by them fastest where there is no
  gradient, to write text with: on a CPU the matrices of experts are
  transposed, if they are plain arrays; on other devices and on a mesh all stay
  as they are.

  What comes back is not to be saved, trained or brought onto a mesh. With
  `donate`, each matrix of `params` that is transposed is deleted at once, so
  that both are never held: `params` can't be used any more.
  """
  is_on_mesh = not jax.sharding.get_abstract_mesh().empty
  if is_on_mesh or jax.default_backend() != 'cpu':
    return params
  flat = traverse_util.flatten_dict(params)
  for path, w in flat.items():
    if path[-2:-1] == ('experts',) and isinstance(w, jax.Array):
      flat[path] = experts_cpu.Turned(_turn(w).block_until_ready())
      if donate:
        w.delete()
  return traverse_util.unflatten_dict(flat)


_turn = jax.jit(lambda w_EFD: jnp.swapaxes(w_EFD, 1, 2))


def are_few_bits(*given: Matrix) -> bool:
  """Whether all of them are."""
  return all(isinstance(w, quantized.Quantized) for w in given)


def _cast(w: jax.Array | quantized.Quantized, dtype: jnp.dtype) -> Any:
  """The matrix in the type that is computed in; few bits stay as they are."""
  return w if isinstance(w, quantized.Quantized) else w.astype(dtype)


def in_use(w: Matrix, dtype: jnp.dtype, *axes: str | None) -> Matrix:
  """A matrix as a product takes it on a mesh: with these logical axes, and put
  together along the one that it is only kept apart on, in this type."""
  if isinstance(w, LowRank):
    return w.replace(weight=in_use(w.weight, dtype, *axes))
  if isinstance(w, quantized.Quantized) or not parallel.is_active():
    return w
  return parallel.constrain(w.astype(dtype), *axes)


def linear(x: jax.Array, w: Matrix, axes: int = 1) -> jax.Array:
  """The last `axes` axes of x times as many first ones of w, in the type of
  x."""
  if isinstance(w, LowRank):
    update = linear(linear(x, w.a, axes), w.b)
    return linear(x, w.weight, axes) + w.scale * update
  # As one matrix: XLA turns one around whose rows have two axes.
  rows, made = x.shape[: x.ndim - axes], w.shape[axes:]
  D, F = math.prod(w.shape[:axes]), math.prod(made)
  if isinstance(w, quantized.Quantized):
    matrix = (w.values.reshape(D, F), w.scales.reshape(-1, F))
    y = _few_bits(x.reshape(-1, D), *matrix)
  else:
    y = multiply(x.reshape(*rows, D), w.astype(x.dtype).reshape(D, F))
  return y.reshape(*rows, *made)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def multiply(
  x: jax.Array,
  w: jax.Array,
  axis: int = 0,
  dtype: jnp.dtype | None = None,
) -> jax.Array:
  """The last axis of x times this axis of the matrix w, in `dtype` or the type
  of x.

  The gradient of w is a product with x on the left. XLA for CPUs transposes the
  left factor of a product over rows, and fuses into this what computes that
  factor. JAX's own gradient has the cotangent on the left, and computing it
  against the order of memory takes longer than the product.
  """
  return _contract(x, w, axis, dtype)


def _multiply_forward(x, w, axis, dtype):
  # Not `multiply`, which a policy that keeps products would not know as one.
  return _contract(x, w, axis, dtype), (x, w)


def _multiply_backward(axis, dtype, saved, d):
  x, w = saved
  rows = tuple(range(x.ndim - 1))
  d_w = jax.lax.dot_general(x, d, ((rows, rows), ((), ())))
  d_w = d_w.T if axis else d_w
  d_x = _contract(d, w, 1 - axis, None)
  return d_x.astype(x.dtype), d_w.astype(w.dtype)


multiply.defvjp(_multiply_forward, _multiply_backward)


def _contract(x, w, axis, dtype):
  dims = (((x.ndim - 1,), (axis,)), ((), ()))
  return jax.lax.dot_general(x, w, dims, preferred_element_type=dtype)


def _few_bits(
  x_TD: jax.Array, values_DF: jax.Array, scales_XF: jax.Array
) -> jax.Array:
  """Rows times a quantised matrix, which on one GPU or TPU is never put
  together."""
  suits_gpu = gpu.suits_one(x_TD, values_DF, len(scales_XF))
  return parallel.run(
    *(_put_together, x_TD, values_DF, scales_XF),
    cuda=gpu.multiply if suits_gpu else None,
    tpu=tpu.multiply if tpu.suits_one(x_TD, values_DF) else None,
  )


def _put_together(x_TD, values_DF, scales_XF) -> jax.Array:
  """x times the matrix that few bits stand for."""
  w_DF = quantized.Quantized(values_DF, scales_XF, -2)
  return x_TD @ w_DF.astype(x_TD.dtype)


def expert_linear(
  x_TD: jax.Array, w_EFD: Matrix, groups: grouped.Groups
) -> jax.Array:
  """Each tile times the matrix of its expert, [T, F]; see
  `grouped.grouped_matmul`."""
  if isinstance(w_EFD, LowRank):
    thin_TR = expert_linear(x_TD, w_EFD.a, groups)
    update_TF = expert_linear(thin_TR, w_EFD.b, groups)
    return expert_linear(x_TD, w_EFD.weight, groups) + w_EFD.scale * update_TF
  return grouped.grouped_matmul(x_TD, _cast(w_EFD, x_TD.dtype), groups)


def expert_gated(
  x_MD: jax.Array, w_EFD: Matrix, groups: grouped.Groups, k: int
) -> jax.Array:
  """The hidden layer of the experts, [T, F]; see `grouped.gated_matmul`."""
  if isinstance(w_EFD, LowRank):
    x_TD = grouped.scatter_to_tiles(x_MD, groups, k)
    gate_up_TF = expert_linear(x_TD, w_EFD, groups)
    return activation.geglu(*jnp.split(gate_up_TF, 2, axis=-1))
  return grouped.gated_matmul(x_MD, _cast(w_EFD, x_MD.dtype), groups, k)


def expert_specs(w: Matrix, axes: tuple[str | None, ...]) -> Any:
  """Where the matrices of experts lie, whose logical axes (experts, out, in)
  are these: specs in the structure of `w`."""
  spec, (experts, out, into) = parallel.spec(*axes), axes
  if isinstance(w, quantized.Quantized):
    return w.replace(values=spec, scales=parallel.spec(experts, None, out))
  if isinstance(w, LowRank):
    return w.replace(
      weight=spec,
      a=parallel.spec(experts, None, into),
      b=parallel.spec(experts, out, None),
    )
  return spec


def gather_experts(w: Matrix, axis: int, dtype: jnp.dtype) -> Matrix:
  """On one device: its experts, put together from where they lie in parts along
  `axis`, 1 (outputs) or 2 (inputs), in the type that is computed in."""
  names = parallel.mesh_axes('embed')
  gather = functools.partial(parallel.gather, names=names)
  if isinstance(w, quantized.Quantized):
    w = w.replace(values=gather(w.values, axis=axis))
    # Scales have outputs last.
    return w.replace(scales=gather(w.scales, axis=2)) if axis == 1 else w
  if isinstance(w, LowRank):
    # The adapter's A ends, or its B is second, in the same axis.
    part = {2: 'a', 1: 'b'}[axis]
    w = w.replace(weight=gather_experts(w.weight, axis, dtype))
    return w.replace(**{part: gather(getattr(w, part), axis=axis)})
  return gather(w.astype(dtype), axis=axis)
