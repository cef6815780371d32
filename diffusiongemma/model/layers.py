"""The norm and the gated MLP.

RMSNorm(x)  = x / sqrt(mean(x^2) + eps) * w
GeGLU(x)    = down(gelu_tanh(gate(x)) * up(x))
"""

import flax.linen as nn
import jax

from diffusiongemma import ops
from diffusiongemma.model import parameters


class RMSNorm(nn.Module):
  """RMSNorm with a plain learned scale (not 1 + w)."""

  dim: int
  epsilon: float
  row: str = 'norm'  # Its row in `parameters`, with the initializer.

  def setup(self):
    self.scale = parameters.declare(self, f'{self.row}/scale', (self.dim,))

  def __call__(self, x: jax.Array) -> jax.Array:
    return ops.norms.rms_norm(x, self.epsilon, self.scale)


class GatedMLP(nn.Module):
  """GeGLU with tanh-gelu, [..., D] -> [..., D].

  On a mesh, hidden features are sharded along the logical axis `features`; None
  replicates them.
  """

  embed_dim: int
  mlp_dim: int
  param_dtype: str
  features: str | None = 'mlp'

  def setup(self):
    D, F = self.embed_dim, self.mlp_dim
    self.gate, self.up, self.down = (
      parameters.declare(self, f'mlp/{name}', shape, self.param_dtype)
      for name, shape in (('gate', (D, F)), ('up', (D, F)), ('down', (F, D)))
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    gate, up = (
      ops.weights.in_use(w, x.dtype, None, self.features)
      for w in (self.gate, self.up)
    )
    down = ops.weights.in_use(self.down, x.dtype, self.features, None)
    return ops.linear.apply(ops.linear.gated(x, gate, up), down)
