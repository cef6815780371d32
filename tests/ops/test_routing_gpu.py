"""The GPU's kernels, interpreted, against what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import ops
from diffusiongemma.ops.gpu import routing as gpu

T, E = 32, 16


@pytest.mark.parametrize('k', [1, 3, 16])
@pytest.mark.parametrize('scale', [1.0, 50.0])
def test_the_same_choice(k, scale):
  """Sharp ones too, where most probabilities are zero; the first of equals."""
  logits_TE = scale * jax.random.normal(jax.random.key(0), (T, E), jnp.float32)
  logits_TE = logits_TE.at[:, 5].set(logits_TE[:, 2]).at[0].set(0.0)
  scale_E = jnp.linspace(0.5, 2.0, E, dtype=jnp.float32)
  assert gpu.supports(logits_TE)
  assert not gpu.supports(logits_TE.astype(jnp.float16))
  weights_Tk, experts_Tk = gpu.choose(logits_TE, scale_E, k, interpret=True)
  weights, experts = ops.routing.choose(logits_TE[None], scale_E, k)
  # What has no probability left is chosen in any order.
  some = np.asarray(weights[0] > 0)
  np.testing.assert_array_equal(experts_Tk[some], experts[0][some])
  np.testing.assert_allclose(weights_Tk, weights[0], rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize('tile', [16, 64])
@pytest.mark.parametrize('most', [1, 3, E, E + 1])
def test_the_same_layout(tile, most):
  """All rows with one expert, or with few; some with none."""
  expert_R = jax.random.randint(jax.random.key(0), (256,), 0, most)
  assert gpu.supports_layout(256, E)
  found = gpu.lay_out(expert_R, E, tile, interpret=True)
  expected = ops.routing._lay_out(expert_R, E, tile)
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_kernels_count_in_32_bits():
  """Also where JAX has 64: their buffers are int32."""
  expert_R = jax.random.randint(jax.random.key(0), (256,), 0, E, jnp.int32)
  expected = gpu.lay_out(expert_R, E, 16, interpret=True)
  with jax.enable_x64(True):
    found = gpu.lay_out(expert_R, E, 16, interpret=True)
  for ours, theirs in zip(found, expected, strict=True):
    assert ours.dtype == jnp.int32
    np.testing.assert_array_equal(ours, theirs)


def test_where_there_is_a_kernel_there_are_gradients():
  logits_TE = jax.random.normal(jax.random.key(0), (T, E), jnp.float32)
  scale_E = jnp.linspace(0.5, 2.0, E, dtype=jnp.float32)

  def total(logits_TE, scale_E):
    weights_BLk, _ = ops.routing.choose(logits_TE[None], scale_E, 3)
    return jnp.sum(jnp.sin(weights_BLk))

  def expected(logits_TE, scale_E):
    p_TE = jax.nn.softmax(logits_TE)
    p_Tk, experts_Tk = jax.lax.top_k(p_TE, 3)
    p_Tk = p_Tk / p_Tk.sum(axis=-1, keepdims=True)
    return jnp.sum(jnp.sin(p_Tk * scale_E[experts_Tk]))

  ours, theirs = (
    jax.grad(f, argnums=(0, 1))(logits_TE, scale_E) for f in (total, expected)
  )
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_what_does_not_suit_the_kernel():
  assert not gpu.supports(jnp.zeros((T, 12)))
  assert not gpu.supports(jnp.zeros((T - 8, E)))
  assert not gpu.supports_layout(256, 12)
  assert not gpu.supports_layout(200, 16)
  assert not gpu.supports_layout(2**15, 16)
