"""Replies taken apart, tool calls read, and nothing read twice."""

import dataclasses
import json
import time
import types

import jax
import numpy as np
import pytest

from diffusiongemma.generation import chat
from diffusiongemma.generation import engine
from diffusiongemma.generation import generate
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.text import call_syntax
from diffusiongemma.text import template as templates

WEATHER = {
  'name': 'get_weather',
  'description': 'The weather.',
  'parameters': {'type': 'object', 'properties': {'city': {'type': 'string'}}},
}


@pytest.fixture(scope='module')
def model(chat_run):
  """A random network that knows the turns."""
  return chat.Model(
    chat_run.config,
    chat_run.params,
    chat_run.tokenizer,
    templates.default_template(),
    max_new_tokens=16,
  )


def written(model, text, stopped_by='stop_token'):
  """As if the model had written `text`, control tokens spelled."""
  tokens = model.tokenizer.encode_template(text, '\ue000')
  return generate.Generation(tokens, 4, 1.0, stopped_by)


def parse(model, text, prompt='<|turn>model\n', **options):
  prompt = model.tokenizer.encode_template(prompt, '\ue000')
  return chat.parse_reply(model, prompt, written(model, text, **options))


def test_an_answer(model):
  reply = parse(model, 'Blue is short. <turn|>')
  assert reply[:4] == ('Blue is short.', '', [], '')


def test_thinking_is_apart(model):
  reply = parse(
    model, '<|channel>thought\nIt scatters.\n<channel|>Blue.<turn|>'
  )
  assert reply[:4] == ('Blue.', 'It scatters.', [], '')
  opened = '<|turn>model\n<|channel>thought\n'
  reply = parse(model, 'It scatters.<channel|>Blue.<turn|>', prompt=opened)
  assert reply[:4] == ('Blue.', 'It scatters.', [], '')
  closed = opened + '<channel|>'
  reply = parse(model, 'thought\nIt scatters.<turn|>', prompt=closed)
  assert reply[:4] == ('thought\nIt scatters.', '', [], '')
  two = '<|channel>thought\na<channel|>b<|channel>thought\nc<channel|>d<turn|>'
  assert parse(model, two)[:2] == ('bd', 'a\nc')


CALL = '<|tool_call>call:{}<tool_call|>'


@pytest.mark.parametrize(
  'written_as, name, arguments',
  [
    ('now{}', 'now', {}),
    ('get_weather{city:<|"|>Rome<|"|>}', 'get_weather', {'city': 'Rome'}),
    (
      'f{a:1,b:-2.5,c:true,d:null,e:word}',
      'f',
      {'a': 1, 'b': -2.5, 'c': True, 'd': None, 'e': 'word'},
    ),
    (
      'f{l:[1,<|"|>x, y<|"|>,[],{k:[{}]}],<|"|>q: q<|"|>:<|"|><|"|>}',
      'f',
      {'l': [1, 'x, y', [], {'k': [{}]}], 'q: q': ''},
    ),
    ('f{s:<|"|>}{"\n:,é<|"|>}', 'f', {'s': '}{"\n:,é'}),
    ('f{n:NaN,m:' + '9' * 5000 + '}', 'f', {'n': 'NaN', 'm': '9' * 5000}),
  ],
)
def test_tool_calls(model, written_as, name, arguments):
  text = 'Let me see.' + CALL.format(written_as) + '<|tool_response>'
  reply = parse(model, text)
  assert reply.text == 'Let me see.' and not reply.problem
  assert reply.tool_calls == [{'name': name, 'arguments': arguments}]


