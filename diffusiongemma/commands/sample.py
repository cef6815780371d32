"""`--mode=sample`: what it asks, writes and shows.

a chat        turns typed one after the other, or a single --prompt
a text        a --prompt and how it goes on, from a network without turns
an infilling  --infill="The capital of ___ is Rome."
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import json
import re
import sys
from typing import Any
from typing import NamedTuple

import jax
from rich import console as rich_console
from rich import text as rich_text

from diffusiongemma.commands import terminal
from diffusiongemma.commands import trace
from diffusiongemma.errors import Error
from diffusiongemma.generation import chat
from diffusiongemma.generation import generate
from diffusiongemma.generation import images
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.text import template as templates
from diffusiongemma.text import tokenizer as tokenizers

# What a person can mend; in a chat it is told and the chat goes on.
EXPECTED_ERRORS = (
  prompt_lib.PromptError,
  images.ImageError,
  templates.TemplateError,
  tokenizers.TokenizerError,
  trace.TraceError,
)
HELP = """\
/image FILE   show a picture together with the next message
/think        switch thinking on or off
/new          forget the conversation
/quit         end (as Ctrl-D does; Ctrl-C stops a reply)
A line that ends in \\ goes on in the next one; // begins a line with a /."""
HOLE = re.compile(r' ?(_{3,})')


class SampleError(Error, ValueError):
  """A request that does not fit the network."""

  exit_code = 2


class Request(NamedTuple):
  """What a person asks for.

  Attributes:
    prompt: a text or message; None asks for messages one after the other.
    system: what the model is told before the first message.
    images: files, shown with the prompt.
    thinking: whether the model thinks before it answers.
    tools: declarations, see `chat.read_tools`.
    infill: a text with holes.
    chat: whether prompts are messages; None if the tokenizer knows turns.
    max_new_tokens: of each text; None is four canvases.
    seed: of the noise.
    trace: a file for the denoising steps of the last text.
    as_json: print one object a text, nothing else.
  """

  prompt: str | None = None
  system: str = ''
  images: tuple[str, ...] = ()
  thinking: bool = False
  tools: tuple[dict[str, Any], ...] = ()
  infill: str | None = None
  chat: bool | None = None
  max_new_tokens: int | None = None
  seed: int = 0
  trace: str = ''
  as_json: bool = False


def sample(run, request: Request) -> int:
  """Writes with a run (`workdir.Run`); returns the exit code.

  Raises:
    SampleError: the network can't do it.
    EXPECTED_ERRORS: the prompt can't be used.
  """
  if request.trace:
    try:
      trace.check_path(request.trace)
    except trace.TraceError as error:
      raise SampleError(str(error)) from error
  knows_turns = templates.knows_turns(run.tokenizer)
  is_chat = knows_turns if request.chat is None else request.chat
  if is_chat and not (knows_turns or run.chat_template):
    raise SampleError(
      'This network knows no turns: its tokenizer has no <|turn>. It goes on '
      'from a text: --nochat.'
    )
  for flag, given in (
    ('system', request.system),
    ('think', request.thinking),
    ('tools', request.tools),
  ):
    if given and not is_chat:
      raise SampleError(f'--{flag} is for a chat; this network has none.')
  for flag, given in (
    ('think', request.thinking),
    ('tools', request.tools),
    ('max_new_tokens', request.max_new_tokens),
  ):
    if given and request.infill is not None:
      raise SampleError(
        f'--{flag} is not for --infill, which writes what its holes hold.'
      )
  if request.max_new_tokens is None:
    canvas_length = run.config.diffusion.canvas_length
    request = request._replace(max_new_tokens=4 * canvas_length)
  if request.infill is not None:
    return _infill(run, request, is_chat)
  if is_chat:
    return _chat(run, request)
  return _go_on(run, request)


@contextlib.contextmanager
def _watching(run, request: Request, shown: str) -> Iterator[dict[str, Any]]:
  """Callbacks for `generate`: a live canvas, and what the trace is made of.

  Without any, the whole canvas is denoised on the device in one go.
  """
  steps = run.config.diffusion.max_denoising_steps
  watchers = []
  with contextlib.ExitStack() as stack:
    canvas = terminal.LiveCanvas(run.tokenizer, shown, steps)
    if canvas.is_terminal and not request.as_json:
      watchers.append(stack.enter_context(canvas))
    if request.trace:
      record = trace.Trace(run.tokenizer, shown, steps)
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


def _console() -> rich_console.Console:
  return rich_console.Console(file=sys.stdout, highlight=False, soft_wrap=True)


def _print(text: str, style: str = '') -> None:
  """Prints what a network wrote; nothing in it reaches the terminal as a
  command."""
  _console().print(rich_text.Text(terminal.printable(text), style))


