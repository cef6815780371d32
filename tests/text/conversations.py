"""Random conversations, and what `transformers` makes of them.

  python tests/text/conversations.py --reference=FOLDER

writes tests/reference/chat_digests.json with the digest of each text that the
released chat template, FOLDER/diffusion_gemma.jinja, makes of a conversation,
null where it refuses; `test_template_fuzz.py` compares.
"""

import argparse
import hashlib
import json
import pathlib
import random
from typing import Any

COUNT = 500
DIGESTS = pathlib.Path(__file__).parents[1] / 'reference' / 'chat_digests.json'
TEXTS = (
  *(
    '',
    ' ',
    'hi',
    ' what is this ',
    'a\n\nb\n',
    '空は青い',
    '{"temp": 20}',
    '{}',
  ),
  *(
    '[1, 2]',
    'it\'s "so"',
    'a: b, c',
    '{{ messages }}',
    '\\n <b>',
    'thought\n',
  ),
)
NAMES = ('f', 'get_weather', 'a.b', 'ns:create', 'x-y')
KEYS = ('a', 'city', 'n', 'Z', 'two words', '日')


class _Dice:
  """Random choices that depend on `random.random` alone, which never changes
  between versions of Python."""

  def __init__(self, seed: int):
    self._random = random.Random(seed)

  def chance(self, p: float) -> bool:
    return self._random.random() < p

  def count(self, n: int) -> int:
    """From 0 to n - 1."""
    return int(self._random.random() * n)

  def pick(self, *options: Any) -> Any:
    return options[self.count(len(options))]


def make(seed: int) -> dict[str, Any]:
  """Arguments of `encode_chat`: messages, tools, thinking."""
  dice = _Dice(seed)
  messages = []
  if dice.chance(0.4):
    role = dice.pick('system', 'developer')
    messages.append({'role': role, **_content(dice)})
  for _ in range(1 + dice.count(6)):
    messages += dice.pick(_user, _user, _assistant, _assistant, _calls)(dice)
  if dice.chance(0.05):
    messages.append({'role': dice.pick('model', 'system', 'tool')})
  tools = [_tool(dice) for _ in range(dice.count(4) if dice.chance(0.4) else 0)]
  return {
    'messages': messages,
    'tools': tools,
    'thinking': dice.chance(0.4),
  }


def _user(dice: _Dice) -> list[dict[str, Any]]:
  return [{'role': 'user', **_content(dice)}]


def _assistant(dice: _Dice) -> list[dict[str, Any]]:
  message = {'role': 'assistant', **_content(dice)}
  if dice.chance(0.4):
    name = dice.pick('reasoning', 'reasoning_content', 'thinking')
    message[name] = dice.pick(None, 'hm', *TEXTS)
  if dice.chance(0.2):
    message['tool_calls'] = dice.pick(None, [])
  if dice.chance(0.1):
    message['tool_responses'] = dice.pick(
      None,
      [],
      [{'name': dice.pick(None, *NAMES), 'response': _value(dice)}],
      [{'response': _value(dice)}, {'name': 'f', 'response': {'a': 1}}],
    )
  if dice.chance(0.1):
    message['notes'] = {'what': 'nobody reads'}
  return [message]


def _calls(dice: _Dice) -> list[dict[str, Any]]:
  """An assistant's calls, and what tools answer to some of them."""
  (message,) = _assistant(dice)
  calls, answers = [], []
  for index in range(1 + dice.count(3)):
    function = {'name': dice.pick(*NAMES)}
    if not dice.chance(0.05):
      function['arguments'] = dice.pick(None, *[_object(dice)] * 9)
    if dice.chance(0.03):
      function['arguments'] = '{"a": 1}'
    call = {'type': 'function', 'function': function}
    if not dice.chance(0.1):
      call['id'] = f'call_{index}'
    calls.append(call)
    if dice.chance(0.7):
      answers.append({'role': 'tool', **_answer(dice)})
      if not dice.chance(0.2):
        answers[-1]['tool_call_id'] = f'call_{index}'
      if dice.chance(0.4):
        answers[-1]['name'] = dice.pick(None, *NAMES)
  message['tool_calls'] = calls
  return [message, *answers]


def _answer(dice: _Dice) -> dict[str, Any]:
  if dice.chance(0.1):
    return {'content': dice.pick({}, {'temp': 20})}
  return _content(dice)


def _content(dice: _Dice) -> dict[str, Any]:
  kind = dice.count(10)
  if kind == 0:
    return dice.pick({}, {'content': None}, {'content': []})
  if kind > 3:
    return {'content': dice.pick(*TEXTS)}
  return {'content': [_part(dice) for _ in range(1 + dice.count(3))]}


