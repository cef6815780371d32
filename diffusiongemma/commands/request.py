"""Requests of `--mode=sample`, and the output of what a network writes."""

from collections.abc import Iterator
import contextlib
import sys
from typing import Any
from typing import NamedTuple

from rich import console as rich_console
from rich import text as rich_text

from diffusiongemma.commands import trace
from diffusiongemma.errors import Error
from diffusiongemma.generation import generate
from diffusiongemma.generation import live
from diffusiongemma.runs.load import Run
from diffusiongemma.text import template as templates


class SampleError(Error, ValueError):
  """A request that does not fit the network."""

  exit_code = 2


class Request(NamedTuple):
  """The options of a call of `--mode=sample`.

  Attributes:
    prompt: a text or message; None reads messages from standard input.
    system: the system message.
    images: files of the pictures of the prompt.
    thinking: whether the model thinks before it answers.
    tools: declarations, see `chat.read_tools`.
    infill: a text with holes.
    prompts: a file of many prompts, '-' is standard input; see `prompts`.
    batch_size: how many of them are written together.
    chat: whether prompts are messages; None if the tokenizer knows turns.
    max_new_tokens: of each text; None is four canvases.
    seed: of the noise.
    trace: a file for the denoising steps of the last text.
    as_json: print only one JSON object per text.
  """

  prompt: str | None = None
  system: str = ''
  images: tuple[str, ...] = ()
  thinking: bool = False
  tools: tuple[dict[str, Any], ...] = ()
  infill: str | None = None
  prompts: str = ''
  batch_size: int = 8
  chat: bool | None = None
  max_new_tokens: int | None = None
  seed: int = 0
  trace: str = ''
  as_json: bool = False


def check(run: Run, request: Request) -> Request:
  """The request with `chat` resolved for this network.

  Raises:
    SampleError: the network does not support the request.
  """
  if request.trace:
    try:
      trace.check_path(request.trace)
    except trace.TraceError as error:
      raise SampleError(str(error)) from error
  is_chat = request.chat
  if is_chat is None:
    is_chat = templates.knows_turns(run.tokenizer)
  elif is_chat:
    try:
      templates.template_of(run.tokenizer, run.chat_template)
    except templates.TemplateError as error:
      raise SampleError(str(error)) from error
  for flag, value in (
    ('system', request.system),
    ('think', request.thinking),
    ('tools', request.tools),
  ):
    if value and not is_chat:
      raise SampleError(f'--{flag} is for a chat; this network has none.')
  for flag, value in (
    ('think', request.thinking),
    ('tools', request.tools),
    ('max_new_tokens', request.max_new_tokens is not None),
  ):
    if value and request.infill is not None:
      raise SampleError(
        f'--{flag} is not for --infill, which writes only into its holes.'
      )
  for flag, other in (
    ('prompt', request.prompt),
    ('infill', request.infill),
    ('image', request.images),
    ('trace', request.trace),
  ):
    if other and request.prompts:
      raise SampleError(f'--{flag} is not for --prompts, a file of prompts.')
  return request._replace(chat=is_chat)


def most_tokens(run: Run, request: Request) -> int:
  """Most new tokens of a text."""
  if request.max_new_tokens is None:
    return generate.default_max_new_tokens(run.config)
  return request.max_new_tokens


@contextlib.contextmanager
def watching(
  run: Run, request: Request, shown: str
) -> Iterator[dict[str, Any]]:
  """Callbacks for `generate`: a live canvas, and the recorder of a trace.

  Without callbacks, a whole canvas is denoised in one program.
  """
  steps = run.config.diffusion.max_denoising_steps
  watchers = []
  with contextlib.ExitStack() as stack:
    canvas = live.LiveCanvas(run.tokenizer, shown, steps)
    if canvas.is_seen and not request.as_json:
      watchers.append(stack.enter_context(canvas))
    if request.trace:
      record = trace.Trace(run.tokenizer, shown, steps, _settings(run, request))
      watchers.append(record)

    def on_step(step, state):
      for watcher in watchers:
        watcher.on_step(step, state)

    def on_canvas(kept):
      for watcher in watchers:
        watcher.on_canvas(kept[0])

    yield {'on_step': on_step, 'on_canvas': on_canvas} if watchers else {}
  if request.trace:
    trace.write(record, request.trace)


def _settings(run: Run, request: Request) -> tuple[str, ...]:
  """What else than the prompt a text depends on, for its trace."""
  diffusion = run.config.diffusion
  return (
    f'seed {request.seed}',
    diffusion.strategy,
    f'temperature {diffusion.t_max:g} to {diffusion.t_min:g}',
    f'canvas {diffusion.canvas_length}',
    f'after {run.step:,} steps of training',
  )


def console() -> rich_console.Console:
  """A console on standard output."""
  return rich_console.Console(file=sys.stdout, highlight=False, soft_wrap=True)


def print_text(text: str, style: str = '') -> None:
  """Prints text of a network, without control characters."""
  console().print(rich_text.Text(live.printable(text), style))


def print_statistics(written: generate.Generation) -> None:
  """Prints tokens and steps of a text, if the output is a terminal."""
  reason = (written.stopped_by or 'nothing').replace('_', ' ')
  if console().file.isatty():
    print_text(
      f'{len(written.tokens)} tokens in {written.steps} steps '
      f'({written.tokens_per_forward:.1f} per step), stopped by {reason}',
      live.STATUS,
    )
