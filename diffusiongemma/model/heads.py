"""The projections of attention: to queries, keys and values, and to outputs.

  q = rotary(RMSNorm(x Wq)),  k = rotary(RMSNorm(x Wk)),  v = bare(x Wv)

Global layers have no Wv: v = bare RMSNorm of the raw x Wk, before its norm
and rotary.
"""

import flax.linen as nn
import jax

from diffusiongemma import ops
from diffusiongemma.config import ModelConfig
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import layers
from diffusiongemma.model import parameters


class Heads(nn.Module):
  """The projections of one layer; `kind` is 'local' or 'global'."""

  config: ModelConfig
  kind: str

  def setup(self):
    cfg = self.config
    D, N = cfg.embed_dim, cfg.num_heads
    K, H = kv_cache.kv_shape(cfg, self.kind)

    def declare(name, *shape):
      return parameters.declare(
        self, f'attention/{name}', shape, cfg.param_dtype
      )

    self.q_proj = declare('q_proj', D, N, H)
    self.k_proj = declare('k_proj', D, K, H)
    if self.kind == 'local':
      self.v_proj = declare('v_proj', D, K, H)
    self.o_proj = declare('o_proj', N, H, D)
    self.q_norm = layers.RMSNorm(H, cfg.norm_epsilon, 'attention/q_norm')
    self.k_norm = layers.RMSNorm(H, cfg.norm_epsilon, 'attention/k_norm')
    if self.kind == 'local':
      self.frequencies = ops.heads.rotary_frequencies(H, cfg.local_rope_theta)
    else:
      self.frequencies = ops.heads.rotary_frequencies(
        H, cfg.global_rope_theta, cfg.global_rotary_fraction
      )

  def project(
    self, x_BLD: jax.Array, positions_BL: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [B,L,N,H], k and v [B,L,K,H], normed and rotated."""
    weights = {'q': self.q_proj, 'k': self.k_proj}
    if self.kind == 'local':
      weights['v'] = self.v_proj
    kv_heads = f'{self.kind}_kv_heads'
    heads_of = {'q': 'q_heads', 'k': kv_heads, 'v': kv_heads}
    weights = {
      name: ops.weights.in_use(w, x_BLD.dtype, None, heads_of[name], None)
      for name, w in weights.items()
    }
    norms = {'q': self.q_norm.scale, 'k': self.k_norm.scale}
    cos_sin = ops.heads.rotary_cos_sin(positions_BL, self.frequencies)
    heads = ops.heads.project(
      x_BLD, weights, norms, cos_sin, self.config.norm_epsilon
    )
    q, k, v = heads['q'], heads['k'], heads['v']
    return (
      ops.parallel.constrain(q, 'batch', 'length', 'q_heads', None),
      ops.parallel.constrain(k, 'batch', None, kv_heads, None),
      ops.parallel.constrain(v, 'batch', None, kv_heads, None),
    )

  def output(self, out_BLNH: jax.Array) -> jax.Array:
    """The output projection, [B, L, D]."""
    o_proj = ops.weights.in_use(
      self.o_proj, out_BLNH.dtype, 'q_heads', None, None
    )
    return ops.linear.apply(out_BLNH, o_proj, axes=2)
