"""Arrays of few bits: how near they are, and what stands in their place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import ops


def brute_force(w, largest, group_size):
  """Row by row, group by group: nearest multiples of each group's scale."""
  w = np.asarray(w, np.float32)
  result = np.zeros_like(w)
  for row in range(w.shape[0]):
    for start in range(0, w.shape[1], group_size):
      part = w[row, start : start + group_size]
      scale = np.float32(jnp.bfloat16(np.abs(part).max() / np.float32(largest)))
      if scale:
        steps = np.clip(np.round(part / scale), -largest, largest)
        result[row, start : start + group_size] = steps * scale
  return result


@pytest.mark.parametrize('kind, largest', [('int8', 127), ('int4', 7)])
@pytest.mark.parametrize('group_size', [8, 32, None])
def test_integers_are_the_nearest_multiples(kind, largest, group_size):
  w = jax.random.normal(jax.random.key(0), (5, 64))
  w = w.at[2].set(0.0).at[3].mul(1e-4)
  found = ops.weights.quantize(w, kind, -1, group_size)
  np.testing.assert_array_equal(
    found.astype(jnp.float32), brute_force(w, largest, group_size or 64)
  )


def test_small_floats_are_near():
  """e4m3 has three bits after the point: half a step is 2^-4 of a value."""
  w = jax.random.normal(jax.random.key(0), (5, 64))
  found = ops.weights.quantize(w, 'fp8', -1)
  assert found.values.dtype == jnp.float8_e4m3fn
  error = np.abs(np.asarray(found.astype(jnp.float32) - w))
  smallest = np.asarray(found.scales, np.float32) * 2.0**-9
  assert (error <= np.abs(w) * 2.0**-4 + smallest).all()
  assert error.max() > 0


@pytest.mark.parametrize('axis', [-1, -2, -3])
def test_any_axis(axis):
  w = jax.random.normal(jax.random.key(1), (8, 16, 24))
  found = ops.weights.quantize(w, 'int4', axis, 8)
  last = jnp.moveaxis(w, axis, -1)
  expected = ops.weights.quantize(last, 'int4', -1, 8).astype(jnp.float32)
  np.testing.assert_array_equal(
    found.astype(jnp.float32), jnp.moveaxis(expected, -1, axis)
  )
  assert found.scales.size == w.size // 8
  if axis != -3:
    turned = ops.weights.quantize(w, 'int4', axis, 8, scales_transposed=True)
    assert turned.num_groups == found.num_groups == w.shape[axis] // 8
    np.testing.assert_array_equal(
      turned.scales, jnp.swapaxes(found.scales, 1, 2)
    )
    np.testing.assert_array_equal(
      turned[2:4].astype(jnp.float32), found[2:4].astype(jnp.float32)
    )


def test_what_groups_do_not_divide_is_refused():
  with pytest.raises(ValueError, match='60 is no multiple of 32'):
    ops.weights.quantize(jnp.ones((2, 60)), 'int4', -1, 32)


def test_a_part_is_quantised_as_the_whole():
  w = jax.random.normal(jax.random.key(2), (6, 8, 32))
  whole = ops.weights.quantize(w, 'int4', -1, 16)
  part = ops.weights.quantize(w[4], 'int4', -1, 16)
  np.testing.assert_array_equal(
    whole[4].astype(jnp.float32), part.astype(jnp.float32)
  )
  rows = ops.weights.rows(whole, 2, 3)
  np.testing.assert_array_equal(rows.values, whole.values[2:5])
  np.testing.assert_array_equal(rows.scales, whole.scales[2:5])


@pytest.mark.parametrize('kind', ['int8', 'int4', 'fp8'])
def test_experts_of_few_bits(kind):
  """The grouped product is that of the matrices that they stand for."""
  E, D, F, M = 5, 16, 24, 40
  keys = jax.random.split(jax.random.key(3), 3)
  w = jax.random.normal(keys[0], (E, F, D))
  w = ops.weights.quantize(w, kind, -1, 8, scales_transposed=True)
  expert_M = jax.random.randint(keys[1], (M,), 0, E)
  x_MD = jax.random.normal(keys[2], (M, D))
  groups = ops.routing.make_groups(expert_M, E, 8)

  def apply(w, x_MD=x_MD):
    x_TD = ops.routing.scatter_to_tiles(x_MD, groups, 1)
    return ops.routing.gather_from_tiles(
      ops.experts.grouped_matmul(x_TD, w, groups), groups
    )

  whole = w.astype(jnp.float32)
  np.testing.assert_allclose(apply(w), apply(whole), rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(
    apply(w),
    jnp.einsum('md,mfd->mf', x_MD, whole[expert_M]),
    rtol=1e-5,
    atol=1e-5,
  )
  # Nor do rows learn anything else.
  found, expected = (
    jax.grad(lambda x_MD, w=w: jnp.sum(apply(w, x_MD) ** 2))(x_MD)
    for w in (w, whole)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
