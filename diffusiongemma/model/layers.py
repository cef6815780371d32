"""Norms, rotary positions and the gated MLP.

RMSNorm(x)  = x / sqrt(mean(x^2) + eps) * w        float32; bare: without w
rotary(x)   = x * cos(p f) + rotate_half(x) * sin(p f)
GeGLU(x)    = down(gelu_tanh(gate(x)) * up(x))
"""

from collections.abc import Sequence
import functools
import math
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.kernels import activation
from diffusiongemma.kernels import dispatch
from diffusiongemma.kernels import grouped_matmul_gpu as gpu
from diffusiongemma.kernels import grouped_matmul_tpu as tpu
from diffusiongemma.kernels import norms_gpu
from diffusiongemma.kernels import quantized
from diffusiongemma.model import parallel


def rms_norm(
  x: jax.Array, epsilon: float, scale: jax.Array | None = None
) -> jax.Array:
  """RMSNorm over the last axis, in float32; the result keeps x's type.

  Without a `scale` it is the bare one.
  """
  x32 = x.astype(jnp.float32)
  variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
  normed = x32 * jax.lax.rsqrt(variance + epsilon)
  if scale is not None:
    normed = normed * scale.astype(jnp.float32)
  return normed.astype(x.dtype)


def add_and_norm(
  x_BLD: jax.Array,
  y_BLD: jax.Array,
  scale_D: jax.Array,
  scales: Sequence[jax.Array],
  dtypes: Sequence[jnp.dtype],
  epsilon: float,
) -> tuple[jax.Array, list[jax.Array]]:
  """(h, norms of h), h = x + RMSNorm(y).

  Args:
    x_BLD: what is added to.
    y_BLD: what is normed and added.
    scale_D: of the norm of y.
    scales: [D], of each norm of h.
    dtypes: in which each of them is computed.
    epsilon: of all norms.
  """

  def plain(x_BLD, y_BLD, scale_D, scales):
    h_BLD = x_BLD + rms_norm(y_BLD, epsilon, scale_D)
    return h_BLD, [
      rms_norm(h_BLD.astype(dtype), epsilon, scale)
      for scale, dtype in zip(scales, dtypes, strict=True)
    ]

  def fused(x_BLD, y_BLD, scale_D, scales):
    D = x_BLD.shape[-1]
    h_TD, normed = norms_gpu.add_and_norm(
      *(x_BLD.reshape(-1, D), y_BLD.reshape(-1, D), scale_D),
      *(scales, dtypes, epsilon),
    )
    return jax.tree.map(lambda x: x.reshape(x_BLD.shape), (h_TD, normed))

  given = (x_BLD, y_BLD, scale_D, list(scales))
  if norms_gpu.suits(x_BLD) and not parallel.is_active():
    return dispatch.run(plain, *given, cuda=fused)
  return plain(*given)


class RMSNorm(nn.Module):
  """RMSNorm with a plain learned scale (not 1 + w)."""

  dim: int
  epsilon: float
  initial_scale: float = 1.0

  def setup(self):
    init = nn.initializers.constant(self.initial_scale)
    self.scale = self.param('scale', init, (self.dim,), jnp.float32)

  def __call__(self, x: jax.Array) -> jax.Array:
    return rms_norm(x, self.epsilon, self.scale)


