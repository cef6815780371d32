"""The Python interface of a run: generate text, chat, measure likelihood.

  run = load('runs/tiny')
  generate(run, 'ROMEO.').text
  for piece in stream(run, 'ROMEO.'): ...
  chat(run, [{'role': 'user', 'content': 'Why is the sky blue?'}]).text
  log_likelihood(run, 'a text').log_p
  loss(config, params, batch, key)             for your own training loop

Each is a few lines over functions that take parameters and token ids. Text is
generated with parameters in the layout that is fastest on this device
(`weights.arrange`), computed at the first call; `run.params` is not changed.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any
from typing import NamedTuple
from typing import TypedDict
from typing import Unpack
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma import config as configs
from diffusiongemma import powers
from diffusiongemma.config import Config
from diffusiongemma.config import ConfigError
from diffusiongemma.diffusion import cross_entropy
from diffusiongemma.diffusion import likelihood
from diffusiongemma.diffusion import loss as losses
from diffusiongemma.diffusion import strategies
from diffusiongemma.diffusion.sampling import AS_CONFIGURED
from diffusiongemma.diffusion.sampling import LogitHook
from diffusiongemma.diffusion.sampling import Sampling
from diffusiongemma.diffusion.sampling import Schedule
from diffusiongemma.fields import unknown_name
from diffusiongemma.generation import chat as chats
from diffusiongemma.generation import generate as generation
from diffusiongemma.generation import network as network_lib
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.ops import weights
from diffusiongemma.ops.weights import Params
from diffusiongemma.runs.load import Run
from diffusiongemma.text import template as templates
from diffusiongemma.training import corpus
from diffusiongemma.training import data
from diffusiongemma.training import objectives

# A text, or token ids that begin with bos.
Prompt = str | Sequence[int]
Prompts = Sequence[str] | Sequence[Sequence[int]]
Seed = int | jax.Array


class Written(NamedTuple):
  """The text generated after a prompt, or a piece of it.

  Attributes:
    text: without control tokens.
    tokens: token ids, a stop token included.
    steps: denoising passes used.
    stopped_by: 'stop_token' or 'max_new_tokens'; None for a piece that is not
      the last.
  """

  text: str
  tokens: list[int]
  steps: int
  stopped_by: str | None


class Likelihood(NamedTuple):
  """The log likelihood of a text.

  Attributes:
    log_p: log p of all tokens after the first, in nats: exact, from the
      network read from left to right.
    tokens: token ids; the first is not predicted.
    log_p_of_token: float32, log p of each token after the first.
    denoising_bound: estimated lower bound of log p under denoising, in nats,
      for a run trained with `loo_ce`; None for others.
    denoising_bound_error: standard error of that estimate.
  """

  log_p: float
  tokens: list[int]
  log_p_of_token: np.ndarray
  denoising_bound: float | None
  denoising_bound_error: float | None


class Options(TypedDict, total=False):
  """Keyword arguments of `generate`, for type checkers."""

  max_new_tokens: int | None
  key: Seed
  sampling: Sampling
  pinned: Mapping[int, int] | Sequence[Mapping[int, int]] | None
  pictures: Sequence[Any] | None
  strategy: str | strategies.Strategy | None
  temperature: float | jax.Array | Schedule | None
  num_steps: int | jax.Array | None
  logit_hook: LogitHook | None
  constraint: LogitHook | None


@overload
def generate(  # type: ignore[overload-overlap]
  run: Run, prompt: Prompt, **options: Unpack[Options]
) -> Written: ...
@overload
def generate(
  run: Run, prompt: Prompts, **options: Unpack[Options]
) -> list[Written]: ...
def generate(
  run: Run,
  prompt: Prompt | Prompts,
  *,
  max_new_tokens: int | None = None,
  key: Seed = 0,
  sampling: Sampling = AS_CONFIGURED,
  pinned: Mapping[int, int] | Sequence[Mapping[int, int]] | None = None,
  pictures: Sequence[Any] | None = None,
  **fields: Any,
) -> Written | list[Written]:
  """Continues a text, or several at once.

  Args:
    run: what `load` returns.
    prompt: a text; token ids that begin with bos; or a list of either.
    max_new_tokens: of each text; None is four canvases.
    key: a seed, or a key of `jax.random.key`; the same key gives the same text.
    sampling: strategy, temperature, steps, hooks, where they differ from the
      config.
    pinned: tokens that the new text must have, by their position in it; a list
      for a list of prompts.
    pictures: images for the image tokens of the prompt, in order; a list of
      lists for a list of prompts.
    **fields: single fields of `sampling`.

  Returns:
    A `Written`, or a list of them for a list of prompts.

  Raises:
    PromptError: a prompt is empty, of a wrong type, or does not fit.
    WorkdirError: the run has no tokenizer.
    ConfigError: `run` is not a `Run`, or `sampling` is invalid.
    ImageError: a picture can't be used.
  """
  _check_run(run)
  prompts, is_one = _token_ids(run, prompt)
  rows = _generated(
    *(run, prompts, key, max_new_tokens, _with_fields(sampling, fields)),
    pinned=_rows(pinned, is_one),
    pictures=_rows(pictures, is_one),
  )
  return rows[0] if is_one else rows


def stream(
  run: Run,
  prompt: Prompt,
  *,
  max_new_tokens: int | None = None,
  key: Seed = 0,
  sampling: Sampling = AS_CONFIGURED,
  pinned: Mapping[int, int] | None = None,
  pictures: Sequence[Any] | None = None,
  **fields: Any,
) -> Iterator[Written]:
  """`generate` for one prompt, canvas by canvas.

  The pieces joined are the text of `generate`. Canvases are generated as the
  iterator is consumed. Arguments and errors are those of `generate`.
  """
  _check_run(run)
  prompts, is_one = _token_ids(run, prompt)
  if not is_one:
    raise prompt_lib.PromptError(
      'stream takes one prompt; generate takes more.'
    )
  canvases = generation.write_canvases(
    *(run.config, weights.arrange(run.params), prompts, _key(key)),
    _count(run, max_new_tokens),
    _with_fields(sampling, fields),
    pinned=None if pinned is None else [pinned],
    pictures=None if pictures is None else [pictures],
  )
  return _pieces(run, canvases)


def show(
  run: Run,
  prompt: Prompt,
  *,
  max_new_tokens: int | None = None,
  key: Seed = 0,
  sampling: Sampling = AS_CONFIGURED,
  pinned: Mapping[int, int] | None = None,
  pictures: Sequence[Any] | None = None,
  **fields: Any,
) -> Written:
  """`generate` of one prompt, shown while it is denoised: live on a terminal,
  in a notebook as one output that is replaced. Arguments and errors are those
  of `generate`."""
  from diffusiongemma.generation import live  # With rich, which is slow.

  _check_run(run)
  prompts, is_one = _token_ids(run, prompt)
  if not is_one:
    raise prompt_lib.PromptError('show takes one prompt; generate takes more.')
  text = prompt if isinstance(prompt, str) else run.tokenizer.decode(prompts[0])
  steps = run.config.diffusion.max_denoising_steps
  with live.LiveCanvas(run.tokenizer, text, steps) as canvas:
    (row,) = _generated(
      *(run, prompts, key, max_new_tokens, _with_fields(sampling, fields)),
      pinned=_rows(pinned, is_one),
      pictures=_rows(pictures, is_one),
      on_step=canvas.on_step if canvas.is_seen else None,
      on_canvas=lambda kept: canvas.on_canvas(kept[0]),
    )
  if not canvas.in_notebook:
    print(live.printable(text + row.text))
  return row


def chat(
  run: Run,
  messages: Sequence[dict[str, Any]],
  *,
  tools: Sequence[dict[str, Any]] = (),
  thinking: bool = False,
  max_new_tokens: int | None = None,
  key: Seed = 0,
  sampling: Sampling = AS_CONFIGURED,
  pictures: Sequence[Any] = (),
  **fields: Any,
) -> chats.Reply:
  """The reply to a conversation, with thinking and tool calls separated.

  Args:
    run: what `load` returns; its tokenizer or template knows turns.
    messages: `{'role': 'user', 'content': 'Hello'}` and so on; the last is from
      the user or a tool.
    tools: declarations of functions in OpenAI's format.
    thinking: whether the model thinks before it answers.
    max_new_tokens: of the reply; None is four canvases.
    key: a seed, or a key of `jax.random.key`.
    sampling: what differs from the config.
    pictures: one for each image part of the messages, in order.
    **fields: single fields of `sampling`.

  Raises:
    TemplateError: the template refuses the messages, or there are no turns.
    PromptError: the messages do not fit the context.
    ImageError: a picture can't be used.
  """
  _check_run(run)
  model = chats.Model(
    run.config,
    weights.arrange(run.params),
    run.tokenizer,
    templates.template_of(run.tokenizer, run.chat_template),
    tuple(tools),
    thinking,
    _count(run, max_new_tokens),
  )
  reply, _ = chats.take_turn(
    *(model, chats.Conversation(), messages, _key(key)),
    _with_fields(sampling, fields),
    pictures=pictures,
  )
  return reply


@overload
def log_likelihood(  # type: ignore[overload-overlap]
  run: Run, text: Prompt, *, key: Seed = 0
) -> Likelihood: ...
@overload
def log_likelihood(
  run: Run, text: Prompts, *, key: Seed = 0
) -> list[Likelihood]: ...
def log_likelihood(
  run: Run, text: Prompt | Prompts, *, key: Seed = 0
) -> Likelihood | list[Likelihood]:
  """The log likelihood of a text, exact and bounded by denoising.

  Args:
    run: what `load` returns.
    text: a text; token ids that begin with bos; or a list of either. The end
      of a text counts only if its end token is included.
    key: of the noise of the bound.

  Returns:
    A `Likelihood`, or a list of them for a list.

  Raises:
    PromptError: a text has nothing to predict, or is longer than the context.
  """
  _check_run(run)
  rows, is_one = _token_ids(run, text)
  context = run.config.model.context_length
  for tokens in rows:
    if not 2 <= len(tokens) <= context:
      raise prompt_lib.PromptError(
        f'A text of {len(tokens)} tokens has no likelihood here: it has 2 to '
        f'{context}, bos included.'
      )
  likelihoods = [_likelihood(run, tokens, _key(key)) for tokens in rows]
  return likelihoods[0] if is_one else likelihoods


def loss(
  config: Config,
  params: Params,
  batch: dict[str, jax.Array],
  key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The training loss of a batch: pure, for `jax.grad` and `jax.jit`.

  Args:
    config: the network, and in `config.train` the objective.
    params: parameters of the network.
    batch: `tokens_BS` and so on, see `loss.check_batch`; `data.make_dataset`
      yields them.
    key: for all random draws: canvases, times, corruption.

  Returns:
    (loss in nats per token, metrics), see `objectives`.

  Raises:
    ConfigError: `config` is no `Config`.
    ValueError: the batch is invalid.
  """
  configs.check_kind(config, Config)
  losses.check_batch(batch, config.diffusion.canvas_length)
  objective = objectives.find(config.train.objective)
  drawn = objective.draw(key, batch, config)
  network = network_lib.bind(config, params, config.train.remat)
  counts = losses.count(batch, drawn)
  value, metrics = objective.loss(network, batch, drawn, counts, config)
  del metrics['auxiliary']
  return value, metrics


