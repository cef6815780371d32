"""Cross entropy in chunks, and gradients that are made with it."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.diffusion import chunks
from diffusiongemma.diffusion import cross_entropy
from diffusiongemma.model import denoiser
from diffusiongemma.tools import plan

B, S = 2, 30


def logits_of(model_config, params):
  model = denoiser.Denoiser(model_config)
  return lambda h: model.apply({'params': params}, h, method='logits')


@pytest.mark.parametrize('scale', [9, 200])
def test_negative_log_likelihood_and_its_gradient_are_those_of_log_softmax(
  scale,
):
  """Where one probability is all but 1 too."""
  keys = jax.random.split(jax.random.key(0), 3)
  logits_BLV = scale * jax.random.normal(keys[0], (2, 5, 11))
  targets_BL = jax.random.randint(keys[1], (2, 5), 0, 11)
  weights_BL = jax.random.normal(keys[2], (2, 5))

  def plain(logits_BLV, targets_BL):
    p_BLV = jax.nn.log_softmax(logits_BLV)
    return -jnp.take_along_axis(p_BLV, targets_BL[..., None], -1)[..., 0]

  ours, wanted = (
    jax.value_and_grad(lambda x, f=f: jnp.sum(weights_BL * f(x, targets_BL)))(
      logits_BLV
    )
    for f in (cross_entropy.negative_log_likelihood, plain)
  )
  np.testing.assert_allclose(ours[0], wanted[0], rtol=1e-6)
  np.testing.assert_allclose(ours[1], wanted[1], atol=1e-6)


@pytest.fixture(scope='module')
def positions(model_config):
  """(hidden states, targets, weights, evidence) of a few positions, of which
  all count in one row, and half in the other."""
  keys = jax.random.split(jax.random.key(0), 5)
  h_BLD = jax.random.normal(keys[0], (B, S, model_config.embed_dim))
  targets_BL, z_BL = jax.random.randint(
    keys[1], (2, B, S), 0, model_config.vocab_size
  )
  weights_BL = jax.random.normal(keys[2], (B, S))
  weights_BL *= jax.random.bernoulli(keys[3], jnp.array([[0.5], [1.0]]), (B, S))
  t_BL = jax.random.uniform(keys[4], (B, S), minval=0.1, maxval=0.9)
  return h_BLD, targets_BL, weights_BL, (z_BL, t_BL)


def weighted(model_config, params, positions, has_evidence):
  """What `cross_entropy.weighted` gives, and its gradients by the parameters
  and the hidden states; compiled anew."""
  h_BLD, targets_BL, weights_BL, evidence = positions

  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def thrice(params, h_BLD):
    total, right_BL = cross_entropy.weighted(
      logits_of(model_config, params),
      *(h_BLD, targets_BL, weights_BL, evidence if has_evidence else None),
    )
    return 3 * total, right_BL

  return jax.jit(thrice)(params, h_BLD)


@pytest.mark.parametrize(
  'chunk_rows, has_evidence', [(2, False), (16, True), (1000, True)]
)
def test_weighted_cross_entropy_is_the_sum_of_cross_entropies(
  model_config, params, positions, monkeypatch, chunk_rows, has_evidence
):
  """And so are its gradients, which it makes at once."""
  h_BLD, targets_BL, weights_BL, evidence = positions

  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def plain(params, h_BLD):
    logits_BLV = logits_of(model_config, params)(h_BLD)
    if has_evidence:
      logits_BLV = cross_entropy.add_evidence(logits_BLV, *evidence)
    log_p_BLV = jax.nn.log_softmax(logits_BLV)
    log_p_BL = jnp.take_along_axis(log_p_BLV, targets_BL[..., None], -1)[..., 0]
    return -3 * jnp.sum(weights_BL * log_p_BL), jnp.argmax(logits_BLV, -1)

  (wanted, argmax_BL), gradients = jax.jit(plain)(params, h_BLD)
  monkeypatch.setattr(
    chunks, 'CHUNK_LOGITS', chunk_rows * model_config.vocab_size
  )
  (got, right_BL), found = weighted(
    model_config, params, positions, has_evidence
  )
  np.testing.assert_allclose(got, wanted, rtol=1e-5)
  counts_BL = weights_BL != 0
  np.testing.assert_array_equal(
    right_BL[counts_BL], (argmax_BL == targets_BL)[counts_BL]
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    *(found, gradients),
  )
  assert np.abs(found[0]['embedding']).max() > 0.1


@pytest.mark.parametrize('chunk_rows', [4, 8, 1000])
def test_values_in_chunks_are_those_of_all_at_once(
  model_config, params, positions, monkeypatch, chunk_rows
):
  """Without gradients, position by position and as a weighted sum."""
  h_BLD, targets_BL, weights_BL, evidence = positions
  logits_fn = logits_of(model_config, params)

  def run():
    return jax.jit(
      lambda: (
        cross_entropy.per_position(logits_fn, h_BLD, targets_BL, evidence),
        cross_entropy.weighted(logits_fn, *positions),
      )
    )()

  (wanted_BL, hits_BL), _ = run()
  V = model_config.vocab_size
  monkeypatch.setattr(chunks, 'CHUNK_LOGITS', chunk_rows * V)
  each, (total, right_BL) = run()
  np.testing.assert_allclose(each[0], wanted_BL, rtol=1e-5)
  np.testing.assert_array_equal(each[1], hits_BL)
  wanted = jnp.sum(weights_BL * wanted_BL)
  np.testing.assert_allclose(total, wanted, rtol=1e-4)
  np.testing.assert_array_equal(right_BL, hits_BL * (weights_BL != 0))


@pytest.mark.parametrize('has_evidence', [False, True])
@pytest.mark.parametrize('chunk_positions', [4, S])
def test_what_has_no_weight_may_be_anything(
  model_config, params, positions, monkeypatch, chunk_positions, has_evidence
):
  """In chunks of nothing else, which are left out, and in others."""
  h_BLD, targets_BL, _, evidence = positions
  V = model_config.vocab_size
  monkeypatch.setattr(chunks, 'CHUNK_LOGITS', chunk_positions * B * V)
  # 4 of one row count and 2 of the other, in other places.
  order_BL = jax.random.permutation(
    jax.random.key(1), jnp.tile(jnp.arange(S), (B, 1)), axis=1, independent=True
  )
  weights_BL = (order_BL < jnp.array([[4], [2]])).astype(jnp.float32)
  damaged_BLD = jnp.where(weights_BL[..., None] == 0, jnp.nan, h_BLD)
  wanted, found = (
    weighted(
      *(model_config, params, (x, targets_BL, weights_BL, evidence)),
      has_evidence,
    )
    for x in (h_BLD, damaged_BLD)
  )
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_logits_are_computed_once(model_config, params, positions, monkeypatch):
  """Three products with the table: logits, and the gradients of its factors."""
  h_BLD, targets_BL, weights_BL, _ = positions
  V, D = params['embedding'].shape
  monkeypatch.setattr(chunks, 'CHUNK_LOGITS', 5 * B * V)

  def total(params, h_BLD):
    logits_fn = logits_of(model_config, params)
    return cross_entropy.weighted(logits_fn, h_BLD, targets_BL, weights_BL)[0]

  gradient = jax.make_jaxpr(jax.grad(total, (0, 1)))(params, h_BLD)
  assert plan.count_flops(gradient) == 3 * 2.0 * B * S * V * D


def test_a_chunk_that_nothing_counts_in_is_not_computed(
  model_config, params, positions, monkeypatch
):
  h_BLD, targets_BL, weights_BL, _ = positions
  computed = []
  logits_fn = logits_of(model_config, params)

  def counting(h_BLD):
    jax.debug.callback(lambda: computed.append(1))
    return logits_fn(h_BLD)

  V = model_config.vocab_size
  monkeypatch.setattr(chunks, 'CHUNK_LOGITS', 5 * B * V)
  weights_BL = weights_BL.at[:, 7:].set(0.0)
  jax.jit(
    lambda h_BLD: cross_entropy.weighted(
      counting, h_BLD, targets_BL, weights_BL
    )[0]
  )(h_BLD)
  jax.effects_barrier()
  assert len(computed) == 2  # Of six.


def test_gradients_have_the_types_of_what_they_are_for(
  model_config, params, positions, monkeypatch
):
  h_BLD, *rest = positions
  V = model_config.vocab_size
  monkeypatch.setattr(chunks, 'CHUNK_LOGITS', 5 * B * V)
  exact = weighted(model_config, params, positions, False)[1]
  found = weighted(
    model_config, params, (h_BLD.astype(jnp.bfloat16), *rest), False
  )[1]
  assert found[0]['embedding'].dtype == jnp.float32
  assert found[1].dtype == jnp.bfloat16
  for a, b in (
    (found[0]['embedding'], exact[0]['embedding']),
    (found[1], exact[1]),
  ):
    np.testing.assert_allclose(
      a.astype(jnp.float32), b, atol=0.02 * np.abs(b).max()
    )


def test_parameters_are_not_kept_alive(model_config, params, positions):
  """A table of its own would stay on the device for each call."""
  h_BLD, targets_BL, weights_BL, _ = positions

  def total(params):
    logits_fn = logits_of(model_config, params)
    kept.append(weakref.ref(logits_fn))
    return cross_entropy.weighted(logits_fn, h_BLD, targets_BL, weights_BL)[0]

  kept = []
  jax.grad(total)(params)
  gc.collect()
  assert [function() for function in kept] == [None]


def test_frozen_parameters_take_no_part_in_the_gradient(
  model_config, params, positions, monkeypatch
):
  """No product is made for the table where nobody asks for its gradient."""
  h_BLD, targets_BL, weights_BL, _ = positions
  V, D = params['embedding'].shape
  rows = B * S // 3
  monkeypatch.setattr(chunks, 'CHUNK_LOGITS', rows * V)

  def flops(is_frozen):
    def total(params, h_BLD):
      if is_frozen:
        params = jax.lax.stop_gradient(params)
      logits_fn = logits_of(model_config, params)
      return cross_entropy.weighted(logits_fn, h_BLD, targets_BL, weights_BL)[0]

    gradient = jax.jit(jax.grad(total, (0, 1)))
    compiled = gradient.lower(params, h_BLD).compile()
    return compiled.cost_analysis()['flops']

  product = 2 * rows * V * D  # Of one chunk: a loop is counted once.
  assert flops(False) - flops(True) > 0.9 * product
