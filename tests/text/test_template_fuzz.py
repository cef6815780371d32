"""Random conversations: what templates make of them, and calls read back."""

import json
import os
import pathlib
import re
import sys

import pytest

from diffusiongemma.generation import chat
from diffusiongemma.text import template as templates
from diffusiongemma.text import tokenizer as tokenizers
from diffusiongemma.text.messages import check_messages

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import conversations

DIGESTS = json.loads(conversations.DIGESTS.read_text())
REFERENCE = os.environ.get('GEMMA_REFERENCE')
MARK = '\ue000'


def render(template, case):
  return templates.render(
    template,
    messages=check_messages(case['messages']),
    tools=case['tools'] or None,
    enable_thinking=case['thinking'],
    add_generation_prompt=True,
    bos_token='<bos>',
  )


def test_random_conversations_are_what_the_released_template_writes(
  chat_tokenizer,
):
  """Digests of 500 texts; where that template refuses, ours may do so too, and
  where it leaves something out, that is said."""
  same, explained = 0, set()
  for seed, digest in enumerate(DIGESTS):
    case = conversations.make(seed)
    reason = conversations.explain(case['messages'])
    try:
      text = render(templates.default_template(), case)
    except templates.TemplateError:
      assert digest is None or reason, seed
      explained.add(reason)
      continue
    assert not reason, seed
    if digest is not None:
      assert conversations.digest(text) == digest, seed
      same += 1
    if seed % 10 == 0:
      ids = templates.encode_chat(
        chat_tokenizer, templates.default_template(), **case
      )
      assert ids == chat_tokenizer.encode_template(text, MARK)
  assert same > 350 and len(explained) == 4


@pytest.mark.parametrize(
  'name', ['', 'diffusion_gemma.jinja', 'diffusion_gemma_training.jinja']
)
@pytest.mark.skipif(
  not REFERENCE,
  reason='GEMMA_REFERENCE names no folder with the released chat templates '
  'and tokenizer_gemma4.model',
)
def test_random_conversations_are_the_tokens_of_transformers(name, tmp_path):
  transformers = pytest.importorskip(
    'transformers', reason='transformers is not installed'
  )
  folder = pathlib.Path(REFERENCE)
  model = (folder / 'tokenizer_gemma4.model').read_bytes()
  (tmp_path / 'tokenizer.model').write_bytes(model)
  ours = tokenizers.make_tokenizer(model, 'tokenizer.model')
  theirs = transformers.GemmaTokenizer.from_pretrained(str(tmp_path))
  released = (folder / 'diffusion_gemma.jinja').read_text('utf-8')
  template = (
    (folder / name).read_text('utf-8') if name else templates.default_template()
  )
  same = 0
  for seed in range(len(DIGESTS)):
    case = conversations.make(seed)
    text = conversations.render(theirs, released, case)
    digest = None if text is None else conversations.digest(text)
    assert digest == DIGESTS[seed]
    if text is None or conversations.explain(case['messages']):
      continue
    expected = theirs(text, add_special_tokens=False)['input_ids']
    assert templates.encode_chat(ours, template, **case) == expected, seed
    same += 1
  assert same > 350


# ----- replies ----------------------------------------------------------------


def spell(call, bare=()):
  """The call as the template spells it, keys in their own order, strings of
  `bare` without quotes."""

  def value(it):
    if isinstance(it, str):
      return it if it in bare else f'<|"|>{it}<|"|>'
    if isinstance(it, dict):
      return '{' + ','.join(f'{k}:{value(v)}' for k, v in it.items()) + '}'
    if isinstance(it, list):
      return '[' + ','.join(map(value, it)) + ']'
    return json.dumps(it)

  return f'call:{call["name"]}' + value(call['arguments'])


def read(tokenizer, text):
  return chat.parse_call(tokenizer, tokenizer.encode_template(text, MARK))


def random_call(seed):
  dice = conversations._Dice(seed)
  return {
    'name': dice.pick(*conversations.NAMES),
    'arguments': conversations._object(dice),
  }


def test_calls_are_read_as_the_template_writes_them(chat_tokenizer):
  for seed in range(300):
    call = random_call(seed)
    message = {'role': 'assistant', 'tool_calls': [{'function': call}]}
    ids = templates.encode_chat(
      chat_tokenizer, templates.default_template(), [message]
    )
    start = ids.index(chat_tokenizer.control_tokens['<|tool_call>']) + 1
    end = ids.index(chat_tokenizer.control_tokens['<tool_call|>'])
    assert chat.parse_call(chat_tokenizer, ids[start:end]) == call, seed


def test_calls_with_one_fault_are_never_read_wrong(chat_tokenizer):
  """A sign or quote is missing, doubled, or changes places with what is before:
  the call is read as it was meant, or as it is written, or not at all."""
  meant = unread = 0
  for seed in range(400):
    call = random_call(seed)
    dice = conversations._Dice(-1 - seed)
    pieces = re.findall(r'<\|"\|>|[{}\[\],:]|[^{}\[\],:<]+|<', spell(call))
    for _ in range(6):
      faulty = list(pieces)
      signs = [
        i for i, p in enumerate(pieces) if p in '{}[],:' or p[:2] == '<|'
      ]
      place = dice.pick(*signs)
      kind = dice.pick('missing', 'doubled', 'swapped')
      if kind == 'missing':
        del faulty[place]
      elif kind == 'doubled':
        faulty.insert(place, faulty[place])
      else:
        faulty[place - 1 : place + 1] = faulty[place - 1 : place + 1][::-1]
      text = ''.join(faulty)
      got = read(chat_tokenizer, text)
      if got is None:
        unread += 1
      elif got == call:
        meant += 1
      else:
        quoted = text.split('<|"|>')[1::2]
        strings = set(all_strings(got['arguments'])) - set(quoted)
        assert squeeze(spell(got, strings)) == squeeze(text), (seed, kind)
  assert meant > 100 and unread > 1000


def squeeze(text):
  return ''.join(text.split())


def all_strings(value):
  if isinstance(value, dict):
    value = list(value.values())
  if isinstance(value, list):
    return [s for v in value for s in all_strings(v)]
  return [value] if isinstance(value, str) else []


def test_what_is_random_is_never_read_twice_over(chat_tokenizer):
  """Of anything that is read, the reading is read again."""
  alphabet = ['<|"|>', *'{}[],:"\'=\\ \n', 'a', '1', 'true', 'call:', '-', '日']
  readable = 0
  for seed in range(3000):
    dice = conversations._Dice(seed)
    body = ''.join(dice.pick(*alphabet) for _ in range(dice.count(9)))
    got = read(chat_tokenizer, 'call:f{a:' + body + '}')
    if got is not None:
      readable += 1
      assert read(chat_tokenizer, spell(got)) == got
  assert readable > 100
