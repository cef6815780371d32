"""Prompts to text: prefill, then canvas after canvas.

  cache = prefill(prompt)
  repeat:  canvas = sample_canvas(denoise_fn(cache));  cut it at a stop token
           cache = prefill(canvas, cache)                    ("commit")

This is where the network and the sampler meet: `make_denoise_fn` binds
parameters and cache into the function that the sampler calls. Layers are
lowered once here: to look into them, apply a `denoiser.Denoiser` yourself.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma import powers
from diffusiongemma import sharding
from diffusiongemma.config import Config
from diffusiongemma.config import ModelConfig
from diffusiongemma.diffusion import sampler
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import denoiser
from diffusiongemma.model import parallel
from diffusiongemma.text import images as image_lib

LogitHook = Callable[[jax.Array, jax.Array], jax.Array]


class PromptError(ValueError):
  """A prompt that can't be continued; the message says why."""


class Generation(NamedTuple):
  """What was written after one prompt.

  Attributes:
    tokens: ids, a stop token included, padding not.
    steps: denoising passes used.
    tokens_per_forward: tokens for each of them, pads not counted.
    stopped_by: 'stop_token' or 'max_new_tokens'.
  """

  tokens: list[int]
  steps: int
  tokens_per_forward: float
  stopped_by: str


class Generated(NamedTuple):
  """What was written after a batch of prompts.

  Attributes:
    rows: one for each prompt.
    cache: prompts and answers, to go on from; None unless it was asked for.
    prompt_cache: the same without the answers.
  """

  rows: list[Generation]
  cache: kv_cache.KVCache | None
  prompt_cache: kv_cache.KVCache | None


