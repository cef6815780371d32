"""Conversations to tokens, through the chat template of a checkpoint.

  messages -> (every string escaped) -> Jinja, in a sandbox -> tokens

A template is code from a stranger: it runs in a sandbox, which hides Python
from it, and what it writes is bounded. What a person has typed is escaped
before it gets there, so that only the template itself can open a turn.
"""

from collections.abc import Sequence
import functools
import json
from typing import Any

import jinja2

from diffusiongemma.text import sandbox
from diffusiongemma.text import tokenizer as tokenizers

DEFAULT = tokenizers.ASSETS / 'chat_template.jinja'
MAX_TEMPLATE_CHARACTERS = 1_000_000
ROLES = ('system', 'developer', 'user', 'assistant', 'model', 'tool')

_TEXT_PARTS = ('text', 'input_text', 'output_text')
_PICTURE_PARTS = ('image', 'image_url')
_REASONING = ('reasoning_content', 'thinking', 'reasoning')
# What templates do not look at, and where it belongs.
_ELSEWHERE = {
  'function_call': 'calls of tools are in tool_calls',
  **dict.fromkeys(
    ('image', 'images'), 'pictures are parts of the content, {"type": "image"}'
  ),
  **dict.fromkeys(
    ('audio', 'audios', 'video', 'videos'), 'the network has no use for it'
  ),
}


class TemplateError(ValueError):
  """A chat template that can't be used, or a conversation it refuses."""


def default_template() -> str:
  """The template of DiffusionGemma, for a checkpoint without its own."""
  return DEFAULT.read_text('utf-8')


def knows_turns(tokenizer: tokenizers.Tokenizer) -> bool:
  """Whether the tokenizer has what `default_template` is made of."""
  return {'<|turn>', '<turn|>'} <= set(tokenizer.control_tokens)


def encode_chat(
  tokenizer: tokenizers.Tokenizer,
  template: str,
  messages: Sequence[dict[str, Any]],
  *,
  tools: Sequence[dict[str, Any]] = (),
  thinking: bool = False,
) -> list[int]:
  """Token ids of a conversation up to where the model goes on, bos among them
  where the template writes it.

  Args:
    tokenizer: whose control tokens the template spells.
    template: Jinja.
    messages: `{'role': 'user', 'content': ...}` and so on, content a string or
      parts like `{'type': 'image'}`, which become one image token each.
    tools: declarations, `{'type': 'function', 'function': {...}}`.
    thinking: the template's `enable_thinking`.

  Raises:
    TemplateError: the template is broken or refuses the messages, or they are
      none; see `check_messages`.
  """
  write = _writer(tokenizer, template, messages, tools, thinking)
  text, mark = write(messages, generation_prompt=True)
  return tokenizer.encode_template(text, mark)


def check_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """The messages with nothing in them that templates stumble over.

  What is null is left out, as `transformers` does; reasoning goes by the names
  that templates know; parts of text are of the type 'text'.

  Raises:
    TemplateError: something is no message or would be left out by a template;
      it says which message and what.
  """
  if not isinstance(messages, (list, tuple)):
    raise TemplateError(f'A chat is a list of messages, not {_kind(messages)}.')
  checked, is_answer = [], False
  for index, message in enumerate(messages):
    if not isinstance(message, dict):
      raise TemplateError(
        f'Message {index} is {_kind(message)}; a message is '
        '{"role": ..., "content": ...}.'
      )
    role = message.get('role')
    if role not in ROLES:
      raise TemplateError(
        f'Message {index} has the role {role!r}; roles are {", ".join(ROLES)}.'
      )
    try:
      message = _check_message(message, is_first=not index)
      if role != 'tool':
        calls = message.get('tool_calls')
        is_answer = bool(calls and not message.get('tool_responses'))
      elif not is_answer:
        raise TemplateError('it answers no call of the message before.')
    except TemplateError as error:
      raise TemplateError(f'Message {index} ({role}): {error}') from None
    checked.append(message)
  return checked


def _check_message(message: dict[str, Any], is_first: bool) -> dict[str, Any]:
  """Of `check_messages`; its errors do not say which message it is."""
  message = {k: v for k, v in message.items() if v is not None}
  for key, reason in _ELSEWHERE.items():
    if message.get(key):
      raise TemplateError(f'{key!r} would be left out; {reason}.')
  is_tool = message['role'] == 'tool'
  content = message.get('content', '')
  if isinstance(content, (list, tuple)):
    message['content'] = [
      _check_part(number, part) for number, part in enumerate(content)
    ]
    types = [part['type'] for part in message['content']]
    if is_first and message['role'] in ('system', 'developer'):
      if set(types) - {'text'}:
        raise TemplateError(
          'a picture in it would be left out; show it in a message of the user.'
        )
  # A tool may answer with fields, too.
  elif not isinstance(content, (str, dict) if is_tool else str):
    raise TemplateError(
      f'its content is {_kind(content)}, not text or a list of parts.'
    )
  said = [message[name] for name in _REASONING if name in message]
  if any(text and not isinstance(text, str) for text in said):
    raise TemplateError('its reasoning is no text.')
  if said:
    message = {'thinking': said[0], **message, 'reasoning_content': said[0]}
  if calls := message.get('tool_calls'):
    _check_list('tool_calls', calls)
    message['tool_calls'] = [_check_call(*item) for item in enumerate(calls)]
  _check_list('tool_responses', message.get('tool_responses') or [])
  return message


