"""Products of linear layers, whose gradient is written by hand, and parameters
as a device takes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import config as configs
from diffusiongemma import ops
from diffusiongemma.devices import sharding
from diffusiongemma.model import denoiser
from diffusiongemma.model import parameters


@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize(
  'given, dtype, tolerance',
  [
    ('float32', None, 1e-5),
    ('bfloat16', None, 2e-2),
    ('bfloat16', 'float32', 2e-2),
  ],
)
def test_multiply_and_its_gradients_are_those_of_einsum(
  axis, given, dtype, tolerance
):
  """Of any leading axes, and of a type for the result that is another."""
  keys = jax.random.split(jax.random.key(0), 3)
  x_BLD = jax.random.normal(keys[0], (2, 3, 5), given)
  w_DF = jax.random.normal(keys[1], (5, 7), given)
  cotangent_BLF = jax.random.normal(keys[2], (2, 3, 7), dtype or given)
  w = w_DF.T if axis else w_DF

  def plain(x, w):
    spec = 'bld,fd->blf' if axis else 'bld,df->blf'
    return jnp.einsum(spec, x, w, preferred_element_type=dtype)

  def ours(x, w):
    return ops.linear.multiply(x, w, axis, dtype and jnp.dtype(dtype))

  made, pull = jax.vjp(ours, x_BLD, w)
  wanted, pull_plain = jax.vjp(plain, x_BLD, w)
  assert made.dtype == wanted.dtype
  np.testing.assert_allclose(
    made.astype('float32'), wanted.astype('float32'), rtol=tolerance
  )
  if dtype:  # It is rounded once, after the product.
    d_x = jnp.einsum('blf,fd->bld', cotangent_BLF, w_DF.T.astype(dtype))
    assert (pull(cotangent_BLF)[0] == d_x.astype(given)).all()
  pairs = zip(pull(cotangent_BLF), pull_plain(cotangent_BLF), strict=True)
  for got, expected in pairs:
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(
      got.astype('float32'),
      expected.astype('float32'),
      rtol=tolerance,
      atol=tolerance,
    )


def test_arranged_parameters_are_the_same_network(model_config, params):
  arranged = ops.weights.arrange(params)
  assert isinstance(
    arranged['layer_00']['experts']['down'], ops.weights.Transposed
  )
  assert arranged['embedding'] is params['embedding']
  tokens_BP = jnp.arange(3, 15).reshape(2, 6)
  model = denoiser.Denoiser(model_config)

  def read(params):
    return model.apply(
      {'params': params}, tokens_BP, jnp.array([6, 4]), method='prefill'
    )

  (made, cache, _), (wanted, *_) = read(arranged), read(params)
  np.testing.assert_allclose(made, wanted, atol=1e-5)
  denoise = functools.partial(model.apply, method='denoise')
  made, wanted = (
    denoise({'params': p}, tokens_BP, None, cache) for p in (arranged, params)
  )
  np.testing.assert_allclose(made, wanted, atol=1e-5)


def test_arranging_deletes_what_it_is_given_only_when_told(params):
  copied = jax.tree.map(jnp.copy, params)
  ops.weights.arrange(copied)
  assert not any(x.is_deleted() for x in jax.tree.leaves(copied))
  ops.weights.arrange(copied, donate=True)
  assert copied['layer_00']['experts']['down'].is_deleted()
  assert not copied['embedding'].is_deleted()


def test_where_nothing_is_to_be_arranged_all_stays(params):
  few = parameters.quantize(configs.QuantizationConfig(experts='int8'), params)
  assert jax.tree.all(
    jax.tree.map(lambda a, b: a is b, ops.weights.arrange(few), few)
  )
  mesh = sharding.make_mesh(configs.MeshConfig(data=1))
  with jax.set_mesh(mesh):
    assert ops.weights.arrange(params) is params
