"""The projections of attention: heads of queries, keys and values, and back.

  q = rotary(RMSNorm(x Wq)),  k = rotary(RMSNorm(x Wk)),  v = bare(x Wv)

Global layers have no Wv: v = bare RMSNorm of the raw x Wk, before its norm
and rotary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusiongemma.config import ModelConfig
from diffusiongemma.kernels import attention_gpu as gpu
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import layers
from diffusiongemma.model import matrices
from diffusiongemma.model import parallel


def project(
  x_BLD: jax.Array,
  weights: dict[str, matrices.Matrix],
  norms: dict[str, jax.Array],
  cos_sin: tuple[jax.Array, jax.Array],
  epsilon: float,
) -> dict[str, jax.Array]:
  """Heads of q, k and v [B, L, N, H], normed, those of q and k turned.

  Args:
    x_BLD: what all are made of.
    weights: matrices [D, N, H]; without one for v, what k's gives is v too.
    norms: scales [H] for q and k; v has a bare norm.
    cos_sin: of each position, see `layers.rotary_cos_sin`.
    epsilon: of the norms.
  """

  def plain(x_BLD, weights, norms, cos_sin):
    heads = {name: matrices.linear(x_BLD, w) for name, w in weights.items()}
    return _norm_and_rotate(heads, norms, cos_sin, epsilon)

  def fused(x_BLD, weights, norms, cos_sin):
    B, L, D = x_BLD.shape
    heads = gpu.project(
      x_BLD.reshape(-1, D), weights, norms, _flat(cos_sin), epsilon=epsilon
    )
    return {name: x.reshape(B, L, *x.shape[1:]) for name, x in heads.items()}

  suits = matrices.are_few_bits(*weights.values())
  if suits:
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    suits = gpu.suits_heads(x_TD, list(weights.values()))
  return parallel.run(
    *(plain, x_BLD, weights, norms, cos_sin), cuda=fused if suits else None
  )


def _norm_and_rotate(
  heads: dict[str, jax.Array],
  norms: dict[str, jax.Array],
  cos_sin: tuple[jax.Array, jax.Array],
  epsilon: float,
) -> dict[str, jax.Array]:
  """What `project` makes of the products."""

  def plain(heads, norms, cos_sin):
    heads = {'v': heads['k'], **heads}
    normed = {
      name: layers.rms_norm(x, epsilon, norms.get(name))
      for name, x in heads.items()
    }
    turned = {name: layers.rotary(normed[name], cos_sin) for name in norms}
    return {**normed, **turned}

  def fused(heads, norms, cos_sin):
    B, L, *_ = heads['q'].shape
    flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in heads.items()}
    made = gpu.norm_and_rotate(flat, norms, _flat(cos_sin), epsilon=epsilon)
    return {name: x.reshape(B, L, *x.shape[1:]) for name, x in made.items()}

  B, L, N, H = heads['q'].shape
  q_TNH = jax.ShapeDtypeStruct((B * L, N, H), heads['q'].dtype)
  suits = gpu.suits_norm_and_rotate(q_TNH)
  return parallel.run(
    *(plain, heads, norms, cos_sin), cuda=fused if suits else None
  )


def _flat(cos_sin: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """[B, L, F] as [T, F]."""
  cos, sin = (x.reshape(-1, x.shape[-1]) for x in cos_sin)
  return cos, sin


class Heads(nn.Module):
  """The projections of one layer; `kind` is 'local' or 'global'."""

  config: ModelConfig
  kind: str

  def setup(self):
    cfg = self.config
    D, N = cfg.embed_dim, cfg.num_heads
    K, H = kv_cache.kv_shape(cfg, self.kind)
    dtype = jnp.dtype(cfg.param_dtype)
    into, out = layers.linear_init(0, (1, 2)), layers.linear_init((0, 1), 2)
    self.q_proj = self.param('q_proj', into, (D, N, H), dtype)
    self.k_proj = self.param('k_proj', into, (D, K, H), dtype)
    if self.kind == 'local':
      self.v_proj = self.param('v_proj', into, (D, K, H), dtype)
    self.o_proj = self.param('o_proj', out, (N, H, D), dtype)
    # The scale of attention is 1.0 and normed heads have length sqrt(H): a
    # fresh network starts with scores of variance one only from H^-1/4.
    start = H**-0.25
    self.q_norm = layers.RMSNorm(H, cfg.norm_epsilon, start)
    self.k_norm = layers.RMSNorm(H, cfg.norm_epsilon, start)
    if self.kind == 'local':
      self.frequencies = layers.rotary_frequencies(H, cfg.local_rope_theta)
    else:
      self.frequencies = layers.rotary_frequencies(
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
      name: matrices.in_use(w, x_BLD.dtype, None, heads_of[name], None)
      for name, w in weights.items()
    }
    norms = {'q': self.q_norm.scale, 'k': self.k_norm.scale}
    cos_sin = layers.rotary_cos_sin(positions_BL, self.frequencies)
    heads = project(x_BLD, weights, norms, cos_sin, self.config.norm_epsilon)
    q, k, v = heads['q'], heads['k'], heads['v']
    return (
      parallel.constrain(q, 'batch', 'length', 'q_heads', None),
      parallel.constrain(k, 'batch', None, kv_heads, None),
      parallel.constrain(v, 'batch', None, kv_heads, None),
    )

  def output(self, out_BLNH: jax.Array) -> jax.Array:
    """Back to the residual width: [B, L, D]."""
    o_proj = matrices.in_use(self.o_proj, out_BLNH.dtype, 'q_heads', None, None)
    return matrices.linear(out_BLNH, o_proj, axes=2)