@pytest.mark.parametrize(
  'written_as, arguments',
  [
    # As JSON, or with quotes of Python.
    ('f{"content": "a, b: c", "n": 2}', {'content': 'a, b: c', 'n': 2}),
    ('f{opts:{"mode": "fast"}}', {'opts': {'mode': 'fast'}}),
    ('f{refs:["a, b","c"]}', {'refs': ['a, b', 'c']}),
    ("f{refs:['ds_1'],k:'a: {b}'}", {'refs': ['ds_1'], 'k': 'a: {b}'}),
    ("f{'a': 1, 'b': \"it's\"}", {'a': 1, 'b': "it's"}),
    (r'f{a:"x\n\u00e9\"}"}', {'a': 'x\né"}'}),
    ('f{a:"x\ny"}', {'a': 'x\ny'}),
    (r"f{a:'it\'s'}", {'a': "it's"}),
    ('f{a:True,b:[False],c:None}', {'a': True, 'b': [False], 'c': None}),
    ("f{to='a.docx',n=2}", {'to': 'a.docx', 'n': 2}),
    ('f{a:<|"|>say "hi", \'b\'}<|"|>}', {'a': 'say "hi", \'b\'}'}),
    # Braces twice.
    ('f{{"a": 1}}', {'a': 1}),
    ('f{ {a:1} }', {'a': 1}),
    ('f{{}}', {}),
    # Three quotes, and quotation marks inside of a string.
    ('f{a:"""x "y", z""",b:1}', {'a': 'x "y", z', 'b': 1}),
    ("f{a:'''it's'''}", {'a': "it's"}),
    (
      'f{a:<|"|>q(<|"|><|"|><|"|> b, {c} <|"|><|"|><|"|>)<|"|>,e:<|"|>f<|"|>}',
      {'a': 'q(""" b, {c} """)', 'e': 'f'},
    ),
    ('f{a:<|"|>print(<|"|>x<|"|>)<|"|>}', {'a': 'print("x")'}),
    # A sign is missing.
    ('f{a:<|"|>look<|"|>b:90}', {'a': 'look', 'b': 90}),
    ('f{a:[1]\n"b":{c:2}d:3}', {'a': [1], 'b': {'c': 2}, 'd': 3}),
    ('f{a:[{b:1}{b:2}]}', {'a': [{'b': 1}, {'b': 2}]}),
    ('f{a:1,b:<|"|>x<|"|>', {'a': 1, 'b': 'x'}),
    ('f{a:[1,2]', {'a': [1, 2]}),
    ('f{{"a":"b"}', {'a': 'b'}),
    # Words, a date, an address.
    ('f{a:New York,b:c}', {'a': 'New York', 'b': 'c'}),
    ('f{at:2026-01-02T03:04:05Z}', {'at': '2026-01-02T03:04:05Z'}),
    ('f{at:2026-01-02 03:04,b:1}', {'at': '2026-01-02 03:04', 'b': 1}),
    ('f{a:2026-01-02T03:04:05.5+01:00}', {'a': '2026-01-02T03:04:05.5+01:00'}),
    ('f{url:https://a.b/c?d=e}', {'url': 'https://a.b/c?d=e'}),
    ('f{Basic LLM Chain:1, b :2}', {'Basic LLM Chain': 1, 'b': 2}),
    ('f{a:1e999,b:-0.5e3}', {'a': '1e999', 'b': -500.0}),
    ('f{a:b<unused7>}', {'a': 'b<unused7>'}),
  ],
)
def test_calls_with_one_reading(model, written_as, arguments):
  reply = parse(model, CALL.format(written_as) + '<turn|>')
  assert reply.tool_calls == [{'name': 'f', 'arguments': arguments}]
  assert not reply.problem


@pytest.mark.parametrize(
  'written_as, name',
  [
    *((f'call:{name}', name) for name in ('a.b', 'a:b', 'a/b', 'a-b', '日')),
    ('call:default_api.f', 'default_api.f'),
    ('call : f ', 'f'),
    ('f', 'f'),
    ('a.b', 'a.b'),
  ],
)
def test_names_of_tools_are_as_they_are_written(model, written_as, name):
  reply = parse(model, f'<|tool_call>{written_as}{{x:1}}<tool_call|><turn|>')
  assert reply.tool_calls == [{'name': name, 'arguments': {'x': 1}}]


