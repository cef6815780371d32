"""Messages and tools of a training chat, normalised to one form.

  who   role or from: user (human), assistant (model, gpt), system, developer,
        tool (function, observation); function_call is the assistant
  what  content or value: text, or parts that are text
        of the assistant also reasoning (reasoning_content, thinking),
        tool_calls (function_call), tool_responses
        of a tool also tool_call_id, name
  weight, train, trainable    whether an answer is learnt

A null value counts as absent. A key that is not read is an error if it may
change what is learnt; otherwise its name is returned.
"""

import collections
import difflib
import json
from typing import Any
from typing import NamedTuple

from diffusiongemma.errors import Error
from diffusiongemma.text import messages


class DataError(Error, ValueError):
  """Text that can't be used; the message names the file and the remedy."""


ROLES = {
  'system': 'system',
  'developer': 'developer',
  'user': 'user',
  'human': 'user',
  'assistant': 'assistant',
  'model': 'assistant',
  'gpt': 'assistant',
  'chatgpt': 'assistant',
  'bing': 'assistant',
  'function_call': 'assistant',
  'tool': 'tool',
  'function': 'tool',
  'observation': 'tool',
}
FLAGS = ('weight', 'train', 'trainable')
# Names of the same keys in other formats.
SAME = {
  'from': 'role',
  'value': 'content',
  'reasoning_content': 'reasoning',
  'thinking': 'reasoning',
}
KEYS = {
  'assistant': ('reasoning', 'tool_calls', 'tool_responses'),
  'tool': ('tool_call_id',),
}
COMMON_KEYS = ('role', 'content', 'name', *FLAGS)
# Keys of other formats, or of other kinds of messages.
REFUSED_KEYS = (
  'refusal',
  'mask',
  'loss_mask',
  *KEYS['assistant'],
  *KEYS['tool'],
)
# Metadata that does not change the text that is learnt.
NOTES = frozenset(
  ['id', 'idx', 'index', 'uid', 'uuid', 'name', 'title', 'model', 'dataset']
  + ['source', 'url', 'license', 'lang', 'language', 'category', 'tags']
  + ['meta', 'metadata', 'comment', 'created', 'created_at', 'timestamp']
  + ['date', 'parallel_tool_calls']
)
MEDIA = ('image', 'audio', 'video')
NO_MEDIA = 'training reads no images, audio, videos or files'


class Message(NamedTuple):
  """A message in the form of chat templates.

  Attributes:
    message: role, content and so on.
    is_learnt: whether it is an answer to learn.
    unread: keys that were not read.
  """

  message: dict[str, Any]
  is_learnt: bool
  unread: tuple[str, ...] = ()


def parse_json(text: str) -> Any:
  """Parses JSON without duplicate keys. Raises `ValueError`."""
  try:
    return json.loads(
      text, object_pairs_hook=_to_object, parse_constant=_refuse_constant
    )
  except RecursionError as error:
    raise ValueError('it is nested too deeply') from error


def _to_object(pairs):
  members = dict(pairs)
  if len(members) < len(pairs):
    counts = collections.Counter(key for key, _ in pairs)
    ((twice, _),) = counts.most_common(1)
    raise ValueError(f'the key {twice!r} occurs twice in an object')
  return members


def _refuse_constant(name):
  raise ValueError(f'{name} is no number of JSON')


def unread_keys(
  record: dict[str, Any],
  known: tuple[str, ...],
  refused: tuple[str, ...],
  origin: str,
) -> list[str]:
  """Keys that have a value and are neither `known` nor in `NOTES`.

  Raises:
    DataError: a key may change what is learnt: it is one of `refused`, is
      spelled nearly like a known one, or holds media.
  """
  unread = []
  for key, value in record.items():
    if key in known or value in ('', [], {}):
      continue
    if key.lower().removesuffix('s').removesuffix('_url') in MEDIA:
      raise DataError(f'{origin}: there is {key!r}, and {NO_MEDIA}.')
    if key in refused:
      raise DataError(
        f'{origin}: {key!r} is not read here, and may change what is learnt; '
        f'known are {", ".join(known)}.'
      )
    if key in NOTES or key.endswith('_id'):
      continue
    if nearest := difflib.get_close_matches(key.lower(), known, 1, 0.8):
      raise DataError(
        f'{origin}: there is no {key!r}. Did you mean {nearest[0]!r}?'
      )
    unread.append(key)
  return unread


