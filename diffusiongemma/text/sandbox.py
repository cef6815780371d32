"""Runs chat templates: Jinja's sandbox with bounds on size and time.

A huge string can't be undone once it is allocated, so the common ways to make
one are checked before: widths and counts, strings joined or inserted into each
other. The time is checked in each iteration of a loop and at each call.
"""

from collections.abc import Iterable
from collections.abc import Iterator
import datetime
import functools
import json
import re
import time
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

MAX_CHARACTERS = 16_000_000  # Of a string, or elements of a list.
MAX_COUNT = 1_000_000  # Largest width or count.
MAX_SECONDS = 30.0  # Of one conversation.


class _Compiler(jinja2.compiler.CodeGenerator):
  """A compiler without constant folding, whose `~` joins its operands with
  `environment.concat`, and whose loops iterate through `_in_time`."""

  def visit_Template(self, node, frame=None):
    for loop in list(node.find_all(jinja2.nodes.For)):
      timed = (loop.iter, _in_time.__name__, [], [], None, None)
      loop.iter = jinja2.nodes.Filter(*timed, lineno=loop.lineno)
    node.set_environment(self.environment)
    super().visit_Template(node, frame)

  def visit_Concat(self, node, frame):
    self.write('environment.concat([str(part) for part in (')
    for part in node.nodes:
      self.visit(part, frame)
      self.write(', ')
    self.write(')])')

  def _output_child_to_const(self, node, frame, finalize):
    if not isinstance(node, (jinja2.nodes.TemplateData, jinja2.nodes.Const)):
      raise jinja2.nodes.Impossible
    return super()._output_child_to_const(node, frame, finalize)