def make_denoise_fn(
  config: ModelConfig,
  params: dict,
  cache: kv_cache.KVCache,
  logit_hook: LogitHook | None = None,
) -> sampler.DenoiseFn:
  """The sampler's view of a network that has read the text in `cache`.

  `logit_hook` (logits_BLV, step) -> logits_BLV changes the logits before the
  temperature: -inf bans a token, all others at -inf force it.
  """
  model = denoiser.Denoiser(config, lower_once=True)
  apply = functools.partial(model.apply, {'params': params})

  def denoise(tokens_BL, sc_BLD, temperature, uniforms_BL2, step):
    h_BLD = apply(tokens_BL, sc_BLD, cache, method='denoise')
    if logit_hook is None and not parallel.is_active():
      B, L, D = h_BLD.shape
      h_RD, uniforms_R2 = h_BLD.reshape(-1, D), uniforms_BL2.reshape(-1, 2)
      found = apply(h_RD, temperature, uniforms_R2, method='summarize')
      return sampler.Prediction(
        sample_BL=found.sample_R.reshape(B, L),
        argmax_BL=found.argmax_R.reshape(B, L),
        entropy_BL=found.entropy_R.reshape(B, L),
        confidence_BL=found.confidence_R.reshape(B, L),
        sc_BLD=found.mean_RD.reshape(B, L, D),
      )
    # On a mesh every device has its part of the logits.
    logits_BLV = apply(h_BLD, method='logits')
    if logit_hook is not None:
      logits_BLV = logit_hook(logits_BLV, step)
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
  model = denoiser.Denoiser(config, lower_once=True)
  with sharding.activate(config, *tokens_BP.shape):
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
  model = denoiser.Denoiser(config, lower_once=True)
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
    PromptError: an image has more soft tokens than a piece, or the cache has no
      room for the prompts.
  """
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
    cache = prefill(config, params, tokens, taken_B, cache, images)
    start_B += taken_B
  return cache


def _check_room(
  config: ModelConfig, cache: kv_cache.KVCache, length_B: np.ndarray
) -> None:
  """Raises `PromptError` where a global layer would forget what it has read."""
  room = [
    k_BSKH.shape[1]
    for k_BSKH, kind in zip(cache.k, config.attention_pattern, strict=True)
    if kind == 'global'
  ]
  needed = int((np.asarray(cache.length_B) + length_B).max())
  if room and needed > min(room):
    raise PromptError(
      f'The cache has room for {min(room)} tokens; with these prompts there '
      f'are {needed}: make a larger one (init_cache), or let it grow '
      '(cache.grow).'
    )


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


@functools.partial(jax.jit, static_argnames=('config', 'logit_hook'))
def write_canvas(
  config: Config,
  params: dict,
  cache: kv_cache.KVCache,
  keys_B: jax.Array,
  done_B: jax.Array,
  logit_hook: LogitHook | None = None,
  pinned: sampler.Pinned | None = None,
) -> sampler.SamplerState:
  """Denoises one canvas after the cached text, all on the device."""
  with sharding.activate(config.model, keys_B.shape[0]):
    state, _ = sampler.sample_canvas(
      make_denoise_fn(config.model, params, cache, logit_hook),
      keys_B,
      config.diffusion,
      batch_size=keys_B.shape[0],
      vocab_size=config.model.vocab_size,
      embed_dim=config.model.embed_dim,
      done_B=done_B,
      pinned=pinned,
    )
  return state.replace(
    draft_BL=sharding.on_every_device(state.draft_BL),
    steps_B=sharding.on_every_device(state.steps_B),
  )


@functools.partial(jax.jit, static_argnames=('config', 'logit_hook'))
def write_step(
  config: Config,
  params: dict,
  cache: kv_cache.KVCache,
  keys_B: jax.Array,
  state: sampler.SamplerState,
  step: jax.Array,
  logit_hook: LogitHook | None = None,
  pinned: sampler.Pinned | None = None,
) -> sampler.SamplerState:
  """One step of `write_canvas`, for those who watch."""
  drawn = sampler.draw_step_noise(
    keys_B, step, config.diffusion, config.model.vocab_size
  )
  denoise_fn = make_denoise_fn(config.model, params, cache, logit_hook)
  with sharding.activate(config.model, keys_B.shape[0]):
    return sampler.denoise_step(
      denoise_fn, config.diffusion, state, step, drawn, pinned=pinned
    )


def watch_canvas(
  config: Config,
  params: dict,
  cache: kv_cache.KVCache,
  keys_B: jax.Array,
  done_B: jax.Array,
  on_step: Callable[[int, sampler.SamplerState], None],
  logit_hook: LogitHook | None = None,
  pinned: sampler.Pinned | None = None,
) -> sampler.SamplerState:
  """`write_canvas` with a call after every step; the same tokens."""
  canvas_BL = sampler.draw_canvas(
    keys_B, config.diffusion, config.model.vocab_size
  )
  if pinned is not None:
    canvas_BL = pinned.hold(canvas_BL)
  state = sampler.init_state(canvas_BL, config.model.embed_dim)
  state = state.replace(converged_B=done_B)
  on_step(0, state)
  total = config.diffusion.max_denoising_steps
  for step in range(total, 0, -1):
    state = write_step(
      config, params, cache, keys_B, state, step, logit_hook, pinned
    )
    on_step(total - step + 1, state)
    if bool(jnp.all(state.converged_B)):
      break
  return state


def generate(
  config: Config,
  params: dict,
  prompts: Sequence[Sequence[int]],
  key: jax.Array,
  max_new_tokens: int,
  *,
  pictures: Sequence[Sequence[Any]] | None = None,
  pinned: Sequence[Mapping[int, int]] | None = None,
  cache: kv_cache.KVCache | None = None,
  keep_cache: bool = False,
  logit_hook: LogitHook | None = None,
  on_step: Callable[[int, sampler.SamplerState], None] | None = None,
  on_canvas: Callable[[list[list[int]]], None] | None = None,
) -> Generated:
  """Continues a batch of prompts of any lengths, canvas after canvas.

  A row is written as it would be alone: its noise follows from its own key,
  and no row sees another or its padding. Prompts are padded to a power of
  two, so that similar lengths share a compilation.

  Args:
    config: network and sampler.
    params: parameters of the network.
    prompts: token ids of each row, beginning with bos; with a `cache`, what
      comes after the text there.
    key: the noise; one key, from which each row gets its own, or one a row
      [B]. The same key writes the same tokens.
    max_new_tokens: of each row; whole canvases are denoised and then cut.
    pictures: for each row, the images of its `image_token_id`s, in order; see
      `images.load_image` for what they may be.
    pinned: for each row, tokens that the new text must have, by their place in
      it: {0: first token, ...}. It does not end before the last of them.
    cache: what an earlier call has returned, for the next turn of the same
      rows.
    keep_cache: read the last canvases too, and return both caches.
    logit_hook: see `make_denoise_fn`; the same function object compiles once.
    on_step: called with (steps done, state) after every denoising step.
    on_canvas: called with the tokens kept of every row, at every canvas.

  Raises:
    PromptError: there is no prompt, one is empty or does not fit the context
      together with the canvases asked for, pictures and image tokens do not
      agree, or a pinned place is outside of the canvases.
    ImageError: an image can't be used.
    ConfigError: the mesh around the call does not divide the network.
    ValueError: `key` is no key, nor one for each row.
  """
  sharding.validate_here(config)
  C = config.diffusion.canvas_length
  B, canvases = len(prompts), -(-max_new_tokens // C)
  if not B:
    raise PromptError('There is no prompt.')
  used_B = [0] * B if cache is None else np.asarray(cache.length_B).tolist()
  if len(used_B) != B:
    raise PromptError(f'{B} prompts for a cache of {len(used_B)} rows.')
  prompts, seen = _with_pictures(config.model, params, prompts, pictures)
  for prompt, used in zip(prompts, used_B, strict=True):
    check_prompt(config, prompt, max_new_tokens, used)
  pins = None if pinned is None else _pins(pinned, B, canvases, config)
  bucket = powers.smallest_power_of_two(max(16, *map(len, prompts)))
  tokens_BP = np.full((B, bucket), config.diffusion.pad_token_id, np.int32)
  for row, prompt in enumerate(prompts):
    tokens_BP[row, : len(prompt)] = prompt
  length_B = np.array([len(prompt) for prompt in prompts], np.int32)
  longest = int(np.max(used_B + length_B))
  capacity = powers.smallest_power_of_two(max(bucket, longest))
  capacity += canvases * C
  if cache is None:
    cache = kv_cache.init_cache(config.model, B, capacity)
  else:
    cache = kv_cache.grow(config.model, cache, capacity)
  images = seen and denoiser.SoftTokens(
    seen.soft_ITD,
    image_lib.place(
      tokens_BP, seen.counts, config.model.vision, seen.soft_ITD.shape[1]
    ),
  )
  cache = read_prompt(config.model, params, tokens_BP, length_B, cache, images)
  prompt_cache = cache if keep_cache else None

  keys_B = sampler.row_keys(key, B)
  tokens, steps_B = [[] for _ in range(B)], np.zeros(B, int)
  stopped_by = [None] * B
  for index in range(canvases):
    canvas_keys_B = jax.vmap(lambda k, i=index: jax.random.fold_in(k, i))(
      keys_B
    )
    done_B = jnp.array([reason is not None for reason in stopped_by])
    start = (config, params, cache, canvas_keys_B, done_B)
    pins_here = None if pins is None else pins[index]
    if on_step is None:
      state = write_canvas(*start, logit_hook, pins_here)
    else:
      state = watch_canvas(*start, on_step, logit_hook, pins_here)
    steps_B += np.asarray(state.steps_B)
    draft_BL = np.asarray(state.draft_BL)
    kept = [[] for _ in range(B)]
    for row in range(B):
      if stopped_by[row] is None:
        last_pin = max(pinned[row], default=0) if pinned else 0
        kept[row], stopped_by[row] = _keep(
          draft_BL[row],
          config,
          max_new_tokens - len(tokens[row]),
          max(0, last_pin - index * C),
        )
        tokens[row] += kept[row]
    if on_canvas is not None:
      on_canvas(kept)
    finished = None not in stopped_by
    if keep_cache or not finished:
      kept_B = np.array([len(row) for row in kept], np.int32)
      draft_BL = np.maximum(draft_BL, 0)  # Rows that are done have none.
      cache = prefill(config.model, params, draft_BL, kept_B, cache)
    if finished:
      break
  pad = config.diffusion.pad_token_id
  rows = [
    Generation(
      written, int(steps), sum(t != pad for t in written) / int(steps), reason
    )
    for written, steps, reason in zip(tokens, steps_B, stopped_by, strict=True)
  ]
  return Generated(rows, cache if keep_cache else None, prompt_cache)


def _pins(
  pinned: Sequence[Mapping[int, int]], B: int, canvases: int, config: Config
) -> list[sampler.Pinned]:
  """The pinned tokens of each canvas, from those of each row's new text."""
  C = config.diffusion.canvas_length
  if len(pinned) != B:
    raise PromptError(f'{len(pinned)} rows of pinned tokens for {B} prompts.')
  for row, tokens in enumerate(pinned):
    for place in tokens:
      if not 0 <= place < canvases * C:
        raise PromptError(
          f'Place {place} that prompt {row} pins is outside of its {canvases} '
          f'canvases of {C} tokens.'
        )
  try:
    return [
      sampler.pin(
        [
          {i - c * C: t for i, t in row.items() if c * C <= i < (c + 1) * C}
          for row in pinned
        ],
        C,
        config.model.vocab_size,
      )
      for c in range(canvases)
    ]
  except ValueError as error:
    raise PromptError(str(error)) from error