def _print_statistics(written: generate.Generation) -> None:
  if _console().is_terminal:
    _print(
      f'{len(written.tokens)} tokens in {written.steps} steps '
      f'({written.tokens_per_forward:.1f} a step), stopped by '
      f'{written.stopped_by.replace("_", " ")}',
      terminal.STATUS,
    )


# ----- a text ---------------------------------------------------------------


def _go_on(run, request: Request) -> int:
  """A prompt, and how it goes on."""
  prompt = request.prompt or ''
  if not prompt:
    raise prompt_lib.PromptError(
      'The prompt is empty; give a few words to go on from: --prompt="..."'
    )
  tokens = [run.tokenizer.bos_id]
  if request.images:
    tokens += [_image_token(run)] * len(request.images)
  tokens += run.tokenizer.encode(prompt)
  with _watching(run, request, prompt) as callbacks:
    (written,), *_ = generate.generate(
      run.config,
      run.params,
      [tokens],
      jax.random.key(request.seed),
      request.max_new_tokens,
      pictures=[request.images],
      **callbacks,
    )
  text = run.tokenizer.decode(written.tokens)
  if request.as_json:
    print(json.dumps({'text': text, **written._asdict()}))
    return 0
  whole = rich_text.Text().append(terminal.printable(prompt), terminal.PROMPT)
  _console().print(whole.append(terminal.printable(text), terminal.ACCEPTED))
  _print_statistics(written)
  return 0


def _image_token(run) -> int:
  if run.config.model.vision is None:
    raise prompt_lib.PromptError(
      'This network reads text only; it can see no picture.'
    )
  return run.config.model.vision.image_token_id


# ----- an infilling ---------------------------------------------------------


def _infill(run, request: Request, is_chat: bool) -> int:
  """A text whose holes are filled, after the prompt if there is one."""
  pins, holes, length = parse_infill(run.tokenizer, request.infill)
  if is_chat:
    model = _chat_model(run, request)
    messages = [*_start(request).messages]
    if request.prompt:
      messages.append(chat.user_message(request.prompt, len(request.images)))
    tokens = templates.encode_chat(run.tokenizer, model.template, messages)
    end = run.tokenizer.control_tokens.get('<turn|>', run.tokenizer.eos_id)
  else:
    tokens = [run.tokenizer.bos_id, *run.tokenizer.encode(request.prompt or '')]
    end = run.tokenizer.eos_id
  pins[length] = end
  shown = request.prompt + '\n' if request.prompt else ''
  with _watching(run, request, shown) as callbacks:
    (written,), *_ = generate.generate(
      run.config,
      run.params,
      [tokens],
      jax.random.key(request.seed),
      length + 1,
      pictures=[request.images],
      pinned=[pins],
      **callbacks,
    )
  tokens = written.tokens[:length]
  fillings = [run.tokenizer.decode(tokens[a:b]) for a, b in holes]
  if request.as_json:
    text = run.tokenizer.decode(tokens)
    record = {'text': text, 'holes': fillings, 'steps': written.steps}
    print(json.dumps(record))
    return 0
  whole, start = rich_text.Text(), 0
  for (a, b), filling in zip(holes, fillings, strict=True):
    before = run.tokenizer.decode(tokens[start:a])
    whole.append(terminal.printable(before))
    whole.append(terminal.printable(filling), 'bold green')
    start = b
  rest = run.tokenizer.decode(tokens[start:])
  _console().print(whole.append(terminal.printable(rest)))
  return 0


def parse_infill(
  tokenizer: tokenizers.Tokenizer, text: str
) -> tuple[dict[int, int], list[tuple[int, int]], int]:
  """A text with holes: three underscores or more, one for each token.

  Returns:
    (the tokens around the holes by their place, first place and end of each
    hole, tokens in all).

  Raises:
    SampleError: there is no hole.
  """
  pins, holes, place, start = {}, [], 0, 0

  def add(part):
    nonlocal place
    for token in tokenizer.encode(part):
      pins[place] = token
      place += 1

  for hole in HOLE.finditer(text):
    # The space before a word is part of its token.
    add(text[start : hole.start()])
    holes.append((place, place + len(hole.group(1))))
    place += len(hole.group(1))
    start = hole.end()
  if not holes:
    raise SampleError(
      '--infill needs a hole: ___, three underscores or more, one for each '
      'token that is to stand there.'
    )
  add(text[start:])
  return pins, holes, place


# ----- a chat ---------------------------------------------------------------


def _chat_model(run, request: Request) -> chat.Model:
  return chat.Model(
    run.config,
    run.params,
    run.tokenizer,
    run.chat_template or templates.default_template(),
    request.tools,
    request.thinking,
    request.max_new_tokens,
  )


def _start(request: Request) -> chat.Conversation:
  if not request.system:
    return chat.Conversation()
  return chat.Conversation(({'role': 'system', 'content': request.system},))