def _check_run(run: Run) -> None:
  if not isinstance(run, Run):
    raise ConfigError(
      f'run must be what load returns, it is a {type(run).__name__}.'
    )
  _ = run.tokenizer  # Which may raise.


def _rows(of_prompts: Any, is_one: bool) -> Any:
  """Wraps the argument of a single prompt in a list; a list stays as it is."""
  return [of_prompts] if is_one and of_prompts is not None else of_prompts


def _with_fields(sampling: Sampling, fields: Mapping[str, Any]) -> Sampling:
  known = [field.name for field in dataclasses.fields(Sampling)]
  for name in fields:
    if name not in known:
      raise ConfigError(unknown_name(name, known))
  return sampling.replace(**fields) if fields else sampling


def _token_ids(
  run: Run, prompt: Prompt | Prompts
) -> tuple[list[list[int]], bool]:
  """(token ids of each prompt, whether `prompt` is a single one)."""
  if isinstance(prompt, str):
    tokens = run.tokenizer.encode(prompt)
    if not tokens:
      raise prompt_lib.PromptError('The prompt is empty; give a few words.')
    return [[run.tokenizer.bos_id, *tokens]], True
  try:
    items: list[Any] = list(prompt)
  except TypeError as error:
    raise prompt_lib.PromptError(
      'A prompt is a text, token ids, or a list of either; this is a '
      f'{type(prompt).__name__}.'
    ) from error
  if not items:
    raise prompt_lib.PromptError('There is no prompt.')
  if isinstance(items[0], str) or np.ndim(items[0]):
    return [_token_ids(run, item)[0][0] for item in items], False
  return [prompt_lib.token_ids(0, items)], True


