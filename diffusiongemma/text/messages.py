"""Messages of a chat, checked before a chat template sees them.

  {'role': 'user', 'content': 'text' or [{'type': 'text', 'text': ...},
                                         {'type': 'image'}]}

Templates ignore keys that they do not know; here these are errors, so that no
content is lost silently.
"""

from collections.abc import Collection
from collections.abc import Sequence
from typing import Any

from diffusiongemma.errors import Error

ROLES = ('system', 'developer', 'user', 'assistant', 'model', 'tool')

TEXT_PARTS = ('text', 'input_text', 'output_text')
_PICTURE_PARTS = ('image', 'image_url')
_REASONING = ('reasoning_content', 'thinking', 'reasoning')
_KNOWN = frozenset(
  ['role', 'content', 'name', 'tool_calls', 'tool_call_id', 'tool_responses']
  + [*_REASONING]
)
# Keys that templates ignore, and where their content belongs.
_ELSEWHERE = {
  'function_call': 'calls of tools are in tool_calls',
  **dict.fromkeys(
    ('image', 'images'), 'pictures are parts of the content, {"type": "image"}'
  ),
  **dict.fromkeys(
    ('audio', 'audios', 'video', 'videos'), 'the network has no use for it'
  ),
}


class TemplateError(Error, ValueError):
  """A chat template that can't be used, or a conversation it refuses."""


def without_nulls(given: dict[str, Any]) -> dict[str, Any]:
  """The items that are not null: null means absent, as for `transformers`."""
  return {key: value for key, value in given.items() if value is not None}


def check_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """The messages in a form that all templates accept.

  Null values are removed, as in `transformers`; reasoning has the names that
  templates know; text parts have the type 'text'.

  Raises:
    TemplateError: an item is not a message, or a template would omit part of
      it; the error names both.
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
  """`check_messages` of one message; errors do not name the message."""
  message = without_nulls(message)
  for key, reason in _ELSEWHERE.items():
    if message.get(key):
      raise TemplateError(f'{key!r} would be left out; {reason}.')
  if not message.keys() & {'content', 'tool_calls', 'tool_responses'}:
    _check_nothing_else(message, _KNOWN, 'content')
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
  if len(set(filter(None, said))) > 1:
    raise TemplateError(f'its {" and ".join(_REASONING)} say different things.')
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
  part = without_nulls(part)
  type_ = part.get('type', 'text' if 'text' in part else None)
  if type_ in _PICTURE_PARTS:
    # Templates look only at the keys; a value may be the picture itself.
    return {**dict.fromkeys(part, ''), 'type': type_}
  if type_ not in TEXT_PARTS:
    raise TemplateError(
      f'part {number} of its content has the type {type_!r}; types are '
      f'{", ".join((*TEXT_PARTS, *_PICTURE_PARTS))}.'
    )
  if 'text' not in part:
    _check_nothing_else(part, {'type'}, 'text')
  for key in (*_PICTURE_PARTS, *_ELSEWHERE):
    if part.get(key):
      raise TemplateError(
        f'part {number} of its content is text, and {key!r} would be left out.'
      )
  text = part.get('text', '')
  if not isinstance(text, str):
    raise TemplateError(
      f'the text of part {number} of its content is {_kind(text)}.'
    )
  return {**part, 'type': 'text', 'text': text}


def _check_nothing_else(
  given: dict[str, Any], known: Collection[str], missing: str
) -> None:
  """Raises `TemplateError` if the content may be under an unknown key."""
  others = [key for key in given if key not in known and given[key]]
  if others:
    raise TemplateError(
      f'there is no {missing!r}, and {others[0]!r} would be left out.'
    )


def _kind(value: Any) -> str:
  """Name of a value's type in JSON, with its article."""
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
  # At the same position, so that templates that write all keys keep the order.
  arguments = function.get('arguments')
  return {**call, 'function': {**function, 'arguments': arguments}}