def read_message(given: Any, origin: str) -> Message:
  """A message in any of the forms above. Raises `DataError`."""
  if not isinstance(given, dict):
    raise DataError(
      f'{origin} is not {{"role": ..., "content": ...}} but {_show(given)}.'
    )
  given = _with_one_name(messages.without_nulls(given), origin)
  name = given.get('role')
  role = ROLES.get(name) if isinstance(name, str) else None
  if role is None:
    raise DataError(f'{origin}: role {name!r} is none of {", ".join(ROLES)}.')
  if name == 'function_call' or given.get('function_call'):
    given = _with_calls(given, name, origin)
  known = COMMON_KEYS + KEYS.get(role, ())
  unread = unread_keys(given, known, REFUSED_KEYS, origin)
  is_learnt = _is_learnt(given, role, origin)
  message = {k: v for k, v in given.items() if k in known and k not in FLAGS}
  message['role'] = role
  content, more = _read_content(given.get('content'), origin)
  unread += more
  if content is not None or role != 'tool':  # A result may be null.
    message['content'] = '' if content is None else content
  if role == 'assistant':
    unread += _read_beside(message, origin)
  return Message(message, is_learnt, tuple(unread))


def _with_one_name(given, origin):
  """The message with the keys of `SAME` renamed."""
  renamed = {}
  for key, value in given.items():
    name = SAME.get(key, key)
    if renamed.get(name) and value and renamed[name] != value:
      raise DataError(f'{origin}: {key!r} and {name!r} say different things.')
    renamed[name] = renamed.get(name) or value
  return renamed


def _with_calls(given, name, origin):
  """The message with `tool_calls` instead of the role or key
  `function_call`."""
  given = dict(given)
  key = 'content' if name == 'function_call' else 'function_call'
  call = _from_text(given.pop(key, None), 'calls', origin)
  if given.get('tool_calls'):
    raise DataError(f'{origin}: there are both tool_calls and a function_call.')
  given['tool_calls'] = call if isinstance(call, list) else [call]
  return given


def _is_learnt(given, role, origin):
  flags = {name: given[name] for name in FLAGS if name in given}
  for name, flag in flags.items():
    if flag not in (0, 1):
      raise DataError(
        f'{origin}: {name} {_show(flag)} is neither 0 nor 1 (false nor true).'
      )
  if len(set(flags.values())) > 1:
    raise DataError(f'{origin}: {" and ".join(flags)} contradict each other.')
  if role != 'assistant' and any(flags.values()):
    raise DataError(
      f'{origin}: only what the assistant says is learnt; leave {name!r} out.'
    )
  return role == 'assistant' and all(flags.values())


def _read_content(content, origin):
  """(a string or a list of text parts, unread keys)."""
  if content is None or isinstance(content, str):
    return content, []
  if not isinstance(content, list):
    raise DataError(
      f'{origin}: a content is a string or a list, not {_show(content)}.'
    )
  parts, unread = [], []
  for part in content:
    kind = part.get('type') if isinstance(part, dict) else None
    if not isinstance(kind, str):
      raise DataError(
        f'{origin}: a content is a string, or a list of parts like '
        '{"type": "text", "text": ...}.'
      )
    if any(name in kind for name in (*MEDIA, 'file')):
      raise DataError(f'{origin}: there is a part {kind!r}, and {NO_MEDIA}.')
    if kind not in messages.TEXT_PARTS:
      raise DataError(
        f'{origin}: a part {kind!r} is not read; thoughts belong in '
        "'reasoning', calls in 'tool_calls', text in parts of type 'text'."
      )
    part = messages.without_nulls(part)
    if not isinstance(part.get('text'), str):
      raise DataError(f'{origin}: a part {kind!r} has no text.')
    parts.append({'type': 'text', 'text': part['text']})
    unread += unread_keys(part, ('type', 'text'), (), f'{origin}, a part')
  return parts, unread


