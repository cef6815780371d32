"""Each strategy against the sentence that defines it."""

import dataclasses

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.config import DiffusionConfig
from diffusiongemma.diffusion import sampler
from diffusiongemma.diffusion import strategies
from diffusiongemma.diffusion.sampling import Sampling
from diffusiongemma.diffusion.sampling import Time

CONFIG = DiffusionConfig(canvas_length=8, max_denoising_steps=4)


def predicted(confidence=None, entropy=None, sample=None):
  """A prediction of one row with some of its parts."""
  given = next(x for x in (confidence, entropy, sample) if x is not None)
  zeros = jnp.zeros(given.shape)
  return sampler.Prediction(
    sample_BL=zeros.astype(int) if sample is None else sample,
    argmax_BL=zeros.astype(int),
    entropy_BL=zeros if entropy is None else entropy,
    confidence_BL=zeros if confidence is None else confidence,
    sc_BLD=zeros[..., None],
  )


def at(step, steps=CONFIG.max_denoising_steps):
  """One row at this step."""
  return Time(jnp.array([[step]]), jnp.array([[steps]]))


def drawn(length, vocab_size=7):
  keys_B = jax.random.split(jax.random.key(0), 1)
  config = dataclasses.replace(CONFIG, canvas_length=length)
  return sampler.draw_step_noise(keys_B, jnp.ones(1, int), config, vocab_size)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  # Few lengths: each is compiled.
  st.sampled_from([1, 2, 12]).flatmap(
    lambda n: st.lists(st.floats(0, 3, width=32), min_size=n, max_size=n)
  ),
  st.floats(0, 4, width=32),
)
def test_entropy_bound_against_its_definition(entropies, bound):
  prediction = predicted(entropy=jnp.array([entropies]))
  config = dataclasses.replace(CONFIG, entropy_bound=float(bound))
  _, accepted_BL, _ = strategies.entropy_bound(
    config, None, prediction, at(1), drawn(len(entropies))
  )
  accepted = accepted_BL[0]
  order = np.argsort(np.float32(entropies), kind='stable')
  before, expected = np.float32(0), []
  for position in order:
    total = before + np.float32(entropies[position])
    if total - np.float32(entropies[position]) <= np.float32(bound):
      expected.append(position)
    before = total
  # The sums are rounded in another order: leave out what hangs on the last bit.
  sums = np.cumsum(np.sort(np.float64(entropies))) - np.sort(entropies)
  hypothesis.assume(np.abs(sums - bound).min() > 1e-5)
  assert np.nonzero(np.asarray(accepted))[0].tolist() == sorted(expected)
  assert accepted.any()


def test_confidence_accepts_from_its_threshold_on():
  prediction = predicted(confidence=jnp.array([[0.2, 0.9, 0.95, 0.89]]))
  arguments = (jnp.zeros((1, 4), int), prediction, 1, drawn(4))
  _, accepted, _ = strategies.confidence(CONFIG, *arguments)
  assert accepted.tolist() == [[False, True, True, False]]
  strict = dataclasses.replace(CONFIG, accept_confidence=0.99)
  _, accepted, _ = strategies.confidence(strict, *arguments)
  assert accepted.tolist() == [[False, False, True, False]]


def test_top_k_accepts_more_with_every_step():
  values = jnp.array([[0.1, 0.8, 0.3, 0.7, 0.2, 0.6, 0.5, 0.4]])
  order = np.argsort(-np.asarray(values[0]))
  for step, k in ((4, 2), (3, 4), (2, 6), (1, 8)):
    _, accepted, _ = strategies.top_k_confident(
      CONFIG, jnp.zeros((1, 8), int), predicted(values), at(step), drawn(8)
    )
    assert set(np.nonzero(np.asarray(accepted[0]))[0]) == set(order[:k])


@pytest.mark.parametrize('L, N', [(21, 7), (256, 56), (128, 28), (8, 5)])
def test_top_k_accepts_an_equal_number_more_in_a_program(L, N):
  """Rounded up, where XLA would multiply by a rounded 1 / N."""
  config = dataclasses.replace(CONFIG, max_denoising_steps=N)
  confidence_BL = jax.random.uniform(jax.random.key(0), (1, L))

  @jax.jit
  def count(step):
    _, accepted_BL, _ = strategies.top_k_confident(
      config,
      jnp.zeros((1, L), int),
      predicted(confidence_BL),
      at(step, N),
      drawn(L),
    )
    return jnp.sum(accepted_BL)

  found = [int(count(step)) for step in range(N, 0, -1)]
  assert found == [-(-L * i // N) for i in range(1, N + 1)]


def test_ancestral_step_is_the_posterior():
  """Chi-square of next tokens against the formula, x_t equal and unequal to
  x_0, at the first, a middle and the last step."""
  V, count, N = 5, 60_000, CONFIG.max_denoising_steps
  config = dataclasses.replace(CONFIG, canvas_length=count)
  for step in (N, 2, 1):
    for x_t, x_0 in ((3, 3), (3, 1)):
      keys_B = jax.random.split(jax.random.key(step), 1)
      noise = sampler.draw_step_noise(keys_B, jnp.array([step]), config, V)
      canvas = jnp.full((1, count), x_t)
      prediction = predicted(sample=jnp.full((1, count), x_0))
      next_BL, accepted_BL, draft_BL = strategies.ancestral(
        config, canvas, prediction, at(step), noise
      )
      np.testing.assert_array_equal(accepted_BL, next_BL == x_0)
      np.testing.assert_array_equal(draft_BL, next_BL)
      t, s = step / N, (step - 1) / N
      kept = (1 - t) / (1 - s)
      is_t, is_0 = np.arange(V) == x_t, np.arange(V) == x_0
      posterior = (kept * is_t + (1 - kept) / V) * ((1 - s) * is_0 + s / V)
      posterior /= posterior.sum()
      counts = np.bincount(np.asarray(next_BL[0]), minlength=V)
      assert counts[posterior == 0].sum() == 0
      expected = posterior[posterior > 0] * count
      statistic = ((counts[posterior > 0] - expected) ** 2 / expected).sum()
      assert statistic < 18.5  # the 0.999 quantile for 4 degrees of freedom


def test_ancestral_sampling_of_the_exact_posterior_gives_the_data():
  """With p(x_0 | x_t) exact, the draft is distributed as the data in the end,
  and not before, however sure a row is."""
  V, N, rows = 4, 8, 20_000
  config = dataclasses.replace(
    CONFIG,
    canvas_length=1,
    max_denoising_steps=N,
    strategy='ancestral',
    confidence_threshold=1e9,
    stability_threshold=0,
  )
  p_data = jnp.array([0.5, 0.3, 0.15, 0.05])

  def exact(tokens_BL, sc_BLD, temperature, uniforms_BLU, left_B1):
    alpha = 1 - left_B1[:, :, None] / N
    likelihood = alpha * jax.nn.one_hot(tokens_BL, V) + (1 - alpha) / V
    logits_BLV = jnp.log(p_data * likelihood)
    return sampler.predict(
      logits_BLV, temperature, uniforms_BLU, lambda p: sc_BLD
    )

  state, _ = sampler.sample_canvas(
    exact,
    jax.random.key(1),
    config,
    batch_size=rows,
    vocab_size=V,
    embed_dim=1,
    sampling=Sampling(temperature=1.0),
  )
  counts = np.bincount(np.asarray(state.draft_BL[:, 0]), minlength=V)
  expected = np.asarray(p_data) * rows
  assert ((counts - expected) ** 2 / expected).sum() < 16.3  # 3 degrees, 0.999
