"""Splits a chat into prompts and the replies to learn.

A chat template renders a whole conversation. The text of the model in it is
found by comparing the rendered text with and without a message:

  prompt = the past and a generation prompt: what sampling gives the model
  reply  = the text that the message adds to the past
           - the header of its turn: the text before a one-character answer
           - what the generation prompt opened already, such as a thought

Some templates render an answer after the result of the call in the same
message, and consecutive messages of the assistant as one turn.
"""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Sequence
import itertools
from typing import Any
from typing import NamedTuple

from diffusiongemma.text import template as templates
from diffusiongemma.text import tokenizer as tokenizers
from diffusiongemma.text.template import TemplateError

Message = dict[str, Any]

# Markup that only the template writes, never a speaker.
MARKERS = (
  *('<|turn>', '<turn|>', '<|channel>', '<channel|>', '<|think|>', '<|"|>'),
  *('<|tool>', '<tool|>', '<|tool_call>', '<tool_call|>'),
  *('<|tool_response>', '<tool_response|>'),
  *('<|image>', '<|image|>', '<image|>', '<bos>', '<eos>'),
)


class Exchange(NamedTuple):
  """Token ids of a prompt and a reply.

  Attributes:
    prompt: what sampling gives the model, with bos if the template writes it.
    reply: what the model should write, with the token that ends its turn.
  """

  prompt: list[int]
  reply: list[int]


class _Stage(NamedTuple):
  """A prefix of a conversation.

  Attributes:
    messages: all messages so far.
    text: the messages rendered by the template.
    says: index of the message whose text is new, if it is from the model; None
      if the new text is from others.
    thinks: whether the model thinks before it.
  """

  messages: list[Message]
  text: str
  says: int | None = None
  thinks: bool = False


def encode_exchanges(
  tokenizer: tokenizers.Tokenizer,
  template: str,
  messages: Sequence[Message],
  targets: Collection[int],
  tools: Sequence[dict[str, Any]] = (),
) -> list[Exchange]:
  """The exchanges to learn from a chat, in order.

  Thinking is enabled where the reply begins with reasoning.

  Args:
    tokenizer: its control tokens are those of the template.
    template: Jinja.
    messages: as `encode_chat` takes them.
    targets: indices of the messages of the assistant that are learnt.
    tools: declarations.

  Raises:
    TemplateError: the template refuses, omits something, or renders the past
      differently when more messages follow.
  """
  write, mark = templates.make_writer(tokenizer, template, messages, tools)
  unused = templates.unused_characters(messages, tools, template)
  _, probe = itertools.islice(unused, 2)  # The first is the mark.
  end = max(targets) + 1
  while end < len(messages) and messages[end]['role'] == 'tool':
    end += 1
  has_control = lambda text: tokenizer.escape(text, mark) != text
  exchanges = []
  for past, reply in _replies(_unfold(write, messages[:end])):
    past = past or _Stage([], write([]))
    by_learnt = itertools.groupby(reply, lambda stage: stage.says in targets)
    for is_learnt, group in by_learnt:
      stages = list(group)
      if is_learnt:
        texts = _split(write, past, stages, probe, has_control)
        ids = (tokenizer.encode_template(text, mark) for text in texts)
        exchanges.append(Exchange(*ids))
      past = stages[-1]
  return exchanges


def _split(
  write: Callable[..., str],
  past: _Stage,
  stages: Sequence[_Stage],
  probe: str,
  has_control: Callable[[str], bool],
) -> tuple[str, str]:
  """(prompt, reply) of consecutive stages of one turn."""
  last, thinks = stages[-1], stages[0].thinks
  before, whole = past.text, last.text
  if thinks:
    before, whole = (write(s.messages, thinking=True) for s in (past, last))
  answer = {'role': 'assistant', 'content': probe}
  rendered = write([*past.messages, answer], thinking=thinks)
  rendered, found, _ = rendered.partition(probe)
  if not found:
    raise TemplateError(
      'The chat template does not write what the assistant says verbatim.'
    )
  if past.says is not None and not whole.startswith(before):
    # The turn began with text that is not learnt.
    prompt, said = rendered, _without_start(whole, rendered)
  else:
    prompt = write(past.messages, generation_prompt=True, thinking=thinks)
    header = (
      rendered.removeprefix(before) if rendered.startswith(before) else ''
    )
    if not has_control(header):
      header = ''  # It may be text of a speaker.
    said = _said(before, prompt, header, whole)
  if not said.strip():
    raise TemplateError(
      'The chat template writes nothing of what the assistant says.'
    )
  return prompt, said.rstrip()


