"""The GPU's kernel, interpreted, against the arrays that it does without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import ops
from diffusiongemma.ops.gpu import attention as gpu
from diffusiongemma.ops.gpu import heads

B, K, H = 2, 2, 16


@pytest.mark.parametrize('group', [1, 2, 8])
@pytest.mark.parametrize('same_for_all', [True, False])
@pytest.mark.parametrize('lengths', [(64,), (100, 32), (0, 128), (33, 90)])
@pytest.mark.parametrize('programs', [1, 256])
def test_the_same_as_all_scores_at_once(
  group, same_for_all, lengths, programs, monkeypatch
):
  """Parts of whole blocks, of a last one that overlaps, and of nothing; keys of
  a query looked at by one program, and by several."""
  monkeypatch.setattr(gpu, '_PROGRAMS', programs)
  L, N, S = 32, K * group, sum(lengths)
  keys = jax.random.split(jax.random.key(0), 2 + 2 * len(lengths))
  q_BLNH = jax.random.normal(keys[0], (B, L, N, H), jnp.float32)
  parts = [
    (
      jax.random.normal(keys[2 + 2 * i], (B, length, K, H), jnp.float32),
      jax.random.normal(keys[3 + 2 * i], (B, length, K, H), jnp.float32),
    )
    for i, length in enumerate(lengths)
  ]
  rows = 1 if same_for_all else L
  mask_BLS = jax.random.bernoulli(keys[1], 0.4, (B, rows, S))
  # Nothing is seen of the first block, and by the last row nothing at all.
  mask_BLS = mask_BLS.at[:, :, :32].set(False).at[1, -1].set(False)
  assert gpu.supports(q_BLNH, parts)
  found = gpu.attend(q_BLNH, parts, mask_BLS, interpret=True)
  expected = ops.attention.attend(q_BLNH, parts, mask_BLS)
  # Of scores near 16, a rounding is 2e-6 of the weights.
  np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize('filled', [(0, 70), (33, 100), (1, 200)])
@pytest.mark.parametrize('programs', [1, 256])
def test_empty_slots_of_a_cache_are_not_looked_at(
  filled, programs, monkeypatch
):
  """What blocks of nothing else hold would be found in a sum: a weight of zero
  times NaN. Of programs that share a query's keys, some then have none."""
  monkeypatch.setattr(gpu, '_PROGRAMS', programs)
  S, C, N = 100, 32, 2 * K
  keys = jax.random.split(jax.random.key(0), 5)
  q_BLNH = jax.random.normal(keys[0], (B, C, N, H), jnp.float32)
  cached, own = (
    tuple(
      jax.random.normal(key, (B, length, K, H), jnp.float32) for key in pair
    )
    for pair, length in ((keys[1:3], S), (keys[3:], C))
  )
  filled_B = jnp.array(filled)
  is_filled_BS = jnp.arange(S) < filled_B[:, None]
  mask_B1S = jnp.concatenate([is_filled_BS, jnp.ones((B, C), bool)], axis=1)
  mask_B1S = mask_B1S[:, None]
  expected = ops.attention.attend(q_BLNH, [cached, own], mask_B1S)
  # The last block of keys may overlap the one before.
  block_B1 = -(-filled_B[:, None] // 32) * 32
  is_looked_at_BS = (jnp.arange(S) < block_B1) | (block_B1 > S - 32)
  k_BSKH, v_BSKH = cached
  v_BSKH = jnp.where(is_looked_at_BS[:, :, None, None], v_BSKH, jnp.nan)
  found = gpu.attend(
    *(q_BLNH, [(k_BSKH, v_BSKH), own], mask_B1S, filled_B), interpret=True
  )
  np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)
  assert not jnp.all(is_looked_at_BS)


def test_the_kernel_is_told_how_many_keys_are_there(monkeypatch):
  told = []

  def listen(q_BLNH, parts, mask_BLS, filled_B):
    told.append(filled_B.shape)
    return q_BLNH

  monkeypatch.setattr(gpu, 'attend', listen)
  x_BSKH = jnp.ones((B, 32, K, H), jnp.float32)
  with ops.dispatch.compiling_for('cuda'):
    jax.eval_shape(
      lambda filled_B: ops.attention.attend(
        x_BSKH,
        [(x_BSKH, x_BSKH)],
        jnp.ones((B, 1, 32), bool),
        filled_B=filled_B,
      ),
      jnp.array([3, 7]),
    )
  assert told == [(B,)]


