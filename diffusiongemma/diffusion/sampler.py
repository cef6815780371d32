"""The reverse process: a canvas of random tokens becomes text.

Step n of N..1, at temperature T = t_min + (t_max - t_min) n / N:
  p = softmax(logits / T),   sample ~ p,   draft = argmax p,   H = entropy(p)
  accept the k positions of lowest H with  sum_{i<k} H_(i) <= entropy_bound
  next canvas: the sample where accepted, new uniform tokens elsewhere
A row has converged when its draft has not changed for `stability_threshold`
steps and its mean H is below `confidence_threshold`; it is then frozen. The
result is the draft of the last step, not the renoised canvas.

The network is a function (tokens_BL, sc_BLD, temperature_B1, uniforms_BLU,
left_B1) -> Prediction; nothing else of it is known here. A `sampling.Sampling`
has everything that a caller may vary: strategy, temperatures, pinned positions,
which keep their token from the first canvas on. Each row has its own steps.
"""

from collections.abc import Callable
import functools

import flax
import jax
import jax.numpy as jnp

from diffusiongemma import config as configs
from diffusiongemma import ops
from diffusiongemma.config import DiffusionConfig
from diffusiongemma.diffusion import noise
from diffusiongemma.diffusion.sampling import AS_CONFIGURED
from diffusiongemma.diffusion.sampling import Pinned
from diffusiongemma.diffusion.sampling import Sampling
from diffusiongemma.diffusion.sampling import Time
from diffusiongemma.diffusion.sampling import check

# Steps of a typical canvas, by DeepMind's report; used for estimates and
# benchmarks.
TYPICAL_STEPS = 16


class Prediction(flax.struct.PyTreeNode):
  """The output of a network that the sampler needs.

  Attributes:
    sample_BL: int32, one draw from p = softmax(logits / T) at every position.
    argmax_BL: int32, the most probable token of p.
    entropy_BL: float32, the entropy of p in nats.
    confidence_BL: float32, the probability of `argmax_BL`; strategies see -1
      at pinned positions.
    sc_BLD: the mean embedding under p, the self-conditioning of the next step;
      arbitrary after step 1, the last.
    logits_BLV: the logits before temperature, None if they never exist.
  """

  sample_BL: jax.Array
  argmax_BL: jax.Array
  entropy_BL: jax.Array
  confidence_BL: jax.Array
  sc_BLD: jax.Array
  logits_BLV: jax.Array | None = None


# (tokens_BL, sc_BLD, temperature_B1, uniforms_BLU, left_B1) -> Prediction. With
# a logit hook or a constraint there is also `change_logits`, logits -> logits,
# to be called before the temperature.
DenoiseFn = Callable[..., Prediction]


class StepNoise(flax.struct.PyTreeNode):
  """The random numbers of one step.

  Attributes:
    uniforms_BLU: float32 in [-1/2, 1/2], U = `vocabulary.num_halvings(V)` per
      position, for the draw of `sample_BL`.
    tokens_BL: int32, new tokens of rejected positions.
    choice_BL: float32 in [0, 1), for strategies that choose at random.
    vocab_size: V; `tokens_BL` are drawn from it.
  """

  uniforms_BLU: jax.Array
  tokens_BL: jax.Array
  choice_BL: jax.Array
  vocab_size: int = flax.struct.field(pytree_node=False)


class SamplerState(flax.struct.PyTreeNode):
  """The state between steps.

  Attributes:
    canvas_BL: int32, the tokens that the network sees next.
    draft_BL: int32, the result so far: argmax of the last step, or the draft of
      the strategy (the canvas for the ancestral one).
    accepted_BL: bool, accepted positions of `canvas_BL`.
    entropy_BL: float32, nats, of the last step.
    sc_BLD: float32, self-conditioning for the next step; arbitrary after the
      last.
    unchanged_B: int32, steps since the draft last changed.
    converged_B: bool, rows that are done and frozen.
    steps_B: int32, denoising passes that each row has used.
    left_B: int32, remaining denoising passes of each row.
  """

  canvas_BL: jax.Array
  draft_BL: jax.Array
  accepted_BL: jax.Array
  entropy_BL: jax.Array
  sc_BLD: jax.Array
  unchanged_B: jax.Array
  converged_B: jax.Array
  steps_B: jax.Array
  left_B: jax.Array

  @property
  def is_frozen_B(self) -> jax.Array:
    """bool, rows that further steps do not change."""
    return self.converged_B | (self.left_B <= 0)


