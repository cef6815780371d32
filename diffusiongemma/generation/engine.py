"""Generates canvas after canvas with the network and the sampler.

  state = start(prompts)
  repeat:  canvas = next_canvas(state)
           state = keep(state, first tokens of the canvas)       ("commit")

All state between canvases is one pytree, `State`; a row is generated as it
would be alone, whatever canvas the other rows are at. `generate` is built on
these functions, as a server, a stream or reinforcement learning can be.
`make_denoise_fn` binds parameters and cache into the function that the sampler
calls. Equal layers are lowered once here: to look into them, apply a
`denoiser.Denoiser` yourself.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any

from absl import logging
import flax
import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma import config as configs
from diffusiongemma import ops
from diffusiongemma.config import Config
from diffusiongemma.config import ModelConfig
from diffusiongemma.devices import sharding
from diffusiongemma.diffusion import sampler
from diffusiongemma.diffusion.sampling import AS_CONFIGURED
from diffusiongemma.diffusion.sampling import Sampling
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import denoiser
from diffusiongemma.ops.weights import Params

OnStep = Callable[[int, sampler.SamplerState], None]


class State(flax.struct.PyTreeNode):
  """The state between canvases.

  Attributes:
    cache: the text so far, prompt included.
    keys_B: a key for each row; its noise follows from it and `canvas_B`.
    canvas_B: int32, number of canvases of each row.
    done_B: bool, finished rows; they cost no denoising steps.
  """

  cache: kv_cache.KVCache
  keys_B: jax.Array
  canvas_B: jax.Array
  done_B: jax.Array


def make_denoise_fn(
  config: ModelConfig, params: Params, cache: kv_cache.KVCache
) -> sampler.DenoiseFn:
  """The sampler's view of a network that has read the text in `cache`.

  Its attribute `sizes` has the sizes that `sample_canvas` needs. Rows for which
  the cache had no room (`cache.OVERFLOWED`) have no text: their `argmax_BL` is
  -1. In the last step of all rows the self-conditioning is unused and zero.
  Raises `ConfigError` if `config` is not a `ModelConfig`.
  """
  configs.check_kind(config, ModelConfig)
  prompt_lib.check_params(params)
  model = denoiser.Denoiser(config, lower_once=True)
  apply = functools.partial(model.apply, {'params': params})

  def denoise(
    tokens_BL, sc_BLD, temperature_B1, uniforms_BLU, left_B1, change_logits=None
  ):
    h_BLD = apply(tokens_BL, sc_BLD, cache, method='denoise')
    is_text_B1 = cache.length_B[:, None] >= 0
    is_seen = jnp.any(left_B1 > 1)  # Self-conditioning: step 1 is the last.
    if change_logits is None and not ops.parallel.is_active():
      B, L, D = h_BLD.shape
      h_RD, uniforms_RU = h_BLD.reshape(-1, D), uniforms_BLU.reshape(B * L, -1)
      temperature_R = jnp.broadcast_to(temperature_B1, (B, L)).reshape(-1)
      prediction = apply(
        *(h_RD, temperature_R, uniforms_RU, is_seen), method='summarize'
      )
      return sampler.Prediction(
        sample_BL=prediction.sample_R.reshape(B, L),
        argmax_BL=jnp.where(is_text_B1, prediction.argmax_R.reshape(B, L), -1),
        entropy_BL=prediction.entropy_R.reshape(B, L),
        confidence_BL=prediction.confidence_R.reshape(B, L),
        sc_BLD=prediction.mean_RD.reshape(B, L, D),
      )
    # On a mesh every device has its shard of the logits.
    logits_BLV = apply(h_BLD, method='logits')
    if change_logits is not None:
      logging.log_first_n(
        logging.WARNING,
        'A logit hook or a constraint needs all logits in memory, [batch, '
        'canvas, vocabulary] in float32; without, they never exist.',
        1,
      )
      logits_BLV = change_logits(logits_BLV)

    def soft_embedding(p_BLV):
      sc_BLD = apply(p_BLV, method='soft_embedding')
      return jnp.where(is_seen, sc_BLD, 0)

    prediction = sampler.predict(
      logits_BLV, temperature_B1, uniforms_BLU, soft_embedding
    )
    return prediction.replace(
      argmax_BL=jnp.where(is_text_B1, prediction.argmax_BL, -1)
    )

  denoise.sizes = {  # type: ignore[attr-defined]
    'batch_size': len(cache.length_B),
    'vocab_size': config.vocab_size,
    'embed_dim': config.embed_dim,
  }
  return denoise


def start(
  config: Config,
  params: Params,
  prompts: Sequence[Sequence[int]],
  key: jax.Array,
  room: int,
  *,
  pictures: Sequence[Sequence[Any]] | None = None,
  cache: kv_cache.KVCache | None = None,
) -> State:
  """Reads the prompts; returns the state before the first canvas.

  Args:
    config: network and sampler.
    params: parameters of the network.
    prompts: token ids of each row; with a `cache`, those after its text.
    key: for the noise; one key, from which each row gets its own, or one per
      row [B].
    room: most tokens after each prompt, in whole canvases.
    pictures: for each row, the images of its `image_token_id`s, in order.
    cache: earlier text of the same rows.

  Raises:
    PromptError: there is no prompt, one does not fit, or the numbers of
      pictures and image tokens differ.
    ImageError: an image can't be used.
    ConfigError: `config` is not a `Config`, or the mesh around the call does
      not divide the network.
    ValueError: `key` is neither a key nor one per row.
  """
  configs.check_kind(config, Config)
  prompt_lib.check_params(params)
  sharding.validate_here(config)
  prompt_lib.check_kind(prompts)
  B = len(prompts)
  used_B = [0] * B if cache is None else np.asarray(cache.length_B).tolist()
  if len(used_B) != B:
    raise prompt_lib.PromptError(
      f'{B} prompts for a cache of {len(used_B)} rows.'
    )
  keys_B = sampler.row_keys(key, B)
  prompts, seen = prompt_lib.with_pictures(
    config.model, params, prompts, pictures
  )
  for prompt, used in zip(prompts, used_B, strict=True):
    prompt_lib.check(config, prompt, room, used)
  return State(
    cache=prompt_lib.read(config, params, prompts, seen, cache, room),
    keys_B=keys_B,
    canvas_B=jnp.zeros((B,), jnp.int32),
    done_B=jnp.zeros((B,), bool),
  )


def next_canvas(
  config: Config,
  params: Params,
  state: State,
  sampling: Sampling = AS_CONFIGURED,
  on_step: OnStep | None = None,
) -> sampler.SamplerState:
  """Denoises one canvas after the text of each row that is not done.

  Args:
    config: network and sampler.
    params: parameters of the network.
    state: the text so far.
    sampling: what differs from the config.
    on_step: called with (steps done, state) before the first step, when the
      draft is still -1, and after every step; without it, all steps are one
      program. The tokens are the same.

  Returns:
    The last state of the sampler: `draft_BL` is the canvas, int32.
  """
  keys_B = _fold_in(state.keys_B, state.canvas_B)
  arguments = (config, params, state.cache, keys_B, state.done_B, sampling)
  if on_step is None:
    return denoise_canvas(*arguments)
  return _watch_canvas(*arguments, on_step)


def keep(
  config: Config,
  params: Params,
  state: State,
  tokens_BL: jax.Array,
  kept_B: jax.Array | np.ndarray,
  done_B: jax.Array | np.ndarray,
) -> State:
  """Appends the first tokens of a canvas to the text in the cache.

  Args:
    config: network and sampler.
    params: parameters of the network.
    state: the text before the canvas.
    tokens_BL: int32, the canvas; arbitrary after the tokens that are kept.
    kept_B: int32, number of first tokens to keep.
    done_B: bool, finished rows.

  Raises:
    PromptError: the cache has no room for them.
  """
  tokens_BL = jnp.maximum(tokens_BL, 0)  # Finished rows have no draft.
  cache = prompt_lib.prefill(
    config.model, params, tokens_BL, kept_B, state.cache
  )
  return state.replace(
    cache=cache, canvas_B=state.canvas_B + 1, done_B=jnp.asarray(done_B)
  )


@jax.jit
def _fold_in(keys_B, canvas_B):
  return jax.vmap(jax.random.fold_in)(keys_B, canvas_B)


@functools.partial(jax.jit, static_argnames='config')
def denoise_canvas(
  config: Config,
  params: Params,
  cache: kv_cache.KVCache,
  keys_B: jax.Array,
  done_B: jax.Array,
  sampling: Sampling = AS_CONFIGURED,
) -> sampler.SamplerState:
  """`next_canvas` with the noise of `keys_B`, as one program."""
  with sharding.activate(config.model, keys_B.shape[0]):
    state, _ = sampler.sample_canvas(
      make_denoise_fn(config.model, params, cache),
      keys_B,
      config.diffusion,
      sampling,
      done_B=done_B,
    )
  return state.replace(
    draft_BL=sharding.on_every_device(state.draft_BL),
    steps_B=sharding.on_every_device(state.steps_B),
  )


@functools.partial(jax.jit, static_argnames='config')
def denoise_step(
  config: Config,
  params: Params,
  cache: kv_cache.KVCache,
  keys_B: jax.Array,
  state: sampler.SamplerState,
  sampling: Sampling = AS_CONFIGURED,
) -> sampler.SamplerState:
  """One step of `denoise_canvas`, for callers with callbacks."""
  drawn = sampler.draw_step_noise(
    keys_B, state.left_B, config.diffusion, config.model.vocab_size
  )
  denoise_fn = make_denoise_fn(config.model, params, cache)
  with sharding.activate(config.model, keys_B.shape[0]):
    return sampler.denoise_step(
      denoise_fn, config.diffusion, state, drawn, sampling
    )


def _watch_canvas(
  config: Config,
  params: Params,
  cache: kv_cache.KVCache,
  keys_B: jax.Array,
  done_B: jax.Array,
  sampling: Sampling,
  on_step: OnStep,
) -> sampler.SamplerState:
  """`denoise_canvas` with a call after every step."""
  state = sampler.first_state(
    keys_B,
    config.diffusion,
    vocab_size=config.model.vocab_size,
    embed_dim=config.model.embed_dim,
    sampling=sampling,
    done_B=done_B,
  )
  steps = 0
  on_step(steps, state)
  while not bool(jnp.all(state.is_frozen_B)):
    state = denoise_step(config, params, cache, keys_B, state, sampling)
    steps += 1
    on_step(steps, state)
  return state
