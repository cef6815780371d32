"""Softmax attention of grouped queries, with exactly one mask.

  out = softmax(q k^T, masked) v          scale 1.0, softmax in float32

All at once, or in one of four ways with the same result and less memory or
work: queries block by block; a few blocks, each with only the keys up to its
end (causal); blocks with only the keys of a window (bands); keys chunk by
chunk, without fully masked chunks such as empty slots of a cache.
"""

from collections.abc import Sequence
import functools
import math

import jax
import jax.numpy as jnp

from diffusiongemma.ops import dispatch
from diffusiongemma.ops import parallel

# Most attention scores on a device at a time, 256 MB of float32.
MAX_SCORES = 2**26
# Keys of a chunk on a CPU, without a gradient.
_CHUNK = 256
# The number of queries of a band is a multiple of this.
_BLOCK_UNIT = 64
# Largest share of all scores for which bands are used: causal blocks have about
# as many.
_MOST_IN_BANDS = 0.5
# Number of causal blocks: 5/8 of all scores; more blocks would save little.
_CAUSAL_BLOCKS = 4


def attend(
  q_BLNH: jax.Array,
  parts: Sequence[tuple[jax.Array, jax.Array]],
  mask_BLS: jax.Array,
  max_scores: int = MAX_SCORES,
  window: int | None = None,
  filled_B: jax.Array | None = None,
  implementation: dispatch.Implementation = None,
) -> jax.Array:
  """Softmax attention [B, L, N, H] with N = K * G query heads.

  A single GPU uses a kernel, a CPU takes many keys chunk by chunk; gradients
  and all other cases take queries block by block if all at once would have more
  than `max_scores` scores on a device.

  Args:
    q_BLNH: queries, already normed; the scale is 1.0.
    parts: keys and values [B, S_i, K, H], such as those of the cache and new
      ones; they are not concatenated, which would copy the cache.
    mask_BLS: bool, True where seen, over the concatenated parts; its L may be 1
      (the same for all queries).
    max_scores: see above.
    window: set if the keys are those of the queries' own positions, and query i
      sees only i - window < j <= i: then most masked scores are not computed.
      The L of the mask must be that of the queries.
    filled_B: int32, number of leading keys of the first part that are filled:
      the mask is False after them, and a kernel skips them. None is all.
    implementation: see `ops`.
  """
  L = q_BLNH.shape[1]
  if window is not None and parallel.parts('length') == 1:
    if _has_bands(L, window):
      return _attend_in_bands(q_BLNH, parts, mask_BLS, max_scores, window)
    if L >= _CAUSAL_BLOCKS * _BLOCK_UNIT:
      return _attend_causally(q_BLNH, parts, mask_BLS, max_scores, window)

  def plain(q_BLNH, parts, mask_BLS, _):
    return _attend_in_blocks(q_BLNH, parts, mask_BLS, max_scores)

  def in_chunks(q_BLNH, parts, mask_BLS, _):
    return _attend_in_chunks(q_BLNH, parts, mask_BLS, _CHUNK)

  def choose_cpu():
    is_long = any(k_BSKH.shape[1] > _CHUNK for k_BSKH, _ in parts)
    has_room = math.prod(q_BLNH.shape[:3]) * _CHUNK <= max_scores
    return in_chunks if is_long and has_room else None

  def choose_cuda():
    from diffusiongemma.ops.gpu import attention as gpu

    return gpu.attend if gpu.supports(q_BLNH, parts) else None

  return parallel.run(
    *(plain, q_BLNH, list(map(tuple, parts)), mask_BLS, filled_B),
    implementation=implementation,
    cpu=choose_cpu,
    cuda=choose_cuda,
  )


