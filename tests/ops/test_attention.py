"""Attention block by block against all at once."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import ops
from diffusiongemma.model import masks
from diffusiongemma.tools import plan

B, L, N, K, H = 2, 13, 4, 2, 8


def given(same_for_all: bool):
  """(queries, keys and values of two parts, what each query sees)."""
  keys = jax.random.split(jax.random.key(0), 6)
  q_BLNH = jax.random.normal(keys[0], (B, L, N, H))
  parts = [
    tuple(jax.random.normal(key, (B, S, K, H)) for key in pair)
    for S, pair in ((11, keys[1:3]), (L, keys[3:5]))
  ]
  rows = 1 if same_for_all else L
  mask_BLS = jax.random.bernoulli(keys[5], 0.7, (B, rows, 11 + L))
  return q_BLNH, parts, mask_BLS.at[:, :, 0].set(True)


@pytest.mark.parametrize('same_for_all', [True, False])
@pytest.mark.parametrize('num_blocks', [2, 5, 100])
def test_blocks_of_queries_equal_all_at_once(num_blocks, same_for_all):
  *differentiated, mask_BLS = given(same_for_all)
  max_scores = B * N * L * (11 + L) // num_blocks

  def total(max_scores, q_BLNH, parts):
    out = ops.attention.attend(q_BLNH, parts, mask_BLS, max_scores)
    return jnp.sum(jnp.sin(out)), out

  def run(max_scores):
    function = functools.partial(total, max_scores)
    blocked = 'scan' in str(jax.make_jaxpr(function)(*differentiated))
    return blocked, jax.value_and_grad(function, argnums=(0, 1), has_aux=True)(
      *differentiated
    )

  is_blocked, ((_, whole), whole_gradients) = run(ops.attention.MAX_SCORES)
  assert not is_blocked
  is_blocked, ((_, blocked), gradients) = run(max_scores)
  assert is_blocked
  np.testing.assert_allclose(blocked, whole, rtol=0, atol=1e-6)
  for ours, theirs in zip(
    jax.tree.leaves(gradients), jax.tree.leaves(whole_gradients), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


# All blocks at once, two of them, and parts of one.
@pytest.mark.parametrize('max_scores', [ops.attention.MAX_SCORES, 800, 50])
@pytest.mark.parametrize('L', [24, 29])
@pytest.mark.parametrize(
  'window, most',  # Of the keys of each query, the blocks' on average.
  [(1, 12 + 4), (2, 12 + 4), (5, 12 + 4), (8, 12 + 4), (13, 18), (None, 20)],
)
def test_blocks_with_keys_of_their_own_equal_all_at_once(
  monkeypatch, window, most, L, max_scores
):
  """In bands and causal blocks, of two documents a row too; and few keys are
  multiplied."""
  monkeypatch.setattr(ops.attention, '_BLOCK_UNIT', 4)
  keys = jax.random.split(jax.random.key(2), 3)
  shapes = ((B, L, N, H), (B, L, K, H), (B, L, K, H))
  q_BLNH, *part = map(jax.random.normal, keys, shapes)
  empty = jnp.zeros((B, 0, K, H))
  first_BL = jnp.where(jnp.arange(L) < 7, 0, 7)[None] * jnp.array([[0], [1]])
  zero_B, none_BS = jnp.zeros(B, jnp.int32), jnp.zeros((B, 0), jnp.int32)
  mask = masks.prefill_mask(zero_B, none_BS, L, window, None, first_BL)

  def total(window, q_BLNH, part):
    out = ops.attention.attend(
      q_BLNH, [(empty, empty), part], mask.seen_BLS, max_scores, window
    )
    return jnp.sum(jnp.sin(out)), out

  def run(window):
    function = functools.partial(total, window)
    of_all = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)
    flops = plan.count_flops(jax.make_jaxpr(of_all)(q_BLNH, part))
    (_, out), gradients = jax.jit(of_all)(q_BLNH, part)
    return flops, (out, gradients)

  all_flops, whole = run(None)
  flops, in_blocks = run(mask.window)
  assert flops < all_flops * most / L
  for ours, theirs in zip(
    jax.tree.leaves(in_blocks), jax.tree.leaves(whole), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
  'L, window, scores',
  [
    (252, 1024, 252**2),
    (512, 512, 128 * (128 + 256 + 384 + 512)),
    (1536, 1024, 384 * (384 + 768 + 1152 + 1536 - 129)),
    (4096, 1024, 4096 * (512 + 1024)),
    (4096, 4096, 1024 * (1024 + 2048 + 3072 + 4096)),
  ],
)
def test_bands_and_causal_blocks_where_they_are_less(L, window, scores):
  """All at once, in four causal blocks, or in bands of 512 queries."""
  shapes = ((1, L, N, H), (1, L, K, H), (1, L, K, H))
  q, *part = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
  mask = jax.ShapeDtypeStruct((1, L, L), jnp.bool_)

  def count(window):
    attend = functools.partial(ops.attention.attend, window=window)
    return plan.count_flops(jax.make_jaxpr(attend)(q, [part], mask))

  assert count(None) == 4 * L * L * N * H
  assert count(window) == 4 * scores * N * H


def test_many_rows_take_a_few_blocks_at_a_time(monkeypatch):
  """With room for the scores of two of six, all queries of a block together,
  rather than few queries of all."""
  monkeypatch.setattr(ops.attention, '_BLOCK_UNIT', 4)
  shapes = ((B, 24, N, H), (B, 24, K, H), (B, 24, K, H))
  q, *part = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
  mask = jax.ShapeDtypeStruct((B, 24, 24), jnp.bool_)

  def shapes_of_scores(max_scores):
    attend = functools.partial(
      ops.attention.attend, max_scores=max_scores, window=5
    )
    traced = str(jax.make_jaxpr(attend)(q, [part], mask))
    return set(re.findall(r'f32\[(\d+),2,(\d+),2,8\] = dot_general', traced))

  assert shapes_of_scores(B * N * 24 * 8) == {(str(B * 6), '4')}
  assert shapes_of_scores(B * N * 8 * 8) == {(str(B * 2), '4')}
  assert shapes_of_scores(B * N * 2 * 8) == {(str(B), '2')}


@pytest.mark.parametrize('same_for_all', [True, False])
@pytest.mark.parametrize('chunk', [1, 4, 11, 50])
def test_chunks_of_keys_equal_all_at_once(chunk, same_for_all):
  """Some of which have nothing that any query sees, or that one does."""
  q_BLNH, parts, mask_BLS = given(same_for_all)
  mask_BLS = mask_BLS.at[:, :, :9].set(False).at[0, 0, 3:].set(False)
  mask_BLS = mask_BLS.at[0, 0, -1].set(True)
  whole = ops.attention._attend(q_BLNH, parts, mask_BLS)
  chunked = ops.attention._attend_in_chunks(q_BLNH, parts, mask_BLS, chunk)
  np.testing.assert_allclose(chunked, whole, rtol=0, atol=1e-6)


def test_chunks_that_nobody_sees_are_not_looked_at():
  """What they hold would be found in a sum: a weight of zero times NaN."""
  q_BLNH, parts, mask_BLS = given(True)
  whole = ops.attention._attend(
    q_BLNH, parts, mask_BLS.at[:, :, 4:8].set(False)
  )
  (k_BSKH, v_BSKH), new = parts
  v_BSKH = v_BSKH.at[:, 4:8].set(jnp.nan)
  chunked = functools.partial(ops.attention._attend_in_chunks, chunk=4)
  one_row_sees = mask_BLS.at[0, :, 4:8].set(False).at[1, :, 7].set(True)
  mask_BLS = mask_BLS.at[:, :, 4:8].set(False)
  parts = ((k_BSKH, v_BSKH), new)
  out_BLNH = chunked(q_BLNH, parts, mask_BLS)
  np.testing.assert_allclose(out_BLNH, whole, rtol=0, atol=1e-6)
  assert jnp.any(jnp.isnan(chunked(q_BLNH, parts, one_row_sees)))


def test_a_cpu_takes_long_texts_in_chunks(monkeypatch):
  """The gradient is that of all at once; short ones are taken whole, and so
  many queries that chunks would be too large in blocks."""
  q_BLNH, parts, mask_BLS = given(True)
  monkeypatch.setattr(ops.attention, '_CHUNK', 8)

  def run(q_BLNH):
    out_BLNH = ops.attention.attend(q_BLNH, parts, mask_BLS)
    return jnp.sum(jnp.sin(out_BLNH)), out_BLNH

  def whole(q_BLNH):
    out_BLNH = ops.attention._attend(q_BLNH, parts, mask_BLS)
    return jnp.sum(jnp.sin(out_BLNH)), out_BLNH

  assert 'while' in jax.jit(run).lower(q_BLNH).as_text()
  np.testing.assert_allclose(run(q_BLNH)[1], whole(q_BLNH)[1], atol=1e-6)
  gradient = jax.jit(jax.grad(run, has_aux=True))
  assert 'while' not in gradient.lower(q_BLNH).as_text()
  expected, _ = jax.grad(whole, has_aux=True)(q_BLNH)
  np.testing.assert_allclose(gradient(q_BLNH)[0], expected, atol=1e-6)
  monkeypatch.setattr(ops.attention, '_CHUNK', 16)
  jax.clear_caches()
  short, expected = jax.jit(run)(q_BLNH), jax.jit(whole)(q_BLNH)
  np.testing.assert_array_equal(short[1], expected[1])
  monkeypatch.setattr(ops.attention, '_CHUNK', 8)
  monkeypatch.setattr(ops.attention, '_attend_in_chunks', pytest.fail)
  in_blocks = ops.attention.attend(q_BLNH, parts, mask_BLS, 8 * B * L * N - 1)
  np.testing.assert_allclose(in_blocks, expected[1], atol=1e-6)


def test_scores_at_long_context_stay_bounded():
  """A canvas of the released network over 256k tokens, in a global layer."""
  q_BLNH = jax.ShapeDtypeStruct((1, 256, 16, 512), jnp.bfloat16)
  parts = [
    [jax.ShapeDtypeStruct((1, S, 2, 512), jnp.bfloat16)] * 2
    for S in (262144, 256)
  ]
  mask_BLS = jax.ShapeDtypeStruct((1, 1, 262144 + 256), jnp.bool_)
  without_a_gpu = functools.partial(
    ops.attention._attend_in_blocks, max_scores=ops.attention.MAX_SCORES
  )
  jaxpr = jax.make_jaxpr(without_a_gpu)(q_BLNH, parts, mask_BLS)
  (scan,) = [e for e in jaxpr.eqns if e.primitive.name == 'scan']
  assert scan.params['length'] == 18
  of_a_block = scan.params['jaxpr'].eqns[-1].params['jaxpr'].eqns
  sizes = [v.aval.size for eqn in of_a_block for v in eqn.outvars]
  assert ops.attention.MAX_SCORES / 2 < max(sizes) <= ops.attention.MAX_SCORES
