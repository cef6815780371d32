"""Prompt to tokens with a random network: the seams between the parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.config import Config
from diffusiongemma.config import DiffusionConfig
from diffusiongemma.config import VisionConfig
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import denoiser
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


@pytest.fixture(scope='module')
def seeing(model_config):
  """(config, parameters) of a network with an image encoder."""
  vision = VisionConfig(
    embed_dim=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=8,
    patch_size=2,
    pooling_kernel=2,
    position_table_size=16,
    image_token_id=90,
    begin_image_token_id=91,
    end_image_token_id=92,
  )
  config = dataclasses.replace(
    model_config, attention_pattern=('local', 'global'), vision=vision
  )
  model = denoiser.Denoiser(config)
  return config, denoiser.init_params(model, jax.random.key(0))


def read_with_images(config, params):
  """Two prompts of 40 and 31 tokens, the first with images at 10 and 18."""
  rng = np.random.default_rng(0)
  tokens_BP = rng.integers(3, 90, (2, 40)).astype(np.int32)
  index_BP = np.full((2, 40), -1, np.int32)
  T = 7
  index_BP[0, 10:17] = np.arange(7)  # All of the first image.
  index_BP[0, 18:23] = T + np.arange(5)  # The second has five soft tokens.
  tokens_BP[index_BP >= 0] = config.vision.image_token_id
  patches = rng.uniform(0, 1, (2, 4 * T, 12)).astype(np.float32)
  x, y = np.meshgrid(np.arange(14), np.arange(2))
  positions = np.stack([x, y], -1).reshape(1, -1, 2).repeat(2, axis=0)
  positions[1, 20:] = -1
  positions[1, :20, 0], positions[1, :20, 1] = np.divmod(np.arange(20), 2)
  soft_ITD = generate.encode_images(
    config, params, jnp.asarray(patches), jnp.asarray(positions)
  )
  images = denoiser.SoftTokens(soft_ITD, jnp.asarray(index_BP))
  return tokens_BP, np.array([40, 31], np.int32), images


@pytest.mark.parametrize('chunk_length', [7, 8, 13, 40])
def test_a_prompt_in_pieces_equals_the_whole(seeing, chunk_length):
  """Images, in one row only, are never cut; the window is five tokens."""
  config, params = seeing
  tokens_BP, length_B, images = read_with_images(config, params)
  caches = [
    generate.read_prompt(
      config,
      params,
      tokens_BP,
      length_B,
      kv_cache.init_cache(config, 2, 48),
      images,
      length,
    )
    for length in (chunk_length, 100)
  ]
  np.testing.assert_array_equal(caches[0].length_B, length_B)
  outputs = []
  model = denoiser.Denoiser(config)
  for cache in caches:
    canvas_BL = jnp.arange(12).reshape(2, 6)
    sc_BLD = jnp.zeros((2, 6, config.embed_dim))
    outputs.append(
      model.apply(
        {'params': params}, canvas_BL, sc_BLD, cache, method='denoise'
      )
    )
  np.testing.assert_allclose(*outputs, atol=2e-5)


def test_images_change_what_follows_and_themselves_both_ways(seeing):
  """A later soft token changes an earlier one of its image, nothing else
  before it."""
  config, params = seeing
  tokens_BP, length_B, images = read_with_images(config, params)
  model = denoiser.Denoiser(config)

  def hidden(images):
    h, _, _ = model.apply(
      {'params': params}, tokens_BP, length_B, None, images, method='prefill'
    )
    return np.asarray(h)

  other = images.replace(soft_ITD=images.soft_ITD.at[1, 4].add(1.0))
  changed = np.abs(hidden(other) - hidden(images)).max(-1) > 1e-6
  assert not changed[1].any() and not changed[0, :18].any()
  assert changed[0, 18:].all()
  single = dataclasses.replace(config.vision, bidirectional=False)
  model = denoiser.Denoiser(dataclasses.replace(config, vision=single))
  changed = np.abs(hidden(other) - hidden(images)).max(-1) > 1e-6
  assert not changed[0, :22].any() and changed[0, 22:].all()


def test_an_image_longer_than_a_piece(seeing):
  config, params = seeing
  cache = kv_cache.init_cache(config, 2, 48)
  arguments = read_with_images(config, params)
  with pytest.raises(generate.PromptError, match='7 soft tokens does not fit'):
    generate.read_prompt(
      config, params, *arguments[:2], cache, arguments[2], chunk_length=6
    )
