"""The GPU's kernel, interpreted, against the norms that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import ops
from diffusiongemma.ops.gpu import norms as gpu

B, L = 2, 3


@pytest.mark.parametrize('D', [32, 88, 300])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_same_norms(D, dtype):
  """Rows of a power of two, and rows that are filled up to one."""
  keys = jax.random.split(jax.random.key(0), 5)
  x_BLD, y_BLD = (jax.random.normal(k, (B, L, D), dtype) for k in keys[:2])
  scale_D, *scales = (jax.random.uniform(k, (D,)) for k in keys[2:])
  dtypes = (jnp.float32, dtype)
  assert gpu.supports(x_BLD)
  found = gpu.add_and_norm(
    *(x_BLD.reshape(-1, D), y_BLD.reshape(-1, D), scale_D, scales, dtypes),
    *(1e-6, True),
  )
  expected = ops.norms.add_and_norm(x_BLD, y_BLD, scale_D, scales, dtypes, 1e-6)
  for ours, theirs in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    assert ours.dtype == theirs.dtype
    # One rounding of the type in which h is kept.
    limit = 2e-6 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(
      ours.reshape(theirs.shape).astype(jnp.float32),
      theirs.astype(jnp.float32),
      rtol=limit,
      atol=limit,
    )


def test_where_there_is_a_kernel_there_are_gradients():
  keys = jax.random.split(jax.random.key(0), 4)
  x_BLD, y_BLD = (jax.random.normal(k, (B, L, 64)) for k in keys[:2])
  scales = [jax.random.uniform(k, (64,)) for k in keys[2:]]

  def total(x_BLD, y_BLD, scale_D, scale):
    h_BLD, (normed,) = ops.norms.add_and_norm(
      x_BLD, y_BLD, scale_D, [scale], [jnp.float32], 1e-6
    )
    return jnp.sum(jnp.sin(h_BLD) * normed)

  def expected(x_BLD, y_BLD, scale_D, scale):
    h_BLD = x_BLD + ops.norms.rms_norm(y_BLD, 1e-6, scale_D)
    return jnp.sum(jnp.sin(h_BLD) * ops.norms.rms_norm(h_BLD, 1e-6, scale))

  ours, theirs = (
    jax.grad(f, argnums=(0, 1, 2, 3))(x_BLD, y_BLD, *scales)
    for f in (total, expected)
  )
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_what_does_not_suit_the_kernel():
  assert not gpu.supports(jnp.zeros((2, 24)))
  assert not gpu.supports(jnp.zeros((2, 2**15)))
