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
    TemplateError: the template is broken or refuses the messages.
  """
  write = _writer(tokenizer, template, messages, tools, thinking)
  text, mark = write(messages, generation_prompt=True)
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