def test_several_tool_calls(model):
  reply = parse(model, CALL.format('a{}') + CALL.format('b{x:1}') + '<turn|>')
  assert [call['name'] for call in reply.tool_calls] == ['a', 'b']
  assert not reply.text and not reply.problem


@pytest.mark.parametrize(
  'written_as',
  [
    '',
    'f',
    'f{',
    'f{a}',
    'f{a:}',
    'f{a:1',
    'f{a:1}}',
    'f{a:[1}',
    'f{a:<|"|>x}',
    'f{,}',
    'f{a::1}',
    '{}',
    'f{a:' + '[' * 60 + ']' * 60 + '}',
    'f{a:' + '[' * 3000,
    'f{a:' + '{a:' * 60 + '1' + '}' * 61,
    'f{a:"' + 'x' * 1_000_001 + '"}',
    # Two readings.
    'f{q:a, b: c}',
    'f{q:[New York, Rome]}',
    'f{a:<|"|>x<|"|>b:<|"|>y<|"|>}',
    'f{a:<|"|>print(<|"|>b:<|"|>)<|"|>}',
    'f{a:<|"|><|"|><|"|>x<|"|><|"|><|"|>}',
    'f{a:[<|"|>x<|"|> <|"|>y<|"|>]}',
    'f{a:["x" "y"]}',
    'f{a:1 b:2}',
    'f{a:[1 2]}',
    'f{a:{b:1,c:2}',
    'f{a:<|"|>x,<|"|>b:1}',
    'f{a:<|"|>x}<|"|>',
    r"f{a:'C:\new'}",
    # No reading.
    'f{a:1,a:2}',
    'f{"a":1,a:2}',
    'f{a:1} and so on',
    'f{a:1,}',
    'f{a:[1,]}',
    'f{a:1,',
    'f{a:<|"|>x',
    'f{a:<|"|>x<|"|>y<|"|>}',
    'f{a:"say "hi", so"}',
    r'f{a:"\ud800"}',
    r'f{a:"\x"}',
    'f{a:b:c}',
    'f(a=1)',
    'a b{}',
  ],
)
def test_calls_that_cannot_be_read(model, written_as):
  reply = parse(model, CALL.format(written_as) + '<turn|>')
  assert not reply.tool_calls
  assert reply.problem.startswith('A call of a tool cannot be read: call:')


def test_a_call_that_cannot_be_read_is_told_with_its_quotes(model):
  reply = parse(
    model, CALL.format('f{a:<|"|>x<|"|>') + CALL.format('f{a:x<|"|>')
  )
  assert reply.problem == 'A call of a tool cannot be read: call:f{a:x"'
  for text in ('callf{x:1}', 'ns:f{x:1}', ':f{}', '{"name": "f"}'):
    reply = parse(model, f'<|tool_call>{text}<tool_call|>')
    assert reply.problem == f'A call of a tool cannot be read: {text}'


def test_a_call_that_is_cut_off_is_not_read(model):
  """Its last argument may be longer."""
  whole = CALL.format('f{a:1}')
  text = whole + '<|tool_call>call:f{a:<|"|>x<|"|>'
  reply = parse(model, text, stopped_by='max_new_tokens')
  assert reply.tool_calls == [{'name': 'f', 'arguments': {'a': 1}}]
  assert 'not finished' in reply.problem
  thought = '<|channel>thought\nhm<channel|>'
  reply = parse(
    model, thought + text[len(whole) :], stopped_by='max_new_tokens'
  )
  assert not reply.tool_calls and 'not finished' in reply.problem
  ended = parse(model, text + '<turn|>')
  assert [c['arguments'] for c in ended.tool_calls] == [{'a': 1}, {'a': 'x'}]


