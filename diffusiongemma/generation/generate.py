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

from diffusiongemma import config as configs
from diffusiongemma import ops
from diffusiongemma.config import Config
from diffusiongemma.config import ModelConfig
from diffusiongemma.devices import sharding
from diffusiongemma.diffusion import sampler
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import denoiser

LogitHook = Callable[[jax.Array, jax.Array], jax.Array]


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

  After step 1, the last, nobody sees the self-conditioning: it is zero. Rows
  for which the cache had no room (`cache.OVERFLOWED`) have no text: their
  `argmax_BL` is -1. Raises `ConfigError` for what is no `ModelConfig`.
  """
  configs.check_kind(config, ModelConfig)
  model = denoiser.Denoiser(config, lower_once=True)
  apply = functools.partial(model.apply, {'params': params})

  def denoise(tokens_BL, sc_BLD, temperature, uniforms_BLU, step):
    h_BLD = apply(tokens_BL, sc_BLD, cache, method='denoise')
    is_text_B1 = cache.length_B[:, None] >= 0
    is_seen = step > 1  # The self-conditioning: step 1 is the last.
    if logit_hook is None and not ops.parallel.is_active():
      B, L, D = h_BLD.shape
      h_RD, uniforms_RU = h_BLD.reshape(-1, D), uniforms_BLU.reshape(B * L, -1)
      found = apply(
        *(h_RD, temperature, uniforms_RU, is_seen), method='summarize'
      )
      return sampler.Prediction(
        sample_BL=found.sample_R.reshape(B, L),
        argmax_BL=jnp.where(is_text_B1, found.argmax_R.reshape(B, L), -1),
        entropy_BL=found.entropy_R.reshape(B, L),
        confidence_BL=found.confidence_R.reshape(B, L),
        sc_BLD=found.mean_RD.reshape(B, L, D),
      )
    # On a mesh every device has its part of the logits.
    logits_BLV = apply(h_BLD, method='logits')
    if logit_hook is not None:
      logits_BLV = logit_hook(logits_BLV, step)

    def soft_embedding(p_BLV):
      sc_BLD = apply(p_BLV, method='soft_embedding')
      return jnp.where(is_seen, sc_BLD, 0)

    found = sampler.predict(
      logits_BLV, temperature, uniforms_BLU, soft_embedding
    )
    return found.replace(argmax_BL=jnp.where(is_text_B1, found.argmax_BL, -1))

  # What `sample_canvas` compares with the sizes that it is told.
  denoise.sizes = {
    'batch_size': len(cache.length_B),
    'vocab_size': config.vocab_size,
    'embed_dim': config.embed_dim,
  }
  return denoise


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
  state = sampler.first_state(
    keys_B,
    config.diffusion,
    vocab_size=config.model.vocab_size,
    embed_dim=config.model.embed_dim,
    pinned=pinned,
    done_B=done_B,
  )
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

  A row is written as it would be alone, but for rounding: its noise follows
  from its own key, and no row sees another or its padding. A product of more
  rows may round otherwise, in bfloat16 much more than in float32, and a draw
  between two tokens that are nearly as probable then falls on the other one
  (`experiments/parity/rows.py`). Prompts are padded to a power of two, so that
  similar lengths share a compilation.

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
    on_step: called with (steps done, state) before the first denoising step,
      when the draft is still -1, and after every one.
    on_canvas: called with the tokens kept of every row, at every canvas.

  Raises:
    PromptError: there is no prompt, one is empty or does not fit the context
      together with the canvases asked for, pictures and image tokens do not
      agree, or a pinned place is outside of the canvases.
    ImageError: an image can't be used.
    ConfigError: `config` is no `Config`, or the mesh around the call does not
      divide the network.
    ValueError: `key` is no key, nor one for each row.
  """
  configs.check_kind(config, Config)
  prompt_lib.check_params(params)
  if type(max_new_tokens) is not int:
    raise prompt_lib.PromptError(
      f'max_new_tokens = {max_new_tokens!r} must be a whole number.'
    )
  sharding.validate_here(config)
  C = config.diffusion.canvas_length
  if isinstance(prompts, (str, bytes)):
    raise prompt_lib.PromptError(
      'The prompts are a text, and lists of token ids are read here: '
      '[[tokenizer.bos_id, *tokenizer.encode(text)]].'
    )
  B, canvases = len(prompts), -(-max_new_tokens // C)
  if not B:
    raise prompt_lib.PromptError('There is no prompt.')
  used_B = [0] * B if cache is None else np.asarray(cache.length_B).tolist()
  if len(used_B) != B:
    raise prompt_lib.PromptError(
      f'{B} prompts for a cache of {len(used_B)} rows.'
    )
  prompts, seen = prompt_lib.with_pictures(
    config.model, params, prompts, pictures
  )
  for prompt, used in zip(prompts, used_B, strict=True):
    prompt_lib.check(config, prompt, max_new_tokens, used)
  pins = None if pinned is None else _pins(pinned, B, canvases, config)
  cache = prompt_lib.read(config, params, prompts, seen, cache, canvases * C)
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
      cache = prompt_lib.prefill(config.model, params, draft_BL, kept_B, cache)
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
    raise prompt_lib.PromptError(
      f'{len(pinned)} rows of pinned tokens for {B} prompts.'
    )
  for row, tokens in enumerate(pinned):
    for place in tokens:
      if not 0 <= place < canvases * C:
        raise prompt_lib.PromptError(
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
    raise prompt_lib.PromptError(str(error)) from error


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


def cut_at_stop(
  tokens_L: np.ndarray, stop_token_ids: tuple[int, ...]
) -> tuple[list[int], bool]:
  """Tokens up to and with the first stop token, and whether there is one."""
  (places,) = np.nonzero(np.isin(tokens_L, stop_token_ids))
  if places.size:
    return tokens_L[: places[0] + 1].tolist(), True
  return tokens_L.tolist(), False