class _Context(jinja2.runtime.Context):
  """The context of one conversation, with its deadline."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.deadline = time.monotonic() + MAX_SECONDS

  def check_time(self) -> None:
    if time.monotonic() > self.deadline:
      raise jinja2.sandbox.SecurityError(
        f'The chat template takes more than {MAX_SECONDS:g} seconds.'
      )


@jinja2.pass_context
def _in_time(context: _Context, elements: Iterable[Any]) -> Iterator[Any]:
  """The elements of a loop, with a time check before each."""
  for element in elements:
    context.check_time()
    yield element


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """A sandbox without Python's internal attributes, without mutation of its
  arguments, with bounds on the common ways to make huge values, and with a
  deadline."""

  intercepted_binops = frozenset(['+', '*', '**', '%'])
  code_generator_class = _Compiler
  context_class = _Context

  def __init__(self, **options):
    super().__init__(optimized=False, **options)
    self.filters = {k: _bounded(k, f) for k, f in self.filters.items()}
    self.filters[_in_time.__name__] = _in_time
    del self.globals['lipsum']

  @staticmethod
  def concat(pieces):
    """Joins strings, with a bound on the length."""
    pieces = list(pieces)
    _check_length(sum(map(len, pieces)))
    return ''.join(pieces)

  def call_binop(self, context, operator, left, right):
    if operator == '+':
      if all(hasattr(side, '__len__') for side in (left, right)):
        _check_length(len(left) + len(right))
      return super().call_binop(context, operator, left, right)
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if not numbers or operator == '**':
      raise jinja2.sandbox.SecurityError(
        f'{operator} of a {type(left).__name__} and a {type(right).__name__} '
        'is not allowed.'
      )
    return super().call_binop(context, operator, left, right)

  def call(self, context, function, *args, **kwargs):
    context.check_time()
    if isinstance(function, jinja2.runtime.LoopContext):  # A recursive loop.
      args = [_in_time(context, elements) for elements in args]
    method = getattr(function, '__wrapped__', function)
    owner = getattr(method, '__self__', None)
    if isinstance(owner, (str, bytes, int)):
      args = _all_there(args)
      _check_size(method.__name__, owner, *args, *kwargs.values())
    return super().call(context, function, *args, **kwargs)


class _Generation(jinja2.ext.Extension):
  """`{% generation %}` ... `{% endgeneration %}`, which mark the text to train
  on for other libraries; the tags are ignored here."""

  tags = {'generation'}

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Scope:
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return jinja2.nodes.Scope(body, lineno=line)


def _bounded(name, function):
  """A filter with its size checked before it runs."""
  contexts = (jinja2.nodes.EvalContext, jinja2.Environment)

  @functools.wraps(function)
  def wrapper(*args, **kwargs):
    if name in _GROWING:
      args = _all_there(args)
      values = [v for v in args if not isinstance(v, contexts)]
      _check_size(name, *values, *kwargs.values())
    return function(*args, **kwargs)

  return wrapper


# Filters that take a width, or insert their arguments into their result.
_GROWING = frozenset(
  ['batch', 'center', 'format', 'indent', 'join', 'replace', 'round', 'slice']
  + ['truncate', 'wordwrap']
)


def _all_there(values) -> list[Any]:
  """The values with iterators and ranges turned into lists."""
  kinds = (Iterator, range)
  return [list(v) if isinstance(v, kinds) else v for v in values]


def _check_size(name: str, it: Any, *others: Any) -> None:
  """Raises `SecurityError` if the result of a method or filter of `it` with
  these arguments would be huge."""
  text = it if isinstance(it, str) else ''
  texts = [other for other in others if isinstance(other, str)]
  counts = [n for n in others if isinstance(n, int) and not isinstance(n, bool)]
  is_format = name in ('format', 'format_map')
  # A format only prints its numbers, unless they are widths: '{:{}}' and '%*d'.
  has_widths = not is_format or re.search(r'\{[^{}]*\{|%[^%\w]*\*', text)
  if has_widths and max(counts, default=0) > MAX_COUNT:
    raise jinja2.sandbox.SecurityError(f'{max(counts)} is too large.')
  if is_format:
    if re.search(r'\d{7}', text):
      raise jinja2.sandbox.SecurityError('The width of a format is too large.')
    fields = text.count('{') + text.count('%')
    _check_length(len(text) + fields * sum(map(len, texts)))
  elif name == 'replace' and len(texts) >= 2:
    _check_length(len(text) + text.count(texts[0]) * len(texts[1]))
  elif name == 'indent':
    widths = [4, *counts, *map(len, texts)]
    _check_length(len(text) + (1 + text.count('\n')) * max(widths))
  elif name == 'expandtabs':
    _check_length(len(text) + text.count('\t') * max(counts, default=8))
  elif name == 'join':
    # The method of a separator joins its argument, the filter joins `it`.
    for elements in (it, *others):
      if isinstance(elements, (list, tuple, dict)):
        inside = sum(map(_length, elements))
        between = sum(map(len, [text, *texts])) * len(elements)
        _check_length(inside + between)
    if len(texts) == 1:
      _check_length(len(text) * (1 + len(texts[0])))


def _length(part: Any) -> int:
  """Length of a string, or of all strings in an object together (a filter may
  select one)."""
  if isinstance(part, dict):
    return sum(map(_length, part.values()))
  return len(part) if isinstance(part, str) else 0


def _check_length(length: int) -> None:
  if length > MAX_CHARACTERS:
    raise jinja2.sandbox.SecurityError(
      f'The result of the chat template is too large: {length} characters.'
    )


@functools.lru_cache(maxsize=4)
def compile_template(template: str) -> jinja2.Template:
  """The compiled template; rendering raises whatever its expressions raise, and
  `SecurityError`."""
  # Hugging Face templates rely on these two options and on these names.
  environment = _Sandbox(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, 'jinja2.ext.loopcontrols'],
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _refuse
  environment.globals['strftime_now'] = lambda f: (
    datetime.datetime.now().strftime(f)
  )
  return environment.from_string(template)


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | str | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """The filter `tojson` as Hugging Face templates use it."""
  width = len(indent) if isinstance(indent, str) else indent or 0
  if width > 100:
    raise jinja2.sandbox.SecurityError(f'An indentation of {width}.')
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _refuse(message: str):
  raise jinja2.TemplateError(message)
