"""Conversations to tokens, through the chat template of a checkpoint.

  messages -> (every string escaped) -> Jinja, in a sandbox -> tokens

A template is untrusted code: it runs in a sandbox that hides Python, and its
output is bounded. Text of users is escaped first, so that only the template
itself can open a turn.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import functools
import itertools
import json
from typing import Any

import jinja2

from diffusiongemma.text import sandbox
from diffusiongemma.text import tokenizer as tokenizers
from diffusiongemma.text.messages import TemplateError
from diffusiongemma.text.messages import check_messages

DEFAULT = tokenizers.ASSETS / 'chat_template.jinja'
MAX_TEMPLATE_CHARACTERS = 1_000_000


def default_template() -> str:
  """The template of DiffusionGemma, for a checkpoint without its own."""
  return DEFAULT.read_text('utf-8')


def knows_turns(tokenizer: tokenizers.Tokenizer) -> bool:
  """Whether the tokenizer has the turn tokens of `default_template`."""
  return {'<|turn>', '<turn|>'} <= set(tokenizer.control_tokens)


def template_of(tokenizer: tokenizers.Tokenizer, own: str | None) -> str:
  """The template of a network: its own or, if its tokenizer knows turns,
  `default_template`.

  Raises:
    TemplateError: the tokenizer knows no turns.
  """
  if own is not None:
    return own
  if not knows_turns(tokenizer):
    raise TemplateError(
      'This network knows no turns: its tokenizer has no <|turn>, and no chat '
      'template came with it. It can continue a text: dg.generate, or '
      '--mode=sample --nochat.'
    )
  return default_template()


def encode_chat(
  tokenizer: tokenizers.Tokenizer,
  template: str,
  messages: Sequence[dict[str, Any]],
  *,
  tools: Sequence[dict[str, Any]] = (),
  thinking: bool = False,
) -> list[int]:
  """Token ids of a conversation, up to where the model continues. They begin
  with one bos, whether the template writes it or not.

  Args:
    tokenizer: its control tokens are those of the template.
    template: Jinja.
    messages: `{'role': 'user', 'content': ...}` and so on, content a string or
      parts like `{'type': 'image'}`, which become one image token each.
    tools: declarations, `{'type': 'function', 'function': {...}}`.
    thinking: the template's `enable_thinking`.

  Raises:
    TemplateError: the template is broken or refuses the messages, or they are
      not messages; see `check_messages`.
  """
  write, mark = make_writer(tokenizer, template, messages, tools)
  text = write(messages, generation_prompt=True, thinking=thinking)
  ids = tokenizer.encode_template(text, mark)
  return [tokenizer.bos_id, *without_bos(tokenizer, ids)]


def without_bos(
  tokenizer: tokenizers.Tokenizer, ids: Sequence[int]
) -> list[int]:
  """`ids` without any leading bos."""
  return list(itertools.dropwhile(lambda i: i == tokenizer.bos_id, ids))


def make_writer(
  tokenizer: tokenizers.Tokenizer,
  template: str,
  messages: Sequence[dict[str, Any]],
  tools: Sequence[dict[str, Any]] = (),
) -> tuple[Callable[..., str], str]:
  """(write, mark): `write` renders messages, escaped with the mark, with or
  without a generation prompt and thinking.

  Raises:
    TemplateError: they are not messages; see `messages.check_messages`.
  """
  mark = next(unused_characters(check_messages(messages), tools, template))
  escape = functools.partial(_map_strings, lambda s: tokenizer.escape(s, mark))
  escaped_tools = escape(tools) or None

  def write(messages, *, generation_prompt=False, thinking=False):
    return render(
      template,
      messages=escape(check_messages(messages)),
      tools=escaped_tools,
      enable_thinking=thinking,
      add_generation_prompt=generation_prompt,
      bos_token=tokenizer.pieces([tokenizer.bos_id])[0],
      eos_token=tokenizer.pieces([tokenizer.eos_id])[0],
    )

  return write, mark


def unused_characters(*values: Any) -> Iterator[str]:
  """Two or more characters of the private use area that occur in no value.

  Raises:
    TemplateError: there are no two, or the values can't be JSON.
  """
  try:
    text = json.dumps(values, ensure_ascii=False)
  except (TypeError, ValueError, RecursionError) as error:
    raise TemplateError(
      f'The messages or tools are not valid JSON: {error}.'
    ) from error
  unused = sorted(set(map(chr, range(0xE000, 0xF900))) - set(text))
  if len(unused) < 2:
    raise TemplateError(
      'The messages use all characters of the private use area, of which one '
      'is needed to mark what they spell.'
    )
  return iter(unused)


def render(template: str, **variables) -> str:
  """The text of a template with these variables. Raises `TemplateError`."""
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
  except Exception as error:  # Expressions can raise anything.
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
