"""Schedules, and the steps of each rule."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusiongemma import config as configs
from diffusiongemma.training import optimizer as optimizers


def test_adafactor_keeps_no_second_moments_of_large_matrices():
  rule = configs.OptimizerConfig(kind='adafactor')
  optimizer = optimizers.make_optimizer(configs.Config(optimizer=rule))
  params = {'large': jnp.zeros((128, 256)), 'small': jnp.zeros((100, 4))}
  state = jax.eval_shape(optimizer.init, params)
  elements = sum(x.size for x in jax.tree.leaves(state))
  assert 400 + 128 + 256 <= elements < 400 + 128 + 256 + 10


def test_schedules():
  config = configs.OptimizerConfig(
    peak_learning_rate=1.0, warmup_steps=10, final_rate_fraction=0.1
  )
  cosine = optimizers.make_schedule(config, 110)
  assert cosine(0) == 0 and cosine(5) == 0.5 and cosine(10) == 1
  np.testing.assert_allclose(cosine(60), 0.55, rtol=1e-5)
  np.testing.assert_allclose(cosine(110), 0.1, rtol=1e-5)
  constant = optimizers.make_schedule(
    dataclasses.replace(config, schedule='constant'), 110
  )
  assert constant(5) == 0.5 and constant(10) == constant(500) == 1


def steps_of(kind, params, gradients, number=1, **changes):
  """What the last of some updates with the same gradients adds to the
  parameters."""
  given = {'kind': kind, 'warmup_steps': 0, 'schedule': 'constant', **changes}
  rule = configs.OptimizerConfig(**given)
  optimizer = optimizers.make_optimizer(configs.Config(optimizer=rule))
  update, state = jax.jit(optimizer.update), optimizer.init(params)
  for _ in range(number):
    updates, state = update(gradients, state, params)
  return updates


KINDS = pytest.mark.parametrize('kind', ['adam', 'adafactor', 'muon'])


@KINDS
def test_only_matrices_decay(kind):
  """By the rate times `weight_decay`; the embedding too."""
  params = {
    name: jnp.ones(shape)
    for name, shape in (('w', (2, 2)), ('embedding', (3, 2)), ('scale', (2,)))
  }
  zero = jax.tree.map(jnp.zeros_like, params)
  updates = steps_of(
    kind, params, zero, peak_learning_rate=0.5, weight_decay=0.1
  )
  for name in ('w', 'embedding'):
    np.testing.assert_allclose(updates[name], -0.05, rtol=1e-6)
  np.testing.assert_array_equal(updates['scale'], 0.0)


@KINDS
@pytest.mark.parametrize('size', [1e-3, 1e-6])
def test_steps_are_as_long_as_the_rate_whatever_the_gradient(kind, size):
  """Of an embedding, where Muon is Adam, with as many rows as Adafactor wants
  to keep no second moments; an epsilon is one of a gradient. Muon's momentum
  looks ahead, which is more at first."""
  params = {'embedding': jnp.ones((128, 128))}
  gradients = {'embedding': jnp.full((128, 128), size)}
  updates = steps_of(
    kind, params, gradients, 60, peak_learning_rate=0.5, weight_decay=0.0
  )
  np.testing.assert_allclose(updates['embedding'], -0.5, rtol=0.03)


def test_adam_is_that_of_its_numbers():
  """Two steps by the formula: its two rates of forgetting, its epsilon."""
  given = {'b1': 0.7, 'b2': 0.9, 'epsilon': 0.01, 'schedule': 'constant'}
  adam = configs.OptimizerConfig(
    **given, peak_learning_rate=1.0, warmup_steps=0, weight_decay=0.0
  )
  optimizer = optimizers.make_optimizer(configs.Config(optimizer=adam))
  params = {'w': jnp.zeros(1)}
  state = optimizer.init(params)
  for gradient in (0.5, -0.2):
    updates, state = optimizer.update(
      {'w': jnp.array([gradient])}, state, params
    )
  mean = (0.7 * 0.3 * 0.5 - 0.3 * 0.2) / (1 - 0.7**2)
  square = (0.9 * 0.1 * 0.5**2 + 0.1 * 0.2**2) / (1 - 0.9**2)
  wanted = -mean / (square**0.5 + 0.01)
  np.testing.assert_allclose(updates['w'], wanted, rtol=1e-5)


def test_gradients_are_clipped_all_together():
  """To a norm of 1: the second of two steps remembers how long the first was,
  as Adam does not."""
  params = {'a': jnp.zeros(1), 'b': jnp.zeros(1)}
  rule = configs.OptimizerConfig(
    b1=0.5, b2=0.5, warmup_steps=0, schedule='constant', weight_decay=0.0
  )
  optimizer = optimizers.make_optimizer(configs.Config(optimizer=rule))

  def second_step(long):
    state = optimizer.init(params)
    for a, b in (long, (0.1, 0.2)):
      gradients = {'a': jnp.array([a]), 'b': jnp.array([b])}
      updates, state = optimizer.update(gradients, state, params)
    return [float(x[0]) for x in jax.tree.leaves(updates)]

  clipped = second_step((0.6, 0.8))
  np.testing.assert_allclose(second_step((60.0, 80.0)), clipped, rtol=1e-5)
  assert abs(second_step((0.3, 0.4))[0] / clipped[0] - 1) > 0.05


HALF = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.bfloat16))


@KINDS
def test_steps_of_bfloat16_parameters_are_those_of_float32(kind):
  """Also long after the gradients became a hundred times smaller, which a
  second moment in bfloat16 never notices: it is changed by less than a half of
  its last bit."""
  rng = np.random.default_rng(0)
  params = HALF({'w': rng.normal(size=(4, 6)), 'scale': rng.normal(size=3)})
  rule = configs.OptimizerConfig(
    kind=kind, b2=0.999, warmup_steps=0, schedule='constant', clip_norm=1e9
  )
  optimizer = optimizers.make_optimizer(configs.Config(optimizer=rule))
  update = jax.jit(optimizer.update)

  gradients = HALF(jax.tree.map(lambda x: 1 + x, params))
  small = HALF(jax.tree.map(lambda x: 0.01 * (1 + x), params))

  def run(params):
    state = optimizer.init(params)
    as_parameters = lambda tree: optax.tree.cast_like(tree, params)
    for these, count in ((gradients, 100), (small, 300)):
      for _ in range(count):
        updates, state = update(as_parameters(these), state, params)
    return updates, state

  got, wanted = run(params), run(optimizers.to_float32(params))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert a.dtype == b.dtype != jnp.bfloat16
    np.testing.assert_allclose(a, b, rtol=1e-6)
