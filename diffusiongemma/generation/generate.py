"""Prompts to tokens: generates canvases and cuts them where a text ends.

`generate_tokens` generates a batch; `write_canvases` the same, canvas by
canvas.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from diffusiongemma import config as configs
from diffusiongemma.config import Config
from diffusiongemma.diffusion import sampling as sampling_lib
from diffusiongemma.diffusion.sampling import AS_CONFIGURED
from diffusiongemma.diffusion.sampling import Pinned
from diffusiongemma.diffusion.sampling import Sampling
from diffusiongemma.generation import engine
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.ops.weights import Params


class Generation(NamedTuple):
  """The text generated after one prompt.

  Attributes:
    tokens: ids, with a stop token and without padding.
    steps: denoising passes used.
    tokens_per_forward: tokens per denoising pass, pad tokens not counted.
    stopped_by: 'stop_token' or 'max_new_tokens'; None if unfinished.
  """

  tokens: list[int]
  steps: int
  tokens_per_forward: float
  stopped_by: str | None


class Generated(NamedTuple):
  """The texts generated after a batch of prompts.

  Attributes:
    rows: one for each prompt.
    cache: of prompts and answers, to continue them; None unless requested.
    prompt_cache: the same without the answers.
  """

  rows: list[Generation]
  cache: kv_cache.KVCache | None
  prompt_cache: kv_cache.KVCache | None


class Canvas(NamedTuple):
  """The tokens that one canvas added.

  Attributes:
    kept: new tokens of each row.
    so_far: all tokens, those of this canvas included; caches only after the
      last canvas.
  """

  kept: list[list[int]]
  so_far: Generated


def generate_tokens(
  config: Config,
  params: Params,
  prompts: Sequence[Sequence[int]],
  key: jax.Array,
  max_new_tokens: int,
  sampling: Sampling = AS_CONFIGURED,
  *,
  pictures: Sequence[Sequence[Any]] | None = None,
  pinned: Sequence[Mapping[int, int]] | None = None,
  cache: kv_cache.KVCache | None = None,
  keep_cache: bool = False,
  on_step: engine.OnStep | None = None,
  on_canvas: Callable[[list[list[int]]], None] | None = None,
) -> Generated:
  """Continues a batch of prompts of any lengths, canvas after canvas.

  A row is generated as it would be alone, except for rounding: its noise
  follows from its own key, and no row sees another or its padding. Products of
  more rows may round differently, in bfloat16 much more than in float32, and a
  draw between two tokens of nearly equal probability may then change
  (`experiments/parity/rows.py`). Prompts are padded to a power of two, so that
  similar lengths share a compilation.

  Args:
    config: network and sampler.
    params: parameters of the network.
    prompts: token ids of each row, beginning with bos; with a `cache`, those
      after its text.
    key: for the noise; one key, from which each row gets its own, or one per
      row [B]. The same key gives the same tokens.
    max_new_tokens: of each row; whole canvases are denoised and then cut.
    sampling: what differs from the config.
    pictures: for each row, the images of its `image_token_id`s, in order; for
      supported types see `images.load_image`.
    pinned: for each row, tokens that the new text must have, by their position
      in it: {0: first token, ...}. It does not end before the last of them.
    cache: returned by an earlier call, for the next turn of the same rows.
    keep_cache: read the last canvases too, and return both caches.
    on_step: called with (steps done, state) before the first denoising step,
      when the draft is still -1, and after every step.
    on_canvas: called with the tokens kept of every row, after every canvas.

  Raises:
    PromptError: there is no prompt, one is empty or does not fit the context
      together with the new canvases, the numbers of pictures and image tokens
      differ, or a pinned position is outside of the canvases.
    ImageError: an image can't be used.
    ConfigError: `config` is not a `Config`, `sampling` is invalid, or the mesh
      around the call does not divide the network.
    ValueError: `key` is neither a key nor one per row.
  """
  for canvas in write_canvases(
    *(config, params, prompts, key, max_new_tokens, sampling),
    pictures=pictures,
    pinned=pinned,
    cache=cache,
    keep_cache=keep_cache,
    on_step=on_step,
  ):
    if on_canvas is not None:
      on_canvas(canvas.kept)
  return canvas.so_far


def default_max_new_tokens(config: Config) -> int:
  """The default of `max_new_tokens`: four canvases."""
  return 4 * config.diffusion.canvas_length


def write_canvases(
  config: Config,
  params: Params,
  prompts: Sequence[Sequence[int]],
  key: jax.Array,
  max_new_tokens: int,
  sampling: Sampling = AS_CONFIGURED,
  *,
  pictures: Sequence[Sequence[Any]] | None = None,
  pinned: Sequence[Mapping[int, int]] | None = None,
  cache: kv_cache.KVCache | None = None,
  keep_cache: bool = False,
  on_step: engine.OnStep | None = None,
) -> Iterator[Canvas]:
  """`generate_tokens`, canvas by canvas: each is generated when the iterator
  gets there. Arguments and errors are those of `generate_tokens`."""
  configs.check_kind(config, Config)
  if type(max_new_tokens) is not int:
    raise prompt_lib.PromptError(
      f'max_new_tokens = {max_new_tokens!r} must be a whole number.'
    )
  if max_new_tokens < 1:
    raise prompt_lib.PromptError(
      f'max_new_tokens = {max_new_tokens} must be positive.'
    )
  sampling_lib.check(sampling)
  if sampling.pinned is not None:
    raise prompt_lib.PromptError(
      'sampling.pinned is for one canvas; tokens of a text are pinned by their '
      'position in it: pinned=[{0: token}].'
    )
  prompt_lib.check_kind(prompts)
  C = config.diffusion.canvas_length
  B, canvases = len(prompts), -(-max_new_tokens // C)
  state = engine.start(
    *(config, params, prompts, key, canvases * C),
    pictures=pictures,
    cache=cache,
  )
  pins = None if pinned is None else _pins(pinned, B, canvases, config)
  return _canvases(
    *(config, params, state, max_new_tokens, sampling),
    *(pinned, pins, keep_cache, on_step),
  )


def _canvases(
  config: Config,
  params: Params,
  state: engine.State,
  max_new_tokens: int,
  sampling: Sampling,
  pinned: Sequence[Mapping[int, int]] | None,
  pins: list[Pinned] | None,
  keep_cache: bool,
  on_step: engine.OnStep | None,
) -> Iterator[Canvas]:
  B, C = len(state.canvas_B), config.diffusion.canvas_length
  canvases = -(-max_new_tokens // C)
  prompt_cache = state.cache if keep_cache else None
  tokens: list[list[int]] = [[] for _ in range(B)]
  steps_B = np.zeros(B, int)
  stopped_by: list[str | None] = [None] * B
  for index in range(canvases):
    here = sampling if pins is None else sampling.replace(pinned=pins[index])
    final = engine.next_canvas(config, params, state, here, on_step)
    steps_B += np.asarray(final.steps_B)
    draft_BL = np.asarray(final.draft_BL)
    kept_tokens: list[list[int]] = [[] for _ in range(B)]
    for row in range(B):
      if stopped_by[row] is None:
        last_pin = max(pinned[row], default=0) if pinned else 0
        kept_tokens[row], stopped_by[row] = _keep(
          draft_BL[row],
          config,
          max_new_tokens - len(tokens[row]),
          max(0, last_pin - index * C),
        )
        tokens[row] += kept_tokens[row]
    finished = None not in stopped_by
    if keep_cache or not finished:
      kept_B = np.array([len(row) for row in kept_tokens], np.int32)
      done_B = np.array([reason is not None for reason in stopped_by])
      state = engine.keep(config, params, state, final.draft_BL, kept_B, done_B)
    rows = [
      _generation(config, *row)
      for row in zip(tokens, steps_B.tolist(), stopped_by, strict=True)
    ]
    yield Canvas(
      kept_tokens,
      Generated(
        rows, state.cache if keep_cache and finished else None, prompt_cache
      ),
    )
    if finished:
      return


def _generation(
  config: Config, tokens: list[int], steps: int, stopped_by: str | None
) -> Generation:
  pad = config.diffusion.pad_token_id
  per_forward = sum(token != pad for token in tokens) / steps
  return Generation(list(tokens), steps, per_forward, stopped_by)


def _pins(
  pinned: Sequence[Mapping[int, int]], B: int, canvases: int, config: Config
) -> list[Pinned]:
  """The pinned tokens of each canvas, from those of the text of each row."""
  C = config.diffusion.canvas_length
  if len(pinned) != B:
    raise prompt_lib.PromptError(
      f'{len(pinned)} rows of pinned tokens for {B} prompts.'
    )
  for row, tokens in enumerate(pinned):
    for position in tokens:
      if not 0 <= position < canvases * C:
        raise prompt_lib.PromptError(
          f'Position {position} that prompt {row} pins is outside of its '
          f'{canvases} canvases of {C} tokens.'
        )
  try:
    return [
      sampling_lib.pin(
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
  """(tokens kept of a canvas, why the row ends with it, or None)."""
  stop_token_ids = config.diffusion.stop_token_ids
  rest, stopped = cut_at_stop(draft_L[no_stop_before:], stop_token_ids)
  kept = draft_L[:no_stop_before].tolist() + rest
  if stopped and len(kept) <= room:
    return kept, 'stop_token'
  return kept[:room], 'max_new_tokens' if len(kept) >= room else None


def cut_at_stop(
  tokens_L: np.ndarray, stop_token_ids: tuple[int, ...]
) -> tuple[list[int], bool]:
  """(tokens up to and including the first stop token, whether there is one)."""
  (positions,) = np.nonzero(np.isin(tokens_L, stop_token_ids))
  if positions.size:
    return tokens_L[: positions[0] + 1].tolist(), True
  return tokens_L.tolist(), False
