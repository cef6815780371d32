"""The GPU's kernels, interpreted, against the loop that they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import ops
from diffusiongemma.ops.gpu import vocabulary as gpu

R, D, V, SIZE = 48, 32, 384, 128


def given(kind=None, scale=1.0):
  """(h, table, temperatures), some rows of the table twice."""
  keys = jax.random.split(jax.random.key(0), 2)
  table_VD = jax.random.normal(keys[0], (V, D), jnp.float32)
  table_VD = table_VD.at[200:300].set(table_VD[100:200])
  if kind:
    table_VD = ops.weights.quantize(table_VD, kind, -1)
  h_RD = scale * jax.random.normal(keys[1], (R, D), jnp.float32)
  return h_RD, table_VD, jnp.linspace(0.5, 0.9, R, dtype=jnp.float32)


def carry():
  """Before anything was looked at."""
  lowest_R, nothing_R = jnp.full((R,), -jnp.inf), jnp.zeros((R,), jnp.int32)
  return lowest_R, jnp.zeros((R,)), nothing_R, jnp.zeros((R, D))


@pytest.mark.parametrize('kind', [None, 'int8'])
@pytest.mark.parametrize(('scale', 'softcap'), [(1.0, 5.0), (8.0, 0.0)])
def test_the_same_as_the_loop(kind, scale, softcap):
  """One part of the table after the other; with a quantised one too."""
  arguments = given(kind, scale)
  assert gpu.supports(*arguments[:2], SIZE, ops.vocabulary.BIN)
  how = {'size': SIZE, 'softcap': softcap}
  kernels = functools.partial(
    gpu.look_at, **how, bin_size=ops.vocabulary.BIN, interpret=True
  )
  found = expected = carry()
  for start in range(0, V, SIZE):
    found, (bins, at) = kernels(found, *arguments, jnp.int32(start))
    expected, (bins_there, at_there) = ops.vocabulary.look_at(
      expected, *arguments, jnp.int32(start), **how
    )
    np.testing.assert_allclose(at, at_there, rtol=1e-6)
    np.testing.assert_allclose(bins, bins_there, rtol=2e-4, atol=1e-7)
  np.testing.assert_array_equal(found[2], expected[2])
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_too_small_for_the_kernels():
  h_RD, table_VD, _ = given()
  supports = functools.partial(gpu.supports, bin_size=ops.vocabulary.BIN)
  assert supports(h_RD, table_VD, 64)
  assert not supports(h_RD, table_VD, 8)  # Half a bin.
  assert not supports(h_RD[:10], table_VD, 64)
  assert not supports(h_RD[:, :24], table_VD[:, :24], 64)
  assert not supports(h_RD, ops.weights.quantize(table_VD, 'int8', -1, 8), 64)
