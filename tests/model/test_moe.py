"""Router and experts against the formula, one token at a time."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma import ops
from diffusiongemma.model import moe
from diffusiongemma.ops.cpu import experts as cpu_experts


def make(model_config, params):
  layer = params['layer_00']
  x_BLD = jax.random.normal(jax.random.key(5), (1, 17, model_config.embed_dim))
  return layer, x_BLD, route(model_config, layer['router'], 3 * x_BLD)


def route(model_config, router, h_BLD):
  normed_BLD = ops.norms.rms_norm(
    h_BLD, model_config.norm_epsilon, router['scale']
  )
  return moe.Router(model_config).apply({'params': router}, normed_BLD)


def test_router_formula(model_config, params):
  layer, x_BLD, routing = make(model_config, params)
  router, k = layer['router'], model_config.experts_per_token
  for m, x in enumerate(3 * np.asarray(x_BLD[0], np.float64)):
    x = x / np.sqrt(np.mean(x**2) + model_config.norm_epsilon)
    x = x * router['scale'] * model_config.embed_dim**-0.5
    logits = x @ router['proj']
    p = np.exp(logits) / np.exp(logits).sum()
    chosen = np.argsort(-p)[:k]
    weights = p[chosen] / p[chosen].sum() * router['per_expert_scale'][chosen]
    assert routing.experts_BLk[0, m].tolist() == chosen.tolist()
    np.testing.assert_allclose(routing.weights_BLk[0, m], weights, rtol=1e-5)


def test_router_ignores_the_length_of_the_residual(model_config, params):
  layer, x_BLD, routing = make(model_config, params)
  other = route(model_config, layer['router'], 300 * x_BLD)
  np.testing.assert_allclose(other.weights_BLk, routing.weights_BLk, rtol=1e-4)


def test_experts_formula(model_config, params):
  layer, x_BLD, routing = make(model_config, params)
  experts = layer['experts']
  out = moe.Experts(model_config).apply({'params': experts}, x_BLD, routing)
  for m, x in enumerate(x_BLD[0]):
    expected = 0
    chosen, weights = routing.experts_BLk[0, m], routing.weights_BLk[0, m]
    for e, w in zip(chosen, weights, strict=True):
      gate, up = jnp.split(experts['gate_up'][e] @ x, 2)
      hidden = nn.gelu(gate, approximate=True) * up
      expected += w * (experts['down'][e] @ hidden)
    np.testing.assert_allclose(out[0, m], expected, atol=1e-5)


def test_statistics_tell_even_from_collapsed():
  M, E = 12, 4
  even = moe.Routing(
    jnp.full((1, M, 2), 0.5),
    jnp.stack([jnp.arange(M) % E, (jnp.arange(M) + 1) % E], 1)[None],
    jnp.full((1, M, E), 1 / E),
  )
  one = moe.Routing(
    jnp.ones((1, M, 1)),
    jnp.zeros((1, M, 1), int),
    jax.nn.one_hot(jnp.zeros((1, M)), E),
  )
  length_B = jnp.array([M])
  statistics = moe.routing_statistics((even,), length_B)
  np.testing.assert_allclose(statistics['router_entropy'], np.log(E), rtol=1e-5)
  np.testing.assert_allclose(statistics['expert_load_max'], 1.0)
  statistics = moe.routing_statistics((one,), length_B)
  np.testing.assert_allclose(statistics['router_entropy'], 0.0, atol=1e-5)
  np.testing.assert_allclose(statistics['expert_load_max'], E)
  # Padding, all of which one expert gets, is not counted.
  padding = moe.Routing(
    jnp.full((1, M, 2), 0.5),
    jnp.zeros((1, M, 2), int),
    jax.nn.one_hot(jnp.zeros((1, M)), E),
  )
  padded = jax.tree.map(lambda a, b: jnp.append(a, b, 1), even, padding)
  statistics = moe.routing_statistics((padded,), length_B)
  np.testing.assert_allclose(statistics['expert_load_max'], 1.0)
  np.testing.assert_allclose(statistics['router_entropy'], np.log(E), rtol=1e-5)


def test_a_cpu_has_a_way_of_its_own_without_a_gradient(
  model_config, params, monkeypatch
):
  layer, x_BLD, routing = make(model_config, params)
  experts = moe.Experts(model_config)

  def run(x_BLD, params):
    out_BLD = experts.apply({'params': params}, x_BLD, routing)
    return jnp.sum(jnp.sin(out_BLD)), out_BLD

  gradient = jax.grad(run, argnums=(0, 1), has_aux=True)
  given = x_BLD, layer['experts']
  with ops.dispatch.switched_off():
    in_tiles, wanted = run(*given)[1], gradient(*given)
  calls, apply = [], cpu_experts.apply
  monkeypatch.setattr(
    cpu_experts, 'apply', lambda *a, **k: calls.append(a) or apply(*a, **k)
  )
  np.testing.assert_allclose(run(*given)[1], in_tiles, atol=1e-6)
  assert len(calls) == 1
  jax.tree.map(np.testing.assert_array_equal, gradient(*given), wanted)
  assert len(calls) == 1