def _key(key: Seed) -> jax.Array:
  return jax.random.key(key) if isinstance(key, int) else key


def _count(run: Run, max_new_tokens: int | None) -> int:
  if max_new_tokens is None:
    return generation.default_max_new_tokens(run.config)
  return max_new_tokens


def _generated(
  run: Run,
  prompts: Sequence[Sequence[int]],
  key: Seed,
  max_new_tokens: int | None,
  sampling: Sampling,
  **options: Any,
) -> list[Written]:
  """`generate_tokens` of a run, as texts."""
  written = generation.generate_tokens(
    *(run.config, weights.arrange(run.params), prompts, _key(key)),
    *(_count(run, max_new_tokens), sampling),
    **options,
  )
  return [_written(run, row) for row in written.rows]


def _written(run: Run, row: generation.Generation) -> Written:
  text = run.tokenizer.decode(row.tokens)
  return Written(text, row.tokens, row.steps, row.stopped_by)


def _pieces(
  run: Run, canvases: Iterator[generation.Canvas]
) -> Iterator[Written]:
  """The text that each canvas adds; a character whose bytes are split between
  two canvases comes with the second."""
  sent, steps = '', 0
  for canvas in canvases:
    (row,), (tokens,) = canvas.so_far.rows, canvas.kept
    text = run.tokenizer.decode(row.tokens)
    if row.stopped_by is None:
      text = text.rstrip('\N{REPLACEMENT CHARACTER}')
    new = text[len(sent) :]
    yield Written(new, tokens, row.steps - steps, row.stopped_by)
    sent, steps = sent + new, row.steps


