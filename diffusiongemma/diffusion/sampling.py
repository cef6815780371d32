"""Sampling options of a request, as one pytree.

  Sampling(strategy='confidence', temperature=0.7, pinned=pin(...))

Numbers and arrays in it are data: another value does not recompile. A callable
is a function, or a callable pytree such as
`jax.tree_util.Partial(function, array)` or a `flax.struct.PyTreeNode` with
`__call__`: the function is part of the program, its arrays are data.

  strategy(config, canvas_BL, prediction, time, drawn)     see `strategies`
  temperature(config, time) -> T > 0, one or [B, 1]
  logit_hook, constraint(canvas_BL, logits_BLV, time, state) -> logits_BLV
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import inspect
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.config import ConfigError
from diffusiongemma.config import DiffusionConfig
from diffusiongemma.diffusion import strategies


class Time(NamedTuple):
  """The step of each row of a batch.

  Attributes:
    left_B1: int32, remaining steps, this one included: N..1.
    steps_B1: int32, N, the number of all steps.
  """

  left_B1: jax.Array
  steps_B1: jax.Array


class Pinned(flax.struct.PyTreeNode):
  """Positions that keep their token: infilling, editing, forced words.

  Attributes:
    mask_BL: bool, True where pinned.
    tokens_BL: int32, the tokens there; arbitrary elsewhere.
  """

  mask_BL: jax.Array
  tokens_BL: jax.Array

  def hold(self, tokens_BL: jax.Array) -> jax.Array:
    """`tokens_BL` with the pinned tokens inserted."""
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


# (canvas_BL, logits_BLV, time, state) -> logits_BLV
LogitHook = Callable[[jax.Array, jax.Array, Time, 'object'], jax.Array]
# (config, time) -> T
Schedule = Callable[[DiffusionConfig, Time], jax.Array]


class Sampling(flax.struct.PyTreeNode):
  """Options that override the config when a batch is sampled.

  Attributes:
    strategy: a name or a callable; None is that of the config.
    temperature: T > 0 of all steps, a number or float32 [B], or a callable;
      None falls from the config's t_max to its t_min.
    num_steps: most denoising steps of a canvas, a number or int32 [B] for each
      row; None is `config.max_denoising_steps`.
    pinned: positions of the canvas that keep their token at every step.
    logit_hook: changes the logits before the temperature; -inf bans a token,
      all others at -inf force it.
    constraint: the same, applied after the hook.
  """

  strategy: str | strategies.Strategy | None = None
  temperature: float | jax.Array | Schedule | None = None
  num_steps: int | jax.Array | None = None
  pinned: Pinned | None = None
  logit_hook: LogitHook | None = None
  constraint: LogitHook | None = None

  def __post_init__(self):
    # Plain functions are wrapped as pytrees without arrays.
    for name in ('strategy', 'temperature', 'logit_hook', 'constraint'):
      value = getattr(self, name)
      if isinstance(value, str):
        value = strategies.find(value)
      if inspect.isroutine(value):
        object.__setattr__(self, name, jax.tree_util.Partial(value))

  def steps_B1(self, config: DiffusionConfig, batch_size: int) -> jax.Array:
    """N of each row, int32 [B, 1]."""
    steps = self.num_steps
    steps = config.max_denoising_steps if steps is None else steps
    return _column('num_steps', jnp.asarray(steps, jnp.int32), batch_size)

  def temperature_B1(self, config: DiffusionConfig, time: Time) -> jax.Array:
    """T of each row, float32 [B, 1]."""
    temperature = self.temperature
    if temperature is None:
      temperature = falling_temperature
    if callable(temperature):
      temperature = temperature(config, time)
    temperature = jnp.asarray(temperature, jnp.float32)
    return _column('temperature', temperature, len(time.left_B1))

  def strategy_of(self, config: DiffusionConfig) -> strategies.Strategy:
    """The strategy as a function."""
    strategy = self.strategy or config.strategy
    return strategies.find(strategy) if isinstance(strategy, str) else strategy

  @property
  def needs_logits(self) -> bool:
    """Whether logits must exist in memory, for a hook or a constraint."""
    return self.logit_hook is not None or self.constraint is not None


AS_CONFIGURED = Sampling()


def falling_temperature(config: DiffusionConfig, time: Time) -> jax.Array:
  """T of step n = N..1, linear in n, t_max at N; float32, shape of `time`."""
  share = jnp.asarray(time.left_B1, jnp.float32) / time.steps_B1
  return config.t_min + (config.t_max - config.t_min) * share


def check(sampling: Sampling) -> None:
  """Raises `ConfigError` for invalid options; traced values are not checked."""
  if not isinstance(sampling, Sampling):
    raise ConfigError(
      f'sampling must be a Sampling, it is a {type(sampling).__name__}: '
      "Sampling(strategy='confidence', temperature=0.7)."
    )
  for name in ('temperature', 'num_steps'):
    value = getattr(sampling, name)
    if value is None or callable(value) or isinstance(value, jax.core.Tracer):
      continue
    if not np.all(np.asarray(value) > 0):
      raise ConfigError(f'{name} must be positive, it is {value}.')


def _column(name: str, x: jax.Array, batch_size: int) -> jax.Array:
  """A scalar, [B] or [B, 1] broadcast to [B, 1]."""
  shapes = ((), (batch_size,), (batch_size, 1))
  if x.shape not in shapes:
    raise ValueError(
      f'{name} must be one number or one for each of {batch_size} rows; its '
      f'shape is {list(x.shape)}.'
    )
  x_B1 = x[:, None] if x.ndim == 1 else x
  return jnp.broadcast_to(x_B1, (batch_size, 1))