def _check_part(number: int, part: Any) -> dict[str, Any]:
  if not isinstance(part, dict):
    raise TemplateError(
      f'part {number} of its content is {_kind(part)}; a part is '
      '{"type": "text", "text": ...} or {"type": "image"}.'
    )
  part = {k: v for k, v in part.items() if v is not None}
  type_ = part.get('type', 'text' if 'text' in part else None)
  if type_ in _PICTURE_PARTS:
    # Templates look at the names alone; a value may be the picture itself.
    return {**dict.fromkeys(part, ''), 'type': type_}
  if type_ not in _TEXT_PARTS:
    raise TemplateError(
      f'part {number} of its content has the type {type_!r}; types are '
      f'{", ".join((*_TEXT_PARTS, *_PICTURE_PARTS))}.'
    )
  text = part.get('text', '')
  if not isinstance(text, str):
    raise TemplateError(
      f'the text of part {number} of its content is {_kind(text)}.'
    )
  return {**part, 'type': 'text', 'text': text}


def _kind(value: Any) -> str:
  """What a value is called where JSON has it."""
  names = {str: 'text', bool: 'a boolean', int: 'a number', float: 'a number'}
  names |= {dict: 'an object', list: 'a list', type(None): 'null'}
  return names.get(type(value), f'a {type(value).__name__}')


def _check_list(name: str, value: Any) -> None:
  if not isinstance(value, (list, tuple)) or not all(
    isinstance(item, dict) for item in value
  ):
    raise TemplateError(f'its {name} are no list of objects.')


def _check_call(number: int, call: dict[str, Any]) -> dict[str, Any]:
  function = call.get('function')
  if not isinstance(function, dict) or not isinstance(
    function.get('name'), str
  ):
    raise TemplateError(
      f'call {number} of its tool_calls has no name; a call is '
      '{"function": {"name": ..., "arguments": {...}}}.'
    )
  return {**call, 'function': {'arguments': None, **function}}


def encode_exchange(
  tokenizer: tokenizers.Tokenizer,
  template: str,
  messages: Sequence[dict[str, Any]],
  tools: Sequence[dict[str, Any]] = (),
) -> tuple[list[int], list[int]]:
  """(what the model is asked with, what it is to say) of a chat's last message.

  The prompt is what sampling gives the model, the header of its turn included;
  the response ends in the token that ends the turn. The model is told to think
  if the last message has any reasoning.

  Raises:
    TemplateError: the template refuses, or tells the past otherwise when there
      is more of it.
  """
  thinking = any(
    messages[-1].get(f) for f in ('reasoning', 'reasoning_content')
  )
  write = _writer(tokenizer, template, messages, tools, thinking)
  before, mark = write(messages[:-1], False)
  prompt, _ = write(messages[:-1], True)
  whole, _ = write(messages, False)
  if not (prompt.startswith(before) and whole.startswith(before)):
    raise TemplateError(
      'The chat template changes what was said before the last message.'
    )
  opening = prompt.removeprefix(before)
  response = whole.removeprefix(before)
  # After a tool's answer sampling goes on in the same turn, while the past is
  # told with a new one.
  start = [{'role': 'user', 'content': ''}]
  header = write(start, True)[0].removeprefix(write(start, False)[0])
  for part in (header, opening.removeprefix(header)):
    response = response.removeprefix(part)
  ids = tokenizer.encode_template(response.rstrip(), mark)
  return tokenizer.encode_template(prompt, mark), ids


def _writer(tokenizer, template, messages, tools, thinking):
  """A function (messages, generation prompt) -> (escaped text, its mark)."""
  given = [check_messages(messages), tools, template]
  try:
    given = json.dumps(given, ensure_ascii=False)
  except (TypeError, ValueError, RecursionError) as error:
    raise TemplateError(
      f'The messages or tools are not what JSON can be: {error}.'
    ) from error
  mark = next(m for m in map(chr, range(0xE000, 0xF900)) if m not in given)
  escape = functools.partial(_map_strings, lambda s: tokenizer.escape(s, mark))

  def write(messages, generation_prompt):
    text = render(
      template,
      messages=escape(check_messages(messages)),
      tools=escape(tools) or None,
      enable_thinking=thinking,
      add_generation_prompt=generation_prompt,
      bos_token=tokenizer.pieces([tokenizer.bos_id])[0],
      eos_token=tokenizer.pieces([tokenizer.eos_id])[0],
    )
    return text, mark

  return write


def render(template: str, **variables) -> str:
  """The text that a template makes of its variables. Raises
  `TemplateError`."""
  if len(template) > MAX_TEMPLATE_CHARACTERS:
    raise TemplateError(
      f'The chat template has {len(template)} characters, more than '
      f'{MAX_TEMPLATE_CHARACTERS}.'
    )
  text, length = [], 0
  try:
    for piece in sandbox.compile_template(template).generate(**variables):
      text.append(piece)
      length += len(piece)
      if length > sandbox.MAX_CHARACTERS:
        raise TemplateError(
          f'The chat template writes more than {sandbox.MAX_CHARACTERS} '
          'characters.'
        )
  except TemplateError:
    raise
  except jinja2.TemplateSyntaxError as error:
    raise TemplateError(
      f'The chat template is broken in line {error.lineno}: {error.message}'
    ) from error
  except Exception as error:  # Its expressions raise whatever they will.
    reason = str(error) or type(error).__name__
    raise TemplateError(
      f'The chat template refuses the conversation: {reason}'
    ) from error
  return ''.join(text)


def _map_strings(function, value: Any) -> Any:
  """`value` with `function` applied to every string in it, keys too."""
  if isinstance(value, str):
    return function(value)
  if isinstance(value, dict):
    return {
      _map_strings(function, k): _map_strings(function, v)
      for k, v in value.items()
    }
  if isinstance(value, (list, tuple)):
    return [_map_strings(function, v) for v in value]
  return value