def rotary_frequencies(
  head_dim: int, theta: float, fraction: float = 1.0
) -> np.ndarray:
  """Angular frequencies [H/2] in radians a position, float32.

  Only the first `fraction` of the pairs turn; the others have frequency zero
  ("proportional" partial rotary: exponents are those of the full head). A
  position of 10^5 magnifies the last bit of a frequency, so they are rounded
  where the PyTorch implementation rounds: exponent, power and reciprocal.
  """
  exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  powers = np.power(theta, exponents.astype(np.float64)).astype(np.float32)
  turning = np.arange(head_dim // 2) < int(fraction * head_dim // 2)
  return np.where(turning, np.float32(1) / powers, np.float32(0))


def turns(
  positions_BL: jax.Array, frequencies: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of the angles [B, L, H/2], in float32."""
  angles_BLF = positions_BL[..., None].astype(jnp.float32) * frequencies
  return jnp.cos(angles_BLF), jnp.sin(angles_BLF)


def rotary(
  x_BLNH: jax.Array, turns_BLF: tuple[jax.Array, jax.Array]
) -> jax.Array:
  """Rotates each head by its position (rotate-half); see `turns`."""
  cos, sin = (turn_BLF[:, :, None, :] for turn_BLF in turns_BLF)
  first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x_BLNH.dtype)


@flax.struct.dataclass
class LowRank:
  """A matrix and its adapter, W + scale A B, which are never added up.

  It stands in the place of W among the parameters; Flax compares the shape of
  the first field with what it expects. With W of axes (in, out), each of which
  may be several:

  Attributes:
    weight: W.
    a: [in, rank].
    b: [rank, out].
    scale: a number.
  """

  weight: jax.Array
  a: jax.Array
  b: jax.Array
  scale: float = flax.struct.field(pytree_node=False)


def in_use(w: Any, dtype: jnp.dtype, *axes: str | None) -> Any:
  """A matrix as a product takes it on a mesh: with these logical axes, and put
  together along the one that it is only kept apart on, in this type."""
  if isinstance(w, LowRank):
    return w.replace(weight=in_use(w.weight, dtype, *axes))
  if isinstance(w, quantized.Quantized) or not parallel.is_active():
    return w
  return parallel.constrain(w.astype(dtype), *axes)


def linear(
  x: jax.Array, w: jax.Array | LowRank | quantized.Quantized, axes: int = 1
) -> jax.Array:
  """The last `axes` axes of x times as many first ones of w, which may be
  quantised or have an adapter; in the type of x."""
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
  together; on a mesh, where the compiler could not divide the kernel, it is."""
  parts = (x_TD, values_DF, scales_XF)
  if parallel.is_active():
    return _put_together(*parts)
  suits_gpu = gpu.suits_one(x_TD, values_DF, len(scales_XF))
  return dispatch.run(
    *(_put_together, *parts),
    cuda=gpu.multiply if suits_gpu else None,
    tpu=tpu.multiply if tpu.suits_one(x_TD, values_DF) else None,
  )


def _put_together(x_TD, values_DF, scales_XF) -> jax.Array:
  """x times the matrix that few bits stand for."""
  w_DF = quantized.Quantized(values_DF, scales_XF, -2)
  return x_TD @ w_DF.astype(x_TD.dtype)


def gated(x: jax.Array, gate: Any, up: Any) -> jax.Array:
  """gelu_tanh(x gate) * (x up)."""

  def plain(x, gate, up):
    return activation.geglu(linear(x, gate), linear(x, up))

  few_bits = all(isinstance(w, quantized.Quantized) for w in (gate, up))
  if not few_bits or parallel.is_active():
    return plain(x, gate, up)
  x_TD = x.reshape(-1, x.shape[-1])
  if not gpu.suits_one(x_TD, gate.values, len(gate.scales)):
    return plain(x, gate, up)

  def fused(x_TD, gate, up):
    matrices = ((w.values, w.scales) for w in (gate, up))
    return gpu.gate(x_TD, *matrices)

  hidden_TF = dispatch.run(plain, x_TD, gate, up, cuda=fused)
  return hidden_TF.reshape(*x.shape[:-1], -1)


def linear_init(in_axis, out_axis, batch_axis=()):
  """Variance 1 / fan-in."""
  return nn.initializers.variance_scaling(
    1.0, 'fan_in', 'normal', in_axis, out_axis, batch_axis
  )


class GatedMLP(nn.Module):
  """GeGLU with tanh-gelu, [..., D] -> [..., D].

  On a mesh hidden features lie along the logical axis `features`; None is for
  one that every device has whole.
  """

  embed_dim: int
  mlp_dim: int
  param_dtype: str
  features: str | None = 'mlp'

  def setup(self):
    shape, init = (self.embed_dim, self.mlp_dim), linear_init(0, 1)
    dtype = jnp.dtype(self.param_dtype)
    self.gate = self.param('gate', init, shape, dtype)
    self.up = self.param('up', init, shape, dtype)
    self.down = self.param('down', init, shape[::-1], dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    gate, up = (
      in_use(w, x.dtype, None, self.features) for w in (self.gate, self.up)
    )
    down = in_use(self.down, x.dtype, self.features, None)
    return linear(gated(x, gate, up), down)