def test_where_there_is_a_kernel_there_are_gradients():
  keys = jax.random.split(jax.random.key(0), 3)
  q_BLNH, k_BSKH, v_BSKH = (
    jax.random.normal(key, (B, 32, K, H), jnp.float32) for key in keys
  )
  mask_BLS = jnp.tril(jnp.ones((1, 32, 32), jnp.bool_))
  assert gpu.supports(q_BLNH, [(k_BSKH, v_BSKH)])

  def total(attend, *given):
    q_BLNH, k_BSKH, v_BSKH = given
    out = attend(q_BLNH, [(k_BSKH, v_BSKH)], mask_BLS, ops.attention.MAX_SCORES)
    return jnp.sum(jnp.sin(out))

  ours, theirs = (
    jax.grad(total, argnums=(1, 2, 3))(attend, q_BLNH, k_BSKH, v_BSKH)
    for attend in (ops.attention.attend, ops.attention._attend_in_blocks)
  )
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('has_v', [True, False])
@pytest.mark.parametrize('kind, group_size', [('int8', None), ('int4', 32)])
def test_heads_out_of_few_bits(has_v, kind, group_size):
  L, D, H = 16, 64, 32
  keys = jax.random.split(jax.random.key(0), 5)
  counts = {'q': 4, 'k': 2, 'v': 2} if has_v else {'q': 4, 'k': 2}
  weights = {
    name: ops.weights.quantize(
      jax.random.normal(key, (D, count, H), jnp.float32), kind, -3, group_size
    )
    for key, (name, count) in zip(keys, counts.items(), strict=False)
  }
  norms = {
    name: jax.random.uniform(key, (H,), jnp.float32)
    for key, name in zip(keys[3:], 'qk', strict=True)
  }
  x_BLD = jax.random.normal(keys[0], (B, L, D), jnp.float32)
  positions_BL = jnp.arange(B * L).reshape(B, L) * 7
  cos_sin = ops.heads.rotary_cos_sin(
    positions_BL, ops.heads.rotary_frequencies(H, 1e4)
  )
  x_TD = x_BLD.reshape(-1, D)
  assert heads.supports(x_TD, list(weights.values()))
  found = heads.project(
    *(x_TD, weights, norms, [x.reshape(B * L, -1) for x in cos_sin]),
    epsilon=1e-6,
    interpret=True,
  )
  expected = ops.heads.project(x_BLD, weights, norms, cos_sin, 1e-6)
  assert found.keys() == expected.keys() == {'q', 'k', 'v'}
  for name, heads_TNH in found.items():
    np.testing.assert_allclose(
      heads_TNH.reshape(expected[name].shape), expected[name], atol=1e-5
    )


@pytest.mark.parametrize('has_v', [True, False])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_heads_that_are_there(has_v, dtype):
  T, H = 32, 64
  counts = {'q': 4, 'k': 2} | ({'v': 2} if has_v else {})
  products = {
    name: jax.random.normal(jax.random.key(n), (T, n, H), dtype) * 3
    for name, n in counts.items()
  }
  norms = {
    name: 1 + 0.1 * jax.random.normal(jax.random.key(i), (H,), jnp.float32)
    for i, name in enumerate('qk')
  }
  positions = jnp.arange(T)[None] + 7
  cos_sin = ops.heads.rotary_cos_sin(
    positions, ops.heads.rotary_frequencies(H, 1e4, 0.25)
  )
  assert heads.supports_norm_and_rotate(products['q'])
  assert not heads.supports_norm_and_rotate(products['q'][:24])
  flat = [x[0] for x in cos_sin]
  found = heads.norm_and_rotate(
    products, norms, flat, epsilon=1e-6, interpret=True
  )
  exact = {name: x[None].astype(jnp.float32) for name, x in products.items()}
  expected = ops.heads._norm_and_rotate(exact, norms, cos_sin, 1e-6)
  assert found.keys() == expected.keys() == {'q', 'k', 'v'}
  tolerance = 1e-5 if dtype == 'float32' else 2.0**-8
  for name, x_TNH in found.items():
    assert x_TNH.dtype == dtype
    np.testing.assert_allclose(
      x_TNH.astype(jnp.float32), expected[name][0], rtol=tolerance, atol=1e-5
    )


def test_few_scores_of_long_heads_are_left_to_xla():
  def supports(S, H):
    array = jax.ShapeDtypeStruct
    k_BSKH = array((1, S, 2, H), 'bfloat16')
    return gpu.supports(array((1, 256, 16, H), 'bfloat16'), [(k_BSKH, k_BSKH)])

  assert supports(2048, 256)
  assert not supports(2048, 512)
  assert supports(2049, 512)


def test_what_is_too_small_for_the_kernel():
  def supports(L, N, K, H, S):
    k_BSKH = jnp.zeros((1, S, K, H), jnp.float32)
    return gpu.supports(
      jnp.zeros((1, L, N, H), jnp.float32), [(k_BSKH, k_BSKH)]
    )

  assert supports(32, 4, 2, 16, 16)
  assert not supports(32, 4, 2, 16, 15)
  assert not supports(32, 4, 2, 24, 16)
  assert not supports(31, 4, 2, 16, 16)
  assert not supports(32, 6, 2, 16, 16)
  assert not supports(32, 4, 2, 1024, 16)
