"""The limits of `parity.py`, for every shape and quantity."""

import functools

import jax
import jax.numpy as jnp
import pytest

from diffusiongemma.model import denoiser

pytest.importorskip('torch', reason='torch is installed by the [test] extra')
pytest.importorskip(
  'transformers', reason='transformers is installed by the [test] extra'
)
import parity

# Seven random layers magnify rounding (1.7 times each); one layer does not.
ONE_LAYER, STACK = 5e-6, 1e-4


@functools.cache
def pair(shape: str) -> parity.Pair:
  return parity.Pair(*parity.SHAPES[shape])


@pytest.mark.parametrize('shape', parity.SHAPES)
@pytest.mark.parametrize(
  ('compare', 'limit'),
  [
    (parity.compare_layers, ONE_LAYER),
    (parity.compare_stack, STACK),
    (parity.compare_images, STACK),
    (parity.compare_unequal, STACK),
  ],
)
def test_forward(shape, compare, limit):
  differences = compare(pair(shape))
  assert max(differences.values()) < limit, differences
  assert min(differences.values()) > 0  # Two programs, not one twice.


@pytest.mark.parametrize('shape', parity.SHAPES)
def test_vision_features(shape):
  difference = parity.compare_images(pair(shape))['vision features']
  assert difference < ONE_LAYER


@pytest.mark.parametrize('shape', parity.SHAPES)
def test_gradients(shape):
  """Of all parameters; three layers, see `compare_gradients`."""
  config, canvas_length = parity.SHAPES[shape]
  small = parity.shallow(config, canvas_length)
  loss, grads = parity.our_gradients(small)
  their_loss, their_grads = parity.their_gradients(small)
  assert abs(loss / their_loss - 1) < 1e-6
  assert parity.worst_of(grads, their_grads) < 1e-4


def test_bfloat16():
  """The same first token at 99 % of positions, and no nearer to float32 than
  bfloat16 can be."""
  differences = parity.compare_bfloat16(pair('two global heads'))
  assert differences['learnt network, float32 logits'] < 1e-5
  assert differences['bfloat16: positions with another top-1'] <= 0.01
  ours = differences['bfloat16 logits from float32, ours']
  theirs = differences['bfloat16 logits from float32, theirs']
  assert 0.3 * theirs < ours < 2 * theirs


def test_bfloat16_multiplies_in_bfloat16():
  """Of all products, only the routers' have float32 operands."""
  config = parity.replace(parity.BASE, dtype='bfloat16')
  model = denoiser.Denoiser(config)
  params = jax.eval_shape(
    lambda: denoiser.init_params(model, jax.random.key(0))
  )

  def everything(params, tokens, patches, positions):
    apply = functools.partial(model.apply, {'params': params})
    soft = apply(patches, positions, method='encode_images')
    images = denoiser.SoftTokens(soft, jnp.zeros((1, 4), jnp.int32))
    h, cache, _ = apply(
      tokens, jnp.full((1,), 4), None, images, method='prefill'
    )
    logits = apply(h, method='logits')
    sc = apply(logits, method='soft_embedding')
    return apply(tokens, sc, cache, method='denoise')

  jaxpr = jax.make_jaxpr(everything)(
    params,
    jnp.zeros((1, 4), jnp.int32),
    jnp.zeros((1, 9, 48)),
    jnp.zeros((1, 9, 2), jnp.int32),
  )
  wide = [
    tuple(variable.aval.shape for variable in equation.invars)
    for equation in equations(jaxpr.jaxpr)
    if equation.primitive.name == 'dot_general'
    and all(v.aval.dtype == jnp.float32 for v in equation.invars)
  ]
  routers = [s for s in wide if s[1] == (config.embed_dim, config.num_experts)]
  pools = [s for s in wide if s not in routers]
  assert len(routers) == 2 * len(config.attention_pattern)
  assert len(pools) <= 1, pools  # The mean over patches of the image encoder.


def equations(jaxpr):
  """All equations, those of nested functions too."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from equations(inner)
