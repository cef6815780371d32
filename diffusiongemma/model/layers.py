"""Norms, rotary positions and the gated MLP.

RMSNorm(x)  = x / sqrt(mean(x^2) + eps) * w        float32; bare: without w
rotary(x)   = x * cos(p f) + rotate_half(x) * sin(p f)
GeGLU(x)    = down(gelu_tanh(gate(x)) * up(x))
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.kernels import activation
from diffusiongemma.kernels import grouped_matmul_gpu as gpu
from diffusiongemma.kernels import norms_gpu
from diffusiongemma.model import matrices
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
    scale = scale.astype(jnp.float32)
    normed = normed * jnp.broadcast_to(scale, normed.shape)
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
  return parallel.run(
    plain, *given, cuda=fused if norms_gpu.suits(x_BLD) else None
  )


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


def rotary_cos_sin(
  positions_BL: jax.Array, frequencies: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of the angles [B, L, H/2], in float32."""
  positions_BL1 = positions_BL[..., None].astype(jnp.float32)
  angles_BLF = positions_BL1 * frequencies[None, None, :]
  return jnp.cos(angles_BLF), jnp.sin(angles_BLF)


def rotary(
  x_BLNH: jax.Array, cos_sin_BLF: tuple[jax.Array, jax.Array]
) -> jax.Array:
  """Rotates each head by its position (rotate-half); see `rotary_cos_sin`."""
  cos, sin = (x_BLF[:, :, None, :] for x_BLF in cos_sin_BLF)
  first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x_BLNH.dtype)


def gated(
  x: jax.Array, gate: matrices.Matrix, up: matrices.Matrix
) -> jax.Array:
  """gelu_tanh(x gate) * (x up)."""

  def plain(x, gate, up):
    return activation.geglu(*(matrices.linear(x, w) for w in (gate, up)))

  def fused(x, gate, up):
    few_bits = ((w.values, w.scales) for w in (gate, up))
    hidden_TF = gpu.gate(x.reshape(-1, x.shape[-1]), *few_bits)
    return hidden_TF.reshape(*x.shape[:-1], -1)

  suits = matrices.are_few_bits(gate, up)
  if suits:
    x_TD = x.reshape(-1, x.shape[-1])
    suits = gpu.suits_one(x_TD, gate.values, len(gate.scales))
  return parallel.run(plain, x, gate, up, cuda=fused if suits else None)


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
      matrices.in_use(w, x.dtype, None, self.features)
      for w in (self.gate, self.up)
    )
    down = matrices.in_use(self.down, x.dtype, self.features, None)
    return matrices.linear(gated(x, gate, up), down)
