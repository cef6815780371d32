"""Writes chat_targets.jsonl.xz: what of random chats the model says.

  python tests/reference/make_chat_targets.py --template=TRAINING_TEMPLATE

The template is the one that the released checkpoint has for training, in which
`{% generation %}` stands around what the model says; `transformers` fills it in
and gives the spans. Each line has the messages and tools of a chat, and for
each turn of the model, as far as the chat has come by then, `end`, the number
of messages, and `said`, the spans of that turn.
"""

import argparse
import json
import lzma
import pathlib
import random

from transformers.utils import chat_template_utils

WORDS = ('what', 'is', 'this', 'thought', 'user', 'model', 'a', 'b')
TOOL = {
  'type': 'function',
  'function': {
    'name': 'f',
    'description': 'what',
    'parameters': {'type': 'object', 'properties': {'x': {'type': 'string'}}},
  },
}
COUNT = 200


def make_chat(rng: random.Random) -> dict:
  """Messages and tools, in any order that a chat may have."""
  words = lambda: ' '.join(rng.choices(WORDS, k=rng.randint(1, 4)))
  messages, has_tools = [], rng.random() < 0.6

  def content():
    if rng.random() < 0.8:
      return words()
    return [{'type': 'text', 'text': words()} for _ in range(rng.randint(1, 2))]

  if rng.random() < 0.3:
    role = rng.choice(['system', 'developer'])
    messages.append({'role': role, 'content': content()})
  for _ in range(rng.randint(1, 3)):
    messages.append({'role': 'user', 'content': content()})
    for _ in range(rng.randint(1, 3)):
      message = {'role': 'assistant', 'content': content()}
      messages.append(message)
      if rng.random() < 0.3:
        key = rng.choice(['reasoning', 'reasoning_content'])
        message[key] = words()
      if not has_tools or rng.random() < 0.4:
        continue
      if rng.random() < 0.5:
        message['content'] = ''
      calls = [
        {
          'id': f'c{i}',
          'type': 'function',
          'function': {'name': 'f', 'arguments': {'x': words(), 'n': i}},
        }
        for i in range(rng.randint(1, 2))
      ]
      message['tool_calls'] = calls
      if rng.random() < 0.1:
        message['tool_responses'] = [
          {'name': 'f', 'response': {'value': words()}} for _ in calls
        ]
      elif rng.random() < 0.9:
        messages += [
          {'role': 'tool', 'tool_call_id': call['id'], 'content': content()}
          for call in calls
        ]
  return {'messages': messages, 'tools': [TOOL] if has_tools else []}


def find_spans(template: str, messages: list, tools: list):
  """(the text that the template makes, spans of what the model says)."""
  (text,), (spans,) = chat_template_utils.render_jinja_template(
    [messages],
    tools=tools or None,
    chat_template=template,
    return_assistant_tokens_mask=True,
    bos_token='<bos>',
    eos_token='<eos>',
  )
  return text, spans


def make_line(template: str, chat: dict) -> dict:
  """The chat and what is said in its turns."""
  messages, tools = chat['messages'], chat['tools']
  is_model = [m['role'] in ('assistant', 'tool') for m in messages] + [False]
  turns, start = [], 0
  for end in range(1, len(messages) + 1):
    if not is_model[end - 1]:
      start = end
    elif not is_model[end]:
      past, _ = find_spans(template, messages[:start], tools)
      text, spans = find_spans(template, messages[:end], tools)
      assert text.startswith(past)
      said = [text[a:b] for a, b in spans if a >= len(past) and b > a]
      turns.append({'end': end, 'said': said})
  return {**chat, 'turns': turns}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--template', required=True)
  given = parser.parse_args()
  template = pathlib.Path(given.template).read_text()
  out = pathlib.Path(__file__).with_name('chat_targets.jsonl.xz')
  rng = random.Random(0)
  lines = [make_line(template, make_chat(rng)) for _ in range(COUNT)]
  text = (json.dumps(line, separators=(',', ':')) for line in lines)
  out.write_bytes(lzma.compress('\n'.join(text).encode()))


if __name__ == '__main__':
  main()
