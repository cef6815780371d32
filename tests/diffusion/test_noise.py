"""Statistics of the forward process."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.diffusion import noise

V = 50


def test_share_of_corrupted_positions_is_t():
  t_B1 = jnp.linspace(0, 1, 11)[:, None]
  tokens_BL = jnp.zeros((11, 4000), jnp.int32)
  _, corrupted_BL = noise.corrupt(jax.random.key(0), tokens_BL, t_B1, V)
  # Four standard deviations of a binomial share over 4000 draws.
  bound = 4 * np.sqrt(0.25 / 4000)
  np.testing.assert_allclose(corrupted_BL.mean(1), t_B1[:, 0], atol=bound)
  assert not corrupted_BL[0].any() and corrupted_BL[-1].all()


def test_kept_positions_keep_their_token():
  tokens_BL = jax.random.randint(jax.random.key(1), (3, 500), 0, V)
  noisy_BL, corrupted_BL = noise.corrupt(
    jax.random.key(0), tokens_BL, jnp.array([[0.2], [0.5], [0.8]]), V
  )
  assert (noisy_BL == tokens_BL)[~corrupted_BL].all()


def test_noise_is_uniform_and_may_hit_itself():
  """Chi-square over V cells; the 0.999 quantile for 49 degrees is 85.4."""
  tokens_BL = jnp.full((1, 50_000), 7)
  noisy_BL, _ = noise.corrupt(jax.random.key(2), tokens_BL, jnp.ones((1, 1)), V)
  counts = np.bincount(noisy_BL[0], minlength=V)
  expected = 50_000 / V
  assert ((counts - expected) ** 2 / expected).sum() < 85.4


def test_rows_and_keys_draw_apart():
  tokens_BL = jnp.zeros((2, 64), jnp.int32)
  draw = lambda key: noise.corrupt(key, tokens_BL, jnp.full((2, 1), 0.9), V)[0]
  one, other = draw(jax.random.key(0)), draw(jax.random.key(1))
  assert (one[0] != one[1]).any() and (one != other).any()
