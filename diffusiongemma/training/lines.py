"""A line of JSON to a document; its keys determine the format.

  {"text": ...}                          a text
  {"prompt": ..., "response": ...}       a prompt and the response to learn;
                                         also "completion", and both may be
                                         lists of messages
  {"messages": [...], "tools": [...]}    a chat, and the tools it could call
  {"conversations": [{"from": ..., "value": ...}]}  the same (ShareGPT)
  {"instruction": ..., "input": ..., "output": ...}  a chat of two messages,
                                         the input after an empty line (Alpaca)
  {"data": ["question", "answer", ...]}  a chat, the user first (UltraChat);
                                         also "messages" that the "prompt"
                                         beside them repeats the first of

and optionally a "split", "train" or "heldout". A chat may have its "system"
message and its tools as keys beside the messages. For the format of a message
see `messages`.
"""

import itertools
from typing import Any
from typing import NamedTuple

from diffusiongemma.text.messages import without_nulls
from diffusiongemma.training import messages as chats
from diffusiongemma.training.messages import DataError


class Document(NamedTuple):
  """A text, a response to a prompt, or a chat.

  Attributes:
    text: the text to learn; empty for a chat, which the template renders.
    origin: file and line, for error messages.
    split: 'train', 'heldout' or '' (unspecified).
    prompt: the prompt that the text answers; None for a text or a chat.
    messages: the chat.
    targets: indices of the messages that are learnt.
    tools: tools that could be called in the chat.
    unread: descriptions of the content of the line that is not read.
  """

  text: str
  origin: str
  split: str = ''
  prompt: str | None = None
  messages: tuple[dict[str, Any], ...] = ()
  targets: tuple[int, ...] = ()
  tools: tuple[dict[str, Any], ...] = ()
  unread: tuple[str, ...] = ()

  @property
  def stands_alone(self) -> bool:
    """Whether it is a text, of which any prefix may be the prompt."""
    return self.prompt is None and not self.messages


# (keys that identify a format, optional keys) of each format.
FORMATS = {
  'text': (('text',), ()),
  'prompt': (('prompt', 'response', 'completion'), ('tools', 'system')),
  'messages': (('messages',), ('tools', 'functions', 'system')),
  'conversations': (('conversations',), ('tools', 'functions', 'system')),
  'instruction': (('instruction', 'output'), ('input', 'system')),
  'data': (('data',), ('system',)),
}
SIGNS = {sign: kind for kind, (signs, _) in FORMATS.items() for sign in signs}
EXAMPLES = (
  '{"text": ...}, {"prompt": ..., "response": ...}, {"messages": [...]}, '
  '{"conversations": [...]}, {"instruction": ..., "output": ...} or '
  '{"data": [...]}'
)
# Keys that change what is learnt, in another format here or in other libraries.
REFUSED = (
  *('input', 'system', 'tools', 'functions', 'history', *chats.FLAGS),
  *('chosen', 'rejected', 'label', 'labels', 'input_ids', 'loss_mask'),
  *('documents', 'suffix', 'reasoning', 'thinking', 'enable_thinking'),
  *('chat_template', 'chat_template_kwargs'),
)


def read_record(record: Any, origin: str) -> Document:
  """The document of a line; see the module docstring. Raises `DataError`."""
  if not isinstance(record, dict):
    raise DataError(f'{origin} is not an object: {{"text": ...}}.')
  record = without_nulls(record)
  split = record.pop('split', '')
  if split not in ('', 'train', 'heldout'):
    raise DataError(f'{origin}: split {split!r} is neither train nor heldout.')
  keys_found = [key for key in record if key in SIGNS]
  if set(keys_found) == {'instruction', 'output', 'text'}:
    keys_found.remove('text')  # Alpaca was published with both in a line.
  if len(keys_found) > 1 and 'data' in keys_found:
    keys_found.remove('data')  # Whatever it is beside another format.
  if set(keys_found) == {'prompt', 'messages'} and _is_repeated(record):
    keys_found.remove('prompt')
    del record['prompt']
  kinds = {SIGNS[key] for key in keys_found}
  if len(kinds) > 1:
    raise DataError(
      f'{origin} is of {len(kinds)} formats; keep one of '
      f'{", ".join(map(repr, keys_found))}.'
    )
  if not kinds:
    chats.unread_keys(record, tuple(SIGNS), (), origin)
    raise DataError(f'{origin} is none of {EXAMPLES}.')
  (kind,) = kinds
  signs, beside = FORMATS[kind]
  # Beside a text, other keys may be metadata.
  refused = chats.FLAGS if kind == 'text' else REFUSED
  known = (*signs, *beside, 'split')
  unread = chats.unread_keys(record, known, refused, origin)
  document = READERS[kind](record, origin)
  keys = tuple(f'the key {key!r}' for key in unread)
  return document._replace(split=split, unread=keys + document.unread)


def _read_text(record, origin):
  return Document(_string(record, 'text', origin), origin)


