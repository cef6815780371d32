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

from diffusiongemma import powers
from diffusiongemma.config import ModelConfig
from diffusiongemma.kernels import attention_gpu as gpu
from diffusiongemma.kernels import dispatch
from diffusiongemma.kernels import quantized
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import layers
from diffusiongemma.model import parallel

# Attention scores that a device has at a time, 256 MB of float32.
MAX_SCORES = 2**26
# Those that a CPU has at a time where there is no gradient: 8 MB, which stay in
# a cache; and the keys that are still worth a product.
_CACHED_SCORES = 2**21
_FEWEST_KEYS = 256
# Queries of a block that has keys of its own are so many times as many; and the
# share of all scores that blocks may have at most, to be worth it.
_BLOCK_UNIT = 64
_MOST_IN_BANDS = 0.8


def attend(
  q_BLNH: jax.Array,
  parts: Sequence[tuple[jax.Array, jax.Array]],
  mask_BLS: jax.Array,
  max_scores: int = MAX_SCORES,
  window: int | None = None,
) -> jax.Array:
  """Softmax attention [B, L, N, H] with N = K * G query heads.

  On one GPU it is a kernel, a CPU takes many keys chunk by chunk; the gradient,
  and all else, takes queries block by block where all at once would have more
  than `max_scores` scores on a device.

  Args:
    q_BLNH: queries; the scale is 1.0, the norms are the caller's.
    parts: keys and values [B, S_i, K, H], such as those of the cache and new
      ones; what is long is not copied to stand beside what is short.
    mask_BLS: bool, True where seen, over all parts one after the other; its L
      may be 1 (the same for all).
    max_scores: see above.
    window: if all keys are those of the queries' own positions, and query i
      sees none but i - window < j <= i: then most others of a long text are not
      multiplied. The L of the mask is that of the queries.
  """
  if window is not None and _has_bands(q_BLNH.shape[1], window):
    return _attend_in_bands(q_BLNH, parts, mask_BLS, max_scores, window)
  given = (q_BLNH, list(map(tuple, parts)), mask_BLS)
  plain = functools.partial(_attend_in_blocks, max_scores=max_scores)
  if parallel.is_active():
    return plain(*given)
  rows, in_chunks = math.prod(q_BLNH.shape[:3]), None
  chunk = _default_chunk(rows)
  is_long = any(k_BSKH.shape[1] > chunk for k_BSKH, _ in parts)
  if is_long and rows * chunk <= max_scores:
    in_chunks = functools.partial(_attend_in_chunks, chunk=chunk)
  return dispatch.run(
    *(plain, *given),
    cpu=in_chunks,
    cuda=gpu.attend if gpu.suits(q_BLNH, parts) else None,
  )


