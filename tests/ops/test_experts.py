"""The tiled product against one product per row, for any routing."""

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import ops


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  # Few lengths: each is compiled.
  st.sampled_from([1, 7, 60]).flatmap(
    lambda n: st.lists(st.integers(0, 4), min_size=n, max_size=n)
  ),
  st.sampled_from([1, 4, 8]),
)
def test_layout(experts, tile):
  """Every row has a slot of its own, in a tile of its own expert."""
  lay_out = jax.jit(ops.routing.make_groups, static_argnums=(1, 2))
  groups = lay_out(jnp.array(experts, jnp.int32), 5, tile)
  slots = np.asarray(groups.slot_R)
  assert len(set(slots.tolist())) == len(experts)
  assert (np.asarray(groups.row_T)[slots] == np.arange(len(experts))).all()
  assert (np.asarray(groups.expert_of_tile)[slots // tile] == experts).all()
  padding = np.delete(np.asarray(groups.row_T), slots)
  assert (padding == len(experts)).all()


def run_tiled(x_MD, weights_EFD, experts_Mk, tile, window=0):
  k = experts_Mk.shape[1]
  groups = ops.routing.make_groups(
    experts_Mk.reshape(-1), weights_EFD.shape[0], tile, window
  )
  x_TD = ops.routing.scatter_to_tiles(x_MD, groups, k)
  y_TF = ops.experts.grouped_matmul(x_TD, weights_EFD, groups)
  y_RF = ops.routing.gather_from_tiles(y_TF, groups)
  return y_RF.reshape(*experts_Mk.shape, -1)


def run_dense(x_MD, weights_EFD, experts_Mk):
  return jnp.einsum('md,mkfd->mkf', x_MD, weights_EFD[experts_Mk])


def check(experts_Mk, tile, window):
  key_x, key_w, key_g = jax.random.split(jax.random.key(0), 3)
  x_MD = jax.random.normal(key_x, (experts_Mk.shape[0], 12), jnp.float32)
  weights_EFD = jax.random.normal(key_w, (6, 10, 12), jnp.float32)
  cotangent = jax.random.normal(key_g, (*experts_Mk.shape, 10), jnp.float32)
  ours, pull_ours = jax.vjp(
    lambda x, w: run_tiled(x, w, experts_Mk, tile, window), x_MD, weights_EFD
  )
  dense, pull_dense = jax.vjp(
    lambda x, w: run_dense(x, w, experts_Mk), x_MD, weights_EFD
  )
  np.testing.assert_allclose(ours, dense, atol=1e-5)
  gradients = zip(pull_ours(cotangent), pull_dense(cotangent), strict=True)
  for got, wanted in gradients:
    np.testing.assert_allclose(got, wanted, atol=2e-5)


# No window, less than a tile, all rows of some experts, all rows of all.
WINDOWS = pytest.mark.parametrize('window', [0, 5, 16, 72])


@WINDOWS
def test_values_and_gradients_for_mixed_routing(window):
  check(jax.random.randint(jax.random.key(3), (50, 2), 0, 6), 8, window)


@WINDOWS
def test_values_and_gradients_when_one_expert_gets_all(window):
  check(jnp.full((33, 2), 4), 8, window)


def test_only_tiles_with_rows_past_the_window_are_left_to_the_loop():
  """Of 4, 20 and no rows in tiles of 8."""
  experts_R = jnp.array([0] * 4 + [1] * 20, jnp.int32)
  groups = ops.routing.make_groups(experts_R, 3, 8, 4)

  def visited(window):
    return ops.routing.for_each_tile(
      lambda tile, seen: seen.at[tile].add(1),
      groups.replace(window=window),
      jnp.zeros(len(groups.expert_of_tile), jnp.int32),
    ).tolist()

  assert visited(0) == [1, 1, 1, 1, 0, 0]
  assert visited(4) == [0, 1, 1, 1, 0, 0]
  assert visited(8) == [0, 0, 1, 1, 0, 0]
  assert visited(16) == [0, 0, 0, 1, 0, 0]
  assert visited(20) == [0, 0, 0, 0, 0, 0]


@WINDOWS
def test_rows_of_experts_that_are_elsewhere_are_left_out(window):
  """They become zero and cost no tile; none here is no tile at all."""
  key_x, key_w = jax.random.split(jax.random.key(0))
  x_MD = jax.random.normal(key_x, (20, 12), jnp.float32)
  weights_EFD = jax.random.normal(key_w, (3, 10, 12), jnp.float32)
  experts_Mk = jnp.arange(40).reshape(20, 2) % 6  # Half of them are not here.
  here_Mk = experts_Mk < 3
  limited_Mk = jnp.where(here_Mk, experts_Mk, 3)

  def tiled(x, w):
    return run_tiled(x, w, limited_Mk, 8, window)

  def dense(x, w):
    return run_dense(x, w, experts_Mk % 3) * here_Mk[..., None]

  ours, pull_ours = jax.vjp(tiled, x_MD, weights_EFD)
  wanted, pull_dense = jax.vjp(dense, x_MD, weights_EFD)
  np.testing.assert_allclose(ours, wanted, atol=1e-5)
  for a, b in zip(pull_ours(ours), pull_dense(ours), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
  nowhere = ops.routing.make_groups(jnp.full(40, 3), 3, 8)
  assert nowhere.used == 0
  nowhere_Mk = jnp.full((20, 2), 3)
  assert not run_tiled(x_MD, weights_EFD, nowhere_Mk, 8, window).any()


def test_tile_follows_the_mean_group():
  assert ops.routing.default_tile(1, 128) == 16
  assert ops.routing.default_tile(2048, 128) == 16
  assert ops.routing.default_tile(4096, 8) == 128


def test_window_holds_most_even_groups_and_is_none_for_small_ones():
  assert ops.routing.default_window(7 * 128, 128) == 0
  assert ops.routing.default_window(2048, 128) == 24
  assert ops.routing.default_window(1024, 32) == 40
  assert ops.routing.default_window(8192, 32) == 280


def test_the_layout_counts_in_32_bits():
  """Also with 64-bit types, in which JAX adds up."""
  with jax.enable_x64(True):
    groups = ops.routing.make_groups(jnp.array([0, 1, 2, 1], jnp.int32), 3, 16)
  for field in jax.tree.leaves(groups):
    assert field.dtype == jnp.int32
