"""One step: gradients in parts, what is frozen, what is left out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma.diffusion import loss
from diffusiongemma.generation import generate
from diffusiongemma.training import optimizer as optimizers
from diffusiongemma.training import step as steps
from diffusiongemma.training import train_state


def test_step_donates_its_state_and_draws_anew(config):
  state, step = train_state.init_train_state(config), step_of(config)
  batch = {
    'tokens_BS': np.full((2, 32), 9, np.int32),
    'length_B': np.full(2, 32, np.int32),
    'first_BS': np.zeros((2, 32), np.int32),
    'canvas_start_BK': np.array([[4, 12, 20]] * 2, np.int32),
    'target_mask_BS': np.ones((2, 32), bool),
  }
  old = state.params['embedding']
  state, first = step(state, batch)
  assert old.is_deleted()
  # The rate of the very first step is zero: only the noise can differ.
  state, second = step(state, batch)
  assert int(state.step) == 2
  assert first['loss_ar'] == second['loss_ar']
  assert first['loss_denoise'] != second['loss_denoise']


@pytest.fixture(scope='module')
def rows(config):
  """A batch of eight rows of random tokens, some shorter."""
  rng = np.random.default_rng(0)
  length_B = rng.integers(25, 33, 8).astype(np.int32)
  position = np.arange(32)
  tokens_BS = rng.integers(3, 2048, (8, 32)).astype(np.int32)
  start_BK = rng.integers(1, 9, (8, 1)) + 8 * np.arange(3)
  return {
    'tokens_BS': tokens_BS,
    'length_B': length_B,
    'first_BS': np.zeros((8, 32), np.int32),
    'canvas_start_BK': np.where(
      start_BK + 8 <= length_B[:, None], start_BK, -1
    ).astype(np.int32),
    'target_mask_BS': (position > 0) & (position < length_B[:, None]),
  }


def changed(config, **changes):
  """The config with other settings of training or of the optimiser."""
  for name, value in changes.items():
    group = 'train' if hasattr(config.train, name) else 'optimizer'
    part = dataclasses.replace(getattr(config, group), **{name: value})
    config = dataclasses.replace(config, **{group: part})
  return config


step_of = functools.cache(steps.make_train_step)


def take_steps(config, batch, count=1):
  """The state after `count` steps, and the numbers of each."""
  state, numbers = train_state.init_train_state(config), []
  for _ in range(count):
    state, of_step = step_of(config)(state, batch)
    numbers.append(of_step)
  return state, numbers


@functools.cache
def gradient_function(config):
  """(params, batch) -> gradients and metrics; the same noise every time."""

  @jax.jit
  def compute(params, batch):
    drawn = loss.draw_noise(
      jax.random.key(3),
      batch,
      config.diffusion.canvas_length,
      2048,
      0.5,
      config.train.canvases,
    )
    return steps.compute_gradients(config, params, batch, drawn)

  return compute


def gradients(config, batch):
  """Those of a fresh network, and metrics."""
  params = train_state.init_train_state(config).params
  return gradient_function(config)(params, batch)


def assert_close(one, other, rtol):
  """Relative to the largest gradient: some are zero up to rounding alone."""
  largest = max(np.abs(b).max() for b in jax.tree.leaves(other))
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * largest)


@pytest.mark.parametrize('canvases', ['one', 'all'])
def test_parts_of_a_batch_add_up_to_it(config, rows, canvases):
  """Though they have other numbers of targets and of canvases."""
  config = changed(config, canvases=canvases)
  whole, numbers = gradients(config, rows)
  parts, of_parts = gradients(changed(config, accumulate_steps=4), rows)
  assert_close(parts, whole, 2e-5)
  for name in ('loss', 'loss_ar', 'loss_denoise'):
    np.testing.assert_allclose(of_parts[name], numbers[name], rtol=1e-5)


@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_computing_layers_again_changes_nothing(config, rows, remat):
  plain, numbers = gradients(config, rows)
  again, of_again = gradients(changed(config, remat=remat), rows)
  assert_close(again, plain, 1e-5)
  np.testing.assert_allclose(of_again['loss'], numbers['loss'], rtol=1e-6)
  params = train_state.init_train_state(config).params
  traced = gradient_function(changed(config, remat=remat)).trace(params, rows)
  assert 'checkpoint' in str(traced.jaxpr) or 'remat' in str(traced.jaxpr)


def test_frozen_parameters_stay(config, rows):
  config = changed(
    config, freeze=('*/router/*', 'embedding'), peak_learning_rate=0.1
  )
  before = train_state.init_train_state(config).params
  state, _ = take_steps(config, rows, 3)
  for keys, leaf in jax.tree_util.tree_leaves_with_path(state.params):
    path = '/'.join(key.key for key in keys)
    old = before
    for key in keys:
      old = old[key.key]
    frozen = '/router/' in path or path == 'embedding'
    assert frozen == bool((leaf == old).all()), path
  sizes = [x.size for x in jax.tree.leaves(state.opt_state)]
  assert state.params['embedding'].size not in sizes, 'no state for it'
  gradient, _ = gradients(config, rows)
  assert not gradient['embedding'].any()
  with pytest.raises(configs.ConfigError, match="'layer_99/.' names no param"):
    take_steps(changed(config, freeze=('layer_99/*',)), rows)


def test_adafactor_learns(config, rows):
  adafactor = changed(config, kind='adafactor', peak_learning_rate=1e-2)
  _, numbers = take_steps(adafactor, rows, 40)
  assert numbers[-1]['loss_ar'] < numbers[0]['loss_ar'] - 0.5


def test_muon_makes_orthogonal_steps_of_matrices(config, rows):
  """All singular values of a step are about the same, those of experts one by
  one; embedding, router and vectors move as with Adam."""
  muon = changed(config, kind='muon', warmup_steps=0)
  before = train_state.init_train_state(muon).params
  state, _ = take_steps(muon, rows)
  moved = jax.tree.map(lambda a, b: np.asarray(a - b), state.params, before)
  D = config.model.embed_dim
  layer = moved['layer_00']
  for matrix in (
    layer['attention']['q_proj'].reshape(D, -1),
    layer['attention']['o_proj'].reshape(-1, D),
    layer['shared_mlp']['up'],
    layer['experts']['down'][0],
  ):
    values = np.linalg.svd(matrix, compute_uv=False)
    assert values.min() > 0.5 * values.max() > 0
  embedding = np.linalg.svd(moved['embedding'], compute_uv=False)
  assert embedding.min() < 0.5 * embedding.max()
  _, numbers = take_steps(muon, rows, 40)
  assert numbers[-1]['loss'] < 0.8 * numbers[0]['loss']


def test_muon_is_not_for_adapters(config):
  config = fields.override(config, 'optimizer.kind', 'muon')
  configs.validate(config)
  with pytest.raises(configs.ConfigError, match='whole matrices'):
    configs.validate(fields.override(config, 'lora.rank', '2'))


def test_the_running_mean_is_what_is_sampled_from(config, rows):
  config = changed(config, ema_decay=0.9, peak_learning_rate=0.1)
  state, step = train_state.init_train_state(config), step_of(config)
  mean = jax.tree.map(np.asarray, state.params)
  for _ in range(3):
    state, _ = step(state, rows)
    mean = jax.tree.map(lambda m, p: 0.9 * m + 0.1 * p, mean, state.params)
  assert_close(state.ema, mean, 1e-6)
  params, rest = train_state.to_items(state)
  assert params is state.ema
  again = train_state.from_items(3, params, rest)
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), again, state))


def poisoned(rows, state):
  """A state whose parameters make every loss NaN."""
  params = dict(state.params, embedding=state.params['embedding'] * np.nan)
  return state.replace(params=params)


def test_a_bad_step_changes_nothing_but_the_counts(config, rows):
  state, step = train_state.init_train_state(config), step_of(config)
  for _ in range(2):
    state, _ = step(state, rows)
  state = poisoned(rows, state)
  before = jax.tree.map(np.asarray, state)
  state, numbers = step(state, rows)
  assert np.isnan(numbers['loss']) and numbers['bad_in_row'] == 1
  expected = before.replace(
    step=before.step + 1,
    health=before.health.replace(bad_in_row=1, bad=1),
  )
  for a, b in zip(
    jax.tree.leaves(state), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_a_spike_is_left_out_when_asked_for(config, rows):
  """The scale of one step's gradient is that of its AR loss's weight."""
  for factor, bad in ((0.0, 0), (10.0, 1)):
    calm = changed(config, spike_factor=factor, peak_learning_rate=1e-5)
    state, _ = take_steps(calm, rows, 3)
    wild = changed(calm, ar_loss_weight=1e4)
    before = jax.tree.map(np.asarray, state.params)
    state, numbers = step_of(wild)(state, rows)
    assert numbers['bad_steps'] == bad
    same = jax.tree.map(lambda a, b: (a == b).all(), state.params, before)
    assert jax.tree.all(same) == bool(bad)
    state, numbers = step_of(calm)(state, rows)
    assert numbers['bad_in_row'] == 0 and numbers['bad_steps'] == bad


def test_overfits_one_batch_and_samples_it_back(model_config):
  """Both halves of the network: what is learnt is what is written."""
  C, length = 8, 20
  text = np.random.default_rng(0).integers(3, 97, length)
  row = np.concatenate([[2], text]).astype(np.int32)
  batch = {
    'tokens_BS': np.stack([row] * 8),
    'length_B': np.full(8, len(row), np.int32),
    'first_BS': np.zeros((8, len(row)), np.int32),
    'canvas_start_BK': np.array([[5, 13]] * 8, np.int32),
    'target_mask_BS': np.ones((8, len(row)), bool),
  }
  config = configs.Config(
    model=model_config,
    diffusion=configs.DiffusionConfig(canvas_length=C, stop_token_ids=(1,)),
    data=configs.DataConfig(sequence_length=32, batch_size=8),
    optimizer=configs.OptimizerConfig(
      peak_learning_rate=1e-2, warmup_steps=10, weight_decay=0.0
    ),
    train=configs.TrainConfig(steps=250),
  )
  state, step = train_state.init_train_state(config), step_of(config)
  for _ in range(250):
    state, numbers = step(state, batch)
  assert numbers['loss_ar'] < 0.02 and numbers['loss_denoise'] < 0.05
  (written,), *_ = generate.generate_tokens(
    config, state.params, [row[:5]], jax.random.key(0), 2 * C
  )
  assert written.tokens == row[5 : 5 + 2 * C].tolist()
  assert written.steps < 30, 'a sure network stops early'


def test_a_norm_grows_over_many_leaves_in_bfloat16():
  """That which is told and that by which gradients are clipped: a sum of
  squares in bfloat16 stops at 256 times the smallest."""
  params = {f'leaf_{i}': jnp.ones(1, jnp.bfloat16) for i in range(300)}
  config = configs.Config(optimizer=configs.OptimizerConfig(b1=0.5))
  optimizer = optimizers.make_optimizer(config)
  state = train_state.TrainState(
    params,
    optimizer.init(params),
    train_state.Health(*(jnp.zeros(()) for _ in range(3))),
    jnp.zeros((), jnp.int32),
  )
  step = jax.jit(train_state.apply_gradients, static_argnums=(0, 1))
  state, norm = step(config, optimizer, state, params, jnp.zeros(()))
  np.testing.assert_allclose(norm, 300**0.5, rtol=1e-6)
  (mean, *_) = (x for x in jax.tree.leaves(state.opt_state) if x.shape == (1,))
  np.testing.assert_allclose(mean, 0.5 * 300**-0.5, rtol=1e-6)
  kept = {leaf.dtype for leaf in jax.tree.leaves(state.params)}
  assert kept == {jnp.dtype('bfloat16')}


def test_a_running_mean_of_bfloat16_parameters_is_exact():
  """What is added at each step is not rounded to their type."""
  params = {'w': jnp.full(3, 1 + 2**-7, jnp.bfloat16)}
  config = changed(configs.Config(), ema_decay=0.99)
  still = optax.set_to_zero()
  state = train_state.TrainState(
    params,
    still.init(params),
    train_state.Health(*(jnp.zeros(()) for _ in range(3))),
    jnp.zeros((), jnp.int32),
    {'w': jnp.zeros(3)},
  )
  step = jax.jit(train_state.apply_gradients, static_argnums=(0, 1))
  for _ in range(100):
    state, _ = step(config, still, state, params, jnp.zeros(()))
  wanted = (1 + 2**-7) * (1 - 0.99**100)
  np.testing.assert_allclose(state.ema['w'], wanted, rtol=1e-5)


def test_gradients_of_bfloat16_parameters_add_up_in_float32(config, rows):
  """Those of the parts of a batch: a sum in bfloat16 loses the later ones."""
  half = fields.override(config, 'model.param_dtype', 'bfloat16')
  whole, _ = gradients(half, rows)
  parts, _ = gradients(changed(half, accumulate_steps=8), rows)
  for leaf in jax.tree.leaves(parts):
    assert leaf.dtype == jnp.float32
  assert_close(parts, optimizers.to_float32(whole), 0.02)
