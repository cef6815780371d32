"""Experts on a CPU against their formula, for any routing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import ops
from diffusiongemma.ops.cpu import experts as experts_cpu

E, D, F = 6, 12, 10


def given(num_tokens):
  """(tokens, gate and up of each expert, down)."""
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (num_tokens, D), (E, 2 * F, D), (E, D, F)
  return [
    jax.random.normal(key, shape, jnp.float32)
    for key, shape in zip(keys, shapes, strict=True)
  ]


def turned(w_EFD):
  return ops.weights.Transposed(jnp.swapaxes(w_EFD, 1, 2))


def one_by_one(x_MD, gate_up_EFD, down_EDF, experts_Mk):
  gate_up_MkF = jnp.einsum('md,mkfd->mkf', x_MD, gate_up_EFD[experts_Mk])
  hidden_MkF = ops.activation.geglu(*jnp.split(gate_up_MkF, 2, axis=-1))
  y_MkD = jnp.einsum('mkf,mkdf->mkd', hidden_MkF, down_EDF[experts_Mk])
  return y_MkD.reshape(-1, D)


def check(experts_Mk, window, turn, num_experts=E):
  k = experts_Mk.shape[1]
  x_MD, gate_up_EFD, down_EDF = given(len(experts_Mk))
  groups = ops.routing.make_groups(
    experts_Mk.reshape(-1), num_experts, 8, window
  )
  weights = gate_up_EFD[:num_experts], down_EDF[:num_experts]
  weights = map(turned, weights) if turn else weights
  made_RD = experts_cpu.apply(x_MD, *weights, groups, k)
  wanted_RD = one_by_one(x_MD, gate_up_EFD, down_EDF, experts_Mk)
  is_here_R1 = experts_Mk.reshape(-1, 1) < num_experts
  wanted_RD = jnp.where(is_here_R1, wanted_RD, 0)
  np.testing.assert_allclose(made_RD, wanted_RD, atol=2e-4)


def every_way(test):
  """No window, less than a tile, all rows of some experts, all rows of all."""
  test = pytest.mark.parametrize('window', [0, 5, 16, 72])(test)
  return pytest.mark.parametrize('turn', [False, True])(test)


@every_way
def test_mixed_routing(window, turn):
  check(jax.random.randint(jax.random.key(3), (50, 2), 0, E), window, turn)


@every_way
def test_one_expert_gets_all(window, turn):
  check(jnp.full((33, 2), 4), window, turn)


@every_way
def test_rows_of_experts_that_are_elsewhere(window, turn):
  experts_Mk = jax.random.randint(jax.random.key(4), (50, 2), 0, E)
  check(experts_Mk, window, turn, num_experts=4)


def test_turned_stands_in_the_place_of_what_it_was():
  _, gate_up_EFD, _ = given(1)
  w = turned(gate_up_EFD)
  assert len(w) == E
  np.testing.assert_array_equal(w.astype(jnp.float32), gate_up_EFD)
  np.testing.assert_array_equal(w[2].astype(jnp.float32), gate_up_EFD[2])
  assert w.astype(jnp.bfloat16).dtype == jnp.bfloat16


def test_few_bits_are_left_to_others():
  _, gate_up_EFD, down_EDF = given(1)
  few = ops.weights.quantize(gate_up_EFD, 'int8', -1)
  assert experts_cpu.supports(turned(gate_up_EFD), down_EDF)
  assert not experts_cpu.supports(few, down_EDF)
