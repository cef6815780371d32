"""A chat in the terminal, or a single turn with --prompt."""

from collections.abc import Callable
import contextlib
import json
import sys
from typing import Any

import jax

from diffusiongemma.commands import request as requests
from diffusiongemma.commands.request import Request
from diffusiongemma.errors import Error
from diffusiongemma.generation import chat
from diffusiongemma.generation import images
from diffusiongemma.generation import live
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.runs.load import Run
from diffusiongemma.text import template as templates

HELP = """\
/image FILE   show a picture together with the next message
/think        switch thinking on or off
/new          forget the conversation
/quit         end (as Ctrl-D does; Ctrl-C stops a reply)
A line that ends in \\ continues on the next one; // begins a line with a /."""


def make_model(run: Run, request: Request) -> chat.Model:
  """The network in the form of `chat.take_turn`."""
  return chat.Model(
    run.config,
    run.params,
    run.tokenizer,
    templates.template_of(run.tokenizer, run.chat_template),
    request.tools,
    request.thinking,
    requests.most_tokens(run, request),
  )


def start(request: Request) -> chat.Conversation:
  """A conversation before its first message."""
  if not request.system:
    return chat.Conversation()
  return chat.Conversation(({'role': 'system', 'content': request.system},))


def write(run: Run, request: Request) -> int:
  """Answers the --prompt, or messages typed until the end; returns the exit
  code."""
  if request.prompt is None:
    return _Chat(run, request).talk()
  if not request.prompt.strip() and not request.images:
    raise prompt_lib.PromptError('The prompt is empty; say something.')
  message = chat.user_message(request.prompt, len(request.images))
  _Chat(run, request).say([message], request.images)
  return 0


class _Chat:
  """A chat in the terminal, or with lines of standard input."""

  def __init__(self, run: Run, request: Request):
    self.run = run
    self.request = request
    self.model = make_model(run, request)
    self.conversation = start(request)
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
    """The next message, None at the end."""
    lines: list[str] = []
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
    """Calls `action`; after an error, the conversation is as before."""
    try:
      action(*arguments)
    except Error as error:
      self.failed = True
      print(f'Error: {error}', file=sys.stderr)
    except KeyboardInterrupt:
      print('\nStopped; the message is forgotten.', file=sys.stderr)

  def obey(self, command: str, argument: str) -> None:
    """Executes a command, a line that begins with a slash."""
    if command == '/image':
      images.load_image(argument)
      self.pictures.append(argument)
    elif command == '/think':
      self.model = self.model._replace(thinking=not self.model.thinking)
      print('Thinking is', 'on.' if self.model.thinking else 'off.')
    elif command == '/new':
      self.conversation, self.pictures = start(self.request), []
    elif command == '/help':
      print(HELP)
    else:
      raise prompt_lib.PromptError(
        f'{command} is not a command; /help lists them. A message that '
        'begins with / is written //...'
      )

  def answer(self, text: str) -> None:
    """Sends a message, then results of tools, until the model makes no more
    calls."""
    pictures, self.pictures = self.pictures, []
    message = chat.user_message(text, len(pictures))
    reply = self.say([message], pictures)
    while reply.tool_calls:
      results = []
      # The last message has the calls, with their names.
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
    with requests.watching(self.run, self.request, '') as callbacks:
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
  """Prints a reply, with its thinking separated."""
  if reply.thinking:
    requests.print_text('[thinking]', live.STATUS)
    requests.print_text(reply.thinking, live.NOISE)
    if reply.text or reply.tool_calls:
      requests.print_text('[answer]', live.STATUS)
  if reply.text:
    requests.print_text(reply.text)
  for call in reply.tool_calls:
    requests.print_text(_spell(call), 'magenta')
  if reply.problem:
    print(f'({live.printable(reply.problem)})', file=sys.stderr)
  requests.print_statistics(reply.written)
  sys.stdout.flush()


def _spell(call: dict[str, Any]) -> str:
  """A call as `name(key="value")`."""
  arguments = ', '.join(
    f'{key}={json.dumps(value, ensure_ascii=False)}'
    for key, value in call['arguments'].items()
  )
  return live.printable(f'{call["name"]}({arguments})')
