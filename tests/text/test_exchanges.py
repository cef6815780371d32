"""What is learnt of a chat: all that the model says, and nothing else."""

import itertools
import json
import lzma
import pathlib

import pytest

from diffusiongemma.text import exchanges
from diffusiongemma.text import template as templates

REFERENCE = pathlib.Path(__file__).parents[1] / 'reference'
# Chats with what the released template for training marks as said; see
# `make_chat_targets.py` beside it.
CHATS = [
  json.loads(line)
  for line in lzma.decompress(
    (REFERENCE / 'chat_targets.jsonl.xz').read_bytes()
  ).splitlines()
]
DEFAULT = templates.default_template()
# As an early one of this model: sampling answers without a thought.
CLOSED_THOUGHT = DEFAULT.replace(
  "{{- '<|turn>model\\n' -}}",
  "{{- '<|turn>model\\n' -}}"
  "{{- '<|channel>thought\\n<channel|>' if not thinking -}}",
)
WITHOUT_BOS = DEFAULT.replace('{{- bos_token -}}', '')
TOLD_APART = """
{%- for m in messages %}
<|turn>{{ m.role }}
{% if m.reasoning %}<|channel>{{ m.reasoning }}<channel|>
{% endif %}
{{ m.content }}
{%- for call in m.tool_calls or [] %}
<|tool_call>{{ call.function | tojson }}<tool_call|>
{%- endfor %}<turn|>
{% endfor %}
{% if add_generation_prompt %}<|turn>assistant
{% endif %}"""
# As some templates of models that always think tell the last answer.
EMPTY_THOUGHT = """{{ bos_token }}
{%- for m in messages %}<|turn>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}
<|channel>{{ m.reasoning }}<channel|>
{% endif %}
{{ m.content }}<turn|>
{% endfor %}
{%- if add_generation_prompt %}<|turn>assistant
{{ '' if enable_thinking else '<|channel><channel|>\n' }}{% endif %}"""
WITH_SPANS = """{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}
{% if m.role == 'assistant' %}
{% generation %}{{ m.content }}<turn|>{% endgeneration %}
{% else %}{{ m.content }}<turn|>{% endif %}

{% endfor %}
{% if add_generation_prompt %}<|turn>assistant
{% endif %}"""
PLAIN = """{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


def user(content='q'):
  return {'role': 'user', 'content': content}


def assistant(content='', **more):
  return {'role': 'assistant', 'content': content, **more}


def result(content):
  return {'role': 'tool', 'name': 'f', 'content': content}


CALL = [{'type': 'function', 'function': {'name': 'f', 'arguments': {}}}]
CALLED = '<|tool_call>call:f{}<tool_call|>'
ANSWERED = '<|tool_response>response:f{value:<|"|>r<|"|>}<tool_response|>'


def spell(tokenizer, ids):
  control = set(tokenizer.control_tokens.values())
  return ''.join(
    tokenizer.pieces(run)[0] if is_control else tokenizer.decode(run)
    for is_control, token in itertools.groupby(ids, control.__contains__)
    for run in ([[t] for t in token] if is_control else [list(token)])
  )


def learn(tokenizer, template, messages, targets=None, tools=()):
  """[(prompt, reply)] as text with control tokens spelled."""
  if targets is None:
    targets = [i for i, m in enumerate(messages) if m['role'] == 'assistant']
  learnt = exchanges.encode_exchanges(
    tokenizer, template, messages, targets, tools
  )
  return [(spell(tokenizer, p), spell(tokenizer, r)) for p, r in learnt]


@pytest.mark.parametrize('first', range(0, len(CHATS), 20))
def test_what_is_learnt_is_what_the_training_template_marks(
  chat_tokenizer, first
):
  """But for the end of the line after a turn, which sampling never reaches; the
  token in which a call ends, which it has to write; and the opening of a
  thought after a tool's answer, which its prompt has."""
  opening = '<|channel>thought\n'
  for chat in CHATS[first : first + 20]:
    start = 0
    for turn in chat['turns']:
      messages = chat['messages'][: turn['end']]
      targets = [i for i, m in enumerate(messages) if m['role'] == 'assistant']
      learnt = learn(
        chat_tokenizer,
        DEFAULT,
        messages,
        [i for i in targets if i >= start],
        chat['tools'],
      )
      said = ''
      for prompt, reply in learnt:
        assert reply.endswith(('<turn|>', '<|tool_response>'))
        said += opening if prompt.endswith(opening) else ''
        said += reply.removesuffix('<|tool_response>')
      expected = ''.join(turn['said']).replace('<turn|>\n', '<turn|>')
      assert said == expected, messages
      start = turn['end']