def _band(window: int) -> tuple[int, int]:
  """(queries of a block, number of blocks before it within its window)."""
  length = -(-window // (2 * _BLOCK_UNIT)) * _BLOCK_UNIT
  return length, -(-(window - 1) // length)


def _has_bands(L: int, window: int) -> bool:
  """Whether bands save enough work for a text of L tokens."""
  length, before = _band(window)
  scores = -(-L // length) * length * (1 + before) * length
  return scores <= _MOST_IN_BANDS * L * L


def _attend_in_bands(
  q_BLNH: jax.Array,
  parts: Sequence[tuple[jax.Array, jax.Array]],
  mask_BLL: jax.Array,
  max_scores: int,
  window: int,
) -> jax.Array:
  """`attend` with blocks of queries as separate rows, each with the keys of its
  block and of the blocks before it that the window reaches; a few blocks at a
  time, if all have more than `max_scores`."""
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
    # Block i of the queries sees blocks i + j of the padded keys.
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
  # Without the checkpoint, the scores of all groups would be residuals.
  groups = jnp.arange(num_groups)
  out_gBlNH = jax.lax.map(jax.checkpoint(one_group), groups)
  return jnp.moveaxis(out_gBlNH, 0, 1).reshape(B, -1, N, H)[:, :L]


def _attend_causally(
  q_BLNH: jax.Array,
  parts: Sequence[tuple[jax.Array, jax.Array]],
  mask_BLL: jax.Array,
  max_scores: int,
  window: int,
) -> jax.Array:
  """`attend` with a few blocks of queries, each with the keys from the window
  of its first query up to its end. A gradient stores the scores of all blocks,
  so each gets its share of `max_scores`."""
  L = q_BLNH.shape[1]
  length = -(-L // _CAUSAL_BLOCKS)
  ((k_BLKH, v_BLKH),) = (part for part in parts if part[0].shape[1])
  blocks = []
  for start in range(0, L, length):
    own = slice(start, start + length)
    seen = slice(max(0, start + 1 - window), start + length)
    part = (k_BLKH[:, seen], v_BLKH[:, seen])
    mask_BlS = mask_BLL[:, own, seen]
    blocks.append(
      attend(q_BLNH[:, own], [part], mask_BlS, max_scores // _CAUSAL_BLOCKS)
    )
  return jnp.concatenate(blocks, axis=1)


def _attend_in_chunks(
  q_BLNH: jax.Array,
  parts: Sequence[tuple[jax.Array, jax.Array]],
  mask_BLS: jax.Array,
  chunk: int,
) -> jax.Array:
  """`attend` with `chunk` keys at a time, without fully masked chunks: sums are
  rescaled as the maximum grows. Remainders shorter than a chunk come first, all
  at once."""
  B, L, N, H = q_BLNH.shape
  K = parts[0][0].shape[2]
  q_BLKGH = q_BLNH.reshape(B, L, K, N // K, H)
  lowest = jnp.finfo(jnp.float32).min

  def take_in(carry, k_BSKH, v_BSKH, mask_BLS):
    scores_BKLGS = _scores(q_BLKGH, k_BSKH, mask_BLS)
    top_BKLG = jnp.max(scores_BKLGS, axis=-1)
    if carry is not None:
      top_BKLG = jnp.maximum(carry[0], top_BKLG)
    w_BKLGS = jnp.exp(scores_BKLGS - top_BKLG[..., None])
    total_BKLG, out_BKLGH = jnp.sum(w_BKLGS, axis=-1), _mix(w_BKLGS, v_BSKH)
    if carry is not None:
      shrink_BKLG = jnp.exp(carry[0] - top_BKLG)
      total_BKLG += carry[1] * shrink_BKLG
      out_BKLGH += carry[2] * shrink_BKLG[..., None]
    return top_BKLG, total_BKLG, out_BKLGH

  carry, start, chunked = None, 0, []
  for k_BSKH, v_BSKH in parts:
    S = k_BSKH.shape[1]
    own_BLS = mask_BLS[:, :, start : start + S]
    start += S
    whole = S - S % chunk if chunk < S else 0
    if whole:
      chunked.append((k_BSKH, v_BSKH, own_BLS))
    if whole < S:
      rest = (k_BSKH[:, whole:], v_BSKH[:, whole:], own_BLS[..., whole:])
      carry = take_in(carry, *rest)
  if carry is None:
    shape = (B, K, L, N // K)
    carry = (
      jnp.full(shape, lowest, jnp.float32),
      jnp.zeros(shape, jnp.float32),
      jnp.zeros((*shape, H), jnp.float32),
    )
  for part in chunked:
    *_, own_BLS = part
    is_seen_S = jnp.any(own_BLS, axis=(0, 1))
    whole = len(is_seen_S) // chunk * chunk
    is_seen_n = jnp.any(is_seen_S[:whole].reshape(-1, chunk), axis=1)
    (seen_n,) = jnp.nonzero(is_seen_n, size=len(is_seen_n))

    def one_chunk(i, carry, part=part, seen_n=seen_n):
      cut = [
        jax.lax.dynamic_slice_in_dim(x, seen_n[i] * chunk, chunk, axis)
        for x, axis in zip(part, (1, 1, 2), strict=True)
      ]
      return take_in(carry, *cut)

    carry = jax.lax.fori_loop(0, jnp.sum(is_seen_n), one_chunk, carry)
  _, total, weighted = carry
  return _means(total, weighted, q_BLNH)


def _scores(q_BLKGH, k_BSKH, mask_BLS) -> jax.Array:
  """[B, K, L, G, S], float32; the lowest number where masked."""
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
  """Weighted sums over total weights, in the layout of q: [B, L, N, H]."""
  out_BKLGH = (out_BKLGH / total_BKLG[..., None]).astype(q_BLNH.dtype)
  return jnp.moveaxis(out_BKLGH, 1, 2).reshape(q_BLNH.shape)


def _attend_in_blocks(q_BLNH, parts, mask_BLS, max_scores) -> jax.Array:
  """`attend` with blocks of queries."""
  B, L, N, H = q_BLNH.shape
  axes = ('batch', 'q_heads', 'length')
  rows = B * N // math.prod(map(parallel.parts, axes))
  of_a_query = max(1, rows) * mask_BLS.shape[2]
  num_blocks = -(-L // min(L, max(1, max_scores // of_a_query)))
  # A multiple of the devices that share a block.
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

  # Without the checkpoint, the scores of all blocks would be residuals.
  @jax.checkpoint
  def one_block(operands):
    q_BlNH, mask_BlS = operands
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
