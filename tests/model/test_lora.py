"""Adapters: the same logits merged and apart, and nothing else learns."""

import dataclasses

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import config as configs
from diffusiongemma.generation import network as network_lib
from diffusiongemma.model import lora

EVERYTHING = configs.LoraConfig(
  rank=3,
  alpha=6.0,
  targets=(
    '*/attention/*',
    '*/shared_mlp/*',
    '*/experts/*',
    'self_conditioning/*',
  ),
)


@pytest.fixture(scope='module')
def adapters(params):
  """Of every matrix that can have one, with a B that is not zero."""
  fresh = lora.init_adapters(EVERYTHING, params, jax.random.key(0))
  flat = traverse_util.flatten_dict(fresh)
  for index, path in enumerate(flat):
    if path[-1] == 'b':
      key = jax.random.fold_in(jax.random.key(1), index)
      flat[path] = 0.1 * jax.random.normal(key, flat[path].shape)
  return traverse_util.unflatten_dict(flat)


@pytest.fixture(scope='module')
def logits(model_config):
  """A function of parameters: the logits of both roles."""
  rng = np.random.default_rng(0)
  text_BS, canvas_BL = rng.integers(3, 97, (2, 2, 9))
  sc_BLD = rng.normal(size=(2, 9, model_config.embed_dim)).astype(np.float32)

  @jax.jit
  def run(params):
    network = network_lib.bind(configs.Config(model=model_config), params)
    h_BSD, cache, _ = network.prefill(text_BS, jnp.array([9, 6]))
    h_BLD = network.denoise(canvas_BL, sc_BLD, cache)
    return network.logits(h_BSD), network.logits(h_BLD)

  return run


def test_merged_and_apart_are_the_same(params, adapters, logits):
  plain = logits(params)
  apart = logits(lora.attach(EVERYTHING, params, adapters))
  merged = logits(lora.merge(EVERYTHING, params, adapters))
  for a, b, c in zip(plain, apart, merged, strict=True):
    np.testing.assert_allclose(b, c, atol=5e-5)
    assert np.abs(a - b).max() > 1e-2, 'the adapters do something'


def test_an_adapter_is_a_product_times_alpha_over_rank(params):
  """Its A begins with rows that keep the size of what they are given."""
  fresh = lora.init_adapters(EVERYTHING, params, jax.random.key(0))
  assert EVERYTHING.alpha / EVERYTHING.rank == 2.0
  for owner, name in (('attention', 'q_proj'), ('experts', 'down')):
    w = params['layer_00'][owner][name]
    a, b = (fresh['layer_00'][owner][name][part] for part in 'ab')
    b = jax.random.normal(jax.random.key(1), b.shape)
    product = jnp.matmul(b, a) if owner == 'experts' else jnp.tensordot(a, b, 1)
    found = lora.low_rank(EVERYTHING, w, a, b).astype(w.dtype)
    np.testing.assert_allclose(found, w + 2.0 * product, atol=1e-5)
    fan_in = a.shape[-1] if owner == 'experts' else a.shape[0]
    assert 0.6 < float(jnp.sum(a**2)) * fan_in / a.size < 1.6


def test_every_adapter_matters(params, adapters, logits):
  """Alone, the adapter of each matrix changes the logits, merged and apart
  alike: a wrong axis of one is not hidden by the others."""
  flat = traverse_util.flatten_dict(adapters)
  paths = {path[:-1] for path in flat if path[0] in ('layer_00', 'layer_01')}
  paths |= {path[:-1] for path in flat if path[0] == 'self_conditioning'}
  assert len(paths) == 9 + 8 + 3  # A global layer has no v_proj.
  plain = logits(params)
  for path in sorted(paths):
    alone = traverse_util.unflatten_dict(
      {p: x if p[:-1] == path else 0 * x for p, x in flat.items()}
    )
    apart = logits(lora.attach(EVERYTHING, params, alone))
    merged = logits(lora.merge(EVERYTHING, params, alone))
    np.testing.assert_allclose(apart[1], merged[1], atol=5e-5, err_msg=path)
    assert np.abs(apart[1] - plain[1]).max() > 1e-4, path


def test_a_fresh_adapter_changes_nothing(params, logits):
  fresh = lora.init_adapters(EVERYTHING, params, jax.random.key(0))
  apart = logits(lora.attach(EVERYTHING, params, fresh))
  for a, b in zip(apart, logits(params), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_gradients_reach_a_and_b_of_every_adapter(params, adapters, logits):
  def score(adapters):
    attached = lora.attach(EVERYTHING, params, adapters)
    return sum(jnp.sum(jnp.square(x)) for x in logits(attached))

  gradient = jax.jit(jax.grad(score))(adapters)
  for path, leaf in traverse_util.flatten_dict(gradient).items():
    assert np.abs(leaf).max() > 0, path


def test_a_merged_matrix_keeps_its_type(params, adapters):
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  merged = lora.merge(EVERYTHING, half, adapters)
  assert {x.dtype.name for x in jax.tree.leaves(merged)} == {'bfloat16'}


@pytest.mark.parametrize(
  'target, message',
  [
    ('*/attention/qproj', r"'\*/attention/qproj' names no matrix.*q_proj"),
    ('*/router/*', 'names nothing that can be adapted.*experts/down'),
    ('embedding', 'names nothing that can be adapted'),
  ],
)
def test_targets_that_are_none(params, target, message):
  config = dataclasses.replace(EVERYTHING, targets=(target,))
  with pytest.raises(configs.ConfigError, match=message):
    lora.init_adapters(config, params, jax.random.key(0))