def _likelihood(run: Run, tokens: list[int], key: jax.Array) -> Likelihood:
  config, pad = run.config, run.config.diffusion.pad_token_id
  S = min(
    powers.smallest_power_of_two(max(16, len(tokens))),
    config.model.context_length,
  )
  tokens_BS = np.full((1, S), pad, np.int32)
  tokens_BS[0, : len(tokens)] = tokens
  length_B = np.array([len(tokens)], np.int32)
  log_p_BS = _log_p(config, run.params, tokens_BS, length_B)
  log_p = np.asarray(log_p_BS)[0, : len(tokens) - 1]
  bound = error = None
  if objectives.find(config.train.objective).LEAVES_ONE_OUT:
    C = config.diffusion.canvas_length
    length = min(config.data.sequence_length, config.model.context_length)
    example = corpus.Example(np.array(tokens[1:], np.int32))
    canvases = data.heldout_canvases(
      [example], length, C, run.tokenizer.bos_id, pad
    )
    nats_nB = _bound(config, run.params, key, canvases)
    total, error = map(float, likelihood.combine(np.asarray(nats_nB)))
    bound = -total
  return Likelihood(float(log_p.sum()), tokens, log_p, bound, error)


@functools.partial(jax.jit, static_argnames='config')
def _log_p(config, params, tokens_BS, length_B):
  """log p of the token after each position, [B, S]."""
  network = network_lib.bind(config, params)
  h_BSD, _, _ = network.prefill(tokens_BS, length_B)
  targets_BS = jnp.roll(tokens_BS, -1, axis=1)
  nats_BS, _ = cross_entropy.per_position(network.logits, h_BSD, targets_BS)
  return -nats_BS


@functools.partial(jax.jit, static_argnames='config')
def _bound(config, params, key, canvases):
  return likelihood.nelbo(
    *(network_lib.bind(config, params), key, *canvases),
    *(config.model.vocab_size, likelihood.DRAWS),
  )
