"""The projections of attention: heads of queries, keys and values, and back.

  q = rotary(RMSNorm(x Wq)),  k = rotary(RMSNorm(x Wk)),  v = bare(x Wv)

Global layers have no Wv: v = bare RMSNorm of the raw x Wk, before its norm
and rotary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusiongemma.config import ModelConfig
from diffusiongemma.kernels import attention_gpu as gpu
from diffusiongemma.kernels import dispatch
from diffusiongemma.kernels import quantized
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import layers
from diffusiongemma.model import parallel


def project(
  x_BLD: jax.Array,
  weights: dict[str, Any],
  norms: dict[str, jax.Array],
  turns: tuple[jax.Array, jax.Array],
  epsilon: float,
) -> dict[str, jax.Array]:
  """Heads of q, k and v [B, L, N, H], normed, those of q and k turned.

  Args:
    x_BLD: what all are made of.
    weights: matrices [D, N, H]; without one for v, what k's gives is v too.
    norms: scales [H] for q and k; v has a bare norm.
    turns: of each position, see `layers.turns`.
    epsilon: of the norms.
  """

  def plain(x_BLD, weights, norms, turns):
    heads = {name: layers.linear(x_BLD, w) for name, w in weights.items()}
    return _norm_and_turn(heads, norms, turns, epsilon)

  def fused(x_BLD, weights, norms, turns):
    B, L, D = x_BLD.shape
    heads = gpu.project(
      x_BLD.reshape(-1, D), weights, norms, _flat(turns), epsilon=epsilon
    )
    return {name: x.reshape(B, L, *x.shape[1:]) for name, x in heads.items()}

  given = (x_BLD, weights, norms, turns)
  few_bits = all(isinstance(w, quantized.Quantized) for w in weights.values())
  if not few_bits or parallel.is_active():
    return plain(*given)
  x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
  if not gpu.suits_heads(x_TD, list(weights.values())):
    return plain(*given)
  return dispatch.run(plain, *given, cuda=fused)


def _norm_and_turn(
  heads: dict[str, jax.Array],
  norms: dict[str, jax.Array],
  turns: tuple[jax.Array, jax.Array],
  epsilon: float,
) -> dict[str, jax.Array]:
  """What `project` makes of the products."""

  def plain(heads, norms, turns):
    heads = {'v': heads['k'], **heads}
    normed = {
      name: layers.rms_norm(x, epsilon, norms.get(name))
      for name, x in heads.items()
    }
    turned = {name: layers.rotary(normed[name], turns) for name in norms}
    return {**normed, **turned}

  def fused(heads, norms, turns):
    B, L, *_ = heads['q'].shape
    flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in heads.items()}
    made = gpu.norm_and_turn(flat, norms, _flat(turns), epsilon=epsilon)
    return {name: x.reshape(B, L, *x.shape[1:]) for name, x in made.items()}

  B, L, N, H = heads['q'].shape
  q_TNH = jax.ShapeDtypeStruct((B * L, N, H), heads['q'].dtype)
  if parallel.is_active() or not gpu.suits_norm_and_turn(q_TNH):
    return plain(heads, norms, turns)
  return dispatch.run(plain, heads, norms, turns, cuda=fused)


def _flat(turns: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """[B, L, F] as [T, F]."""
  cos, sin = (turn.reshape(-1, turn.shape[-1]) for turn in turns)
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
    matrices = {'q': self.q_proj, 'k': self.k_proj}
    if self.kind == 'local':
      matrices['v'] = self.v_proj
    kv_heads = f'{self.kind}_kv_heads'
    heads_of = {'q': 'q_heads', 'k': kv_heads, 'v': kv_heads}
    weights = {
      name: layers.in_use(w, x_BLD.dtype, None, heads_of[name], None)
      for name, w in matrices.items()
    }
    norms = {'q': self.q_norm.scale, 'k': self.k_norm.scale}
    turns = layers.turns(positions_BL, self.frequencies)
    heads = project(x_BLD, weights, norms, turns, self.config.norm_epsilon)
    q, k, v = heads['q'], heads['k'], heads['v']
    return (
      parallel.constrain(q, 'batch', 'length', 'q_heads', None),
      parallel.constrain(k, 'batch', None, kv_heads, None),
      parallel.constrain(v, 'batch', None, kv_heads, None),
    )

  def output(self, out_BLNH: jax.Array) -> jax.Array:
    """Back to the residual width: [B, L, D]."""
    o_proj = layers.in_use(self.o_proj, out_BLNH.dtype, 'q_heads', None, None)
    return layers.linear(out_BLNH, o_proj, axes=2)
