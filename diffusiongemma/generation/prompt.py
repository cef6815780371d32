"""Reads prompts into the cache: checks them, encodes pictures, prefills.

  cache = prefill(tokens, cache)

Rows of a batch may have any lengths: prompts are padded on the right, to a
power of two so that similar lengths share a compilation, and no row sees its
padding. An image token of a prompt is replaced by the soft tokens of a picture.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import operator
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma import config as configs
from diffusiongemma import powers
from diffusiongemma.config import Config
from diffusiongemma.config import ModelConfig
from diffusiongemma.devices import sharding
from diffusiongemma.errors import Error
from diffusiongemma.generation import images as image_lib
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import denoiser
from diffusiongemma.ops.weights import Params


class PromptError(Error, ValueError):
  """A prompt that can't be continued; the message says why."""

  exit_code = 2


def check_kind(prompts: Sequence[Sequence[int]]) -> None:
  """Raises `PromptError` unless `prompts` is a list of prompts."""
  if isinstance(prompts, (str, bytes)):
    raise PromptError(
      'The prompts are a text, but must be lists of token ids: '
      '[[tokenizer.bos_id, *tokenizer.encode(text)]].'
    )
  if not len(prompts):
    raise PromptError('There is no prompt.')


def check(
  config: Config, prompt: Sequence[int], room: int, used: int = 0
) -> None:
  """Raises `PromptError` unless a prompt and `room` tokens, in whole canvases,
  fit the context after the `used` tokens in it."""
  if not prompt:
    raise PromptError('The prompt is empty; it needs at least bos.')
  vocab_size = config.model.vocab_size
  if not all(0 <= token < vocab_size for token in prompt):
    raise PromptError(
      f'The prompt has tokens outside the vocabulary of {vocab_size}.'
    )
  C, context = config.diffusion.canvas_length, config.model.context_length
  canvases, length = -(-room // C), used + len(prompt)
  if length + canvases * C > context:
    room = (context - length) // C * C
    remedy = f'ask for at most {room} new tokens' if room > 0 else 'shorten it'
    raise PromptError(
      f'The prompt has {length} tokens; with {canvases} canvases of {C} '
      f'that is more than the context of {context}: {remedy}.'
    )


def prefill(
  config: ModelConfig,
  params: Params,
  tokens_BP: jax.Array | np.ndarray,
  length_B: jax.Array | np.ndarray,
  cache: kv_cache.KVCache,
  images: denoiser.SoftTokens | None = None,
) -> kv_cache.KVCache:
  """Reads new tokens into the cache; also commits a canvas. No head.

  Args:
    config: the network.
    params: its parameters.
    tokens_BP: int32, new tokens, padded on the right.
    length_B: int32, tokens of each row without padding.
    cache: the text before, with room for them.
    images: soft tokens, with their positions in `tokens_BP`.

  Inside of `jax.jit`, where lengths are not known, nothing is raised: a row
  without room has the length `cache.OVERFLOWED` from then on, and the draft of
  a canvas after it is -1 throughout.

  Raises:
    ConfigError: `config` is not a `ModelConfig`.
    PromptError: the cache has no room for the tokens.
  """
  configs.check_kind(config, ModelConfig)
  check_params(params)
  if not len(tokens_BP) == len(length_B) == len(cache.length_B):
    raise PromptError(
      f'{len(tokens_BP)} rows of tokens with {len(length_B)} lengths, for a '
      f'cache of {len(cache.length_B)} rows.'
    )
  lengths = (cache.length_B, length_B)
  if not any(isinstance(x, jax.core.Tracer) for x in lengths):
    _check_room(config, cache, np.asarray(length_B))
  return read_tokens(config, params, tokens_BP, length_B, cache, images)


@functools.partial(jax.jit, static_argnames='config')
def read_tokens(
  config: ModelConfig,
  params: Params,
  tokens_BP: jax.Array,
  length_B: jax.Array,
  cache: kv_cache.KVCache,
  images: denoiser.SoftTokens | None = None,
) -> kv_cache.KVCache:
  """`prefill` without checks, of tokens that are known to fit."""
  model = denoiser.Denoiser(config, lower_once=True)
  with sharding.activate(config, *tokens_BP.shape):
    _, longer, _ = _apply(model, params)(
      *(tokens_BP, length_B, cache, images), method='prefill'
    )
  return longer


@functools.partial(jax.jit, static_argnames='config')
def encode_images(
  config: ModelConfig,
  params: Params,
  patches_IMX: jax.Array,
  positions_IM2: jax.Array,
) -> jax.Array:
  """Soft tokens [I, T, D] of preprocessed images; see `images.preprocess`.
  Raises `ConfigError` if `config` is not a `ModelConfig`."""
  configs.check_kind(config, ModelConfig)
  model = denoiser.Denoiser(config, lower_once=True)
  apply = _apply(model, params)
  return apply(patches_IMX, positions_IM2, method='encode_images')


def _apply(model: denoiser.Denoiser, params: Params) -> Callable[..., Any]:
  """`model.apply` with parameters bound; its declared type also has returned
  variables."""
  return functools.partial(model.apply, {'params': params})


def read_prompt(
  config: ModelConfig,
  params: Params,
  tokens_BP: np.ndarray,
  length_B: np.ndarray,
  cache: kv_cache.KVCache,
  images: denoiser.SoftTokens | None = None,
  chunk_length: int = 2048,
) -> kv_cache.KVCache:
  """`prefill` of a prompt of any length, piece by piece, with one program.

  Memory for attention grows with the piece, not with the prompt. Each row
  continues where its last piece ended, so that no image is split.

  Args:
    config: the network.
    params: its parameters.
    tokens_BP: int32, prompts, padded on the right.
    length_B: int32, tokens of each without padding.
    cache: the text before, with room for the prompts.
    images: soft tokens, with their positions in `tokens_BP`.
    chunk_length: most tokens of a row in a piece.

  Raises:
    ConfigError: `config` is not a `ModelConfig`.
    PromptError: an image has more soft tokens than a piece, or the cache has no
      room for the prompts.
  """
  configs.check_kind(config, ModelConfig)
  tokens_BP, length_B = np.asarray(tokens_BP), np.asarray(length_B)
  _check_room(config, cache, length_B)
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
    cache = read_tokens(config, params, tokens, taken_B, cache, images)
    start_B += taken_B
  return cache


def check_params(params: Params) -> None:
  """Raises `PromptError` unless `params` are parameters of a network."""
  if not isinstance(params, dict) or 'embedding' not in params:
    raise PromptError(
      'params must be the parameters of a network, a dict of arrays, as in '
      f'run.params; it is {"another dict" if isinstance(params, dict) else ""}'
      f'{"" if isinstance(params, dict) else f"a {type(params).__name__}"}.'
    )


def _check_room(
  config: ModelConfig, cache: kv_cache.KVCache, length_B: np.ndarray
) -> None:
  """Raises `PromptError` if the cache of a layer would overflow."""
  before_B, most = np.asarray(cache.length_B), kv_cache.room(config, cache)
  if (before_B < 0).any():
    raise PromptError(
      f'Row {np.argmin(before_B)} of the cache is no text: an earlier prefill, '
      'inside of jax.jit, had no room for it.'
    )
  needed = int((before_B + length_B).max())
  if most is not None and needed > most:
    raise PromptError(
      f'The cache has room for {most} tokens; with these there are {needed}: '
      'make a larger one (init_cache), or let it grow (cache.grow).'
    )


def _piece_end(image_P: np.ndarray, start: int, length: int, size: int) -> int:
  """The end of a piece from `start`, not between soft tokens of one image."""
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


def token_ids(row: int, prompt: Sequence[int]) -> list[int]:
  """A prompt as a list. Raises `PromptError` if it is not token ids."""
  if isinstance(prompt, (str, bytes)):
    raise PromptError(
      f'Prompt {row} is a text, but must be token ids: '
      '[tokenizer.bos_id, *tokenizer.encode(text)].'
    )
  try:
    return [operator.index(token) for token in prompt]
  except TypeError as error:
    raise PromptError(
      f'Prompt {row} is no list of token ids: {error}. Prompts are a list of '
      'them, also of a single one.'
    ) from error


class Seen(NamedTuple):
  """The pictures of a batch of prompts.

  Attributes:
    soft_ITD: their soft tokens, padded to the largest number.
    counts: number of soft tokens of each picture, a list for each row.
  """

  soft_ITD: jax.Array
  counts: list[list[int]]


def with_pictures(
  config: ModelConfig,
  params: Params,
  prompts: Sequence[Sequence[int]],
  pictures: Sequence[Sequence[Any]] | None,
) -> tuple[list[list[int]], Seen | None]:
  """(prompts with image tokens expanded, the encoded pictures or None)."""
  rows = [token_ids(row, prompt) for row, prompt in enumerate(prompts)]
  if not pictures or not any(pictures):
    for row, prompt in enumerate(rows):
      if config.vision and config.vision.image_token_id in prompt:
        raise PromptError(
          f'Prompt {row} has an image token, and there is no picture for it.'
        )
    return rows, None
  if config.vision is None:
    raise PromptError('This network reads text only; it can see no picture.')
  if len(pictures) != len(prompts):
    raise PromptError(
      f'{len(pictures)} lists of pictures for {len(prompts)} prompts.'
    )
  flat = [picture for row in pictures for picture in row]
  patches = image_lib.preprocess(flat, config.vision)
  counts, remaining = [], iter(patches.counts_I.tolist())
  for row, prompt in enumerate(rows):
    counts.append([next(remaining) for _ in pictures[row]])
    rows[row] = image_lib.expand_image_tokens(
      prompt, counts[row], config.vision
    )
  soft_ITD = encode_images(
    config, params, patches.patches_IMX, patches.positions_IM2
  )
  return rows, Seen(soft_ITD, counts)


def _rounded(config: Config, room: int) -> int:
  """`room` as a power of two canvases, four at least: texts of up to four
  canvases share a compiled program, and so do those of five to eight."""
  C = config.diffusion.canvas_length
  return C * max(4, powers.smallest_power_of_two(-(-room // C)))


def read(
  config: Config,
  params: Params,
  prompts: Sequence[Sequence[int]],
  seen: Seen | None,
  cache: kv_cache.KVCache | None,
  room: int,
) -> kv_cache.KVCache:
  """The cache after prompts of any lengths, each read as if it were alone.

  Args:
    config: the network, and the pad token.
    params: its parameters.
    prompts: token ids of each row, image tokens expanded.
    seen: their pictures.
    cache: the text before, None without.
    room: additional tokens that the cache must hold, at least.
  """
  B, bucket = len(prompts), max(16, *map(len, prompts))
  bucket = powers.smallest_power_of_two(bucket)
  tokens_BP = np.full((B, bucket), config.diffusion.pad_token_id, np.int32)
  for row, prompt in enumerate(prompts):
    tokens_BP[row, : len(prompt)] = prompt
  length_B = np.array([len(prompt) for prompt in prompts], np.int32)
  images = None
  if seen is not None:
    T = seen.soft_ITD.shape[1]
    index_BP = image_lib.place(
      tokens_BP, seen.counts, config.model.image_encoder, T
    )
    images = denoiser.SoftTokens(seen.soft_ITD, jnp.asarray(index_BP))
  used_B = 0 if cache is None else np.asarray(cache.length_B)
  longest = int(np.max(used_B + length_B))
  capacity = powers.smallest_power_of_two(max(bucket, longest))
  capacity += _rounded(config, room)
  if cache is None:
    cache = kv_cache.init_cache(config.model, B, capacity)
  else:
    cache = kv_cache.grow(config.model, cache, capacity)
  return read_prompt(config.model, params, tokens_BP, length_B, cache, images)
