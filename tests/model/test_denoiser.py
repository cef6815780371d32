"""What flows where in the network: caches, windows, padding, roles."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import ops
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import denoiser
from diffusiongemma.model import masks

P, L = 12, 6


@pytest.fixture(scope='module')
def run(model_config, params):
  """The network's methods, jitted."""
  model = denoiser.Denoiser(model_config)

  @functools.partial(jax.jit, static_argnames='method')
  def apply(*arguments, method, params=params):
    return model.apply({'params': params}, *arguments, method=method)

  return apply


@pytest.fixture(scope='module')
def tokens_BP(model_config):
  return jax.random.randint(
    jax.random.key(2), (2, P), 0, model_config.vocab_size
  )


@pytest.fixture(scope='module')
def canvas_BL(model_config):
  return jax.random.randint(
    jax.random.key(3), (2, L), 0, model_config.vocab_size
  )


@pytest.fixture(scope='module')
def sc_BLD(model_config):
  return jax.random.normal(
    jax.random.key(4), (2, L, model_config.embed_dim), jnp.float32
  )


def test_unequal_prompts_equal_the_same_prompts_alone(
  run, tokens_BP, canvas_BL, sc_BLD
):
  lengths = [5, P]
  _, cache, _ = run(tokens_BP, jnp.array(lengths), method='prefill')
  together = run(canvas_BL, sc_BLD, cache, method='denoise')
  for b, length in enumerate(lengths):
    row = slice(b, b + 1)
    _, alone, _ = run(
      tokens_BP[row, :length], jnp.array([length]), method='prefill'
    )
    h = run(canvas_BL[row], sc_BLD[row], alone, method='denoise')
    np.testing.assert_allclose(together[row], h, atol=1e-5)


def test_attention_is_told_what_the_cache_holds(
  model_config, params, tokens_BP, canvas_BL, monkeypatch
):
  """Kernels look at no slots beyond: at the tokens of each row, in a local
  layer at most at its window."""
  told, attend = [], ops.attention.attend

  def listen(*given, filled_B, **rest):
    told.append(filled_B)
    return attend(*given, **rest)

  monkeypatch.setattr(ops.attention, 'attend', listen)
  apply = functools.partial(
    denoiser.Denoiser(model_config).apply, {'params': params}
  )
  cache = kv_cache.init_cache(model_config, 2, 2 * P)
  given = (tokens_BP, jnp.array([3, P]), cache)
  _, cache, _ = apply(*given, method='prefill')
  assert not any(np.any(filled_B) for filled_B in told)
  told.clear()
  apply(canvas_BL, None, cache, method='denoise')
  most = {'local': model_config.sliding_window, 'global': 2 * P}
  kinds = model_config.attention_pattern
  assert {P, most['local']} == {max(map(int, filled_B)) for filled_B in told}
  for kind, filled_B in zip(kinds, told, strict=True):
    np.testing.assert_array_equal(filled_B, np.minimum([3, P], most[kind]))


def test_content_of_padding_is_irrelevant(run, tokens_BP, canvas_BL, sc_BLD):
  results = []
  for filler in (0, 77):
    padded = tokens_BP.at[:, 7:].set(filler)
    h, cache, _ = run(padded, jnp.array([7, 7]), method='prefill')
    denoised = run(canvas_BL, sc_BLD, cache, method='denoise')
    results.append((np.asarray(h[:, :7]), np.asarray(denoised)))
  np.testing.assert_array_equal(results[0][0], results[1][0])
  np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize('pieces', [(5, 7), (3, 1, 8), (11, 1), (4, 4, 4)])
def test_prefill_in_pieces_equals_prefill_at_once(
  run, model_config, tokens_BP, canvas_BL, sc_BLD, pieces
):
  """Pieces shorter and longer than the window, in rows of unequal length; a
  local layer has forgotten what is behind its window by then."""
  rows_B = np.array([P, P - 3])
  _, whole, _ = run(tokens_BP, jnp.asarray(rows_B), method='prefill')
  expected, _, _ = run(tokens_BP, jnp.array([P, P]), method='prefill')
  cache = kv_cache.init_cache(model_config, 2, P + 4)
  start = 0
  for piece in pieces:
    padded = jnp.pad(tokens_BP[:, start : start + piece], [(0, 0), (0, 2)])
    new_B = np.clip(rows_B - start, 0, piece)
    h, cache, _ = run(padded, jnp.asarray(new_B), cache, method='prefill')
    for b, new in enumerate(new_B):
      np.testing.assert_allclose(
        h[b, :new], expected[b, start : start + new], atol=1e-5
      )
    start += piece
  np.testing.assert_array_equal(cache.length_B, whole.length_B)
  np.testing.assert_allclose(
    run(canvas_BL, sc_BLD, cache, method='denoise'),
    run(canvas_BL, sc_BLD, whole, method='denoise'),
    atol=1e-5,
  )


def influence(function, x):
  """[outputs, inputs]: whether a position's output depends on an input's."""
  jacobian = jax.jit(jax.jacobian(lambda x: function(x).sum(-1)[0]))(x)
  return np.abs(np.asarray(jacobian))[:, 0].sum(-1) > 1e-9


