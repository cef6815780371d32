"""Conversations to tokens, through the chat template of a checkpoint.

  messages -> (every string escaped) -> Jinja, in a sandbox -> tokens

A template is code from a stranger: it runs in Jinja's sandbox, which hides
Python from it, and what it writes is bounded. What a person has typed is
escaped before it gets there, so that only the template itself can open a turn.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import datetime
import functools
import json
import re
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.nodes
import jinja2.sandbox

from diffusiongemma.text import tokenizer as tokenizers

DEFAULT = tokenizers.ASSETS / 'chat_template.jinja'
MAX_TEMPLATE_CHARACTERS = 1_000_000
MAX_CHARACTERS = 16_000_000


class TemplateError(ValueError):
  """A chat template that can't be used, or a conversation it refuses."""


def default_template() -> str:
  """The template of DiffusionGemma, for a checkpoint without its own."""
  return DEFAULT.read_text()


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
  generation_prompt: bool = True,
) -> list[int]:
  """Token ids of a conversation, bos among them where the template writes it.

  Args:
    tokenizer: whose control tokens the template spells.
    template: Jinja.
    messages: `{'role': 'user', 'content': ...}` and so on, content a string or
      parts like `{'type': 'image'}`, which become one image token each.
    tools: declarations, `{'type': 'function', 'function': {...}}`.
    thinking: the template's `enable_thinking`.
    generation_prompt: open the model's turn at the end.

  Raises:
    TemplateError: the template is broken or refuses the messages.
  """
  write = _writer(tokenizer, template, messages, tools, thinking)
  text, mark = write(messages, generation_prompt)
  return tokenizer.encode_template(text, mark)


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
  given = json.dumps([messages, tools, template], ensure_ascii=False)
  mark = next(m for m in map(chr, range(0xE000, 0xF900)) if m not in given)
  escape = functools.partial(_map_strings, lambda s: tokenizer.escape(s, mark))

  def write(messages, generation_prompt):
    text = render(
      template,
      messages=escape(messages),
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
    for piece in _compile(template).generate(**variables):
      text.append(piece)
      length += len(piece)
      if length > MAX_CHARACTERS:
        raise TemplateError(
          f'The chat template writes more than {MAX_CHARACTERS} characters.'
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


class _Compiler(jinja2.compiler.CodeGenerator):
  """Computes nothing before the template runs, and joins what stands around
  `~` as it joins the pieces of a block."""

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


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """No attribute of Python's own, no change of what it is given, and none of
  the common ways to make something huge out of small things; of others, and of
  time, it knows no bound."""

  intercepted_binops = frozenset(['+', '*', '**', '%'])
  code_generator_class = _Compiler

  def __init__(self, **options):
    super().__init__(optimized=False, **options)
    self.filters = {k: _bounded(k, f) for k, f in self.filters.items()}
    del self.globals['lipsum']

  @staticmethod
  def concat(pieces):
    """A string of some, which doubles all too soon."""
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
    method = getattr(function, '__wrapped__', function)
    owner = getattr(method, '__self__', None)
    if isinstance(owner, (str, bytes, int)):
      args = _all_there(args)
      _check_size(method.__name__, owner, *args, *kwargs.values())
    return super().call(context, function, *args, **kwargs)


def _bounded(name, function):
  """A filter that makes nothing huge."""
  contexts = (jinja2.nodes.EvalContext, jinja2.Environment)

  @functools.wraps(function)
  def wrapper(*args, **kwargs):
    if name in _GROWING:
      args = _all_there(args)
      values = [v for v in args if not isinstance(v, contexts)]
      _check_size(name, *values, *kwargs.values())
    return function(*args, **kwargs)

  return wrapper


# Filters that take a width, or put what they are given into what they make.
_GROWING = frozenset(
  ['batch', 'center', 'format', 'indent', 'join', 'replace', 'round', 'slice']
  + ['truncate', 'wordwrap']
)


def _all_there(values) -> list:
  """With lists for what would make its elements one by one."""
  kinds = (Iterator, range)
  return [list(v) if isinstance(v, kinds) else v for v in values]


def _check_size(name: str, it: Any, *others: Any) -> None:
  """Raises `SecurityError` where a method or filter, with the values that it
  is given, makes something huge of `it`."""
  text = it if isinstance(it, str) else ''
  texts = [other for other in others if isinstance(other, str)]
  counts = [n for n in others if isinstance(n, int) and not isinstance(n, bool)]
  is_format = name in ('format', 'format_map')
  # Numbers are what a format shows, but for widths: '{:{}}' and '%*d'.
  has_widths = not is_format or re.search(r'\{[^{}]*\{|%[^%\w]*\*', text)
  if has_widths and max(counts, default=0) > MAX_TEMPLATE_CHARACTERS:
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
    # A separator joins its argument, and a filter `it`.
    for parts in (it, *others):
      if isinstance(parts, (list, tuple, dict)):
        inside = sum(map(_length, parts))
        between = sum(map(len, [text, *texts])) * len(parts)
        _check_length(inside + between)
    if len(texts) == 1:
      _check_length(len(text) * (1 + len(texts[0])))


def _length(part: Any) -> int:
  """Of a string, or of those of an object, one of which may be asked for."""
  if isinstance(part, dict):
    return sum(map(_length, part.values()))
  return len(part) if isinstance(part, str) else 0


def _check_length(length: int) -> None:
  if length > MAX_CHARACTERS:
    raise jinja2.sandbox.SecurityError(
      f'What the chat template makes is too large: {length} characters.'
    )


@functools.lru_cache(maxsize=4)
def _compile(template: str) -> jinja2.Template:
  # Templates of Hugging Face are written for these two switches and names.
  sandbox = _Sandbox(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=['jinja2.ext.loopcontrols'],
  )
  sandbox.filters['tojson'] = _to_json
  sandbox.globals['raise_exception'] = _refuse
  sandbox.globals['strftime_now'] = lambda f: datetime.datetime.now().strftime(
    f
  )
  return sandbox.from_string(template)


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | str | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """The filter as templates of Hugging Face know it."""
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
