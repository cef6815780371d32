"""Of several answers the network keeps the one that it finds most probable."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import denoiser
from experiments.sudoku import best_of


def test_the_judge_adds_what_stands_on_the_canvas(model_config, params):
  run = types.SimpleNamespace(
    config=types.SimpleNamespace(model=model_config), params=params
  )
  model = denoiser.Denoiser(model_config)
  prompt_BP = jnp.array([[5, 6, 7], [8, 9, 10]])
  _, cache, _ = model.apply(
    {'params': params}, prompt_BP, jnp.array([3, 3]), method='prefill'
  )
  assert isinstance(cache, kv_cache.KVCache)
  tokens_BL = jnp.array([[3, 4, 5, 6], [7, 7, 8, 9]])
  h_BLD = model.apply(
    {'params': params}, tokens_BL, None, cache, method='denoise'
  )
  logits_BLV = model.apply({'params': params}, h_BLD, method='logits')
  log_p_BLV = np.log(jax.nn.softmax(logits_BLV))
  expected = [
    sum(log_p_BLV[row, place, token] for place, token in enumerate(tokens))
    for row, tokens in enumerate(tokens_BL.tolist())
  ]
  found = best_of.make_judge(run)(cache, tokens_BL)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_each_row_keeps_its_best():
  tries = [
    ([[1, 1], [2, 2], [3, 3]], [-1.0, -5.0, -2.0]),
    ([[4, 4], [5, 5], [6, 6]], [-2.0, -4.0, -2.0]),
    ([[7, 7], [8, 8], [9, 9]], [-0.5, -9.0, -3.0]),
  ]
  best = None
  for tokens, sums in tries:
    best = best_of.keep_best(best, np.array(tokens), np.array(sums))
  assert best[0].tolist() == [[7, 7], [5, 5], [3, 3]]
  assert best[1].tolist() == [-0.5, -4.0, -2.0]