def _part(dice: _Dice) -> dict[str, Any]:
  kind = dice.count(24)
  if kind == 0:
    return dice.pick({'type': 'text'}, {'type': 'file', 'text': 'lost'})
  if kind < 5:
    return dice.pick(
      {'type': 'image'},
      {'type': 'image', 'image': 'cat.png'},
      {'type': 'image_url', 'image_url': {'url': 'https://a.b/cat.png'}},
    )
  return {'type': 'text', 'text': dice.pick(*TEXTS)}


def _value(dice: _Dice, depth: int = 0) -> Any:
  kind = dice.count(8 if depth < 3 else 6)
  if kind == 6:
    return _object(dice, depth + 1)
  if kind == 7:
    return [_value(dice, depth + 1) for _ in range(dice.count(4))]
  if kind < 3:
    return dice.pick(*TEXTS)
  return dice.pick(None, True, False, 0, -3, 2.5, 1e20, 10**20)


def _object(dice: _Dice, depth: int = 0) -> dict[str, Any]:
  return {dice.pick(*KEYS): _value(dice, depth) for _ in range(dice.count(4))}


def _tool(dice: _Dice) -> dict[str, Any]:
  function = {'name': dice.pick(*NAMES), 'description': dice.pick(*TEXTS)}
  if dice.chance(0.8):
    function['parameters'] = _schema(dice, 0, 'object')
  if dice.chance(0.2):
    function['response'] = {
      'description': dice.pick(*TEXTS),
      'type': dice.pick('object', 'OBJECT', 'string'),
    }
  return {'type': 'function', 'function': function}


def _schema(dice: _Dice, depth: int, type_: str = '') -> dict[str, Any]:
  kinds = ('string', 'integer', 'boolean', 'array', 'object')
  type_ = type_ or dice.pick(*kinds[: 5 if depth < 3 else 3])
  schema = {'type': type_}
  if dice.chance(0.6):
    schema['description'] = dice.pick(*TEXTS)
  if dice.chance(0.2):
    schema['nullable'] = dice.pick(True, False)
  if type_ == 'string' and dice.chance(0.3):
    schema['enum'] = [dice.pick(*TEXTS) for _ in range(1 + dice.count(3))]
  if type_ == 'array' and dice.chance(0.8):
    schema['items'] = _schema(dice, depth + 1)
  if type_ == 'object':
    inner = {}
    for _ in range(dice.count(4)):
      inner[dice.pick(*KEYS)] = _schema(dice, depth + 1)
    if depth and dice.chance(0.2):
      schema |= inner
    else:
      schema['properties'] = inner
    if dice.chance(0.5):
      schema['required'] = list(inner)[:2]
  return schema


def explain(messages: list[dict[str, Any]]) -> str:
  """Why these are refused though the released template has a text for them:
  it leaves out what they say. Empty if there is no reason."""
  for index, message in enumerate(messages):
    if message['role'] == 'tool':
      before = index - 1
      while before >= 0 and messages[before]['role'] == 'tool':
        before -= 1
      asked = messages[before] if before >= 0 else {}
      if not asked.get('tool_calls') or asked.get('tool_responses'):
        return 'an answer to no call'
    content = message.get('content')
    types = [p['type'] for p in content] if isinstance(content, list) else []
    if 'file' in types:
      return 'a part of an unknown type'
    is_system = message['role'] in ('system', 'developer')
    if not index and is_system and set(types) - {'text'}:
      return 'a picture in the first message'
  return ''


def digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def render(tokenizer, template: str, case: dict[str, Any]) -> str | None:
  """The text that `transformers` makes; None if the template refuses."""
  try:
    return tokenizer.apply_chat_template(
      case['messages'],
      tools=case['tools'] or None,
      chat_template=template,
      add_generation_prompt=True,
      tokenize=False,
      enable_thinking=case['thinking'],
    )
  except Exception:  # A template raises whatever its expressions do.
    return None


def main() -> None:
  import transformers

  parser = argparse.ArgumentParser()
  parser.add_argument('--reference', type=pathlib.Path, required=True)
  template = (
    parser.parse_args().reference / 'diffusion_gemma.jinja'
  ).read_text('utf-8')
  tokenizer = transformers.PreTrainedTokenizerBase(bos_token='<bos>')
  texts = [render(tokenizer, template, make(i)) for i in range(COUNT)]
  digests = [None if text is None else digest(text) for text in texts]
  DIGESTS.write_text(json.dumps(digests) + '\n')


if __name__ == '__main__':
  main()