def init_state(
  canvas_BL: jax.Array, embed_dim: int, steps_B: jax.Array
) -> SamplerState:
  """The state before the first of `steps_B` steps, from a noise canvas."""
  B, L = canvas_BL.shape
  return SamplerState(
    canvas_BL=canvas_BL,
    draft_BL=jnp.full_like(canvas_BL, -1),
    accepted_BL=jnp.zeros((B, L), bool),
    entropy_BL=jnp.zeros((B, L), jnp.float32),
    sc_BLD=jnp.zeros((B, L, embed_dim), jnp.float32),
    unchanged_B=jnp.zeros((B,), jnp.int32),
    converged_B=jnp.zeros((B,), bool),
    steps_B=jnp.zeros((B,), jnp.int32),
    left_B=jnp.asarray(steps_B, jnp.int32),
  )


def first_state(
  keys_B: jax.Array,
  config: DiffusionConfig,
  *,
  vocab_size: int,
  embed_dim: int,
  sampling: Sampling = AS_CONFIGURED,
  initial_canvas_BL: jax.Array | None = None,
  done_B: jax.Array | None = None,
) -> SamplerState:
  """The initial state of `sample_canvas`; for the arguments see there."""
  if initial_canvas_BL is None:
    initial_canvas_BL = draw_canvas(keys_B, config, vocab_size)
  if sampling.pinned is not None:
    initial_canvas_BL = sampling.pinned.hold(initial_canvas_BL)
  steps_B1 = sampling.steps_B1(config, len(keys_B))
  state = init_state(initial_canvas_BL, embed_dim, steps_B1[:, 0])
  return state if done_B is None else state.replace(converged_B=done_B)


def denoise_step(
  denoise_fn: DenoiseFn,
  config: DiffusionConfig,
  state: SamplerState,
  drawn: StepNoise,
  sampling: Sampling = AS_CONFIGURED,
) -> SamplerState:
  """The one transition of the reverse process: `state.left_B` counts down.

  For the arguments, see `sample_canvas`.
  """
  frozen_B, pinned = state.is_frozen_B, sampling.pinned
  # A frozen row needs no more than the last step does.
  left_B1 = jnp.where(frozen_B, 1, state.left_B)[:, None]
  time = Time(left_B1, sampling.steps_B1(config, len(frozen_B)))
  if sampling.needs_logits:
    denoise_fn = functools.partial(
      denoise_fn, change_logits=_logit_change(sampling, time, state)
    )
  prediction = denoise_fn(
    state.canvas_BL,
    state.sc_BLD,
    sampling.temperature_B1(config, time),
    drawn.uniforms_BLU,
    left_B1,
  )
  _check_prediction(prediction, state, drawn.vocab_size)
  strategy = sampling.strategy_of(config)
  free: int | jax.Array = prediction.entropy_BL.shape[-1]
  if pinned is not None:
    prediction = _certain(prediction, pinned)
    free = jnp.maximum(jnp.sum(~pinned.mask_BL, axis=-1), 1)
  canvas_BL, accepted_BL, draft_BL = strategy(
    config, state.canvas_BL, prediction, time, drawn
  )
  may_converge = draft_BL is None
  if draft_BL is None:
    draft_BL = prediction.argmax_BL
  if pinned is not None:
    canvas_BL, draft_BL = pinned.hold(canvas_BL), pinned.hold(draft_BL)
    accepted_BL |= pinned.mask_BL
  same_B = jnp.all(draft_BL == state.draft_BL, axis=-1)
  unchanged_B = jnp.where(same_B, state.unchanged_B + 1, 0)
  mean_entropy_B = jnp.sum(prediction.entropy_BL, axis=-1) / free
  confident_B = mean_entropy_B < config.confidence_threshold
  stable_B = unchanged_B >= config.stability_threshold
  moved = SamplerState(
    canvas_BL=canvas_BL,
    draft_BL=draft_BL,
    accepted_BL=accepted_BL,
    entropy_BL=prediction.entropy_BL,
    sc_BLD=prediction.sc_BLD,
    unchanged_B=unchanged_B,
    converged_B=stable_B & confident_B & may_converge,
    steps_B=state.steps_B + 1,
    left_B=state.left_B - 1,
  )

  def freeze(old, new):
    frozen = frozen_B.reshape((-1,) + (1,) * (new.ndim - 1))
    # With `jax_enable_x64`, a network or a strategy may return 64-bit arrays.
    return jnp.where(frozen, old, new.astype(old.dtype))

  return jax.tree.map(freeze, state, moved)


def _logit_change(
  sampling: Sampling, time: Time, state: SamplerState
) -> Callable[[jax.Array], jax.Array]:
  """A function that applies hook and constraint to logits [B, L, V]."""

  def change(logits_BLV):
    for function in (sampling.logit_hook, sampling.constraint):
      if function is not None:
        logits_BLV = function(state.canvas_BL, logits_BLV, time, state)
    return logits_BLV

  return change


