"""Networks of few bits: which parameters, what they write, where they lie."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import pytest

from diffusiongemma import config as configs
from diffusiongemma import ops
from diffusiongemma.generation import generate
from diffusiongemma.model import denoiser
from diffusiongemma.model import parameters

MICRO = pathlib.Path(__file__).parents[1] / 'micro_config.py'
MIXED = configs.QuantizationConfig('int4', 'int8', 'int8', group_size=8)


@pytest.fixture(scope='module')
def config():
  return configs.load_config(str(MICRO))


@pytest.fixture(scope='module')
def params(config):
  return denoiser.fresh_params(config)


def dequantized(params):
  return jax.tree.map(
    lambda w: (
      w.astype(jnp.float32) if isinstance(w, ops.weights.Quantized) else w
    ),
    params,
    is_leaf=lambda w: isinstance(w, ops.weights.Quantized),
  )


def test_matrices_are_quantised_and_nothing_else(params):
  few = parameters.quantize(MIXED, params)
  kept = [
    jax.tree_util.keystr(path)
    for path, w in jax.tree_util.tree_leaves_with_path(
      few, is_leaf=lambda w: isinstance(w, ops.weights.Quantized)
    )
    if not isinstance(w, ops.weights.Quantized)
  ]
  names = ('norm', 'scal', 'router')
  assert kept and all(any(n in path for n in names) for path in kept), kept
  assert few['layer_00']['experts']['down'].values.dtype == jnp.int4
  assert few['layer_00']['attention']['o_proj'].values.dtype == jnp.int8
  assert few['self_conditioning']['mlp']['up'].values.dtype == jnp.int8
  assert few['embedding'].values.dtype == jnp.int8


def test_nothing_is_quantised_by_default(params):
  same = parameters.quantize(configs.QuantizationConfig(), params)
  jax.tree.map(np.testing.assert_array_equal, same, params)


def test_storing_and_back(params):
  few = parameters.quantize(MIXED, params)
  again = parameters.from_stored(parameters.to_stored(few))
  assert jax.tree.structure(few) == jax.tree.structure(again)
  jax.tree.map(np.testing.assert_array_equal, few, again)


@pytest.mark.parametrize(
  'kinds', [MIXED, configs.QuantizationConfig('fp8', 'fp8', 'none')]
)
def test_the_network_is_that_of_the_matrices_it_stands_for(
  config, params, kinds
):
  """Prefill, denoising, logits, look-up and self-conditioning."""
  few = parameters.quantize(kinds, params)
  model = denoiser.Denoiser(config.model)

  @jax.jit
  def run(params):
    apply = lambda *a, method: model.apply(
      {'params': params}, *a, method=method
    )
    tokens_BP = jnp.arange(24).reshape(2, 12)
    h_BPD, cache, _ = apply(tokens_BP, jnp.array([12, 9]), method='prefill')
    sc_BLD = apply(
      jax.nn.softmax(
        jnp.sin(jnp.arange(2 * 8 * config.model.vocab_size))
      ).reshape(2, 8, -1),
      method='soft_embedding',
    )
    out_BLD = apply(tokens_BP[:, :8], sc_BLD, cache, method='denoise')
    out_RD = out_BLD.reshape(16, -1)
    U = ops.vocabulary.num_halvings(config.model.vocab_size)
    uniforms_RU = jnp.full((16, U), 0.4)
    found = apply(out_RD, jnp.float32(0.6), uniforms_RU, method='summarize')
    return h_BPD, apply(out_BLD, method='logits'), found

  ours, whole = run(few), run(dequantized(few))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4),
    ours,
    whole,
  )
  assert (np.asarray(ours[1]) != np.asarray(run(params)[1])).any()


def test_writing_with_few_bits(config, params):
  few = parameters.quantize(MIXED, params)
  prompts = [[2, 5, 7], [2, 9, 4, 11]]
  made = [
    generate.generate_tokens(config, p, prompts, jax.random.key(0), 8).rows
    for p in (few, dequantized(few))
  ]
  assert [row.tokens for row in made[0]] == [row.tokens for row in made[1]]


def test_groups_that_do_not_divide_are_named(params):
  kinds = dataclasses.replace(MIXED, group_size=7)
  with pytest.raises(
    configs.ConfigError, match='group_size = 7 does not .*exp'
  ):
    parameters.quantize(kinds, params)


# Run with eight devices, in a process of its own.
SCRIPT = """
import sys
import jax
import numpy as np
from diffusiongemma import config as configs
from diffusiongemma.devices import sharding
from diffusiongemma.generation import generate
from diffusiongemma.model import denoiser
from diffusiongemma.model import parameters

config = configs.load_config(sys.argv[1])
kinds = configs.QuantizationConfig('int4', 'int8', 'int8', group_size=8)
params = parameters.quantize(kinds, denoiser.fresh_params(config))
prompts, key = [[2, 5, 7], [2, 9, 4, 11]], jax.random.key(0)
alone = generate.generate_tokens(config, params, prompts, key, 8).rows
mesh = sharding.make_mesh(configs.MeshConfig(1, 2, 2, 2))
abstract = jax.eval_shape(lambda: params)
where = jax.tree.map(
  lambda x: x.sharding, sharding.with_sharding(abstract, mesh)
)
placed = jax.device_put(params, where)
# As what they stand for lies; the scales of experts are transposed.
shapes = {
  name: [x.addressable_shards[0].data.shape for x in (w.values, w.scales)]
  for name, w in placed['layer_00']['experts'].items()
}
assert shapes == {
  'gate_up': [(1, 16, 8), (1, 2, 16)], 'down': [(1, 8, 8), (1, 1, 8)]
}, shapes
with jax.set_mesh(mesh):
  together = generate.generate_tokens(config, placed, prompts, key, 8).rows
assert [r.tokens for r in alone] == [r.tokens for r in together]
print('equal')
"""


def test_few_bits_on_eight_devices():
  assert 'equal' in many_devices.run(SCRIPT, MICRO, devices=8)