def _band(window: int) -> tuple[int, int]:
  """(queries of a block, how many blocks before it have keys that they see)."""
  length = -(-window // (2 * _BLOCK_UNIT)) * _BLOCK_UNIT
  return length, -(-(window - 1) // length)


def _has_bands(L: int, window: int) -> bool:
  """Whether a text of L tokens, whole on a device, is worth blocks."""
  length, before = _band(window)
  scores = -(-L // length) * length * (1 + before) * length
  return scores <= _MOST_IN_BANDS * L * L and parallel.parts('length') == 1


def _attend_in_bands(
  q_BLNH: jax.Array,
  parts: Sequence[tuple[jax.Array, jax.Array]],
  mask_BLL: jax.Array,
  max_scores: int,
  window: int,
) -> jax.Array:
  """`attend` with blocks of queries as rows of their own, which have their own
  keys and those of the blocks before that the window reaches; a few blocks at a
  time, where all have more than `max_scores`."""
  (B, L, N, H), (length, before) = q_BLNH.shape, _band(window)
  count, reach = -(-L // length), (1 + before) * length
  rows = B * N // math.prod(map(parallel.parts, ('batch', 'q_heads')))
  most = max_scores // (max(1, rows) * length * reach)
  num_groups = -(-count // max(1, min(count, most)))
  at_once = -(-count // num_groups)
  ((k_BLKH, v_BLKH),) = (part for part in parts if part[0].shape[1])

  def pad(x, *axes):
    padding = [(0, 0)] * x.ndim
    for axis, left in axes:
      padding[axis] = (left * length, num_groups * at_once * length - L)
    return jnp.pad(x, padding)

  q_BLNH, mask_BLL = pad(q_BLNH, (1, 0)), pad(mask_BLL, (1, 0), (2, before))
  k_BLKH, v_BLKH = pad(k_BLKH, (1, before)), pad(v_BLKH, (1, before))

  def one_group(index):
    def cut(x, axis, blocks):
      first = index * at_once * length
      return jax.lax.dynamic_slice_in_dim(x, first, blocks * length, axis)

    def with_those_before(x_BLKH):
      x_BLKH = cut(x_BLKH, 1, at_once + before)
      x_BnlKH = x_BLKH.reshape(B, -1, length, *x_BLKH.shape[2:])
      each = [x_BnlKH[:, i : i + at_once] for i in range(before + 1)]
      whole = jnp.concatenate(each, axis=2)
      return whole.reshape(B * at_once, -1, *x_BLKH.shape[2:])

    mask = cut(cut(mask_BLL, 1, at_once), 2, at_once + before)
    mask = mask.reshape(B, at_once, length, at_once + before, length)
    # Of block i of the queries, block i + j of the padded keys.
    seen = [jnp.diagonal(mask, j, 1, 3) for j in range(before + 1)]
    seen = jnp.moveaxis(jnp.concatenate(seen, axis=2), -1, 1)
    out = attend(
      cut(q_BLNH, 1, at_once).reshape(B * at_once, length, N, H),
      [(with_those_before(k_BLKH), with_those_before(v_BLKH))],
      seen.reshape(B * at_once, length, -1),
      max_scores,
    )
    return out.reshape(B, -1, N, H)

  if num_groups == 1:
    return one_group(0)[:, :L]
  # Without the checkpoint the gradient would keep the scores of all groups.
  groups = jnp.arange(num_groups)
  out_gBlNH = jax.lax.map(jax.checkpoint(one_group), groups)
  return jnp.moveaxis(out_gBlNH, 0, 1).reshape(B, -1, N, H)[:, :L]


def _default_chunk(rows: int) -> int:
  """A power of two of keys, for so many queries of all heads."""
  most = max(_FEWEST_KEYS, _CACHED_SCORES // rows)
  return powers.largest_power_of_two(most)


def _attend_in_chunks(
  q_BLNH: jax.Array,
  parts: Sequence[tuple[jax.Array, jax.Array]],
  mask_BLS: jax.Array,
  chunk: int,
) -> jax.Array:
  """`attend` of so many keys at a time: sums are rescaled as the maximum
  grows."""
  B, L, N, H = q_BLNH.shape
  K = parts[0][0].shape[2]
  q_BLKGH = q_BLNH.reshape(B, L, K, N // K, H)
  lowest = jnp.finfo(jnp.float32).min

  def take_in(carry, k_BSKH, v_BSKH, mask_BLS):
    top_BKLG, total_BKLG, out_BKLGH = carry
    scores_BKLGS = _scores(q_BLKGH, k_BSKH, mask_BLS)
    new_BKLG = jnp.maximum(top_BKLG, jnp.max(scores_BKLGS, axis=-1))
    shrink_BKLG = jnp.exp(top_BKLG - new_BKLG)
    w_BKLGS = jnp.exp(scores_BKLGS - new_BKLG[..., None])
    total_BKLG = total_BKLG * shrink_BKLG + jnp.sum(w_BKLGS, axis=-1)
    out_BKLGH = out_BKLGH * shrink_BKLG[..., None] + _mix(w_BKLGS, v_BSKH)
    return new_BKLG, total_BKLG, out_BKLGH

  shape = (B, K, L, N // K)
  carry = (jnp.full(shape, lowest), jnp.zeros(shape), jnp.zeros((*shape, H)))
  start = 0
  for k_BSKH, v_BSKH in parts:
    S = k_BSKH.shape[1]
    own_BLS = mask_BLS[:, :, start : start + S]
    start += S

    def one_chunk(carry, first, part=(k_BSKH, v_BSKH, own_BLS)):
      k, v, mask = (
        jax.lax.dynamic_slice_in_dim(x, first, chunk, axis)
        for x, axis in zip(part, (1, 1, 2), strict=True)
      )
      return take_in(carry, k, v, mask), None

    whole = S - S % chunk
    if whole:
      carry, _ = jax.lax.scan(one_chunk, carry, jnp.arange(0, whole, chunk))
    if whole < S:
      rest = (k_BSKH[:, whole:], v_BSKH[:, whole:], own_BLS[..., whole:])
      carry = take_in(carry, *rest)
  return _means(*carry[1:], q_BLNH)


def _scores(q_BLKGH, k_BSKH, mask_BLS) -> jax.Array:
  """[B, K, L, G, S], float32; the lowest number where nothing is seen."""
  scores_BKLGS = jnp.einsum(
    'blkgh,bskh->bklgs', q_BLKGH, k_BSKH, preferred_element_type=jnp.float32
  )
  mask_BKLGS = mask_BLS[:, None, :, None]
  return jnp.where(mask_BKLGS, scores_BKLGS, jnp.finfo(jnp.float32).min)


def _mix(w_BKLGS, v_BSKH) -> jax.Array:
  """Sums of values, [B, K, L, G, H], float32."""
  return jnp.einsum(
    'bklgs,bskh->bklgh',
    w_BKLGS.astype(v_BSKH.dtype),
    v_BSKH,
    preferred_element_type=jnp.float32,
  )


def _means(total_BKLG, out_BKLGH, q_BLNH) -> jax.Array:
  """Sums over what they are sums of, as the queries are: [B, L, N, H]."""
  out_BKLGH = (out_BKLGH / total_BKLG[..., None]).astype(q_BLNH.dtype)
  return jnp.moveaxis(out_BKLGH, 1, 2).reshape(q_BLNH.shape)


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
  scores, values, start = [], [], 0
  for k_BSKH, v_BSKH in parts:
    end = start + k_BSKH.shape[1]
    if k_BSKH.shape[1]:
      scores.append(_scores(q_BLKGH, k_BSKH, mask_BLS[:, :, start:end]))
      values.append(v_BSKH)
    start = end
  top_BKLG = functools.reduce(jnp.maximum, [jnp.max(s, -1) for s in scores])
  top_BKLG = jax.lax.stop_gradient(top_BKLG)
  weights = [jnp.exp(s - top_BKLG[..., None]) for s in scores]
  total_BKLG = sum(jnp.sum(w, axis=-1) for w in weights)
  out_BKLGH = sum(_mix(w, v) for w, v in zip(weights, values, strict=True))
  return _means(total_BKLG, out_BKLGH, q_BLNH)


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
