"""Chats, or continues a text."""

import pathlib
import typing

from absl import flags

from diffusiongemma.commands import shared

if typing.TYPE_CHECKING:
  from diffusiongemma.commands.request import Request
  from diffusiongemma.runs.load import Run

_PROMPT = flags.DEFINE_string(
  'prompt', None, 'The message, or the text to continue.'
)
_SYSTEM = flags.DEFINE_string('system', '', 'The system message.')
_IMAGE = shared.path(
  flags.DEFINE_multi_string(
    'image', [], 'A picture for the first message; may be repeated.'
  )
)
_THINK = flags.DEFINE_bool(
  'think', False, 'Let the model think before it answers.'
)
_TOOLS = shared.path(
  flags.DEFINE_string(
    'tools', None, 'JSON file with a list of functions it may call.'
  )
)
_INFILL = flags.DEFINE_string(
  'infill', None, 'A text with holes, ___, one underscore per token.'
)
_PROMPTS = shared.path(
  flags.DEFINE_string(
    'prompts',
    '',
    'JSON lines, {"prompt": ...} or {"messages": ...}, or - for standard '
    'input; prints a JSON line for each.',
  )
)
_CHAT = flags.DEFINE_bool(
  'chat', None, 'Prompts are messages. Default: if the network knows turns.'
)
_TRACE = shared.path(
  flags.DEFINE_string(
    'trace', '', 'A .html or .png file for a trace of the denoising steps.'
  )
)
_SEED = flags.DEFINE_integer(
  'seed', 0, 'The random seed.', lower_bound=0, upper_bound=2**63 - 1
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  'max_new_tokens',
  None,
  'Most tokens of a text or reply. Default: four canvases.',
)


def run(overrides: dict[str, str]) -> int:
  """Samples; returns the exit code."""
  from diffusiongemma.commands.request import Request

  request = Request(
    prompt=_PROMPT.value,
    system=_SYSTEM.value,
    images=tuple(_IMAGE.value),
    thinking=_THINK.value,
    tools=_read_tools(),
    infill=_INFILL.value,
    prompts=_PROMPTS.value,
    batch_size=shared.BATCH_SIZE.value or 8,
    chat=_CHAT.value,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    seed=_SEED.value,
    trace=_TRACE.value,
    as_json=shared.FORMAT.value == 'json',
  )
  return sample(shared.load_run(overrides), request)


def _read_tools() -> tuple[dict[str, typing.Any], ...]:
  """The declarations in the file of `--tools`. Raises `ToolsError`."""
  from diffusiongemma.generation import chat

  if not _TOOLS.value:
    return ()
  try:
    return chat.read_tools(pathlib.Path(_TOOLS.value).read_text('utf-8'))
  except (OSError, UnicodeDecodeError) as error:
    raise chat.ToolsError(f'{_TOOLS.value} cannot be read: {error}') from None


def sample(run: 'Run', request: 'Request') -> int:
  """Answers a request with a run; returns the exit code.

  Raises:
    SampleError: the network does not support the request.
    PromptError, ImageError, TemplateError, TokenizerError, TraceError: the
      prompt can't be used, or a trace can't be written.
  """
  from diffusiongemma.commands import chats
  from diffusiongemma.commands import prompts
  from diffusiongemma.commands import request as requests
  from diffusiongemma.commands import texts

  request = requests.check(run, request)
  if request.prompts:
    return prompts.write(run, request)
  if request.infill is not None:
    return texts.infill(run, request)
  if request.chat:
    return chats.write(run, request)
  return texts.go_on(run, request)
