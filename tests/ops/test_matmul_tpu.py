"""The TPU's kernels, interpreted, against the loops that they stand for.

What compiles for a TPU is shown by `tests/tools/test_compiled.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import ops
from diffusiongemma.ops.tpu import matmul as tpu

# NARROW is no multiple of the 128 lanes: what ends in it is turned.
E, WIDE, NARROW, M, TILE = 5, 256, 96, 100, 16


@pytest.fixture(scope='module', params=['some elsewhere', 'all in one', 'none'])
def groups(request):
  """Rows of which some have no expert here, all have the same, or none any."""
  expert_M = {
    'some elsewhere': jax.random.randint(jax.random.key(0), (M,), 0, E + 1),
    'all in one': jnp.full((M,), 3),
    'none': jnp.full((M,), E),
  }[request.param]
  return ops.routing.make_groups(expert_M, E, TILE)


def rows(width, groups, seed=1):
  x_MD = jax.random.normal(jax.random.key(seed), (M, width), jnp.float32)
  return ops.routing.scatter_to_tiles(x_MD, groups, 1)


def matrices(kind, F, D):
  w_EFD = jax.random.normal(jax.random.key(3), (E, F, D), jnp.float32) * D**-0.5
  if not kind:
    return w_EFD
  group_size = 32 if kind == 'int4' else None
  return ops.weights.quantize(
    w_EFD, kind, -1, group_size, scales_transposed=True
  )


def check(found, expected, groups):
  count = int(groups.used) * TILE
  np.testing.assert_allclose(
    np.asarray(found)[:count],
    np.asarray(expected)[:count],
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.fixture(params=[1, 2])
def blocks(request, monkeypatch):
  """Outputs that are made all at once, or a half of them at a time."""

  def of(w):
    values, _ = ops.weights.values_and_scales(w)
    size = values[0].size * values.dtype.itemsize
    monkeypatch.setattr(tpu, 'LARGEST_BLOCK', size // request.param)
    monkeypatch.setattr(tpu, 'CHUNK', 128)
    return w

  return of


@pytest.mark.parametrize('kind', [None, 'int8', 'int4', 'fp8'])
@pytest.mark.parametrize('inputs', [NARROW, WIDE])
def test_products_are_those_of_the_loop(groups, blocks, kind, inputs):
  w_EFD, x_TD = blocks(matrices(kind, WIDE, inputs)), rows(inputs, groups)
  assert tpu.supports(w_EFD, TILE)
  found = tpu.multiply_tiles(x_TD, w_EFD, groups, interpret=True)
  check(found, ops.experts.grouped_matmul(x_TD, w_EFD, groups), groups)


@pytest.mark.parametrize('kind', ['int8', 'int4', 'fp8'])
@pytest.mark.parametrize('rows, outputs', [(48, 300), (512, NARROW)])
def test_products_with_one_matrix(monkeypatch, kind, rows, outputs):
  """Of 300 outputs the last block has but 44."""
  monkeypatch.setattr(tpu, 'ONE_BLOCK', 128 * WIDE)
  x_TD = jax.random.normal(jax.random.key(0), (rows, WIDE), jnp.float32)
  w_DF = (
    jax.random.normal(jax.random.key(1), (WIDE, outputs), jnp.float32)
    * WIDE**-0.5
  )
  few_bits = ops.weights.quantize(
    w_DF, kind, -2, 32 if kind == 'int4' else None
  )
  assert tpu.supports_one(x_TD, few_bits.values)
  parts = ops.weights.values_and_scales(few_bits)
  found = tpu.multiply(x_TD, *parts, interpret=True)
  expected = x_TD @ few_bits.astype(x_TD.dtype)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind', [None, 'int4'])
def test_hidden_layer_of_the_experts(groups, blocks, kind):
  """Two matrices in one, and GeGLU."""
  w_EFD = blocks(matrices(kind, 2 * WIDE, WIDE))
  assert tpu.supports(w_EFD, TILE, parts=2)
  x_TD = rows(WIDE, groups)
  found = tpu.gate_tiles(x_TD, w_EFD, groups, interpret=True)
  x_MD = jax.random.normal(jax.random.key(1), (M, WIDE), jnp.float32)
  check(found, ops.experts.gated_matmul(x_MD, w_EFD, groups, 1), groups)


@pytest.mark.parametrize('F, D', [(WIDE, NARROW), (NARROW, WIDE)])
def test_gradients_are_those_of_the_loop(groups, F, D):
  w_EFD, x_TD, d_TF = matrices(None, F, D), rows(D, groups), rows(F, groups, 2)
  assert tpu.supports(w_EFD, TILE, transposed=True)
  _, pullback = jax.vjp(
    lambda x_TD, w_EFD: ops.experts.grouped_matmul(x_TD, w_EFD, groups),
    x_TD,
    w_EFD,
  )
  d_x_TD, d_w_EFD = pullback(d_TF)
  found = tpu.multiply_tiles(
    d_TF, w_EFD, groups, transposed=True, interpret=True
  )
  check(found, d_x_TD, groups)
  found = tpu.add_tiles(d_TF, x_TD, groups, interpret=True)
  np.testing.assert_allclose(found, d_w_EFD, rtol=1e-5, atol=1e-5)


def test_what_the_kernels_are_not_for():
  w_EFD = matrices(None, WIDE, NARROW)
  assert not tpu.supports(w_EFD, 8), 'few rows'
  few_bits = matrices('int8', WIDE, NARROW)
  assert not tpu.supports(few_bits, TILE, transposed=True), 'no gradients'
  large = jax.ShapeDtypeStruct((E, 256, 40000), jnp.float32)
  assert not tpu.supports(large, TILE), 'too much for fast memory'