def _check_prediction(
  prediction: Prediction, state: SamplerState, vocab_size: int
) -> None:
  """Raises `TypeError` or `ValueError` unless types and shapes are right."""
  if not isinstance(prediction, Prediction):
    shape = getattr(prediction, 'shape', None)
    raise TypeError(
      'denoise_fn must return a Prediction, which sampler.predict makes of '
      f'logits; it returned a {type(prediction).__name__}'
      f'{"" if shape is None else f" of shape {list(shape)}"}.'
    )
  B, L = state.canvas_BL.shape
  for name, wanted in (
    ('sample_BL', (B, L)),
    ('argmax_BL', (B, L)),
    ('entropy_BL', (B, L)),
    ('confidence_BL', (B, L)),
    ('sc_BLD', state.sc_BLD.shape),
    ('logits_BLV', (B, L, vocab_size)),
  ):
    array = getattr(prediction, name)
    if array is not None and array.shape != wanted:
      raise ValueError(
        f'{name} of the Prediction must have the shape {list(wanted)}, by '
        'batch_size, canvas_length, vocab_size and embed_dim; it has '
        f'{list(array.shape)}.'
      )


def _certain(prediction: Prediction, pinned: Pinned) -> Prediction:
  """The prediction with pinned tokens, of entropy 0 and confidence -1: they use
  up no entropy bound and are not the most confident ones."""
  mask_BL = pinned.mask_BL
  return prediction.replace(
    sample_BL=pinned.hold(prediction.sample_BL),
    argmax_BL=pinned.hold(prediction.argmax_BL),
    entropy_BL=jnp.where(mask_BL, 0.0, prediction.entropy_BL),
    confidence_BL=jnp.where(mask_BL, -1.0, prediction.confidence_BL),
  )


def sample_canvas(
  denoise_fn: DenoiseFn,
  key: jax.Array,
  config: DiffusionConfig,
  sampling: Sampling = AS_CONFIGURED,
  *,
  batch_size: int | None = None,
  vocab_size: int | None = None,
  embed_dim: int | None = None,
  trajectory: bool = False,
  initial_canvas_BL: jax.Array | None = None,
  noise_fn: Callable[[jax.Array], StepNoise] | None = None,
  done_B: jax.Array | None = None,
) -> tuple[SamplerState, SamplerState | None]:
  """Denoises one canvas per row; pure, for use inside `jax.jit`.

  Args:
    denoise_fn: the network (see the module docstring). Its attribute `sizes`, a
      dict, has the defaults of `batch_size` and so on.
    key: a key, or one key per row [B]: the noise of a row depends only on its
      own key, not on the rest of the batch.
    config: the sampler's settings; L is `config.canvas_length`.
    sampling: strategy, temperature, pinned positions and so on.
    batch_size: B.
    vocab_size: V.
    embed_dim: D of the self-conditioning.
    trajectory: run all `config.max_denoising_steps` steps and return every
      state, instead of stopping when all rows have converged. The result is
      the same.
    initial_canvas_BL: int32, the canvas to start from instead of noise.
    noise_fn: left_B (remaining steps of each row) -> the random numbers of this
      step, instead of those from `key`.
    done_B: bool, rows that are not sampled at all; they use no steps.

  Returns:
    (last state, whose `draft_BL` is the text; the states after each step,
    stacked along a first axis of N, or None).

  Raises:
    ConfigError: `config` or `sampling` is of a wrong type; a number of steps or
      a temperature is not positive; an unknown strategy.
    TypeError: `denoise_fn` does not return a `Prediction`, or a size is neither
      an argument nor in `sizes`.
    ValueError: an array has a wrong shape, a size is not that of the network,
      or `key` is not a key.
  """
  configs.check_kind(config, DiffusionConfig)
  configs.validate_diffusion(config)
  check(sampling)
  sizes = _sizes(
    denoise_fn,
    {
      'batch_size': batch_size,
      'vocab_size': vocab_size,
      'embed_dim': embed_dim,
    },
  )
  batch_size, vocab_size, embed_dim = sizes.values()
  keys_B = row_keys(key, batch_size)
  shape = (batch_size, config.canvas_length)
  if initial_canvas_BL is not None:
    _check_shape('initial_canvas_BL', initial_canvas_BL, shape)
  if sampling.pinned is not None:
    _check_shape('pinned.mask_BL', sampling.pinned.mask_BL, shape)
    _check_shape('pinned.tokens_BL', sampling.pinned.tokens_BL, shape)
  if done_B is not None:
    _check_shape('done_B', done_B, (batch_size,))
  state = first_state(
    keys_B,
    config,
    vocab_size=vocab_size,
    embed_dim=embed_dim,
    sampling=sampling,
    initial_canvas_BL=initial_canvas_BL,
    done_B=done_B,
  )

  def transition(state):
    if noise_fn is not None:
      drawn = noise_fn(state.left_B)
    else:
      drawn = draw_step_noise(keys_B, state.left_B, config, vocab_size)
    return denoise_step(denoise_fn, config, state, drawn, sampling)

  if trajectory:

    def scan_body(state, _):
      state = transition(state)
      return state, state

    return jax.lax.scan(scan_body, state, length=config.max_denoising_steps)
  unfinished = lambda state: ~jnp.all(state.is_frozen_B)
  return jax.lax.while_loop(unfinished, transition, state), None


