"""Prompt to text: prefill, then canvas after canvas.

  cache = prefill(prompt)
  repeat:  canvas = sample_canvas(denoise_fn(cache));  cut it at a stop token
           cache = prefill(canvas, cache)                    ("commit")

This is where the network and the sampler meet: `make_denoise_fn` binds
parameters and cache into the function that the sampler calls.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.config import Config
from diffusiongemma.config import ModelConfig
from diffusiongemma.diffusion import sampler
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import denoiser


class PromptError(ValueError):
  """A prompt that can't be continued; the message says why."""


class Generation(NamedTuple):
  """What was written after one prompt.

  Attributes:
    tokens: ids, a stop token included, padding not.
    steps: denoising passes used.
    tokens_per_forward: tokens for each of them.
    stopped_by: 'stop_token' or 'max_new_tokens'.
  """

  tokens: list[int]
  steps: int
  tokens_per_forward: float
  stopped_by: str


def make_denoise_fn(
  config: ModelConfig, params: dict, cache: kv_cache.KVCache
) -> sampler.DenoiseFn:
  """The sampler's view of a network that has read the text in `cache`."""
  model = denoiser.Denoiser(config)
  apply = functools.partial(model.apply, {'params': params})

  def denoise(tokens_BL, sc_BLD, temperature, uniforms_BL2):
    h_BLD = apply(tokens_BL, sc_BLD, cache, method='denoise')
    logits_BLV = apply(h_BLD, method='logits')
    soft_embedding = functools.partial(apply, method='soft_embedding')
    return sampler.predict(
      logits_BLV, temperature, uniforms_BL2, soft_embedding
    )

  return denoise


@functools.partial(jax.jit, static_argnames='config')
def prefill(
  config: ModelConfig,
  params: dict,
  tokens_BP: jax.Array,
  length_B: jax.Array,
  cache: kv_cache.KVCache,
  images: denoiser.SoftTokens | None = None,
) -> kv_cache.KVCache:
  """Reads new tokens into the cache; also commits a canvas. No head."""
  model = denoiser.Denoiser(config)
  _, cache, _ = model.apply(
    {'params': params}, tokens_BP, length_B, cache, images, method='prefill'
  )
  return cache


@functools.partial(jax.jit, static_argnames='config')
def encode_images(
  config: ModelConfig,
  params: dict,
  patches_IMX: jax.Array,
  positions_IM2: jax.Array,
) -> jax.Array:
  """Soft tokens [I, T, D] of preprocessed images; see `images.preprocess`."""
  model = denoiser.Denoiser(config)
  return model.apply(
    {'params': params}, patches_IMX, positions_IM2, method='encode_images'
  )


