"""Parses a tool call that the model wrote into a name and arguments.

  call   = ['call:'] name object       a name without 'call:' has no colon
  object = '{' [pair (',' pair)*] '}'  of a call, also within a second '{' '}'
  pair   = key ':' value               or '=' for ':'
  key    = string | words
  value  = object | '[' [value (',' value)*] ']' | string | bare
  bare   = a number, true, false, null (or True, False, None), a date with its
           time, an address ://, or words
  string = between two control tokens <|"|>, in which all else is text, or
           quoted as in JSON, '...' or triple quotes

A call is accepted only if it has exactly one reading:

* Words are unquoted text without symbols of the grammar. Words before a comma
  and a space are rejected: the text could continue there.
* <|"|> inside of a <|"|> string is a quotation mark of the text. The string
  ends at the first one before a ',', '}' or ']', or at the last; those inside
  come in pairs, not in a list, and look like no other beginning or end.
* A backslash in '...' or triple quotes is allowed only before such a quote.
* A comma may be missing after a bracket or the last string, and so may the last
  brace if no object is inside; not where the string itself ends in it.
* No duplicate keys, nothing after the last brace, no comma without a value.
"""

from collections.abc import Callable
import contextlib
import json
import math
import re
from typing import Any

QUOTE = '\udc22'  # Stands for <|"|>: a lone surrogate, which no text contains.
MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 50  # Of objects and lists.

_SPACE = re.compile(r'\s*')
_NAME = rf'[^\s{{}}\[\](),:=<>"\'{QUOTE}]+'
_HEAD = re.compile(
  rf'\s*(?:call\s*:\s*(?P<name>{_NAME}(?::{_NAME})*)'
  rf'|(?!call)(?P<alone>{_NAME}))\s*(?P<outer>{{\s*(?={{))?'
)
_QUOTED = (
  r'"""(?P<triple>(?:[^"\\]|\\"|"(?!""))*)"""'
  r"|'''(?P<triple_single>(?:[^'\\]|\\'|'(?!''))*)'''"
  rf'|(?P<json>"(?:[^"\\{QUOTE}]|\\.)*")'
  rf"|'(?P<single>(?:[^'\\{QUOTE}]|\\')*)'"
)
_WORDS = rf'[^\s,:={{}}\[\]"\'{QUOTE}][^,:={{}}\[\]"\'{QUOTE}]*+'
_KEY = re.compile(
  rf'(?:{_QUOTED}|{QUOTE}(?P<marked>[^{QUOTE}]*){QUOTE}|(?P<words>{_WORDS}))'
  r'\s*[:=]\s*',
  re.DOTALL,
)
_STRING = re.compile(_QUOTED, re.DOTALL)
# Quotation marks at the ends of a text that could also be a doubled delimiter.
_DOUBLED = re.compile(
  rf'{QUOTE}{QUOTE}(?!{QUOTE})|.*(?<!{QUOTE}){QUOTE}{QUOTE}$'
  rf'|{QUOTE}(?!{QUOTE}{QUOTE}).*{QUOTE}$',
  re.DOTALL,
)
_BARE = re.compile(rf'[^,{{}}\[\]"\'{QUOTE}]*')
_NUMBER = re.compile(r'-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?')
_HAS_COLONS = re.compile(
  r'\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?'
  r'|\w+://[^\s:]+'
)
_CONSTANTS = {
  **{'true': True, 'false': False, 'null': None},
  **{'True': True, 'False': False, 'None': None},
}


class _UnreadableError(ValueError):
  """No reading, or more than one."""


def read(text: str) -> dict[str, Any] | None:
  """`{'name': ..., 'arguments': {...}}` of a call, None if it is rejected.

  The name is as written, namespace included: `default_api.f`.

  Args:
    text: the call, with `QUOTE` for each control token <|"|>.
  """
  head = _HEAD.match(text)
  if head is None or len(text) > MAX_CHARACTERS:
    return None
  try:
    arguments, at = _object(text, head.end(), 0)
    if head['outer']:
      at = _space(text, at)
      # The last of two braces may be missing, too.
      at += text.startswith('}', at)
    if _space(text, at) != len(text):
      return None
  except _UnreadableError:
    return None
  return {'name': head['name'] or head['alone'], 'arguments': arguments}


# (text, position, depth) -> (value at that position, its end).
_ReadMember = Callable[[str, int, int], tuple[Any, int]]


def _object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
  if not text.startswith('{', at):
    raise _UnreadableError
  pairs, at = _members(text, at, '}', depth, _pair)
  members = dict(pairs)
  if len(members) < len(pairs):
    raise _UnreadableError
  return members, at