@pytest.mark.parametrize(
  'template, opening',
  [
    (DEFAULT, ''),
    (CLOSED_THOUGHT, '<|channel>thought\n<channel|>'),
    (WITHOUT_BOS, ''),
  ],
)
def test_no_header_is_learnt(chat_tokenizer, template, opening):
  assert CLOSED_THOUGHT != DEFAULT != WITHOUT_BOS
  bos = '' if template is WITHOUT_BOS else '<bos>'
  turns = [user(), assistant('a'), user('p'), assistant('b')]
  asked = f'{bos}<|turn>user\nq<turn|>\n<|turn>model\n'
  again = f'{asked}a<turn|>\n<|turn>user\np<turn|>\n<|turn>model\n'
  assert learn(chat_tokenizer, template, turns) == [
    (asked + opening, 'a<turn|>'),
    (again + opening, 'b<turn|>'),
  ]


def test_templates_of_other_models(chat_tokenizer):
  turns = [user(), assistant('a', tool_calls=CALL), result('r')]
  turns += [assistant('b'), assistant('c')]
  call = '{"name": "f", "arguments": {}}'
  told = '<|turn>user\nq<turn|>\n<|turn>assistant\n'
  later = f'{told}a<|tool_call>{call}<tool_call|><turn|>\n<|turn>tool\nr'
  later = f'{later}<turn|>\n<|turn>assistant\n'
  assert learn(chat_tokenizer, TOLD_APART.lstrip(), turns) == [
    (told, f'a<|tool_call>{call}<tool_call|><turn|>'),
    (later, 'b<turn|>'),
    (f'{later}b<turn|>\n<|turn>assistant\n', 'c<turn|>'),
  ]


def test_a_thought_that_the_template_always_writes(chat_tokenizer):
  told = '<bos><|turn>user\nq<turn|>\n<|turn>assistant\n'
  learnt = lambda answer: learn(chat_tokenizer, EMPTY_THOUGHT, [user(), answer])
  assert learnt(assistant('a')) == [
    (f'{told}<|channel><channel|>\n', 'a<turn|>')
  ]
  assert learnt(assistant('a', reasoning='hm')) == [
    (told, '<|channel>hm<channel|>\na<turn|>')
  ]


def test_spans_write_nothing_themselves(chat_tokenizer):
  told = '<bos><|turn>user\nq<turn|>\n<|turn>assistant\n'
  learnt = learn(chat_tokenizer, WITH_SPANS, [user(), assistant('a')])
  assert learnt == [(told, 'a<turn|>')]


def test_a_header_without_a_control_token_may_be_said(chat_tokenizer):
  """It is where the generation prompt ends, not wherever it is spelled."""
  said = 'x\nassistant: y'
  learnt = learn(chat_tokenizer, PLAIN, [user(), assistant(said)])
  assert learnt == [('<bos>user: q\nassistant:', f' {said}')]


ASKED = '<bos><|turn>user\nq<turn|>\n<|turn>model\n'