def _unfold(
  write: Callable[..., str], messages: Sequence[Message]
) -> Iterator[_Stage]:
  """Prefixes of the conversation, each longer by what one side says."""
  shown: list[Message] = []
  index = 0
  # The empty conversation is rendered only to see whether a result is omitted:
  # some templates refuse to.
  text = write([]) if messages[0]['role'] == 'tool' else None
  while index < len(messages):
    message, start = messages[index], index
    index += 1
    if message['role'] != 'assistant':
      shown = [*shown, message]
      before, text = text, write(shown)
      if text == before and message.get('content'):
        raise TemplateError(
          f'The chat template leaves out message {index}, of role '
          f'{message["role"]!r}.'
        )
      yield _Stage(shown, text)
      continue
    thinks = bool(message.get('reasoning') or message.get('reasoning_content'))
    embedded = message.get('tool_responses')
    while not embedded and messages[index : index + 1]:
      if messages[index]['role'] != 'tool':
        break
      index += 1
    results = messages[start + 1 : index]
    alone, whole = [*shown, message], [*shown, message, *results]
    text_alone = write(alone)
    text_whole = write(whole) if results else text_alone
    if not embedded and text_whole.startswith(text_alone):
      yield _Stage(alone, text_alone, start, thinks)
      shown, text, index = alone, text_alone, start + 1
      continue
    # The content is an answer to the results.
    called = {**message, 'content': ''}
    call = {k: v for k, v in called.items() if k != 'tool_responses'}
    if message.get('tool_calls') or thinks:
      yield _Stage([*shown, call], write([*shown, call]), start, thinks)
    answered = [*shown, called, *results]
    yield _Stage(answered, write(answered))
    if message.get('content'):
      yield _Stage(whole, text_whole, start)
    shown, text = whole, text_whole


def _replies(
  stages: Iterator[_Stage],
) -> Iterator[tuple[_Stage | None, list[_Stage]]]:
  """(the stage before, if any, and the stages of the reply) of each reply.

  A stage that changes the end of the model's text belongs to the same reply.
  """
  past: _Stage | None = None
  reply: list[_Stage] = []
  for stage in stages:
    is_said = stage.says is not None
    if reply and not (is_said and not stage.text.startswith(reply[-1].text)):
      yield past, reply
      past, reply = reply[-1], []
    if is_said:
      reply.append(stage)
    else:
      past = stage
  if reply:
    yield past, reply


def _said(before: str, prompt: str, header: str, whole: str) -> str:
  """The text that a reply adds to the text before it."""
  if whole.startswith(prompt):
    said = whole.removeprefix(prompt)
    opened = ''
  else:
    said = _without_start(whole, before)
    opened = prompt.removeprefix(before).removeprefix(header)
  # After a tool's answer sampling continues the same turn, while the past is
  # rendered with a new one.
  if header:
    said = said.replace(header, '')
  return said.removeprefix(opened)


def _without_start(text: str, start: str) -> str:
  if not text.startswith(start):
    raise TemplateError(
      'The chat template changes what was said before the last message.'
    )
  return text.removeprefix(start)


def drop_thinking(
  tokenizer: tokenizers.Tokenizer, messages: Sequence[Message]
) -> list[Message]:
  """Removes text between `<|channel>` and `<channel|>` from messages of the
  assistant, as the released template does.

  Args:
    tokenizer: if it has no such control tokens, nothing is removed.
    messages: contents are text, or parts `{'type': 'text', 'text': ...}`.

  Raises:
    TemplateError: nothing remains, or the text spells other control tokens,
      which would be learnt as text.
  """
  result = []
  for message in messages:
    if message['role'] == 'assistant':
      content = message['content']
      if isinstance(content, str):
        content = _spoken(tokenizer, content)
      else:
        content = [
          {**part, 'text': _spoken(tokenizer, part['text'])} for part in content
        ]
      check_spelling(tokenizer, message.get('reasoning', ''))
      message = {**message, 'content': content}
    result.append(message)
  return result


def _spoken(tokenizer: tokenizers.Tokenizer, text: str) -> str:
  """`text` without thinking. Raises `TemplateError`."""
  spoken = text
  if '<|channel>' in tokenizer.control_tokens and 'channel' in text:
    segments = text.split('<channel|>')
    spoken = ''.join(segment.partition('<|channel>')[0] for segment in segments)
    if text.strip() and not spoken.strip():
      raise TemplateError(
        'A content of the assistant is all thinking; give it as '
        '"reasoning" beside the content.'
      )
  check_spelling(tokenizer, spoken)
  return spoken


def check_spelling(tokenizer: tokenizers.Tokenizer, text: str) -> None:
  """Raises `TemplateError` if `text` spells one of `MARKERS`."""
  for marker in MARKERS:
    if marker in text and marker in tokenizer.control_tokens:
      raise TemplateError(
        f'What is learnt spells {marker}, which would be learnt as text: leave '
        'marks of turns out, and give a chat as "messages", calls as '
        '"tool_calls" and thoughts as "reasoning".'
      )
