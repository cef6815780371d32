"""Products of rows with one matrix, and the hidden layer of an MLP.

apply(x, W) = x W                               W an array, or quantised
            = x W + s (x A) B                   W with an adapter, `LowRank`
gated(x)    = gelu_tanh(x gate) * (x up)
"""

import functools
import math

import jax
import jax.numpy as jnp

from diffusiongemma.ops import activation
from diffusiongemma.ops import dispatch
from diffusiongemma.ops import parallel
from diffusiongemma.ops.weights import LowRank
from diffusiongemma.ops.weights import Quantized
from diffusiongemma.ops.weights import Weight


def apply(
  x: jax.Array,
  w: Weight,
  axes: int = 1,
  implementation: dispatch.Implementation = None,
) -> jax.Array:
  """Contracts the last `axes` axes of x with the first ones of w, in the type
  of x."""
  if isinstance(w, LowRank):
    update = apply(apply(x, w.a, axes), w.b)
    return apply(x, w.weight, axes, implementation) + w.scale * update
  # As one matrix: XLA would transpose a matrix whose rows have two axes.
  rows, outputs = x.shape[: x.ndim - axes], w.shape[axes:]
  D, F = math.prod(w.shape[:axes]), math.prod(outputs)
  if isinstance(w, Quantized):
    w_DF = w.replace(
      values=w.values.reshape(D, F), scales=w.scales.reshape(-1, F), axis=-2
    )
    y = _apply_quantized(x.reshape(-1, D), w_DF, implementation)
  else:
    y = multiply(x.reshape(*rows, D), w.astype(x.dtype).reshape(D, F))
  return y.reshape(*rows, *outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def multiply(
  x: jax.Array,
  w: jax.Array,
  axis: int = 0,
  dtype: jnp.dtype | None = None,
) -> jax.Array:
  """Contracts the last axis of x with `axis` of the matrix w, in `dtype` or the
  type of x.

  The gradient of w is a product with x on the left. XLA for CPUs transposes the
  left factor of a product over rows, and fuses the computation of that factor
  into the transposition. JAX's own gradient has the cotangent on the left, and
  computing it against the memory order takes longer than the product.
  """
  return _contract(x, w, axis, dtype)


def _multiply_forward(x, w, axis, dtype):
  # Not `multiply`, which a checkpoint policy would not recognise as a product.
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


def _apply_quantized(
  x_TD: jax.Array, w_DF: Quantized, implementation: dispatch.Implementation
) -> jax.Array:
  """Rows times a quantised matrix; on a single GPU or TPU, the dequantised
  matrix never exists in memory."""

  def plain(x_TD, values_DF, scales_XF):
    w_DF = Quantized(values_DF, scales_XF, -2)
    return x_TD @ w_DF.astype(x_TD.dtype)

  def choose_cuda():
    if not w_DF.is_own:
      return None
    from diffusiongemma.ops.gpu import matmul as gpu

    supports = gpu.supports_one(x_TD, w_DF.values, w_DF.num_groups)
    return gpu.multiply if supports else None

  def choose_tpu():
    if not w_DF.is_own:
      return None
    from diffusiongemma.ops.tpu import matmul as tpu

    return tpu.multiply if tpu.supports_one(x_TD, w_DF.values) else None

  return parallel.run(
    *(plain, x_TD, w_DF.values, w_DF.scales),
    implementation=implementation,
    cuda=choose_cuda,
    tpu=choose_tpu,
  )


def gated(
  x: jax.Array,
  gate: Weight,
  up: Weight,
  implementation: dispatch.Implementation = None,
) -> jax.Array:
  """gelu_tanh(x gate) * (x up)."""

  def plain(x, gate, up):
    return activation.geglu(*(apply(x, w) for w in (gate, up)))

  def choose_cuda():
    if not (isinstance(gate, Quantized) and isinstance(up, Quantized)):
      return None
    kinds = {(w.is_own, w.values.dtype, w.num_groups) for w in (gate, up)}
    if len(kinds) > 1 or not gate.is_own:
      return None
    from diffusiongemma.ops.gpu import matmul as gpu

    def fused(x, gate, up):
      matrices = ((w.values, w.scales) for w in (gate, up))
      hidden_TF = gpu.gate(x.reshape(-1, x.shape[-1]), *matrices)
      return hidden_TF.reshape(*x.shape[:-1], -1)

    x_TD = x.reshape(-1, x.shape[-1])
    supports = gpu.supports_one(x_TD, gate.values, gate.num_groups)
    return fused if supports else None

  return parallel.run(
    plain, x, gate, up, implementation=implementation, cuda=choose_cuda
  )
