"""The GPU's kernels, interpreted, against the loops that they stand for.

What compiles for a GPU is shown by `experiments/scale/plans.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import ops
from diffusiongemma.ops.gpu import matmul as gpu

E, D, F, M, TILE = 5, 64, 96, 100, 16


@pytest.fixture(scope='module', params=[0, 1])
def layout(request):
  """Rows of which some have no expert here; once all have the same."""
  expert_M = jax.random.randint(jax.random.key(0), (M,), 0, E + 1)
  if request.param:
    expert_M = jnp.full((M,), 3)
  groups = ops.routing.make_groups(expert_M, E, TILE)
  x_MD = jax.random.normal(jax.random.key(1), (M, D), jnp.float32)
  d_MF = jax.random.normal(jax.random.key(2), (M, F), jnp.float32)
  into = lambda rows: ops.routing.scatter_to_tiles(rows, groups, 1)
  return groups, into(x_MD), into(d_MF)


def used(y_TF, groups):
  return np.asarray(y_TF)[: int(groups.used) * TILE]


@pytest.mark.parametrize('kind', [None, 'int8', 'int4', 'fp8'])
def test_products_are_those_of_the_loop(layout, kind):
  groups, x_TD, _ = layout
  w_EFD = jax.random.normal(jax.random.key(3), (E, F, D), jnp.float32)
  if kind:
    group_size = 32 if kind == 'int4' else None
    w_EFD = ops.weights.quantize(
      w_EFD, kind, -1, group_size, scales_transposed=True
    )
  assert gpu.supports(w_EFD, TILE)
  found = gpu.multiply_tiles(x_TD, w_EFD, groups, interpret=True)
  expected = ops.experts.grouped_matmul(x_TD, w_EFD, groups)
  np.testing.assert_allclose(
    used(found, groups), used(expected, groups), rtol=1e-5, atol=5e-5
  )


@pytest.mark.parametrize('group_size', [32, 64])
def test_pairs_of_int4(layout, group_size):
  """In bfloat16, values of four bits are read two at a time."""
  groups, x_TD, _ = layout
  w_EFD = jax.random.normal(jax.random.key(3), (E, F, D), jnp.float32)
  w_EFD = ops.weights.quantize(
    w_EFD, 'int4', -1, group_size, scales_transposed=True
  )
  x_TD = x_TD.astype(jnp.bfloat16)
  found = gpu.multiply_tiles(x_TD, w_EFD, groups, interpret=True)
  exact = ops.experts.grouped_matmul(x_TD.astype(jnp.float32), w_EFD, groups)
  assert found.dtype == jnp.bfloat16
  # The result alone is rounded.
  np.testing.assert_allclose(
    used(found.astype(jnp.float32), groups),
    used(exact, groups),
    rtol=2.0**-8,
    atol=1e-4,
  )


@pytest.mark.parametrize('kind', [None, 'int4'])
def test_hidden_layer_of_the_experts(kind):
  """Tokens are fetched, two matrices in one meet them, and GeGLU."""
  k = 4
  expert_M = jax.random.randint(jax.random.key(0), (M,), 0, E + 1)
  groups = ops.routing.make_groups(expert_M, E, TILE)
  x_MD = jax.random.normal(jax.random.key(1), (M // k, D), jnp.float32)
  w_EFD = jax.random.normal(jax.random.key(3), (E, 2 * F, D), jnp.float32)
  if kind:
    w_EFD = ops.weights.quantize(w_EFD, kind, -1, 32, scales_transposed=True)
  assert gpu.supports(w_EFD, TILE, parts=2)
  found = gpu.gate_tiles(x_MD, w_EFD, groups, k, interpret=True)
  expected = ops.experts.gated_matmul(x_MD, w_EFD, groups, k)
  assert expected.shape == found.shape == (len(groups.row_T), F)
  here = np.asarray(groups.row_T) < M
  np.testing.assert_allclose(found[here], expected[here], rtol=1e-5, atol=5e-5)


def test_gradients_are_those_of_the_loop(layout):
  groups, x_TD, d_TF = layout
  w_EFD = jax.random.normal(jax.random.key(3), (E, F, D), jnp.float32)
  _, pullback = jax.vjp(
    lambda x_TD, w_EFD: ops.experts.grouped_matmul(x_TD, w_EFD, groups),
    x_TD,
    w_EFD,
  )
  d_x_TD, d_w_EFD = pullback(d_TF)
  np.testing.assert_allclose(
    used(
      gpu.multiply_tiles(d_TF, w_EFD, groups, transposed=True, interpret=True),
      groups,
    ),
    used(d_x_TD, groups),
    rtol=1e-5,
    atol=5e-5,
  )
  found = gpu.add_tiles(d_TF, x_TD, groups, interpret=True)
  np.testing.assert_allclose(found, d_w_EFD, rtol=1e-5, atol=5e-5)
  assert (np.asarray(found) == 0).all(axis=(1, 2)).tolist() == [
    not (np.asarray(groups.row_T).reshape(-1, TILE) < M)[
      np.asarray(groups.expert_of_tile) == e
    ].any()
    for e in range(E)
  ]


@pytest.mark.parametrize('kind, group_size', [('int8', None), ('int4', 16)])
def test_one_matrix(kind, group_size):
  x_TD = jax.random.normal(jax.random.key(1), (48, D), jnp.float32)
  w_DF = jax.random.normal(jax.random.key(3), (D, F), jnp.float32)
  w_DF = ops.weights.quantize(w_DF, kind, -2, group_size)
  assert gpu.supports_one(x_TD, w_DF.values, len(w_DF.scales))
  found = gpu.multiply(x_TD, w_DF.values, w_DF.scales, interpret=True)
  expected = x_TD @ w_DF.astype(jnp.float32)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=5e-5)


def test_hidden_layer_of_one_expert():
  x_TD = jax.random.normal(jax.random.key(1), (48, D), jnp.float32)
  gate_DF, up_DF = (
    ops.weights.quantize(
      jax.random.normal(jax.random.key(i), (D, F), jnp.float32), 'int8', -2
    )
    for i in (3, 4)
  )
  found = gpu.gate(
    x_TD, *((w.values, w.scales) for w in (gate_DF, up_DF)), interpret=True
  )
  gate, up = (x_TD @ w.astype(jnp.float32) for w in (gate_DF, up_DF))
  expected = ops.activation.geglu(gate, up)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=5e-5)


def test_what_is_too_small_for_the_kernels():
  w_EFD = jnp.zeros((E, F, D), jnp.float32)
  assert not gpu.supports(w_EFD, 8)
  assert not gpu.supports(w_EFD[:, :24], TILE)
  for group_size in (8, 16):
    assert not gpu.supports(
      ops.weights.quantize(
        w_EFD, 'int4', -1, group_size, scales_transposed=True
      ),
      TILE,
    )
  assert not gpu.supports_one(
    jnp.zeros((7, D), jnp.float32), jnp.zeros((D, F), jnp.float32), 1
  )