def _sizes(
  denoise_fn: DenoiseFn, given: dict[str, int | None]
) -> dict[str, int]:
  """The sizes of a network: the arguments, which must agree with its own."""
  own = getattr(denoise_fn, 'sizes', {})
  for name, size in given.items():
    if size is None and name not in own:
      raise TypeError(
        f'sample_canvas needs {name}: denoise_fn has no attribute `sizes` with '
        'it, unlike those of make_denoise_fn.'
      )
    if size is not None and size != own.get(name, size):
      raise ValueError(
        f'{name} = {size}, and the network of denoise_fn has {own[name]}.'
      )
  return {
    name: own[name] if size is None else size for name, size in given.items()
  }


def _check_shape(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
  if array.shape != shape:
    axes = ('batch_size', 'canvas_length')[: len(shape)]
    raise ValueError(
      f'{name} must be [{", ".join(axes)}] = {list(shape)}, it is '
      f'{list(array.shape)}.'
    )


def row_keys(key: jax.Array, batch_size: int) -> jax.Array:
  """One key per row: `key` itself, or split from a single one.

  Raises:
    ValueError: `key` is neither a key of `jax.random.key` nor one per row.
  """
  dtype, shape = getattr(key, 'dtype', None), getattr(key, 'shape', ())
  is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
  if not is_key or shape not in ((), (batch_size,)):
    actual = repr(key) if dtype is None else f'{dtype}{list(shape)}'
    raise ValueError(
      f'key must be one of jax.random.key, or an array of {batch_size}, one '
      f'per row; it is {actual}.'
    )
  return key if key.ndim else jax.random.split(key, batch_size)


def draw_canvas(
  keys_B: jax.Array, config: DiffusionConfig, vocab_size: int
) -> jax.Array:
  """The initial canvas of noise, int32 [B, L]."""
  return jax.vmap(
    lambda key: noise.prior_canvas(
      jax.random.fold_in(key, 0), (config.canvas_length,), vocab_size
    )
  )(keys_B)


def draw_step_noise(
  keys_B: jax.Array,
  step_B: jax.Array,
  config: DiffusionConfig,
  vocab_size: int,
) -> StepNoise:
  """The random numbers of step n >= 1 of each row, from its own key."""

  def draw(key, step):
    uniform_key, token_key, choice_key = jax.random.split(
      jax.random.fold_in(key, step), 3
    )
    L = config.canvas_length
    U = ops.vocabulary.num_halvings(vocab_size)
    uniforms_LU = noise.uniform_from_nearer_end(uniform_key, (L, U))
    tokens_L = noise.prior_canvas(token_key, (L,), vocab_size)
    choice_L = jax.random.uniform(choice_key, (L,), jnp.float32)
    return uniforms_LU, tokens_L, choice_L

  uniforms_BLU, tokens_BL, choice_BL = jax.vmap(draw)(keys_B, step_B)
  return StepNoise(uniforms_BLU, tokens_BL, choice_BL, vocab_size)


def predict(
  logits_BLV: jax.Array,
  temperature: jax.Array,
  uniforms_BLU: jax.Array,
  soft_embedding: Callable[[jax.Array], jax.Array],
) -> Prediction:
  """A `Prediction` from logits in memory, in float32.

  Args:
    logits_BLV: unscaled logits.
    temperature: > 0, a scalar or [B, 1].
    uniforms_BLU: float32 in [-1/2, 1/2]; see `StepNoise`.
    soft_embedding: probabilities [B, L, V] -> [B, L, D].
  """
  temperature_X1 = jnp.asarray(temperature, jnp.float32)[..., None]
  scaled_BLV = logits_BLV.astype(jnp.float32) / temperature_X1
  log_p_BLV = jax.nn.log_softmax(scaled_BLV, axis=-1)
  p_BLV = jnp.exp(log_p_BLV)
  # A banned token has log p = -inf and adds nothing, nor to gradients.
  terms_BLV = p_BLV * jnp.where(p_BLV > 0, log_p_BLV, 0.0)
  return Prediction(
    sample_BL=ops.vocabulary.sample(p_BLV, uniforms_BLU),
    argmax_BL=jnp.argmax(scaled_BLV, axis=-1).astype(jnp.int32),
    entropy_BL=-jnp.sum(terms_BLV, axis=-1),
    confidence_BL=jnp.max(p_BLV, axis=-1),
    sc_BLD=soft_embedding(p_BLV),
    logits_BLV=logits_BLV,
  )