@pytest.mark.parametrize('kind', ['local', 'global'])
def test_information_flow(model_config, kind):
  """Gradients of one layer say who sees whom: causal and banded in prefill,
  everything of the canvas and W - 1 of the prefix when denoising."""
  config = dataclasses.replace(model_config, attention_pattern=(kind,))
  layer = denoiser.Layer(config, kind)
  W, D = config.sliding_window, config.embed_dim
  window = W if kind == 'local' else None
  x_BPD = jax.random.normal(jax.random.key(0), (1, P, D), jnp.float32)
  positions = jnp.arange(P)[None]
  zero = jnp.zeros((1,), jnp.int32)
  empty = kv_cache.init_cache(config, 1, 0)
  causal = masks.prefill_mask(zero, jnp.zeros((1, 0), int), P, window)
  arguments = (positions, causal, (empty.k[0], empty.v[0]))
  init = jax.jit(functools.partial(layer.init, method='prefill'))
  params = init(jax.random.key(1), x_BPD, *arguments)

  def prefill(x):
    return layer.apply(params, x, *arguments, method='prefill')

  seen = influence(lambda x: prefill(x)[0], x_BPD)
  for query in range(P):
    for key in range(P):
      near = kind == 'global' or query - key < W
      assert seen[query, key] == (key <= query and near)

  canvas = jax.random.normal(jax.random.key(2), (1, L, D), jnp.float32)
  whole = masks.denoise_mask(zero[:, None] + P, positions, L, window)

  def denoise(x, canvas):
    return layer.apply(
      params,
      canvas,
      P + jnp.arange(L)[None],
      whole,
      prefill(x)[1],
      method='denoise',
    )

  assert influence(lambda c: denoise(x_BPD, c), canvas).all()
  seen = influence(lambda x: denoise(x, canvas), x_BPD)
  expected = [kind == 'global' or key >= P - (W - 1) for key in range(P)]
  assert (seen == np.array(expected)).all()


def test_self_conditioning_off_is_the_network_without_it(
  run, params, model_config, canvas_BL
):
  """Bit for bit, whatever the weights of the module are."""
  x_BLD = run(canvas_BL, method='embed')
  module = denoiser.SelfConditioning(model_config)
  off = module.apply(
    {'params': params['self_conditioning']}, x_BLD, jnp.zeros_like(x_BLD)
  )
  none = module.apply({'params': params['self_conditioning']}, x_BLD, None)
  bare = ops.norms.rms_norm(x_BLD, model_config.norm_epsilon)
  np.testing.assert_array_equal(off, bare)
  np.testing.assert_array_equal(none, bare)


def test_roles_share_everything_but_one_scalar(
  run, params, tokens_BP, canvas_BL, sc_BLD
):
  def outputs(params):
    h, cache, _ = run(
      tokens_BP, jnp.array([P, P]), method='prefill', params=params
    )
    _, fixed, _ = run(tokens_BP, jnp.array([P, P]), method='prefill')
    return h, run(canvas_BL, sc_BLD, fixed, method='denoise', params=params)

  def changed(name):
    layer = {**params['layer_00'], name: params['layer_00'][name] * 2}
    return outputs({**params, 'layer_00': layer})

  before = outputs(params)
  prefill, denoise = changed('prefill_scalar')
  assert np.abs(prefill - before[0]).max() > 1e-3
  np.testing.assert_array_equal(denoise, before[1])
  prefill, denoise = changed('denoise_scalar')
  np.testing.assert_array_equal(prefill, before[0])
  assert np.abs(denoise - before[1]).max() > 1e-3


def test_partial_rotary_leaves_the_rest_alone():
  """A quarter of the pairs turns; frequencies are those of the full head."""
  frequencies = ops.heads.rotary_frequencies(16, 1e6, 0.25)
  expected = [1e6 ** (-2 * i / 16) if i < 2 else 0.0 for i in range(8)]
  np.testing.assert_allclose(frequencies, expected, rtol=1e-6)
  x = jax.random.normal(jax.random.key(0), (1, 3, 2, 16), jnp.float32)
  turned = ops.heads.rotary(
    x, ops.heads.rotary_cos_sin(jnp.array([[0, 5, 900]]), frequencies)
  )
  still = np.r_[2:8, 10:16]
  np.testing.assert_array_equal(turned[..., still], x[..., still])
  np.testing.assert_allclose(turned[:, 0], x[:, 0], atol=1e-6)
  assert np.abs(turned[:, 1] - x[:, 1]).max() > 0.1


def test_what_looks_into_a_network_leaves_it_as_it_was(
  model_config, params, tokens_BP
):
  """Without `lower_once`, which keeps what was traced."""
  model = denoiser.Denoiser(model_config)

  def prefill(**kwargs):
    run = functools.partial(model.apply, method='prefill', **kwargs)
    return jax.jit(run)({'params': params}, tokens_BP, jnp.array([P, P]))

  def without_mlp(next_function, args, kwargs, context):
    made = next_function(*args, **kwargs)
    called = context.module.name, context.method_name
    return made * 0 if called == ('shared_mlp', '__call__') else made

  before = prefill()[0]
  with nn.intercept_methods(without_mlp):
    changed = prefill()[0]
  assert np.abs(changed - before).max() > 0.01
  np.testing.assert_array_equal(prefill()[0], before)
  for name in ('router', 'norm_in'):
    _, seen = prefill(
      capture_intermediates=lambda module, _, name=name: module.name == name,
      mutable=['intermediates'],
    )
    assert list(seen['intermediates']['layer_00']) == [name]


def test_bfloat16_is_bfloat16(model_config, params, tokens_BP):
  """Activations and cache are 16 bits wide, logits 32."""
  config = dataclasses.replace(model_config, dtype='bfloat16')
  model = denoiser.Denoiser(config)
  h, cache, _ = jax.jit(functools.partial(model.apply, method='prefill'))(
    {'params': params}, tokens_BP, jnp.array([P, P])
  )
  assert h.dtype == cache.k[0].dtype == cache.v[1].dtype == jnp.bfloat16
  logits = model.apply({'params': params}, h, method='logits')
  assert logits.dtype == jnp.float32
  assert float(jnp.abs(logits).max()) <= config.logit_softcap