def read_prompt(
  config: ModelConfig,
  params: dict,
  tokens_BP: np.ndarray,
  length_B: np.ndarray,
  cache: kv_cache.KVCache,
  images: denoiser.SoftTokens | None = None,
  chunk_length: int = 2048,
) -> kv_cache.KVCache:
  """`prefill` of a prompt of any length, piece by piece, with one program.

  Memory for attention grows with the piece, not with the prompt. Each row
  goes on where its last piece ended, so that no image is cut.

  Args:
    config: the network.
    params: its parameters.
    tokens_BP: int32, prompts, padded on the right.
    length_B: int32, how many tokens of each are real.
    cache: the text before, with room for the prompts.
    images: soft tokens, with places in `tokens_BP`.
    chunk_length: most tokens of a row in a piece.

  Raises:
    PromptError: an image has more soft tokens than a piece.
  """
  tokens_BP, length_B = np.asarray(tokens_BP), np.asarray(length_B)
  B, P = tokens_BP.shape
  size = min(chunk_length, P)
  index_BP = np.full((B, P), -1) if images is None else images.index_BP
  index_BP = np.asarray(index_BP)
  T = 1 if images is None else images.soft_ITD.shape[1]
  image_BP = np.where(index_BP < 0, -1, index_BP // T)
  start_B = np.zeros(B, np.int32)
  while (start_B < length_B).any():
    tokens, index = np.zeros((2, B, size), np.int32)
    index[:] = -1
    taken_B = np.zeros(B, np.int32)
    for b in range(B):
      end = _piece_end(image_BP[b], start_B[b], length_B[b], size)
      taken_B[b] = end - start_B[b]
      tokens[b, : taken_B[b]] = tokens_BP[b, start_B[b] : end]
      index[b, : taken_B[b]] = index_BP[b, start_B[b] : end]
    if images is not None:
      images = images.replace(index_BP=jnp.asarray(index))
    cache = prefill(config, params, tokens, taken_B, cache, images)
    start_B += taken_B
  return cache


def _piece_end(image_P: np.ndarray, start: int, length: int, size: int) -> int:
  """Where a piece from `start` ends: not between soft tokens of one image."""
  end = min(start + size, length)
  if end == length or image_P[end] < 0 or image_P[end] != image_P[end - 1]:
    return end
  while end > start and image_P[end - 1] == image_P[end]:
    end -= 1
  if end == start:
    soft_tokens = (image_P == image_P[end]).sum()
    raise PromptError(
      f'An image of {soft_tokens} soft tokens does not fit into pieces of '
      f'{size} tokens; read longer pieces.'
    )
  return end


@functools.partial(jax.jit, static_argnames='config')
def write_canvas(
  config: Config, params: dict, cache: kv_cache.KVCache, keys_B: jax.Array
) -> sampler.SamplerState:
  """Denoises one canvas after the cached text, all on the device."""
  state, _ = sampler.sample_canvas(
    make_denoise_fn(config.model, params, cache),
    keys_B,
    config.diffusion,
    batch_size=keys_B.shape[0],
    vocab_size=config.model.vocab_size,
    embed_dim=config.model.embed_dim,
  )
  return state


@functools.partial(jax.jit, static_argnames='config')
def write_step(
  config: Config,
  params: dict,
  cache: kv_cache.KVCache,
  keys_B: jax.Array,
  state: sampler.SamplerState,
  step: jax.Array,
) -> sampler.SamplerState:
  """One step of `write_canvas`, for those who watch."""
  drawn = sampler.draw_step_noise(
    keys_B, step, config.diffusion, config.model.vocab_size
  )
  denoise_fn = make_denoise_fn(config.model, params, cache)
  return sampler.denoise_step(denoise_fn, config.diffusion, state, step, drawn)


def watch_canvas(
  config: Config,
  params: dict,
  cache: kv_cache.KVCache,
  keys_B: jax.Array,
  on_step: Callable[[int, sampler.SamplerState], None],
) -> sampler.SamplerState:
  """`write_canvas` with a call after every step; the same tokens."""
  canvas_BL = sampler.draw_canvas(
    keys_B, config.diffusion, config.model.vocab_size
  )
  state = sampler.init_state(canvas_BL, config.model.embed_dim)
  on_step(0, state)
  total = config.diffusion.max_denoising_steps
  for step in range(total, 0, -1):
    state = write_step(config, params, cache, keys_B, state, step)
    on_step(total - step + 1, state)
    if bool(jnp.all(state.converged_B)):
      break
  return state


def generate(
  config: Config,
  params: dict,
  prompt: list[int],
  key: jax.Array,
  max_new_tokens: int,
  on_step: Callable[[int, sampler.SamplerState], None] | None = None,
  on_canvas: Callable[[list[int]], None] | None = None,
) -> Generation:
  """Continues one prompt.

  Args:
    config: network and sampler.
    params: parameters of the network.
    prompt: token ids, beginning with bos.
    key: the noise; the same key writes the same tokens.
    max_new_tokens: upper limit; whole canvases are denoised and then cut.
    on_step: called with (steps done, state) after every denoising step.
    on_canvas: called with the tokens kept of every finished canvas.

  Raises:
    PromptError: the prompt is empty, or does not fit the context together
      with the canvases asked for.
  """
  C = config.diffusion.canvas_length
  canvases = -(-max_new_tokens // C)
  check_prompt(config, prompt, max_new_tokens)
  # Powers of two, so that prompts of similar length share a compilation.
  bucket = max(16, 1 << (len(prompt) - 1).bit_length())
  tokens_BP = np.full((1, bucket), config.diffusion.pad_token_id, np.int32)
  tokens_BP[0, : len(prompt)] = prompt
  capacity = bucket + canvases * C
  cache = kv_cache.init_cache(config.model, 1, capacity)
  length_B = np.array([len(prompt)], np.int32)
  cache = read_prompt(config.model, params, tokens_BP, length_B, cache)

  tokens, steps, stopped_by = [], 0, 'max_new_tokens'
  canvas_length_B = np.array([C], np.int32)
  for index in range(canvases):
    keys_B = jax.random.fold_in(key, index)[None]
    if on_step is None:
      state = write_canvas(config, params, cache, keys_B)
    else:
      state = watch_canvas(config, params, cache, keys_B, on_step)
    steps += int(state.steps_B[0])
    kept, stopped = cut_at_stop(
      np.asarray(state.draft_BL[0]), config.diffusion.stop_token_ids
    )
    kept = kept[: max_new_tokens - len(tokens)]
    tokens += kept
    if on_canvas is not None:
      on_canvas(kept)
    if stopped and kept and kept[-1] in config.diffusion.stop_token_ids:
      stopped_by = 'stop_token'
      break
    if index + 1 < canvases:
      cache = prefill(
        config.model, params, state.draft_BL, canvas_length_B, cache
      )
  return Generation(tokens, steps, len(tokens) / steps, stopped_by)


def check_prompt(
  config: Config, prompt: list[int], max_new_tokens: int
) -> None:
  """Raises `PromptError` unless prompt and canvases fit the context."""
  if max_new_tokens < 1:
    raise PromptError(f'max_new_tokens = {max_new_tokens} must be positive.')
  text = [t for t in prompt if t != config.diffusion.bos_token_id]
  if not text:
    raise PromptError('The prompt is empty; give it a few words to go on from.')
  C, context = config.diffusion.canvas_length, config.model.context_length
  canvases = -(-max_new_tokens // C)
  if len(prompt) + canvases * C > context:
    room = (context - len(prompt)) // C * C
    remedy = f'ask for at most {room} new tokens' if room > 0 else 'shorten it'
    raise PromptError(
      f'The prompt has {len(prompt)} tokens; with {canvases} canvases of {C} '
      f'that is more than the context of {context}: {remedy}.'
    )


def cut_at_stop(
  tokens_L: np.ndarray, stop_token_ids: tuple[int, ...]
) -> tuple[list[int], bool]:
  """Tokens up to and with the first stop token, and whether there is one."""
  (places,) = np.nonzero(np.isin(tokens_L, stop_token_ids))
  if places.size:
    return tokens_L[: places[0] + 1].tolist(), True
  return tokens_L.tolist(), False