def _keep(
  draft_L: np.ndarray, config: Config, room: int, no_stop_before: int
) -> tuple[list[int], str | None]:
  """(tokens of a canvas that are kept, why the row ends with it, if so)."""
  stop_token_ids = config.diffusion.stop_token_ids
  rest, stopped = cut_at_stop(draft_L[no_stop_before:], stop_token_ids)
  kept = draft_L[:no_stop_before].tolist() + rest
  if stopped and len(kept) <= room:
    return kept, 'stop_token'
  return kept[:room], 'max_new_tokens' if len(kept) >= room else None


class _Seen(NamedTuple):
  """Encoded pictures of a batch; `counts` has a list for each row."""

  soft_ITD: jax.Array
  counts: list[list[int]]


def _with_pictures(
  config: ModelConfig,
  params: dict,
  prompts: Sequence[Sequence[int]],
  pictures: Sequence[Sequence[Any]] | None,
) -> tuple[list[list[int]], _Seen | None]:
  """Prompts in which each image token stands for a whole picture."""
  prompts = [[int(token) for token in prompt] for prompt in prompts]
  if not pictures or not any(pictures):
    for row, prompt in enumerate(prompts):
      if config.vision and config.vision.image_token_id in prompt:
        raise PromptError(
          f'Prompt {row} has an image token, and there is no picture for it.'
        )
    return prompts, None
  if config.vision is None:
    raise PromptError('This network reads text only; it can see no picture.')
  if len(pictures) != len(prompts):
    raise PromptError(
      f'{len(pictures)} lists of pictures for {len(prompts)} prompts.'
    )
  flat = [picture for row in pictures for picture in row]
  patches = image_lib.preprocess(flat, config.vision)
  counts, remaining = [], iter(patches.counts_I.tolist())
  for row, prompt in enumerate(prompts):
    counts.append([next(remaining) for _ in pictures[row]])
    prompts[row] = image_lib.expand_image_tokens(
      prompt, counts[row], config.vision
    )
  soft_ITD = encode_images(
    config, params, patches.patches_IMX, patches.positions_IM2
  )
  return prompts, _Seen(soft_ITD, counts)


def check_prompt(
  config: Config, prompt: Sequence[int], max_new_tokens: int, used: int = 0
) -> None:
  """Raises `PromptError` unless prompt and canvases fit the context, of which
  `used` tokens are taken."""
  if max_new_tokens < 1:
    raise PromptError(f'max_new_tokens = {max_new_tokens} must be positive.')
  if not prompt:
    raise PromptError('The prompt is empty; it has at least bos.')
  vocab_size = config.model.vocab_size
  if not all(0 <= token < vocab_size for token in prompt):
    raise PromptError(
      f'The prompt has tokens outside the vocabulary of {vocab_size}.'
    )
  C, context = config.diffusion.canvas_length, config.model.context_length
  canvases, length = -(-max_new_tokens // C), used + len(prompt)
  if length + canvases * C > context:
    room = (context - length) // C * C
    remedy = f'ask for at most {room} new tokens' if room > 0 else 'shorten it'
    raise PromptError(
      f'The prompt has {length} tokens; with {canvases} canvases of {C} '
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
