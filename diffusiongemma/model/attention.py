"""Grouped-query attention of both layer kinds; takes exactly one mask.

  q = rotary(RMSNorm(x Wq)),  k = rotary(RMSNorm(x Wk)),  v = bare(x Wv)
  out = softmax(q k^T, masked) v Wo          scale 1.0, softmax in float32

Global layers have no Wv: v = bare RMSNorm of the raw x Wk, before its norm
and rotary.
"""

from collections.abc import Sequence
import functools
import math
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

# Attention scores that a device has at a time, 256 MB of float32.
MAX_SCORES = 2**26


def attend(
  q_BLNH: jax.Array,
  parts: Sequence[tuple[jax.Array, jax.Array]],
  mask_BLS: jax.Array,
  max_scores: int = MAX_SCORES,
) -> jax.Array:
  """Softmax attention [B, L, N, H] with N = K * G query heads.

  On one GPU it is a kernel; its gradient, and all else, takes queries block by
  block where all at once would have more than `max_scores` scores on a device.

  Args:
    q_BLNH: queries; the scale is 1.0, the norms are the caller's.
    parts: keys and values [B, S_i, K, H], such as those of the cache and new
      ones; what is long is not copied to stand beside what is short.
    mask_BLS: bool, True where seen, over all parts one after the other; its L
      may be 1 (the same for all).
    max_scores: see above.
  """
  given = (q_BLNH, list(map(tuple, parts)), mask_BLS)
  plain = functools.partial(_attend_in_blocks, max_scores=max_scores)
  if gpu.suits(q_BLNH, parts) and not parallel.is_active():
    return dispatch.run(plain, *given, cuda=gpu.attend)
  return plain(*given)


def _attend_in_blocks(q_BLNH, parts, mask_BLS, max_scores) -> jax.Array:
  """`attend` with blocks of queries."""
  B, L, N, H = q_BLNH.shape
  axes = ('batch', 'q_heads', 'length')
  rows = B * N // math.prod(map(parallel.parts, axes))
  of_a_query = max(1, rows) * mask_BLS.shape[2]
  num_blocks = -(-L // min(L, max(1, max_scores // of_a_query)))
  # Of a block, each device has as many.
  length = -(-L // num_blocks)
  length += -length % parallel.parts('length')
  num_blocks = -(-L // length)
  if num_blocks == 1:
    return _attend(q_BLNH, parts, mask_BLS)
  padding = ((0, 0), (0, num_blocks * length - L))

  def blocks(x_BLX):
    rest = x_BLX.shape[2:]
    x_BLX = jnp.pad(x_BLX, padding + ((0, 0),) * len(rest))
    x_BnlX = x_BLX.reshape(B, num_blocks, length, *rest)
    heads = ('q_heads', None) if len(rest) > 1 else (None,)
    return parallel.constrain(
      jnp.moveaxis(x_BnlX, 1, 0), None, 'batch', 'length', *heads
    )

  # Without the checkpoint the gradient would keep the scores of every block.
  @jax.checkpoint
  def one_block(given):
    q_BlNH, mask_BlS = given
    return _attend(q_BlNH, parts, mask_BLS if mask_BlS is None else mask_BlS)

  of_each = blocks(mask_BLS) if mask_BLS.shape[1] > 1 else None
  out_nBlNH = jax.lax.map(one_block, (blocks(q_BLNH), of_each))
  return jnp.moveaxis(out_nBlNH, 0, 1).reshape(B, -1, N, H)[:, :L]


def _attend(
  q_BLNH: jax.Array,
  parts: Sequence[tuple[jax.Array, jax.Array]],
  mask_BLS: jax.Array,
) -> jax.Array:
  """`attend` of all queries at once."""
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
    heads.setdefault('v', heads['k'])
    normed = {
      name: layers.rms_norm(x, epsilon, norms.get(name))
      for name, x in heads.items()
    }
    turned = {name: layers.rotary(normed[name], turns) for name in norms}
    return {**normed, **turned}

  def fused(x_BLD, weights, norms, turns):
    B, L, D = x_BLD.shape
    rows = tuple(turn.reshape(B * L, -1) for turn in turns)
    heads = gpu.project(
      x_BLD.reshape(-1, D), weights, norms, rows, epsilon=epsilon
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