@pytest.mark.parametrize(
  'text, reply_text, calls',
  [
    ('what<turn|>\n<turn|>this', 'what', []),
    ('<|tool_call>call:f{}<tool_call|><|tool_response>this', '', ['f']),
    ('what<eos>this', 'what', []),
  ],
)
@pytest.mark.parametrize('has_stops', [False, True])
def test_the_end_of_a_turn_ends_a_reply(
  model, monkeypatch, text, reply_text, calls, has_stops
):
  """Whatever the checkpoint lists as the end of a text."""
  tokenizer = model.tokenizer
  ends = [tokenizer.control_tokens[name] for name in chat.TURN_ENDS]
  stops = (1, *ends) if has_stops else (1,)
  diffusion = dataclasses.replace(
    model.config.diffusion, canvas_length=128, stop_token_ids=stops
  )
  config = dataclasses.replace(model.config, diffusion=diffusion)
  tokens = tokenizer.encode_template(text, '\ue000')
  draft_BL = np.array([tokens + [0] * (128 - len(tokens))], np.int32)
  used = []

  def scripted(config, *unused):
    used.append(config)
    return types.SimpleNamespace(draft_BL=draft_BL, steps_B=np.array([1]))

  monkeypatch.setattr(engine, 'denoise_canvas', scripted)
  model = model._replace(config=config, max_new_tokens=128)
  reply, _ = say(model, chat.Conversation(), 'what')
  assert reply.text == reply_text and not reply.problem
  assert [call['name'] for call in reply.tool_calls] == calls
  assert reply.written.tokens[-1] in (1, *ends)
  assert (used[0] is config) == has_stops  # The same compiles nothing anew.


def test_what_is_no_whole_answer_says_so(model):
  cut = {'stopped_by': 'max_new_tokens'}
  for text in (
    '<|channel>thought\nhm hm',
    '<|channel>thought\nhm hm<channel|>',
    '<|channel>thought\na<channel|>x<|channel>hm',
  ):
    problem = parse(model, text, **cut).problem
    assert 'thinking used up all' in problem and '--max_new_tokens' in problem
  assert 'not finished: no end within' in parse(model, 'Blue', **cut).problem
  for text in ('<turn|>', '<|channel>thought\nhm<channel|><turn|>', '<eos>'):
    assert 'without an answer' in parse(model, text).problem
  assert not parse(model, 'Blue<turn|>').problem


def say(model, conversation, text, **options):
  return chat.take_turn(
    model, conversation, [chat.user_message(text)], jax.random.key(1), **options
  )


@pytest.mark.parametrize('thinking', [False, True])
def test_turns_go_on_from_what_was_read(model, monkeypatch, thinking):
  """The same replies as when everything is read anew, with less reading."""
  model = model._replace(thinking=thinking)
  read = []
  original = generate.generate_tokens

  def watched(config, params, prompts, *rest, **options):
    read.append(len(prompts[0]))
    return original(config, params, prompts, *rest, **options)

  monkeypatch.setattr(generate, 'generate_tokens', watched)
  conversation = chat.Conversation()
  for text in ('what is this', 'what', 'is this what'):
    forgetful = chat.Conversation(
      conversation.messages, conversation.pictures, ()
    )
    expected, _ = say(model, forgetful, text)
    reply, conversation = say(model, conversation, text)
    assert reply == expected
  whole, rest = read[0::2], read[1::2]
  assert rest[0] == whole[0]
  for turn in (1, 2):  # At least the last prompt is not read again.
    assert rest[turn] <= whole[turn] - whole[turn - 1]
  roles = [message['role'] for message in conversation.messages]
  assert roles == ['user', 'assistant'] * 3


def test_the_longest_text_that_goes_on_is_reused():
  reads = [chat._Read(tokens, 0, None) for tokens in ((2, 5), (2, 5, 6, 1))]
  assert chat._longest_read(reads, (2, 5, 6, 1, 7)) is reads[1]
  assert chat._longest_read(reads, (2, 5, 6, 1)) is reads[0]
  assert chat._longest_read(reads, (2, 5, 9, 1, 7)) is reads[0]
  assert chat._longest_read(reads, (2, 4, 6, 1, 7)) is None
  assert chat._longest_read((), (2,)) is None


