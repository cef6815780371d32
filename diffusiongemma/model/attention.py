"""Grouped-query attention of both layer kinds; takes exactly one mask.

  q = rotary(RMSNorm(x Wq)),  k = rotary(RMSNorm(x Wk)),  v = bare(x Wv)
  out = softmax(q k^T, masked) v Wo          scale 1.0, softmax in float32

Global layers have no Wv: v = bare RMSNorm of the raw x Wk, before its norm
and rotary.
"""

from collections.abc import Sequence
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusiongemma.config import ModelConfig
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import layers
from diffusiongemma.model import parallel


def attend(
  q_BLNH: jax.Array,
  parts: Sequence[tuple[jax.Array, jax.Array]],
  mask_BLS: jax.Array,
) -> jax.Array:
  """Softmax attention [B, L, N, H] with N = K * G query heads.

  Args:
    q_BLNH: queries; the scale is 1.0, the norms are the caller's.
    parts: keys and values [B, S_i, K, H], such as those of the cache and new
      ones; what is long is not copied to stand beside what is short.
    mask_BLS: bool, True where seen, over all parts one after the other; its L
      may be 1 (the same for all).
  """
  B, L, N, H = q_BLNH.shape
  K = parts[0][0].shape[2]
  q_BLKGH = q_BLNH.reshape(B, L, K, N // K, H)
  lowest = jnp.finfo(jnp.float32).min
  scores, values, start = [], [], 0
  for k_BSKH, v_BSKH in parts:
    end = start + k_BSKH.shape[1]
    mask_BKLGS = mask_BLS[:, None, :, None, start:end]
    start = end
    if k_BSKH.shape[1]:
      scores_BKLGS = jnp.einsum(
        'blkgh,bskh->bklgs', q_BLKGH, k_BSKH, preferred_element_type=jnp.float32
      )
      scores.append(jnp.where(mask_BKLGS, scores_BKLGS, lowest))
      values.append(v_BSKH)
  top_BKLG = functools.reduce(jnp.maximum, [jnp.max(s, -1) for s in scores])
  top_BKLG = jax.lax.stop_gradient(top_BKLG)
  weights = [jnp.exp(s - top_BKLG[..., None]) for s in scores]
  total_BKLG = sum(jnp.sum(w, axis=-1) for w in weights)
  out_BKLGH = sum(
    jnp.einsum(
      'bklgs,bskh->bklgh',
      w.astype(v.dtype),
      v,
      preferred_element_type=jnp.float32,
    )
    for w, v in zip(weights, values, strict=True)
  )
  out_BKLGH = (out_BKLGH / total_BKLG[..., None]).astype(q_BLNH.dtype)
  return jnp.moveaxis(out_BKLGH, 1, 2).reshape(B, L, N, H)


class Attention(nn.Module):
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
    q = layers.linear(x_BLD, self.q_proj)
    k = layers.linear(x_BLD, self.k_proj)
    if self.kind == 'local':
      v = layers.linear(x_BLD, self.v_proj)
    else:
      v = k
    q = layers.rotary(self.q_norm(q), positions_BL, self.frequencies)
    k = layers.rotary(self.k_norm(k), positions_BL, self.frequencies)
    v = layers.rms_norm(v, self.config.norm_epsilon)
    kv_axes = ('batch', None, f'{self.kind}_kv_heads', None)
    return (
      parallel.constrain(q, 'batch', 'length', 'q_heads', None),
      parallel.constrain(k, *kv_axes),
      parallel.constrain(v, *kv_axes),
    )

  def output(self, out_BLNH: jax.Array) -> jax.Array:
    """Back to the residual width: [B, L, D]."""
    return layers.linear(out_BLNH, self.o_proj, axes=2)
