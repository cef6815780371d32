"""The pass over the vocabulary against whole logits, and draws from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.diffusion import sampler
from diffusiongemma.kernels import quantized
from diffusiongemma.kernels import vocabulary

R, D = 24, 16


def plain(h_RD, table_VD, temperature, uniforms_R2, softcap):
  """The same from whole logits."""
  logits_RV = h_RD @ table_VD.T
  if softcap:
    logits_RV = softcap * jnp.tanh(logits_RV / softcap)
  return sampler.predict(
    logits_RV[None], temperature, uniforms_R2[None], lambda p: p @ table_VD
  )


def given(V, scale=1.0):
  keys = jax.random.split(jax.random.key(V), 3)
  return (
    jax.random.normal(keys[0], (R, D)) * scale,
    jax.random.normal(keys[1], (V, D)),
    jnp.float32(0.7),
    jax.random.uniform(keys[2], (R, 2)),
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
  found = vocabulary.summarize(*arguments, softcap=5.0, chunk=chunk)
  compare(found, plain(*arguments, 5.0))


@pytest.mark.parametrize('scale', [1e-3, 8.0])
def test_flat_and_sharp_distributions(scale):
  """Without a softcap the largest logit is near 150: exp overflows."""
  arguments = given(1000, scale)
  found = vocabulary.summarize(*arguments, softcap=0.0, chunk=64)
  compare(found, plain(*arguments, 0.0))


def test_of_equal_tokens_the_first_is_the_argmax():
  h_RD, table_VD, *rest = given(96)
  twice_VD = jnp.concatenate([table_VD, table_VD])
  found = vocabulary.summarize(h_RD, twice_VD, *rest, chunk=32)
  once = vocabulary.summarize(h_RD, table_VD, *rest, chunk=32)
  np.testing.assert_array_equal(found.argmax_R, once.argmax_R)


def test_a_quantised_table_is_what_it_stands_for():
  h_RD, table_VD, *rest = given(97)
  few_VD = quantized.quantize(table_VD, 'int8', -1)
  summarize = functools.partial(vocabulary.summarize, softcap=30.0, chunk=32)
  found = summarize(h_RD, few_VD, *rest)
  compare(found, plain(h_RD, few_VD.astype(jnp.float32), *rest, 30.0))


def test_all_but_the_mean_is_there_without_it():
  summarize = jax.jit(functools.partial(vocabulary.summarize, chunk=32))
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
      vocabulary.summarize(h_RD, *rest, with_mean=with_mean).mean_RD
    )
  )
  assert jnp.any(gradient(h_RD, jnp.bool_(True)))
  np.testing.assert_array_equal(gradient(h_RD, jnp.bool_(False)), 0.0)


def test_no_array_has_all_logits():
  """Nothing in the traced program has R * V elements."""
  V = 4096
  closed = jax.make_jaxpr(functools.partial(vocabulary.summarize, chunk=64))(
    *given(V)
  )

  def sizes(jaxpr):
    for eqn in jaxpr.eqns:
      yield from (v.aval.size for v in eqn.outvars)
      for value in eqn.params.values():
        if hasattr(value, 'jaxpr'):
          yield from sizes(value.jaxpr)

  assert max(sizes(closed.jaxpr)) <= max(R * V // 16, V * D)


def test_two_level_draw_has_the_right_distribution():
  """Chi-square against p over 300 tokens, three chunks, many of them zero."""
  V, draws = 300, 40_000
  weights = jax.random.exponential(jax.random.key(0), (V,))
  weights = jnp.where(jnp.arange(V) % 3 == 0, weights, 0.0)
  p = weights / weights.sum()
  tokens = vocabulary.sample(
    jnp.broadcast_to(p, (1, draws, V)),
    jax.random.uniform(jax.random.key(1), (1, draws, 2)),
  )[0]
  counts = np.bincount(tokens, minlength=V)
  assert counts[np.asarray(p) == 0].sum() == 0
  expected = np.asarray(p, np.float64)[::3] * draws
  statistic = ((counts[::3] - expected) ** 2 / expected).sum()
  assert statistic < 148.2  # the 0.999 quantile for 99 degrees of freedom


def test_what_has_no_mass_is_never_drawn():
  """Of a vocabulary so large that its sums, added up in blocks, fall here and
  there; at the places where they do, and at the end."""
  rng = np.random.default_rng(6)
  mass = np.exp(rng.normal(0, 4, (8, 8192))).astype(np.float32)
  mass[:, -70:] = 0
  mass[:, ::3] = 0
  total = np.asarray(jax.jit(lambda x: jnp.cumsum(x, axis=-1))(mass))
  rises = np.take(total, np.arange(0, 8192, 3), axis=-1) / total[:, -1:]
  uniforms = np.concatenate([rises, np.full((8, 1), 1 - 2**-24)], axis=1)
  uniforms = np.minimum(uniforms, 1 - 2**-24).astype(np.float32)
  draw = jax.jit(jax.vmap(vocabulary.invert, (None, -1), -1))
  drawn = np.asarray(draw(mass, uniforms))
  assert (np.take_along_axis(mass, drawn, axis=-1) > 0).all()


def test_draw_at_the_ends_of_the_unit_interval():
  p = jnp.zeros((1, 2, 260)).at[..., 3].set(0.5).at[..., 257].set(0.5)
  ends = jnp.array([[[0.0, 0.0], [1 - 2**-24, 1 - 2**-24]]])
  assert vocabulary.sample(p, ends).tolist() == [[3, 257]]