def _read_beside(message, origin):
  """Normalises reasoning, calls and results of an assistant's message in place;
  returns unread keys."""
  unread = []
  if reasoning := message.pop('reasoning', None):
    if not isinstance(reasoning, str):
      raise DataError(f'{origin}: the reasoning is no text.')
    # Templates read one name or the other.
    message['reasoning'] = message['reasoning_content'] = reasoning
  for name in ('tool_calls', 'tool_responses'):
    if not isinstance(message.get(name, []), list):
      raise DataError(f'{origin}: {name} are a list.')
  if 'tool_calls' in message:
    read = [_read_call(call, origin) for call in message['tool_calls']]
    message['tool_calls'] = [call for call, _ in read]
    unread += [key for _, keys in read for key in keys]
  if not all(isinstance(r, dict) for r in message.get('tool_responses', [])):
    raise DataError(
      f'{origin}: tool_responses are a list of {{"name": ..., "response": '
      '...}.'
    )
  content = message['content']
  texts = (
    [content] if isinstance(content, str) else [p['text'] for p in content]
  )
  said = any(text.strip() for text in texts)
  if not (said or message.get('reasoning') or message.get('tool_calls')):
    raise DataError(
      f'{origin} has neither content nor reasoning nor tool_calls; there is '
      'nothing to learn.'
    )
  return unread


def _read_call(given, origin):
  """(a call with arguments as an object, unread keys)."""
  if not isinstance(given, dict):
    raise DataError(f'{origin}: {_show(given)} is no tool call.')
  given = messages.without_nulls(given)
  function = given.get('function', given)
  function = (
    messages.without_nulls(function) if isinstance(function, dict) else {}
  )
  name, arguments = function.get('name'), function.get('arguments')
  if not (name and isinstance(name, str)):
    raise DataError(
      f'{origin}: a tool call is {{"type": "function", "function": {{"name": '
      '..., "arguments": {...}}}.'
    )
  if arguments != '':
    arguments = _from_text(arguments, f'arguments of {name!r}', origin)
  if not isinstance(arguments or {}, dict):
    raise DataError(f'{origin}: arguments of {name!r} are not an object.')
  if given.get('type', 'function') != 'function':
    raise DataError(
      f'{origin}: a call of type {given["type"]!r} is not read, only '
      "'function' is."
    )
  call = {
    'type': 'function',
    'function': {'name': name, 'arguments': arguments or {}},
  }
  if 'id' in given:
    call['id'] = given['id']
  known = ('id', 'type', 'function', 'name', 'arguments')
  keys = unread_keys({**given, **function}, known, (), f'{origin}, a call')
  return call, keys


def read_tools(given: Any, origin: str) -> list[dict[str, Any]]:
  """Declarations of functions, which may be JSON text. Raises `DataError`."""
  given = _from_text(given, 'tools', origin)
  tools = []
  for tool in given if isinstance(given, list) else [given]:
    function = tool
    if isinstance(tool, dict) and 'function' in tool:
      function = tool['function']
    kind = tool.get('type') if isinstance(tool, dict) else None
    if kind not in (None, 'function'):
      raise DataError(
        f"{origin}: a tool of type {kind!r} is not read, only 'function' is."
      )
    if not (
      isinstance(function, dict) and isinstance(function.get('name'), str)
    ):
      raise DataError(
        f'{origin}: tools are a list of functions, {{"type": "function", '
        '"function": {"name": ..., ...}}.'
      )
    function = messages.without_nulls(function)
    function.pop('type', None)
    if 'parameters' in function:
      function['parameters'] = _from_text(
        function['parameters'], f'parameters of {function["name"]!r}', origin
      )
      if not isinstance(function['parameters'], dict):
        raise DataError(
          f'{origin}: parameters of {function["name"]!r} are not a JSON schema '
          'of an object.'
        )
    tools.append({'type': 'function', 'function': function})
  return tools


def _from_text(value, what, origin):
  """Parses JSON if `value` is a string; returns any other value as it is."""
  if not isinstance(value, str):
    return value
  try:
    return parse_json(value)
  except ValueError as error:
    raise DataError(f'{origin}: {what} are not JSON: {error}.') from error


def _show(value):
  """The first 40 characters of the value as JSON."""
  text = json.dumps(value)
  return text if len(text) <= 40 else f'{text[:40]}...'
