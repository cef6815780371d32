"""Prompts of any length, with pictures, read whole and in pieces."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.config import Config
from diffusiongemma.config import DiffusionConfig
from diffusiongemma.config import VisionConfig
from diffusiongemma.generation import generate
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import denoiser

C = 6
PROMPT = [2, 10, 20, 30]


def test_a_cache_that_is_too_small_is_refused(model_config, params):
  """A global layer would forget what it has read."""
  read = functools.partial(prompt_lib.read_prompt, model_config, params)
  tokens_BP, length_B = np.array([PROMPT]), np.array([len(PROMPT)])
  cache = read(
    tokens_BP, length_B, kv_cache.init_cache(model_config, 1, 2 * len(PROMPT))
  )
  cache = read(tokens_BP, length_B, cache)
  with pytest.raises(prompt_lib.PromptError, match='The cache has room for'):
    read(tokens_BP, length_B, cache)


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
    position_table_size=64,
    image_token_id=90,
    begin_image_token_id=91,
    end_image_token_id=92,
  )
  config = dataclasses.replace(model_config, vision=vision)
  model = denoiser.Denoiser(config)
  return config, denoiser.init_params(model, jax.random.key(0))


@functools.partial(jax.jit, static_argnames=('config', 'method'))
def apply(config, params, *given, method):
  model = denoiser.Denoiser(config)
  return model.apply({'params': params}, *given, method=method)


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
  soft_ITD = prompt_lib.encode_images(
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
    prompt_lib.read_prompt(
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
  for cache in caches:
    canvas_BL = jnp.arange(12).reshape(2, 6)
    outputs.append(
      apply(config, params, canvas_BL, None, cache, method='denoise')
    )
  np.testing.assert_allclose(*outputs, atol=2e-5)


def test_generate_sees_pictures(seeing):
  """Two rows, one with two pictures; the same as soft tokens by hand."""
  config, params = seeing
  diffusion = DiffusionConfig(
    canvas_length=C, max_denoising_steps=3, stop_token_ids=(1,)
  )
  vision = dataclasses.replace(config.vision, soft_tokens_per_image=70)
  model = dataclasses.replace(config, vision=vision, context_length=512)
  config = Config(model=model, diffusion=diffusion)
  rng = np.random.default_rng(0)
  pictures = [
    [rng.integers(0, 256, (8, 12, 3)).astype(np.uint8) for _ in range(2)],
    [],
  ]
  prompts = [[2, 90, 5, 90, 6], [2, 7]]
  key = jax.random.key(0)
  rows, *_ = generate.generate_tokens(
    config, params, prompts, key, C, pictures=pictures
  )
  other = [[pictures[0][0], 255 - pictures[0][1]], []]
  changed, *_ = generate.generate_tokens(
    config, params, prompts, key, C, pictures=other
  )
  assert rows[0] != changed[0] and rows[1] == changed[1]
  with pytest.raises(prompt_lib.PromptError, match='no picture for it'):
    generate.generate_tokens(config, params, prompts, key, C)
  with pytest.raises(ValueError, match='2 image tokens, and there are 1'):
    generate.generate_tokens(
      config, params, prompts, key, C, pictures=[pictures[0][:1], []]
    )
  with pytest.raises(prompt_lib.PromptError, match='1 lists of pictures for 2'):
    generate.generate_tokens(
      config, params, prompts, key, C, pictures=pictures[:1]
    )


def test_images_change_what_follows_and_themselves_both_ways(seeing):
  """A later soft token changes an earlier one of its image, nothing else
  before it."""
  config, params = seeing
  tokens_BP, length_B, images = read_with_images(config, params)
  other = images.replace(soft_ITD=images.soft_ITD.at[1, 4].add(1.0))

  def changes(config):
    """Whether each hidden state is another with the other image."""
    one, two = (
      apply(config, params, tokens_BP, length_B, None, x, method='prefill')[0]
      for x in (images, other)
    )
    return np.abs(np.asarray(one) - two).max(-1) > 1e-6

  changed = changes(config)
  assert not changed[1].any() and not changed[0, :18].any()
  assert changed[0, 18:].all()
  single = dataclasses.replace(config.vision, bidirectional=False)
  changed = changes(dataclasses.replace(config, vision=single))
  assert not changed[0, :22].any() and changed[0, 22:].all()


def test_an_image_longer_than_a_piece(seeing):
  config, params = seeing
  cache = kv_cache.init_cache(config, 2, 48)
  arguments = read_with_images(config, params)
  with pytest.raises(
    prompt_lib.PromptError, match='7 soft tokens does not fit'
  ):
    prompt_lib.read_prompt(
      config, params, *arguments[:2], cache, arguments[2], chunk_length=6
    )