def test_a_turn_that_fails_changes_nothing(model):
  _, conversation = say(model, chat.Conversation(), 'what')
  with pytest.raises(prompt_lib.PromptError, match='more than the context'):
    say(model, conversation, 'xyz ' * 600)
  with pytest.raises(prompt_lib.PromptError, match='reads text only'):
    say(model, conversation, 'what', pictures=['a.png'])
  assert len(conversation.messages) == 2


def test_thinking_and_calls_go_into_the_history(model):
  text = '<|channel>thought\nhm<channel|>So.' + CALL.format('f{x:1}')
  reply = parse(model, text + '<|tool_response>')
  message = chat._assistant_message(reply, 3)
  assert message == {
    'role': 'assistant',
    'content': 'So.',
    'reasoning': 'hm',
    'tool_calls': [
      {
        'id': '3.0',
        'type': 'function',
        'function': {'name': 'f', 'arguments': {'x': 1}},
      }
    ],
  }
  answer = chat.tool_message('f', '3.0', '{"y": [1, "z"]}')
  ids = templates.encode_chat(
    model.tokenizer,
    model.template,
    [chat.user_message('go'), message, answer],
    tools=chat.read_tools(json.dumps([WEATHER])),
    thinking=True,
  )
  expected = (
    '<bos><|turn>system\n<|think|>\n<|tool>declaration:get_weather{description:'
    '<|"|>The weather.<|"|>,parameters:{properties:{city:{type:<|"|>STRING<|"|>'
    '}},type:<|"|>OBJECT<|"|>}}<tool|><turn|>\n<|turn>user\ngo<turn|>\n'
    '<|turn>model\n<|channel>thought\nhm\n<channel|><|tool_call>call:f{x:1}'
    '<tool_call|><|tool_response>response:f{value:<|"|>{"y": [1, "z"]}<|"|>}'
    '<tool_response|>So.<turn|>\n<|channel>thought\n'
  )
  assert ids == model.tokenizer.encode_template(expected, '\ue000')


@pytest.mark.parametrize(
  'result',
  ['text', '[1, 2]', '3', '{broken', '[' * 9999, '{"temp": 20}', '{}', ''],
)
def test_what_a_tool_answers_is_text(result):
  """Also the text of a JSON object."""
  assert chat.tool_message('f', '0.0', result)['content'] == result


@pytest.mark.parametrize(
  'text, message',
  [
    ('{', 'Tools are not JSON'),
    ('{}', 'a JSON list'),
    ('[3]', 'Tool 0 is not an object'),
    ('[{"name": "f"}]', 'Tool 0 has no description'),
    ('[{"function": {"description": "d"}}]', 'Tool 0 has no name'),
    (
      '[{"name": "f", "description": "d", "parameters": [1]}]',
      'parameters of tool 0 are not a JSON schema',
    ),
    (
      '[{"name": "f", "description": "d", "parameters": {"properties": '
      '{"x": "string"}}}]',
      'parameters of tool 0 are not a JSON schema',
    ),
  ],
)
def test_tools_that_cannot_be(text, message):
  with pytest.raises(chat.ToolsError, match=message):
    chat.read_tools(text)
  bare = json.dumps([WEATHER])
  wrapped = json.dumps([{'type': 'function', 'function': WEATHER}])
  assert chat.read_tools(bare) == chat.read_tools(wrapped)


@pytest.mark.parametrize('start', ['call:f{a', 'call:f{a:[]b', 'call:f{a:1,b'])
def test_calls_are_read_in_time_that_grows_with_them(start):
  """Not with the square, which would be minutes here."""
  begin = time.process_time()
  assert call_syntax.read(start + ' ' * 200_000 + '}') is None
  assert time.process_time() - begin < 5