def _read_prompt(record, origin):
  if 'response' in record and 'completion' in record:
    raise DataError(f'{origin} has both a response and a completion.')
  name = 'completion' if 'completion' in record else 'response'
  prompt, response = record.get('prompt'), record.get(name)
  if isinstance(prompt, list) != isinstance(response, list):
    raise DataError(
      f'{origin}: prompt and {name} are both text, or both lists of messages.'
    )
  if isinstance(prompt, list):
    return _read_chat(record, prompt + response, origin, len(prompt))
  prompt, response = (_string(record, n, origin) for n in ('prompt', name))
  if not response:
    raise DataError(f'{origin}: the {name} is empty.')
  for key in ('system', 'tools'):
    if record.get(key):
      raise DataError(
        f'{origin}: {key!r} is for chats; give the prompt and the {name} as '
        'messages.'
      )
  return Document(response, origin, prompt=prompt)


def _read_messages(record, origin):
  return _read_chat(record, record['messages'], origin)


def _read_conversations(record, origin):
  return _read_chat(record, record['conversations'], origin)


def _read_instruction(record, origin):
  asked, said = (
    _string(record, name, origin) for name in ('instruction', 'output')
  )
  if record.get('input', '') != '':
    asked = f'{asked}\n\n{_string(record, "input", origin)}'
  turns = [('user', asked), ('assistant', said)]
  return _read_chat(
    record, [{'role': r, 'content': c} for r, c in turns], origin
  )


def _read_data(record, origin):
  turns = record['data']
  if not isinstance(turns, list) or not all(isinstance(x, str) for x in turns):
    raise DataError(f'{origin}: data is a list of texts, the user first.')
  roles = itertools.cycle(('user', 'assistant'))
  return _read_chat(
    record,
    [{'role': r, 'content': c} for r, c in zip(roles, turns, strict=False)],
    origin,
  )


def _is_repeated(record):
  """Whether the prompt is what the first of the messages says, too."""
  messages = record['messages']
  first = messages[0] if isinstance(messages, list) and messages else None
  return isinstance(first, dict) and record['prompt'] == first.get('content')


def _read_chat(record, given, origin, num_before=0):
  """A chat, whose first `num_before` messages are never learnt."""
  if not isinstance(given, list):
    raise DataError(
      f'{origin}: messages are a list of {{"role": ..., "content": ...}}.'
    )
  read = [
    chats.read_message(message, f'{origin}, message {number}')
    for number, message in enumerate(given, 1)
  ]
  if record.get('system'):
    system = {'role': 'system', 'content': _string(record, 'system', origin)}
    if read and read[0].message['role'] in ('system', 'developer'):
      raise DataError(f'{origin} has two system messages.')
    read.insert(0, chats.Message(system, is_learnt=False))
    num_before += 1
  messages = _pair_results([m.message for m in read], origin)
  tools = [record[key] for key in ('tools', 'functions') if record.get(key)]
  if len(tools) > 1:
    raise DataError(f'{origin} has both tools and functions.')
  targets = [i for i, m in enumerate(read) if m.is_learnt and i >= num_before]
  if not targets:
    raise DataError(f'{origin}: there is no message of the assistant to learn.')
  return Document(
    '',
    origin,
    messages=tuple(messages),
    targets=tuple(targets),
    tools=tuple(chats.read_tools(tools[0], origin) if tools else ()),
    unread=tuple(
      f'the key {key!r} of messages' for m in read for key in m.unread
    ),
  )


def _pair_results(messages, origin):
  """The messages with tool results matched to calls: a result without a call id
  answers the first open call, of the same name if it has one.

  Templates find a call by its id; several calls without ids would be
  indistinguishable.
  """
  paired, waiting = [], []
  for number, message in enumerate(messages):
    if message['role'] == 'tool':
      key = 'tool_call_id' if 'tool_call_id' in message else 'name'
      fitting = waiting
      if key in message:
        fitting = [call for call in waiting if call[key] == message[key]]
      if waiting and key in message and not fitting:
        raise DataError(
          f'{origin}: the tool result {message[key]!r} ({key}) answers no call '
          'before it.'
        )
      if fitting:
        call_id = fitting[0]['tool_call_id']
        waiting = [call for call in waiting if call is not fitting[0]]
        message = {**message, 'tool_call_id': call_id} if call_id else message
    elif calls := message.get('tool_calls', []):
      if len(calls) > 1:
        calls = [
          {'id': f'call_{number}_{i}', **call} for i, call in enumerate(calls)
        ]
        message = {**message, 'tool_calls': calls}
      waiting = [
        {'tool_call_id': call.get('id'), 'name': call['function']['name']}
        for call in calls
      ]
    else:
      waiting = []
    paired.append(message)
  return paired


def _string(record, name, origin):
  if not isinstance(record.get(name), str):
    raise DataError(f'{origin} has no {name!r} that is text.')
  return record[name]


READERS = {
  'text': _read_text,
  'prompt': _read_prompt,
  'messages': _read_messages,
  'conversations': _read_conversations,
  'instruction': _read_instruction,
  'data': _read_data,
}
