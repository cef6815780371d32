"""The pass over the vocabulary against whole logits, and draws from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import ops
from diffusiongemma.diffusion import noise
from diffusiongemma.diffusion import sampler

R, D = 24, 16


def plain(h_RD, table_VD, temperature, uniforms_RU, softcap):
  """The same from whole logits."""
  logits_RV = h_RD @ table_VD.T
  if softcap:
    logits_RV = softcap * jnp.tanh(logits_RV / softcap)
  return sampler.predict(
    logits_RV[None], temperature, uniforms_RU[None], lambda p: p @ table_VD
  )


def draws(key, count, V):
  """Uniforms of so many draws from V tokens."""
  U = ops.vocabulary.num_halvings(V)
  return noise.uniform_from_nearer_end(key, (count, U))


def given(V, scale=1.0):
  keys = jax.random.split(jax.random.key(V), 3)
  return (
    jax.random.normal(keys[0], (R, D), jnp.float32) * scale,
    jax.random.normal(keys[1], (V, D), jnp.float32),
    jnp.float32(0.7),
    draws(keys[2], R, V),
  )


def compare(found, expected):
  for name in ('sample', 'argmax'):
    np.testing.assert_array_equal(
      getattr(found, f'{name}_R'), getattr(expected, f'{name}_BL')[0]
    )
  for ours, theirs in (
    (found.entropy_R, expected.entropy_BL),
    (found.confidence_R, expected.confidence_BL),
    (found.mean_RD, expected.sc_BLD),
  ):
    np.testing.assert_allclose(ours, theirs[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('V', [11, 32, 97, 1000])
@pytest.mark.parametrize('chunk', [32, 96, None])
def test_chunks_give_what_whole_logits_give(V, chunk):
  """Vocabularies below a bin, of whole bins, and with a last part of one."""
  arguments = given(V)
  found = ops.vocabulary.summarize(*arguments, softcap=5.0, chunk=chunk)
  compare(found, plain(*arguments, 5.0))


@pytest.mark.parametrize('scale', [1e-3, 8.0])
def test_flat_and_sharp_distributions(scale):
  """Without a softcap the largest logit is near 150: exp overflows."""
  arguments = given(1000, scale)
  found = ops.vocabulary.summarize(*arguments, softcap=0.0, chunk=64)
  compare(found, plain(*arguments, 0.0))


def test_of_equal_tokens_the_first_is_the_argmax():
  h_RD, table_VD, temperature, uniforms_RU = given(96)
  once = ops.vocabulary.summarize(*given(96), chunk=32)
  twice_VD = jnp.concatenate([table_VD, table_VD])
  uniforms_RU = jnp.pad(uniforms_RU, ((0, 0), (0, 1)))
  found = ops.vocabulary.summarize(
    h_RD, twice_VD, temperature, uniforms_RU, chunk=32
  )
  np.testing.assert_array_equal(found.argmax_R, once.argmax_R)


def test_a_quantised_table_is_what_it_stands_for():
  h_RD, table_VD, *rest = given(97)
  few_VD = ops.weights.quantize(table_VD, 'int8', -1)
  summarize = functools.partial(
    ops.vocabulary.summarize, softcap=30.0, chunk=32
  )
  found = summarize(h_RD, few_VD, *rest)
  compare(found, plain(h_RD, few_VD.astype(jnp.float32), *rest, 30.0))


def test_all_but_the_mean_is_there_without_it():
  summarize = jax.jit(functools.partial(ops.vocabulary.summarize, chunk=32))
  whole = summarize(*given(97))
  with_it = summarize(*given(97), with_mean=jnp.bool_(True))
  without = summarize(*given(97), with_mean=jnp.bool_(False))
  for name, value in vars(whole).items():
    np.testing.assert_array_equal(getattr(with_it, name), value)
    if name != 'mean_RD':
      np.testing.assert_array_equal(getattr(without, name), value)
  np.testing.assert_array_equal(without.mean_RD, 0.0)
  h_RD, *rest = given(97)
  gradient = jax.grad(
    lambda h_RD, with_mean: jnp.sum(
      ops.vocabulary.summarize(h_RD, *rest, with_mean=with_mean).mean_RD
    )
  )
  assert jnp.any(gradient(h_RD, jnp.bool_(True)))
  np.testing.assert_array_equal(gradient(h_RD, jnp.bool_(False)), 0.0)


def test_no_array_has_all_logits():
  """Nothing in the traced program has R * V elements."""
  V = 4096
  closed = jax.make_jaxpr(
    functools.partial(ops.vocabulary.summarize, chunk=64)
  )(*given(V))

  def sizes(jaxpr):
    for eqn in jaxpr.eqns:
      yield from (v.aval.size for v in eqn.outvars)
      for value in eqn.params.values():
        if hasattr(value, 'jaxpr'):
          yield from sizes(value.jaxpr)

  assert max(sizes(closed.jaxpr)) <= max(R * V // 16, V * D)


def test_draws_have_the_right_distribution():
  """Chi-square against p over 300 tokens, three chunks, many of them zero."""
  V, count = 300, 40_000
  weights = jax.random.exponential(jax.random.key(0), (V,))
  weights = jnp.where(jnp.arange(V) % 3 == 0, weights, 0.0)
  p = weights / weights.sum()
  sample = jax.vmap(ops.vocabulary.sample, (None, 0))
  tokens = sample(p, draws(jax.random.key(1), count, V))
  counts = np.bincount(tokens, minlength=V)
  assert counts[np.asarray(p) == 0].sum() == 0
  expected = np.asarray(p, np.float64)[::3] * count
  statistic = ((counts[::3] - expected) ** 2 / expected).sum()
  assert statistic < 148.2  # the 0.999 quantile for 99 degrees of freedom


@pytest.mark.parametrize('right', [0.0, 3e-7, 1e-3, 0.5, 0.9, 1 - 1e-6, 1.0])
def test_a_halving_over_all_values_of_a_uniform(right):
  """All that are 2^-23 apart: as many go right as the mass there says."""
  place = np.arange(2**23) / 2**23
  uniforms = np.where(place < 0.5, place, place - 1).astype(np.float32)
  mass = jnp.array([1 - right, right], jnp.float32)
  draw = jax.jit(jax.vmap(ops.vocabulary.draw_index, (None, 0)))
  share = np.asarray(mass, np.float64)[1] / np.asarray(mass, np.float64).sum()
  assert abs(np.sum(draw(mass, uniforms[:, None])) - share * 2**23) <= 1


def law(name, V):
  """Probabilities of V tokens, float64."""
  rng = np.random.default_rng(V)
  if name == 'even':
    p = np.ones(V)
  elif name == 'Gaussian logits':
    p = np.exp(rng.normal(0, 6, V))
  else:  # Heads of this mass together, a third apart, and the rest even.
    head, count = name
    p = np.full(V, (1 - head) / (V - count))
    p[V // 3 + V // 3 * np.arange(count)] = head / count
  return p / p.sum()


def paths(tokens, V):
  """Uniforms that lead to tokens, however small these are: those that are
  nearest to the ends."""
  U = ops.vocabulary.num_halvings(V)
  is_right = tokens[:, None] >> np.arange(U - 1, -1, -1) & 1
  return np.where(is_right, -(2.0**-64), 0.0).astype(np.float32)


LAWS = ['even', 'Gaussian logits', (0.999, 1), (0.9999, 1), (0.9999, 2)]


@pytest.mark.parametrize('name', LAWS)
def test_each_token_has_its_probability(name):
  """Of the released vocabulary all tokens are reached; and the widths of the
  intervals of uniforms that lead to one, each found by bisection, have its
  probability as their product."""
  V = 2**18
  p = law(name, V)
  sample = jax.jit(jax.vmap(ops.vocabulary.sample, (None, 0)))
  find = functools.partial(sample, jnp.asarray(p, jnp.float32))
  np.testing.assert_array_equal(find(paths(np.arange(V), V)), np.arange(V))

  rng = np.random.default_rng(0)
  heads = np.flatnonzero(p == p.max())[:2]
  beside = (heads[:, None] + np.arange(-32, 32)).ravel() % V
  tokens = np.concatenate([beside, rng.integers(0, V, 128)])
  uniforms, widths = paths(tokens, V), np.ones(len(tokens))
  for level in range(uniforms.shape[1]):
    # From the end where the token's half is, or from the other one.
    is_right = np.signbit(uniforms[:, level])
    for_bisection = uniforms.copy()

    def stays(place, right, level=level, moved=for_bisection):
      moved[:, level] = np.where(right, -place, place)
      return np.asarray(find(moved)) == tokens

    is_small = ~stays(0.5, is_right)
    from_right = is_right == is_small
    low, high = np.full((2, len(tokens)), -80.0)
    high[:] = -1
    for _ in range(28):
      middle = (low + high) / 2
      inside = stays(2.0**middle, from_right) == is_small
      low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    widths *= np.where(is_small, 2.0**high, 1 - 2.0**high)
  np.testing.assert_allclose(widths, p[tokens], rtol=2e-5)


@pytest.mark.parametrize('chunk', [2**12, None])
def test_rare_tokens_are_reached_in_the_chunked_pass(chunk):
  V, head = 2**18, 2**18 // 3
  near = head + np.arange(-32, 32)
  tokens = np.concatenate([near, np.random.default_rng(1).integers(0, V, 64)])
  logits = np.log(law((0.9999, 1), V))
  found = jax.jit(functools.partial(ops.vocabulary.summarize, chunk=chunk))(
    jnp.ones((len(tokens), 1), jnp.float32),
    jnp.asarray(logits, jnp.float32)[:, None],
    jnp.float32(1),
    paths(tokens, V),
  )
  np.testing.assert_array_equal(found.sample_R, tokens)


def test_what_has_no_mass_is_never_drawn():
  """At the ends of each half, and in between."""
  rng = np.random.default_rng(6)
  mass = np.exp(rng.normal(0, 4, (8, 5000))).astype(np.float32)
  mass[:, -70:] = 0
  mass[:, ::3] = 0
  ends = rng.choice([0.0, -(2.0**-64), 0.5, -0.5, 0.25], (8, 4000, 13))
  draw = jax.vmap(jax.vmap(ops.vocabulary.draw_index, (None, 0)))
  drawn = np.asarray(jax.jit(draw)(mass, ends.astype(np.float32)))
  assert (np.take_along_axis(mass, drawn, axis=-1) > 0).all()


def test_draw_at_the_ends_of_the_unit_interval():
  p = jnp.zeros((2, 260), jnp.float32).at[:, 3].set(0.5).at[:, 257].set(0.5)
  U = ops.vocabulary.num_halvings(260)
  ends = jnp.array([[0.0] * U, [-(2.0**-64)] * U])
  assert ops.vocabulary.sample(p, ends).tolist() == [3, 257]


def test_another_number_of_uniforms_is_refused():
  with pytest.raises(ValueError, match='11 uniforms, and 2'):
    ops.vocabulary.sample(
      jnp.ones(1025, jnp.float32), jnp.zeros(2, jnp.float32)
    )
