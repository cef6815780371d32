"""RMSNorm, in float32.

RMSNorm(x) = x / sqrt(mean(x^2) + eps) * w          bare: without w
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diffusiongemma.ops import dispatch
from diffusiongemma.ops import parallel


def rms_norm(
  x: jax.Array, epsilon: float, scale: jax.Array | None = None
) -> jax.Array:
  """RMSNorm over the last axis, computed in float32; the result has x's type.

  Without a `scale`, the bare norm.
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
  implementation: dispatch.Implementation = None,
) -> tuple[jax.Array, list[jax.Array]]:
  """(h, norms of h), h = x + RMSNorm(y).

  Args:
    x_BLD: the residual stream.
    y_BLD: the update, to be normed and added.
    scale_D: scale of the norm of y.
    scales: [D] each, scales of the norms of h.
    dtypes: types of the norms of h.
    epsilon: of all norms.
    implementation: see `ops`.
  """

  def plain(x_BLD, y_BLD, scale_D, scales):
    h_BLD = x_BLD + rms_norm(y_BLD, epsilon, scale_D)
    return h_BLD, [
      rms_norm(h_BLD.astype(dtype), epsilon, scale)
      for scale, dtype in zip(scales, dtypes, strict=True)
    ]

  def choose_cuda():
    from diffusiongemma.ops.gpu import norms as gpu

    def fused(x_BLD, y_BLD, scale_D, scales):
      D = x_BLD.shape[-1]
      h_TD, normed = gpu.add_and_norm(
        *(x_BLD.reshape(-1, D), y_BLD.reshape(-1, D), scale_D),
        *(scales, dtypes, epsilon),
      )
      return jax.tree.map(lambda x: x.reshape(x_BLD.shape), (h_TD, normed))

    return fused if gpu.supports(x_BLD) else None

  return parallel.run(
    *(plain, x_BLD, y_BLD, scale_D, list(scales)),
    implementation=implementation,
    cuda=choose_cuda,
  )
