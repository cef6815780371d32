"""Heads of queries, keys and values: projected, normed and rotated.

q = rotary(RMSNorm(x Wq)),  k = rotary(RMSNorm(x Wk)),  v = bare RMSNorm(x Wv)
rotary(x) = x * cos(p f) + rotate_half(x) * sin(p f)
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.ops import dispatch
from diffusiongemma.ops import linear
from diffusiongemma.ops import norms as norm_ops
from diffusiongemma.ops import parallel
from diffusiongemma.ops.weights import Quantized
from diffusiongemma.ops.weights import Weight


def project(
  x_BLD: jax.Array,
  weights: Mapping[str, Weight],
  norms: Mapping[str, jax.Array],
  cos_sin: tuple[jax.Array, jax.Array],
  epsilon: float,
  implementation: dispatch.Implementation = None,
) -> dict[str, jax.Array]:
  """Heads of q, k and v [B, L, N, H], normed, those of q and k rotated.

  Args:
    x_BLD: the input.
    weights: matrices [D, N, H]; if 'v' is absent, v is the unnormalised k,
      normed without a scale.
    norms: scales [H] for q and k; v has a bare norm.
    cos_sin: of each position, see `rotary_cos_sin`.
    epsilon: of the norms.
    implementation: see `ops`.
  """

  def plain(x_BLD, weights, norms, cos_sin):
    heads = {name: linear.apply(x_BLD, w) for name, w in weights.items()}
    return _norm_and_rotate(heads, norms, cos_sin, epsilon)

  def choose_cuda():
    if not all(isinstance(w, Quantized) and w.is_own for w in weights.values()):
      return None
    if len({w.values.dtype for w in weights.values()}) > 1:
      return None
    from diffusiongemma.ops.gpu import heads as gpu

    def fused(x_BLD, weights, norms, cos_sin):
      B, L, D = x_BLD.shape
      x_TD = x_BLD.reshape(-1, D)
      heads = gpu.project(x_TD, weights, norms, _flat(cos_sin), epsilon=epsilon)
      return {name: x.reshape(B, L, *x.shape[1:]) for name, x in heads.items()}

    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    return fused if gpu.supports(x_TD, list(weights.values())) else None

  return parallel.run(
    *(plain, x_BLD, dict(weights), dict(norms), cos_sin),
    implementation=implementation,
    cuda=choose_cuda,
  )


def _norm_and_rotate(
  heads: dict[str, jax.Array],
  norms: dict[str, jax.Array],
  cos_sin: tuple[jax.Array, jax.Array],
  epsilon: float,
) -> dict[str, jax.Array]:
  """The heads of `project`, from the products."""

  def plain(heads, norms, cos_sin):
    heads = {'v': heads['k'], **heads}
    normed = {
      name: norm_ops.rms_norm(x, epsilon, norms.get(name))
      for name, x in heads.items()
    }
    rotated = {name: rotary(normed[name], cos_sin) for name in norms}
    return {**normed, **rotated}

  def choose_cuda():
    from diffusiongemma.ops.gpu import heads as gpu

    def fused(heads, norms, cos_sin):
      flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in heads.items()}
      flat = gpu.norm_and_rotate(flat, norms, _flat(cos_sin), epsilon=epsilon)
      return {name: x.reshape(B, L, *x.shape[1:]) for name, x in flat.items()}

    B, L, N, H = heads['q'].shape
    q_TNH = jax.ShapeDtypeStruct((B * L, N, H), heads['q'].dtype)
    return fused if gpu.supports_norm_and_rotate(q_TNH) else None

  return parallel.run(plain, heads, norms, cos_sin, cuda=choose_cuda)


def _flat(cos_sin: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """[B, L, F] as [T, F]."""
  cos, sin = (x.reshape(-1, x.shape[-1]) for x in cos_sin)
  return cos, sin


def rotary_frequencies(
  head_dim: int, theta: float, fraction: float = 1.0
) -> np.ndarray:
  """Angular frequencies [H/2] in radians per position, float32.

  Only the first `fraction` of the pairs are rotated; the others have frequency
  zero ("proportional" partial rotary: exponents are those of the full head).
  A position of 10^5 magnifies the last bit of a frequency, so they are rounded
  where the PyTorch implementation rounds: exponent, power and reciprocal.
  """
  exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  powers = np.power(theta, exponents.astype(np.float64)).astype(np.float32)
  turning = np.arange(head_dim // 2) < int(fraction * head_dim // 2)
  return np.where(turning, np.float32(1) / powers, np.float32(0))


def rotary_cos_sin(
  positions_BL: jax.Array, frequencies: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(cosines, sines) of the angles, [B, L, H/2] each, in float32."""
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