@pytest.mark.parametrize(
  'turns, expected',
  [
    (
      [assistant('a', tool_calls=CALL), result('r')],
      [
        (ASKED, f'{CALLED}<|tool_response>'),
        (f'{ASKED}{CALLED}{ANSWERED}', 'a<turn|>'),
      ],
    ),
    (
      [assistant('a', tool_calls=CALL), result('r'), assistant('b')],
      [
        (ASKED, f'{CALLED}<|tool_response>'),
        (f'{ASKED}{CALLED}{ANSWERED}', 'ab<turn|>'),
      ],
    ),
    (
      [assistant('a', tool_calls=CALL)],
      [(ASKED, f'{CALLED}a<|tool_response>')],
    ),
    (
      [
        assistant(
          'a',
          tool_calls=CALL,
          tool_responses=[{'name': 'f', 'response': 'r'}],
        )
      ],
      [
        (ASKED, f'{CALLED}<|tool_response>'),
        (f'{ASKED}{CALLED}{ANSWERED}', 'a<turn|>'),
      ],
    ),
    ([assistant('a1'), assistant('a2')], [(ASKED, 'a1a2<turn|>')]),
    (
      [assistant('a1'), assistant('a2', tool_calls=CALL), result('r')],
      [
        (ASKED, f'a1{CALLED}<|tool_response>'),
        (f'{ASKED}a1{CALLED}{ANSWERED}', 'a2<turn|>'),
      ],
    ),
  ],
)
def test_what_is_told_later_or_as_one_turn(chat_tokenizer, turns, expected):
  assert learn(chat_tokenizer, DEFAULT, [user(), *turns]) == expected


@pytest.mark.parametrize(
  'targets, expected',
  [
    ([1], [(ASKED, 'a<turn|>')]),
    ([2], [(f'{ASKED}a', 'b<turn|>')]),
    ([1, 2], [(ASKED, 'ab<turn|>')]),
    ([1, 3], [(ASKED, 'a<turn|>'), (f'{ASKED}ab', 'c<turn|>')]),
  ],
)
def test_targets_inside_one_turn(chat_tokenizer, targets, expected):
  turns = [user(), assistant('a'), assistant('b'), assistant('c')]
  turns = turns[: 1 + max(targets)]
  assert learn(chat_tokenizer, DEFAULT, turns, targets) == expected


@pytest.mark.parametrize(
  'template, turns, message',
  [
    (
      DEFAULT,
      [user(), result('lost'), assistant('a')],
      r'Message 1 \(tool\): it answers no call',
    ),
    (
      "{{ messages | rejectattr('role', 'equalto', 'system')"
      " | map(attribute='content') | join }}",
      [user(), {'role': 'system', 'content': 'lost'}, assistant('a')],
      "leaves out message 2, of role 'system'",
    ),
    (
      '{{ messages | length }}{{ messages[-1].content }}',
      [user(), assistant('a')],
      'changes what was said before',
    ),
    (
      "{{ 'x' if add_generation_prompt }}",
      [user(), assistant('a')],
      'does not write what the assistant says',
    ),
    (
      "{{ messages | map(attribute='content') | join | replace('a', '') }}",
      [user(), assistant('a')],
      'writes nothing of what the assistant says',
    ),
  ],
)
def test_templates_that_tell_too_little(
  chat_tokenizer, template, turns, message
):
  with pytest.raises(templates.TemplateError, match=message):
    learn(chat_tokenizer, template, turns)


@pytest.mark.parametrize(
  'content, expected',
  [
    ('<|channel>thought\nhm\n<channel|>a', 'a'),
    ('b <|channel>x<channel|> c <|channel>y', 'b  c '),
    ('a<channel|>b', 'ab'),
    ('the English channel', 'the English channel'),
  ],
)
def test_thinking_inside_a_content(chat_tokenizer, content, expected):
  parts = lambda text: [{'type': 'text', 'text': text}]
  for wrap in (str, parts):
    messages = [user(wrap(content)), assistant(wrap(content))]
    asked, answer = exchanges.drop_thinking(chat_tokenizer, messages)
    assert asked == user(wrap(content)), 'what others say stays'
    assert answer == assistant(wrap(expected))


@pytest.mark.parametrize(
  'message, expected',
  [
    (assistant(f'{CALLED}a'), r'spells <\|tool_call>.*as "tool_calls"'),
    (assistant('a<turn|>'), r'spells <turn\|>'),
    (assistant('<|turn>model\na'), r'spells <\|turn>'),
    (assistant('a', reasoning='<channel|>a'), r'spells <channel\|>'),
    (assistant('<|channel>thought\nhm'), 'is all thinking'),
  ],
)
def test_marks_that_would_be_learnt_as_text(chat_tokenizer, message, expected):
  with pytest.raises(templates.TemplateError, match=expected):
    exchanges.drop_thinking(chat_tokenizer, [message])
