"""Prompt to tokens with a random network: the seams between the parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.config import Config
from diffusiongemma.config import DiffusionConfig
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.text import generate

C = 6
PROMPT = [2, 10, 20, 30]


@pytest.fixture(scope='module')
def config(model_config):
  diffusion = DiffusionConfig(
    canvas_length=C, max_denoising_steps=4, stop_token_ids=(1,)
  )
  return Config(model=model_config, diffusion=diffusion)


def run(config, params, new_tokens, **callbacks):
  return generate.generate(
    config, params, PROMPT, jax.random.key(0), new_tokens, **callbacks
  )


def test_watching_changes_nothing(config, params):
  """The step by step driver writes what the loop on the device writes."""
  steps, canvases = [], []
  quiet = run(config, params, 2 * C)
  watched = run(
    config,
    params,
    2 * C,
    on_step=lambda step, state: steps.append(step),
    on_canvas=canvases.append,
  )
  assert watched == quiet
  assert steps == [0, 1, 2, 3, 4] * 2
  assert sum(canvases, []) == quiet.tokens


def test_limit_cuts_inside_a_canvas(config, params):
  whole, cut = run(config, params, 2 * C), run(config, params, C + 2)
  assert cut.tokens == whole.tokens[: C + 2]
  assert cut.stopped_by == 'max_new_tokens'
  assert cut.tokens_per_forward == len(cut.tokens) / cut.steps


def test_stops_at_a_stop_token(config, params):
  """Declares a token that is written a stop token: the text ends with it."""
  whole = run(config, params, 3 * C)
  stop = whole.tokens[C + 3]
  diffusion = dataclasses.replace(config.diffusion, stop_token_ids=(stop,))
  stopped = run(dataclasses.replace(config, diffusion=diffusion), params, 3 * C)
  first = whole.tokens.index(stop)
  assert stopped.tokens == whole.tokens[: first + 1]
  assert stopped.stopped_by == 'stop_token'
  assert stopped.steps == 4 * (first // C + 1)


def test_second_canvas_continues_the_first(config, params):
  """Committing equals a prefill of the whole text in one go."""
  whole = run(config, params, 2 * C)
  text = PROMPT + whole.tokens[:C]
  cache = kv_cache.init_cache(config.model, 1, len(text))
  cache = generate.prefill(
    config.model, params, np.array([text]), np.array([len(text)]), cache
  )
  keys_B = jax.random.fold_in(jax.random.key(0), 1)[None]
  state = generate.write_canvas(config, params, cache, keys_B)
  assert state.draft_BL[0].tolist() == whole.tokens[C:]


def test_prompts_of_one_bucket_compile_once(config, params):
  run(config, params, C)
  before = generate.prefill._cache_size(), generate.write_canvas._cache_size()
  for length in (2, 7, 16):
    prompt = list(range(2, 2 + length))
    generate.generate(config, params, prompt, jax.random.key(1), C)
  after = generate.prefill._cache_size(), generate.write_canvas._cache_size()
  assert after == before


@pytest.mark.parametrize(
  'prompt, new_tokens, message',
  [
    ([2], 4, 'The prompt is empty'),
    ([], 4, 'The prompt is empty'),
    ([2] + [5] * 300, 4, 'more than the context of 256: shorten it'),
    ([2] + [5] * 200, 100, 'ask for at most 54 new tokens'),
    ([2, 5], 0, 'must be positive'),
  ],
)
def test_prompts_that_cannot_be_continued(
  config, params, prompt, new_tokens, message
):
  with pytest.raises(generate.PromptError, match=message):
    generate.generate(config, params, prompt, jax.random.key(0), new_tokens)


def test_cut_at_stop():
  tokens = np.array([5, 6, 1, 7, 1])
  assert generate.cut_at_stop(tokens, (1, 50)) == ([5, 6, 1], True)
  assert generate.cut_at_stop(tokens, (50,)) == (tokens.tolist(), False)
  assert generate.cut_at_stop(jnp.array([1, 2]), (1,)) == ([1], True)