def _members(
  text: str, at: int, end: str, depth: int, member: _ReadMember
) -> tuple[list[Any], int]:
  """(members between brackets, position after them)."""
  members: list[Any] = []
  at = _space(text, at + 1)
  if text.startswith(end, at):
    return members, at + 1
  while True:
    value, at = member(text, at, depth)
    members.append(value)
    last, at = at, _space(text, at)
    sign = text[at : at + 1]
    if sign == end:
      return members, at + 1
    if sign == ',':
      at = _space(text, at + 1)
    elif sign:
      if not (_may_lack(',', text, last) and _starts(text, at)):
        raise _UnreadableError
    elif depth or not _may_lack(end, text, last) or _has_objects(members):
      raise _UnreadableError
    else:
      return members, at


def _pair(text: str, at: int, depth: int) -> tuple[tuple[str, Any], int]:
  key = _KEY.match(text, at)
  if key is None:
    raise _UnreadableError
  if key['marked'] is not None:
    name = key['marked']
  else:
    name = key['words'].strip() if key['words'] else _unquote(key)
  value, at = _value(text, key.end(), depth, has_marks=True)
  return (name, value), at


def _value(
  text: str, at: int, depth: int, has_marks: bool = False
) -> tuple[Any, int]:
  """(value, its end). With `has_marks` a string may contain quotation marks; in
  a list, they are more likely a missing comma."""
  if depth > MAX_DEPTH:
    raise _UnreadableError
  if text.startswith('{', at):
    return _object(text, at, depth + 1)
  if text.startswith('[', at):
    return _members(text, at, ']', depth + 1, _value)
  if text.startswith(QUOTE, at):
    return _marked(text, at, has_marks)
  if string := _STRING.match(text, at):
    return _unquote(string), string.end()
  return _bare(text, at)


def _marked(text: str, at: int, has_marks: bool) -> tuple[str, int]:
  """A string between control tokens."""
  end = text.find(QUOTE, at + 1)
  while end >= 0 and text[(after := _space(text, end + 1)) : after + 1] not in (
    *('', ',', '}', ']'),
  ):
    further = text.find(QUOTE, end + 1)
    if further < 0:
      break
    end = further
  string = text[at + 1 : end]
  marks = string.count(QUOTE)
  if (
    end < 0
    or marks % 2
    or (marks and not has_marks)
    or re.search(rf'[:,\[{{]\s*{QUOTE}|{QUOTE}\s*:', string)
    or _DOUBLED.match(string)
  ):
    raise _UnreadableError
  return string.replace(QUOTE, '"'), end + 1


def _bare(text: str, at: int) -> tuple[Any, int]:
  """A value without quotes."""
  end = _end(_BARE, text, at)
  bare = text[at:end].strip()
  if bare in _CONSTANTS:
    return _CONSTANTS[bare], end
  if _NUMBER.fullmatch(bare):
    with contextlib.suppress(ValueError):  # Too many digits for Python.
      number = json.loads(bare)
      if abs(number) != math.inf:
        return number, end
    return bare, end
  if _HAS_COLONS.fullmatch(bare):
    return bare, end
  if (
    not re.match('[^:=][^:]*$', bare)
    or re.match(r',\s', text[end : end + 2])
    or all(w in _CONSTANTS or _NUMBER.fullmatch(w) for w in bare.split())
  ):
    raise _UnreadableError
  return bare, end


def _unquote(string: re.Match[str]) -> str:
  """The text between the quotes of a match of `_STRING`."""
  if string['json'] is not None:
    try:
      value = json.loads(string['json'], strict=False)
      value.encode()
    except ValueError as error:
      raise _UnreadableError from error
    return value
  kinds = ('triple', 'triple_single', 'single')
  (value,) = (string[kind] for kind in kinds if string[kind] is not None)
  return value.replace('\\"', '"').replace("\\'", "'")


def _may_lack(sign: str, text: str, end: int) -> bool:
  """Whether `sign` may be missing after a member that ends at `end`."""
  last = text[end - 1]
  if last in '}]':
    return True
  is_last_string = last in f'"\'{QUOTE}' and text.find(last, end) < 0
  return is_last_string and text[:end].rstrip(last)[-1:] != sign


def _starts(text: str, at: int) -> bool:
  """Whether a member begins at `at` that needs no comma before it."""
  return text[at] in '{[' or _KEY.match(text, at) is not None


def _has_objects(value: Any) -> bool:
  if isinstance(value, (list, tuple)):
    return any(map(_has_objects, value))
  return isinstance(value, dict)


def _space(text: str, at: int) -> int:
  """The position after any spaces."""
  return _end(_SPACE, text, at)


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
  """The end of the match at `at`; `at` itself if nothing matches."""
  match = pattern.match(text, at)
  return match.end() if match else at