def _chat(run, request: Request) -> int:
  """One message and its reply, or as many as are typed."""
  if request.prompt is None:
    return _Chat(run, request).talk()
  if not request.prompt.strip() and not request.images:
    raise prompt_lib.PromptError('The prompt is empty; say something.')
  message = chat.user_message(request.prompt, len(request.images))
  _Chat(run, request).say([message], request.images)
  return 0


class _Chat:
  """A chat on the terminal, or from lines of a file."""

  def __init__(self, run, request: Request):
    self.run = run
    self.request = request
    self.model = _chat_model(run, request)
    self.conversation = _start(request)
    self.pictures = list(request.images)  # Of the next message.
    self.turns = 0
    self.failed = False

  def talk(self) -> int:
    """Reads messages until there are no more; 1 if one of them failed."""
    if sys.stdin.isatty():
      with contextlib.suppress(ImportError):
        import readline  # noqa: F401  Lines can be edited then.
      print('Say something; /help tells more, Ctrl-D ends.')
    while (line := self.read_line('> ')) is not None:
      command, _, argument = line.partition(' ')
      if command == '/quit':
        break
      if line.startswith('/') and not line.startswith('//'):
        self.attempt(self.obey, command, argument.strip())
      elif line.strip():
        self.attempt(self.answer, line.removeprefix('/'))
    return int(self.failed)

  def read_line(self, prompt: str) -> str | None:
    """What was typed, None at the end."""
    lines = []
    while not lines or lines[-1].endswith('\\'):
      try:
        line = input(prompt if sys.stdin.isatty() else '')
      except EOFError:
        if not lines:
          return None
        line = ''
      except KeyboardInterrupt:
        print()
        return None
      lines.append(line)
    return '\n'.join([*(line[:-1] for line in lines[:-1]), lines[-1]])

  def attempt(self, action: Callable[..., None], *arguments: str) -> None:
    """Does it; what goes wrong is told, and nothing of it stays."""
    try:
      action(*arguments)
    except EXPECTED_ERRORS as error:
      self.failed = True
      print(f'Error: {error}', file=sys.stderr)
    except KeyboardInterrupt:
      print('\nStopped; the message is forgotten.', file=sys.stderr)

  def obey(self, command: str, argument: str) -> None:
    """Follows a line that begins with a slash."""
    if command == '/image':
      images.load_image(argument)
      self.pictures.append(argument)
    elif command == '/think':
      self.model = self.model._replace(thinking=not self.model.thinking)
      print('Thinking is', 'on.' if self.model.thinking else 'off.')
    elif command == '/new':
      self.conversation, self.pictures = _start(self.request), []
    elif command == '/help':
      print(HELP)
    else:
      raise prompt_lib.PromptError(
        f'{command} is not a command; /help lists them. A message that '
        'begins with / is written //...'
      )

  def answer(self, text: str) -> None:
    """Sends a message, then what tools answer, until the model has done."""
    pictures, self.pictures = self.pictures, []
    message = chat.user_message(text, len(pictures))
    reply = self.say([message], pictures)
    while reply.tool_calls:
      results = []
      # The calls stand in the last message, with their names.
      for call in self.conversation.messages[-1]['tool_calls']:
        function = call['function']
        result = self.read_line(f'{_spell(function)} = ')
        if result is None:
          return
        name = function['name']
        results.append(chat.tool_message(name, call['id'], result))
      reply = self.say(results)

  def say(self, messages: list[dict[str, Any]], pictures=()) -> chat.Reply:
    """Sends messages and shows the reply."""
    key = jax.random.fold_in(jax.random.key(self.request.seed), self.turns)
    with _watching(self.run, self.request, '') as callbacks:
      reply, self.conversation = chat.take_turn(
        self.model,
        self.conversation,
        messages,
        key,
        pictures=pictures,
        **callbacks,
      )
    self.turns += 1
    if self.request.as_json:
      record = reply._asdict()
      record |= record.pop('written')._asdict()
      print(json.dumps(record), flush=True)
    else:
      show_reply(reply)
    return reply


def show_reply(reply: chat.Reply) -> None:
  """Prints a reply, its thinking apart."""
  if reply.thinking:
    _print('[thinking]', terminal.STATUS)
    _print(reply.thinking, terminal.NOISE)
    if reply.text or reply.tool_calls:
      _print('[answer]', terminal.STATUS)
  if reply.text:
    _print(reply.text)
  for call in reply.tool_calls:
    _print(_spell(call), 'magenta')
  if reply.problem:
    print(f'({terminal.printable(reply.problem)})', file=sys.stderr)
  _print_statistics(reply.written)
  sys.stdout.flush()


def _spell(call: dict[str, Any]) -> str:
  """A call as `name(key="value")`."""
  arguments = ', '.join(
    f'{key}={json.dumps(value, ensure_ascii=False)}'
    for key, value in call['arguments'].items()
  )
  return terminal.printable(f'{call["name"]}({arguments})')
