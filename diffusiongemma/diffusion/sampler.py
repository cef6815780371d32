"""The reverse process: a canvas of random tokens becomes text.

Step n of N..1, at temperature T = t_min + (t_max - t_min) n / N:
  p = softmax(logits / T),   sample ~ p,   draft = argmax p,   H = entropy(p)
  accept the k positions of lowest H with  sum_{i<k} H_(i) <= entropy_bound
  next canvas: the sample where accepted, new uniform tokens elsewhere
A row has converged when its draft has not changed for `stability_threshold`
steps and its mean H is below `confidence_threshold`; it is then frozen. The
result is the draft of the last step, not the renoised canvas.

The network is a function (tokens_BL, sc_BLD, temperature, uniforms_BLU, step)
-> Prediction; nothing else of it is known here. What is accepted is a plain
function, see `strategies.py`. Pinned positions keep their token from the first
canvas on.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma import config as configs
from diffusiongemma import ops
from diffusiongemma.config import DiffusionConfig
from diffusiongemma.diffusion import noise
from diffusiongemma.diffusion import strategies

# A canvas takes about so many, says DeepMind's report: what estimates and
# benchmarks count with.
TYPICAL_STEPS = 16


@flax.struct.dataclass
class Prediction:
  """What the sampler asks of a network.

  Attributes:
    sample_BL: int32, one draw from softmax(logits / T) at every position.
    argmax_BL: int32, its most probable token.
    entropy_BL: float32, its entropy in nats.
    confidence_BL: float32, the probability of `argmax_BL`; for a strategy, -1
      where a token is pinned.
    sc_BLD: its mean embedding, the next step's self-conditioning; after step
      1, the last, anything.
    logits_BLV: the logits before temperature, where they exist at all.
  """

  sample_BL: jax.Array
  argmax_BL: jax.Array
  entropy_BL: jax.Array
  confidence_BL: jax.Array
  sc_BLD: jax.Array
  logits_BLV: jax.Array | None = None


# (tokens_BL, sc_BLD, temperature, uniforms_BLU, step) -> Prediction
DenoiseFn = Callable[..., Prediction]


@flax.struct.dataclass
class StepNoise:
  """The random numbers of one step.

  Attributes:
    uniforms_BLU: float32 in [-1/2, 1/2], U = `vocabulary.num_halvings(V)` a
      position: what `sample` is drawn by.
    tokens_BL: int32, what rejected positions are renoised with.
    choice_BL: float32 in [0, 1), for strategies that choose at random.
    vocab_size: V, of what `tokens_BL` are drawn from.
  """

  uniforms_BLU: jax.Array
  tokens_BL: jax.Array
  choice_BL: jax.Array
  vocab_size: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Pinned:
  """Positions that keep their token: infilling, editing, forced words.

  Attributes:
    mask_BL: bool, True where pinned.
    tokens_BL: int32, the tokens there; anything elsewhere.
  """

  mask_BL: jax.Array
  tokens_BL: jax.Array

  def hold(self, tokens_BL: jax.Array) -> jax.Array:
    """`tokens_BL` with the pinned ones in their places."""
    return jnp.where(self.mask_BL, self.tokens_BL, tokens_BL)


def pin(
  rows: Sequence[Mapping[int, int]], canvas_length: int, vocab_size: int
) -> Pinned:
  """`Pinned` of a batch, from {index on the canvas: token} of each row.

  Raises:
    ValueError: an index outside the canvas, a token outside the vocabulary.
  """
  mask_BL = np.zeros((len(rows), canvas_length), bool)
  tokens_BL = np.zeros((len(rows), canvas_length), np.int32)
  for row, tokens in enumerate(rows):
    for index, token in tokens.items():
      if not 0 <= index < canvas_length:
        raise ValueError(
          f'Row {row} pins index {index}, outside of its canvas of '
          f'{canvas_length}.'
        )
      if not 0 <= token < vocab_size:
        raise ValueError(
          f'Row {row} pins token {token}, outside of the vocabulary of '
          f'{vocab_size}.'
        )
      mask_BL[row, index], tokens_BL[row, index] = True, token
  return Pinned(jnp.asarray(mask_BL), jnp.asarray(tokens_BL))


@flax.struct.dataclass
class SamplerState:
  """What goes from step to step.

  Attributes:
    canvas_BL: int32, the tokens that the network sees next.
    draft_BL: int32, the result so far: argmax of the last step, or what the
      strategy says, the ancestral one the canvas.
    accepted_BL: bool, positions of `canvas_BL` that were accepted.
    entropy_BL: float32, nats, of the last step.
    sc_BLD: float32, self-conditioning for the next step; after the last,
      anything.
    unchanged_B: int32, steps since the draft last changed.
    converged_B: bool, rows that are frozen.
    steps_B: int32, denoising passes each row has used.
  """

  canvas_BL: jax.Array
  draft_BL: jax.Array
  accepted_BL: jax.Array
  entropy_BL: jax.Array
  sc_BLD: jax.Array
  unchanged_B: jax.Array
  converged_B: jax.Array
  steps_B: jax.Array


def init_state(canvas_BL: jax.Array, embed_dim: int) -> SamplerState:
  """The state before the first step, from a noise canvas."""
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
  )


def first_state(
  keys_B: jax.Array,
  config: DiffusionConfig,
  *,
  vocab_size: int,
  embed_dim: int,
  pinned: Pinned | None = None,
  initial_canvas_BL: jax.Array | None = None,
  done_B: jax.Array | None = None,
) -> SamplerState:
  """The state that `sample_canvas`, where the arguments are explained, starts
  from."""
  if initial_canvas_BL is None:
    initial_canvas_BL = draw_canvas(keys_B, config, vocab_size)
  if pinned is not None:
    initial_canvas_BL = pinned.hold(initial_canvas_BL)
  state = init_state(initial_canvas_BL, embed_dim)
  return state if done_B is None else state.replace(converged_B=done_B)


def temperature_at(config: DiffusionConfig, step: jax.Array) -> jax.Array:
  """T of step n = N..1 (steps that remain), linear from t_max to t_min."""
  share = jnp.asarray(step, jnp.float32) / config.max_denoising_steps
  return config.t_min + (config.t_max - config.t_min) * share


def denoise_step(
  denoise_fn: DenoiseFn,
  config: DiffusionConfig,
  state: SamplerState,
  step: jax.Array,
  drawn: StepNoise,
  *,
  strategy: Callable | None = None,
  temperature: Callable = temperature_at,
  pinned: Pinned | None = None,
) -> SamplerState:
  """The one transition of the reverse process; `step` counts down to 1.

  For the arguments after `drawn`, see `sample_canvas`.
  """
  strategy = strategy or strategies.STRATEGIES[config.strategy]
  prediction = denoise_fn(
    state.canvas_BL,
    state.sc_BLD,
    temperature(config, step),
    drawn.uniforms_BLU,
    step,
  )
  _check_prediction(prediction, state, drawn.vocab_size)
  free = prediction.entropy_BL.shape[-1]
  if pinned is not None:
    prediction = _certain(prediction, pinned)
    free = jnp.maximum(jnp.sum(~pinned.mask_BL, axis=-1), 1)
  canvas_BL, accepted_BL, draft_BL = strategy(
    config, state.canvas_BL, prediction, step, drawn
  )
  may_converge = draft_BL is None
  if may_converge:
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
  )

  def freeze(old, new):
    frozen = state.converged_B.reshape((-1,) + (1,) * (new.ndim - 1))
    # With `jax_enable_x64` a network, or a strategy, may answer in 64 bits.
    return jnp.where(frozen, old, new.astype(old.dtype))

  return jax.tree.map(freeze, state, moved)


def _check_prediction(
  prediction: Prediction, state: SamplerState, vocab_size: int
) -> None:
  """Raises `TypeError` or `ValueError` for what a network must not return."""
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
  """The prediction with nothing to predict where tokens are pinned: they take
  no share of an entropy bound, nor are they the most confident ones."""
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
  *,
  batch_size: int,
  vocab_size: int,
  embed_dim: int,
  trajectory: bool = False,
  strategy: Callable | None = None,
  temperature: Callable = temperature_at,
  pinned: Pinned | None = None,
  initial_canvas_BL: jax.Array | None = None,
  noise_fn: Callable[[jax.Array], StepNoise] | None = None,
  done_B: jax.Array | None = None,
) -> tuple[SamplerState, SamplerState | None]:
  """Denoises one canvas per row; pure, for use inside `jax.jit`.

  Args:
    denoise_fn: the network (see the top of the file); an attribute `sizes`, a
      dict of `batch_size` and so on, is compared with the arguments here.
    key: a key, or one key a row [B]: a row's noise follows from its own key
      alone, so that it does not depend on what else is in the batch.
    config: the sampler's settings; L is `config.canvas_length`.
    batch_size: B.
    vocab_size: V.
    embed_dim: D of the self-conditioning.
    trajectory: run all N steps and return every state, instead of stopping
      when all rows have converged. The result is the same.
    strategy: what becomes of a prediction, see `strategies`; None is the one
      that `config.strategy` names.
    temperature: (config, step) -> T > 0.
    pinned: positions that keep their token at every step.
    initial_canvas_BL: int32, where to start instead of noise.
    noise_fn: step -> the random numbers of that step, instead of those that
      follow from `key`.
    done_B: bool, rows that are not to be sampled at all; they use no steps.

  Returns:
    (last state, its `draft_BL` is the text; states after each step stacked
    along a first axis of N, or None).

  Raises:
    ConfigError: no `DiffusionConfig`, no step, a temperature that is not
      positive, no such strategy.
    TypeError: `denoise_fn` returns something else than a `Prediction`.
    ValueError: an array of another shape, or no key.
  """
  configs.check_kind(config, DiffusionConfig)
  configs.validate_diffusion(config)
  sizes = {
    'batch_size': batch_size,
    'vocab_size': vocab_size,
    'embed_dim': embed_dim,
  }
  for name, size in getattr(denoise_fn, 'sizes', {}).items():
    if sizes[name] != size:
      raise ValueError(
        f'{name} = {sizes[name]}, and the network of denoise_fn has {size}.'
      )
  keys_B = row_keys(key, batch_size)
  shape = (batch_size, config.canvas_length)
  if initial_canvas_BL is not None:
    _check_shape('initial_canvas_BL', initial_canvas_BL, shape)
  if pinned is not None:
    _check_shape('pinned.mask_BL', pinned.mask_BL, shape)
    _check_shape('pinned.tokens_BL', pinned.tokens_BL, shape)
  if done_B is not None:
    _check_shape('done_B', done_B, (batch_size,))
  state = first_state(
    keys_B,
    config,
    vocab_size=vocab_size,
    embed_dim=embed_dim,
    pinned=pinned,
    initial_canvas_BL=initial_canvas_BL,
    done_B=done_B,
  )
  if noise_fn is None:
    noise_fn = lambda step: draw_step_noise(keys_B, step, config, vocab_size)

  def transition(state, step):
    return denoise_step(
      denoise_fn,
      config,
      state,
      step,
      noise_fn(step),
      strategy=strategy,
      temperature=temperature,
      pinned=pinned,
    )

  last_step = config.max_denoising_steps
  if trajectory:

    def scan_body(state, step):
      state = transition(state, step)
      return state, state

    steps = jnp.arange(last_step, 0, -1)
    return jax.lax.scan(scan_body, state, steps)

  def unfinished(carry):
    state, step = carry
    return (step > 0) & ~jnp.all(state.converged_B)

  def loop_body(carry):
    state, step = carry
    return transition(state, step), step - 1

  start = (state, jnp.asarray(last_step, jnp.int32))
  state, _ = jax.lax.while_loop(unfinished, loop_body, start)
  return state, None


def _check_shape(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
  if array.shape != shape:
    axes = ('batch_size', 'canvas_length')[: len(shape)]
    raise ValueError(
      f'{name} must be [{", ".join(axes)}] = {list(shape)}, it is '
      f'{list(array.shape)}.'
    )


def row_keys(key: jax.Array, batch_size: int) -> jax.Array:
  """One key a row: the keys given, or split from a single one.

  Raises:
    ValueError: neither a key of `jax.random.key` nor one for each row.
  """
  dtype, shape = getattr(key, 'dtype', None), getattr(key, 'shape', None)
  is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
  if not is_key or shape not in ((), (batch_size,)):
    found = repr(key) if dtype is None else f'{dtype}{list(shape)}'
    raise ValueError(
      f'key must be one of jax.random.key, or an array of {batch_size}, one a '
      f'row; it is {found}.'
    )
  return key if key.ndim else jax.random.split(key, batch_size)


def draw_canvas(
  keys_B: jax.Array, config: DiffusionConfig, vocab_size: int
) -> jax.Array:
  """The noise that denoising starts from: int32 [B, L]."""
  return jax.vmap(
    lambda key: noise.prior_canvas(
      jax.random.fold_in(key, 0), (config.canvas_length,), vocab_size
    )
  )(keys_B)


def draw_step_noise(
  keys_B: jax.Array,
  step: jax.Array,
  config: DiffusionConfig,
  vocab_size: int,
) -> StepNoise:
  """The random numbers of step n >= 1, each row from its own key."""

  def draw(key):
    uniform_key, token_key, choice_key = jax.random.split(
      jax.random.fold_in(key, step), 3
    )
    L = config.canvas_length
    U = ops.vocabulary.num_halvings(vocab_size)
    uniforms_LU = noise.uniform_from_nearer_end(uniform_key, (L, U))
    tokens_L = noise.prior_canvas(token_key, (L,), vocab_size)
    choice_L = jax.random.uniform(choice_key, (L,), jnp.float32)
    return uniforms_LU, tokens_L, choice_L

  return StepNoise(*jax.vmap(draw)(keys_B), vocab_size)


def predict(
  logits_BLV: jax.Array,
  temperature: jax.Array,
  uniforms_BLU: jax.Array,
  soft_embedding: Callable[[jax.Array], jax.Array],
) -> Prediction:
  """A `Prediction` from whole logits, in float32.

  Args:
    logits_BLV: unscaled logits.
    temperature: a scalar > 0.
    uniforms_BLU: float32 in [-1/2, 1/2]; see `StepNoise`.
    soft_embedding: probabilities [B, L, V] -> [B, L, D].
  """
  scaled_BLV = logits_BLV.astype(jnp.float32) / temperature
  log_p_BLV = jax.nn.log_softmax(scaled_BLV, axis=-1)
  p_BLV = jnp.exp(log_p_BLV)
  # A forbidden token has log p = -inf, and adds nothing, nor to gradients.
  terms_BLV = p_BLV * jnp.where(p_BLV > 0, log_p_BLV, 0.0)
  return Prediction(
    sample_BL=ops.vocabulary.sample(p_BLV, uniforms_BLU),
    argmax_BL=jnp.argmax(scaled_BLV, axis=-1).astype(jnp.int32),
    entropy_BL=-jnp.sum(terms_BLV, axis=-1),
    confidence_BL=jnp.max(p_BLV, axis=-1),
    sc_BLD=soft_embedding(p_BLV),
    logits_BLV=logits_BLV,
  )
