"""What is learnt of training lines in every form that is read, and what is said
of those that are not."""

import json

import pytest

from diffusiongemma.config import DataConfig
from diffusiongemma.text import template as templates
from diffusiongemma.training import corpus

C = 8
ASKED = '<|turn>user\nq<turn|>\n<|turn>model\n'
QUESTION = {'role': 'user', 'content': 'q'}
ANSWER = {'role': 'assistant', 'content': 'a'}
CALL = {'name': 'f', 'arguments': {'x': 1}}
CALLED = '<|tool_call>call:f{x:1}<tool_call|><|tool_response>'
RESULT = f'{CALLED}response:f{{value:<|"|>r<|"|>}}<tool_response|>'
TOOL = {'name': 'f', 'description': 'd'}
DECLARED = (
  '<|turn>system\n<|tool>declaration:f{description:<|"|>d<|"|>}<tool|><turn|>\n'
)


def load(tmp_path, tokenizer, lines, template=None, **settings):
  """The corpus of lines, of which the last is held out."""
  path = tmp_path / 'a.jsonl'
  path.write_text('\n'.join(map(json.dumps, lines)))
  config = DataConfig(path=str(path), **settings)
  return corpus.load_corpus(config, tokenizer, C, template)


def learn(tmp_path, tokenizer, record, template=None):
  """[(prompt, reply)] of a line, as text with control tokens spelled."""
  other = {'text': 'word ' * 50, 'split': 'heldout'}
  read = load(tmp_path, tokenizer, [record, other], template)
  learnt = []
  for example in read.train:
    start = example.prompt_length
    end = start + example.num_targets
    fill = set(example.tokens[end:].tolist())
    assert fill <= {tokenizer.eos_id}
    prompt, reply = example.tokens[:start], example.tokens[start:end]
    learnt.append((spell(tokenizer, prompt), spell(tokenizer, reply)))
  return learnt


def spell(tokenizer, ids):
  """Text of tokens, control tokens as they are spelled."""
  names = {i: piece for piece, i in tokenizer.control_tokens.items()}
  text, run = '', []
  for i in ids.tolist():
    if i in names:
      text += tokenizer.decode(run) + names[i]
      run = []
    else:
      run.append(i)
  return text + tokenizer.decode(run)


def chat(*messages, **more):
  return {'messages': list(messages), **more}


def shares(*turns, **more):
  return {
    'conversations': [{'from': who, 'value': what} for who, what in turns],
    **more,
  }


def openai_call(arguments, **more):
  function = {'name': 'f', 'arguments': arguments}
  calls = [{'id': 'c', 'type': 'function', 'function': function}]
  return {'role': 'assistant', 'tool_calls': calls, **more}


PLAIN = [(ASKED, 'a<turn|>')]
SYSTEM = [(f'<|turn>system\ns<turn|>\n{ASKED}', 'a<turn|>')]
CALLS = [
  (f'{DECLARED}{ASKED}', CALLED),
  (f'{DECLARED}{ASKED}{RESULT}', 'a<turn|>'),
]


@pytest.mark.parametrize(
  'record, expected',
  [
    (chat(QUESTION, ANSWER), PLAIN),
    (shares(('human', 'q'), ('gpt', 'a')), PLAIN),
    (shares(('user', 'q'), ('model', 'a')), PLAIN),
    (shares(('system', 's'), ('human', 'q'), ('gpt', 'a')), SYSTEM),
    (shares(('human', 'q'), ('gpt', 'a'), system='s'), SYSTEM),
    ({'conversations': [QUESTION, ANSWER]}, PLAIN),
    (chat({'from': 'human', 'value': 'q'}, ANSWER), PLAIN),
    (chat(QUESTION, {'role': 'model', 'content': 'a'}), PLAIN),
    (chat({'role': 'human', 'content': 'q'}, ANSWER), PLAIN),
    (
      shares(
        ('human', 'q'),
        ('function_call', json.dumps(CALL)),
        ('observation', 'r'),
        ('gpt', 'a'),
        tools=json.dumps([TOOL]),
      ),
      CALLS,
    ),
    (
      chat(
        QUESTION,
        openai_call('{"x": 1}', content=None, refusal=None, audio=None),
        {'role': 'tool', 'tool_call_id': 'c', 'content': 'r'},
        ANSWER,
        tools=json.dumps([{'type': 'function', 'function': TOOL}]),
        parallel_tool_calls=False,
      ),
      CALLS,
    ),
    (
      chat(
        QUESTION,
        {
          'role': 'assistant',
          'function_call': {'name': 'f', 'arguments': '{"x": 1}'},
        },
        {'role': 'function', 'name': 'f', 'content': 'r'},
        ANSWER,
        functions=[TOOL],
      ),
      CALLS,
    ),
    (
      chat(QUESTION, {'role': 'assistant', 'tool_calls': [CALL]}),
      [(ASKED, CALLED)],
    ),
    (
      chat(QUESTION, openai_call('')),
      [(ASKED, CALLED.replace('x:1', ''))],
    ),
    ({'instruction': 'q', 'output': 'a'}, PLAIN),
    ({'data': ['q', 'a'], 'id': '3'}, PLAIN),
    ({'prompt': 'q', 'prompt_id': 'x', 'messages': [QUESTION, ANSWER]}, PLAIN),
    ({'instruction': 'q', 'input': '', 'output': 'a'}, PLAIN),
    ({'instruction': 'q', 'input': None, 'output': 'a'}, PLAIN),
    ({'instruction': 'q', 'output': 'a', 'system': 's'}, SYSTEM),
    (
      {'instruction': 'q', 'input': 'is', 'output': 'a'},
      [(ASKED.replace('q', 'q\n\nis'), 'a<turn|>')],
    ),
    ({'prompt': 'q', 'completion': 'a'}, [('q', 'a<eos>')]),
    ({'prompt': 'q', 'response': 'a'}, [('q', 'a<eos>')]),
    ({'prompt': [QUESTION], 'completion': [ANSWER]}, PLAIN),
    (
      {'prompt': [QUESTION, ANSWER, QUESTION], 'completion': [ANSWER]},
      [(f'{ASKED}a<turn|>\n{ASKED}', 'a<turn|>')],
    ),
  ],
)
def test_formats_are_told_apart(tmp_path, chat_tokenizer, record, expected):
  assert learn(tmp_path, chat_tokenizer, record) == expected


@pytest.mark.parametrize(
  'results',
  [
    [('observation', 'r'), ('observation', 's')],
    [
      {'role': 'function', 'name': 'g', 'content': 's'},
      {'role': 'function', 'name': 'f', 'content': 'r'},
    ],
    [
      {'role': 'tool', 'tool_call_id': 'id of g', 'content': 's'},
      {'role': 'tool', 'content': 'r'},
    ],
  ],
)
def test_results_of_several_calls_are_told_apart(
  tmp_path, chat_tokenizer, results
):
  calls = [{**CALL, 'name': name} for name in 'fg']
  if 'tool_call_id' in results[0]:
    calls = [{**call, 'id': f'id of {call["name"]}'} for call in calls]
  record = shares(('human', 'q'), ('function_call', json.dumps(calls)))
  record['conversations'] += [
    {'from': r[0], 'value': r[1]} if isinstance(r, tuple) else r
    for r in results
  ]
  record['conversations'].append({'from': 'gpt', 'value': 'a'})
  *_, (prompt, _) = learn(tmp_path, chat_tokenizer, record)
  told = prompt.split('<|tool_response>')[1:]
  assert sorted(told) == [
    f'response:{name}{{value:<|"|>{said}<|"|>}}<tool_response|>'
    for name, said in (('f', 'r'), ('g', 's'))
  ]


def test_nulls_of_tools_are_as_absent(tmp_path, chat_tokenizer):
  tool = {**TOOL, 'description': None, 'response': None, 'strict': None}
  record = chat(QUESTION, ANSWER, tools=[tool])
  declared = DECLARED.replace('<|"|>d<|"|>', '<|"|><|"|>')
  assert learn(tmp_path, chat_tokenizer, record) == [
    (f'{declared}{ASKED}', 'a<turn|>')
  ]


def test_a_file_may_be_an_array(tmp_path, chat_tokenizer):
  lines = [chat(QUESTION, ANSWER), {'text': 'word ' * 50}]
  for content in (
    json.dumps(lines, indent=1),
    '\ufeff \n' + json.dumps(lines),
    '\n'.join(map(json.dumps, lines)),
  ):
    path = tmp_path / 'a.json'
    path.write_text(content)
    config = DataConfig(path=str(tmp_path))
    read = corpus.load_corpus(config, chat_tokenizer, C)
    assert len(read.train) == len(read.heldout) == 1


@pytest.mark.parametrize(
  'record, expected',
  [
    (
      {'text': 'x', **chat(QUESTION, ANSWER)},
      "of 2 formats; keep one of 'text', 'messages'",
    ),
    (
      {'messages': [QUESTION, ANSWER], 'prompt': 'x'},
      "keep one of 'messages', 'prompt'",
    ),
    (
      {'data': ['q', 3]},
      'data is a list of texts',
    ),
    (
      {'instruction': 'q', 'output': 'a', 'prompt': 'x'},
      "keep one of 'instruction', 'output', 'prompt'",
    ),
    ({'prompt': 'q', 'response': 'a', 'completion': 'b'}, 'both a response'),
    ({'prompt': 'q', 'chosen': 'a', 'rejected': 'b'}, "'chosen' is not read"),
    ({'prompt': [QUESTION], 'completion': 'a'}, 'are both text, or both'),
    (
      chat(QUESTION, ANSWER, tools=[{'type': 'web_search', 'name': 'x'}]),
      "a tool of type 'web_search' is not read",
    ),
    (
      chat(QUESTION, ANSWER, tools=[{'name': 'x', 'parameters': '3'}]),
      "parameters of 'x' are not a JSON schema",
    ),
    (
      chat(
        QUESTION,
        {**openai_call('{}'), 'content': 'a'},
        {'role': 'tool', 'tool_call_id': 'other', 'content': 'r'},
        ANSWER,
      ),
      "tool result 'other'",
    ),
    ({'prompt': 'q', 'response': '<|channel>t<channel|>a'}, r'spells <\|chann'),
    ({'prompt': '<|turn>user', 'completion': 'a'}, r'spells <\|turn>'),
    (chat(QUESTION, {**ANSWER, 'content': 'a<eos>'}), 'spells <eos>'),
    ({'prompt': 'q', 'completion': 'a', 'tools': [TOOL]}, "'tools' is for cha"),
    (shares(('robot', 'q'), ('gpt', 'a')), "1: role 'robot' is none of"),
    (chat({**QUESTION, 'value': 'p'}, ANSWER), 'say different things'),
    (
      chat({'role': 'system', 'content': 's'}, ANSWER, system='s'),
      'two system messages',
    ),
    (shares(('function_call', 'f()')), 'message 1: calls are not JSON'),
    (chat(openai_call('[1]')), "arguments of 'f' are not an object"),
    (chat(openai_call('{"x": 1, "x": 2}')), "'x' occurs twice"),
    (chat(ANSWER, tools=[TOOL], functions=[TOOL]), 'both tools and functions'),
    ({'instruction': 'q', 'output': ''}, 'message 2 has neither content'),
    ({'conversations': 'q'}, 'messages are a list'),
  ],
)
def test_lines_that_could_mean_something_else(
  tmp_path, chat_tokenizer, record, expected
):
  with pytest.raises(corpus.DataError, match=f'a.jsonl, line 1.*{expected}'):
    learn(tmp_path, chat_tokenizer, record)


IMAGE = {'type': 'image', 'image': 'cat.png'}
TEXT = {'type': 'text', 'text': 'q'}


@pytest.mark.parametrize(
  'record, expected',
  [
    *(
      (
        chat({'role': 'user', 'content': [part, TEXT]}, ANSWER),
        f'line 1, message 1: there is a part .{part["type"]}., and training',
      )
      for part in (
        IMAGE,
        {'type': 'image_url', 'image_url': {'url': 'https://x/cat.png'}},
        {'type': 'input_image', 'image_url': 'cat.png'},
        {'type': 'input_audio', 'input_audio': {}},
        {'type': 'audio'},
        {'type': 'video'},
        {'type': 'file', 'file': {}},
      )
    ),
    *(
      (
        chat(QUESTION, ANSWER, **{key: value}),
        f"line 1: there is '{key}', and training reads no images",
      )
      for key, value in (
        ('images', ['cat.png']),
        ('image', 'cat.png'),
        ('videos', [{'path': 'x'}]),
        ('audios', ['x']),
        ('audio', {'id': 1}),
      )
    ),
    (
      chat({**QUESTION, 'images': ['cat.png']}, ANSWER),
      "line 1, message 1: there is 'images'",
    ),
    ({'text': 'x', 'image': 'cat.png'}, "line 1: there is 'image'"),
    (
      {'prompt': 'x', 'response': 'y', 'image_url': 'cat.png'},
      "line 1: there is 'image_url'",
    ),
  ],
)
def test_pictures_are_refused(tmp_path, chat_tokenizer, record, expected):
  with pytest.raises(corpus.DataError, match=expected):
    learn(tmp_path, chat_tokenizer, record)


@pytest.mark.parametrize(
  'flag, is_learnt',
  [
    ({'weight': 0}, False),
    ({'train': False}, False),
    ({'trainable': False}, False),
    ({'weight': 0.0, 'train': False}, False),
    ({'weight': 1}, True),
    ({'weight': None, 'train': True}, True),
  ],
)
def test_answers_that_are_not_to_be_learnt(
  tmp_path, chat_tokenizer, flag, is_learnt
):
  """They stay in the prompts of later ones."""
  record = chat(QUESTION, {**ANSWER, **flag}, QUESTION, ANSWER)
  last = (f'{ASKED}a<turn|>\n{ASKED}', 'a<turn|>')
  expected = [*PLAIN, last] if is_learnt else [last]
  assert learn(tmp_path, chat_tokenizer, record) == expected


@pytest.mark.parametrize(
  'message, expected',
  [
    ({**ANSWER, 'weight': 0.5}, 'weight 0.5 is neither 0 nor 1'),
    ({**ANSWER, 'train': 'no'}, 'train "no" is neither'),
    ({**ANSWER, 'train': True, 'weight': 0}, 'weight and train contradict'),
    ({**QUESTION, 'weight': 1}, 'only what the assistant says is learnt'),
    ({**ANSWER, 'wieght': 0}, "no 'wieght'. Did you mean 'weight'"),
    ({**ANSWER, 'Weight': 0}, "no 'Weight'. Did you mean 'weight'"),
    ({**ANSWER, 'mask': 1}, "'mask' is not read here"),
    ({**ANSWER, 'refusal': 'no'}, "'refusal' is not read here"),
    ({**QUESTION, 'tool_calls': [CALL]}, "'tool_calls' is not read here"),
  ],
)
def test_flags_that_are_not_known(tmp_path, chat_tokenizer, message, expected):
  record = chat(ANSWER, message, ANSWER)
  with pytest.raises(corpus.DataError, match=f'message 2: .*{expected}'):
    learn(tmp_path, chat_tokenizer, record)


def test_a_line_without_a_target_is_refused(tmp_path, chat_tokenizer):
  with pytest.raises(corpus.DataError, match='no message of the assistant'):
    learn(tmp_path, chat_tokenizer, chat(QUESTION, {**ANSWER, 'weight': 0}))


@pytest.mark.parametrize(
  'more, expected',
  [
    ({'weight': 0}, "'weight' is not read here"),
    ({'chat_template_kwargs': {'x': 1}}, "'chat_template_kwargs' is not read"),
    ({'history': [['q', 'a']]}, "'history' is not read"),
    ({'tool': [TOOL]}, "no 'tool'. Did you mean 'tools'"),
    ({'splits': 'train'}, "no 'splits'. Did you mean 'split'"),
  ],
)
def test_keys_that_may_change_what_is_learnt(
  tmp_path, chat_tokenizer, more, expected
):
  with pytest.raises(corpus.DataError, match=f'line 1: .*{expected}'):
    learn(tmp_path, chat_tokenizer, chat(QUESTION, ANSWER, **more))


def test_other_keys_are_told_once(tmp_path, chat_tokenizer):
  """But for notes, and for what has no value."""
  record = chat(
    QUESTION,
    {**ANSWER, 'mood': 'good', 'annotations': [], 'id': 7},
    {**ANSWER, 'mood': 'bad'},
    topic='x',
    id=1,
    source='y',
    metadata={'z': 1},
    images=[],
    score=None,
  )
  path = tmp_path / 'a.jsonl'
  read = load(tmp_path, chat_tokenizer, [record] * 3)
  assert read.notes == (
    f"Not read: the key 'mood' of messages (3 of 3; the first is {path}, line "
    '1).',
    f"Not read: the key 'topic' (3 of 3; the first is {path}, line 1).",
  )


def test_all_kinds_of_text_parts_are_text(tmp_path, chat_tokenizer):
  parts = lambda kind, text: [{'type': kind, 'text': text, 'image': None}]
  record = chat(
    {'role': 'user', 'content': parts('input_text', 'q')},
    {'role': 'assistant', 'content': parts('output_text', 'a')},
  )
  assert learn(tmp_path, chat_tokenizer, record) == PLAIN


@pytest.mark.parametrize(
  'part, expected',
  [
    ({'type': 'thinking', 'thinking': 'hm'}, "part 'thinking' is not read"),
    ({'type': 'tool_use', 'name': 'f'}, "part 'tool_use' is not read"),
    ({'type': 'refusal', 'refusal': 'no'}, "part 'refusal' is not read"),
    ({'type': 'text'}, "part 'text' has no text"),
    ({'type': 'text', 'text': None}, "part 'text' has no text"),
    ({'text': 'q'}, 'or a list of parts like'),
    ({'type': 'text', 'text': 'q', 'texts': 'p'}, "no 'texts'"),
  ],
)
def test_parts_that_are_not_read(tmp_path, chat_tokenizer, part, expected):
  record = chat(QUESTION, {'role': 'assistant', 'content': [TEXT, part]})
  with pytest.raises(corpus.DataError, match=f'message 2.*{expected}'):
    learn(tmp_path, chat_tokenizer, record)


def test_thinking_inside_a_content_is_left_out_and_told(
  tmp_path, chat_tokenizer
):
  said = '<|channel>thought\nhm\n<channel|>a'
  record = chat(QUESTION, {'role': 'assistant', 'content': said})
  assert learn(tmp_path, chat_tokenizer, record) == PLAIN
  (note,) = load(tmp_path, chat_tokenizer, [record, record]).notes
  assert (
    note.startswith('Not read: thinking inside a content') and '2 of' in note
  )


@pytest.mark.parametrize(
  'content, expected',
  [
    ('<|tool_call>call:f{x:1}<tool_call|>', r'spells <\|tool_call>'),
    ('a<turn|>', r'spells <turn\|>'),
    ('<|channel>thought\nhm', 'is all thinking'),
  ],
)
def test_marks_inside_a_content_are_refused(
  tmp_path, chat_tokenizer, content, expected
):
  record = chat(QUESTION, {'role': 'assistant', 'content': content})
  with pytest.raises(corpus.DataError, match=f'line 1: .*{expected}'):
    learn(tmp_path, chat_tokenizer, record)


@pytest.mark.parametrize('name', ['reasoning', 'reasoning_content', 'thinking'])
def test_reasoning_has_several_names(tmp_path, chat_tokenizer, name):
  record = chat(QUESTION, {**ANSWER, name: 'hm'})
  ((_, said),) = learn(tmp_path, chat_tokenizer, record)
  assert said == '<|channel>thought\nhm\n<channel|>a<turn|>'


def test_the_early_template_closes_a_thought_before_the_answer(
  tmp_path, chat_tokenizer
):
  opened = "{{- '<|turn>model\\n' -}}"
  closed = "{{- '<|channel>thought\\n<channel|>' -}}"
  template = templates.default_template().replace(opened, opened + closed)
  assert closed in template
  learnt = learn(tmp_path, chat_tokenizer, chat(QUESTION, ANSWER), template)
  assert learnt == [(f'{ASKED}<|channel>thought\n<channel|>', 'a<turn|>')]


def test_a_call_and_a_content_are_learnt_where_they_are_told(
  tmp_path, chat_tokenizer
):
  record = chat(
    QUESTION,
    openai_call({'x': 1}, content='a'),
    {'role': 'tool', 'tool_call_id': 'c', 'content': 'r'},
  )
  expected = [(ASKED, CALLED), (f'{ASKED}{RESULT}', 'a<turn|>')]
  assert learn(tmp_path, chat_tokenizer, record) == expected


def test_answers_in_a_row_are_one_turn(tmp_path, chat_tokenizer):
  record = chat(QUESTION, ANSWER, {**ANSWER, 'content': 'b'})
  assert learn(tmp_path, chat_tokenizer, record) == [(ASKED, 'ab<turn|>')]


@pytest.mark.parametrize('bos', ['', '{{ bos_token }}', '{{ bos_token * 2 }}'])
def test_rows_begin_with_one_bos_whatever_the_template_writes(
  tmp_path, chat_tokenizer, bos
):
  """The row's own; prompts are without."""
  bos = bos.replace('{{ bos_token * 2 }}', '{{ bos_token }}{{ bos_token }}')
  template = templates.default_template().replace('{{- bos_token -}}', bos)
  learnt = learn(tmp_path, chat_tokenizer, chat(QUESTION, ANSWER), template)
  assert learnt == PLAIN


def test_nulls_are_as_absent(tmp_path, chat_tokenizer):
  nothing = dict.fromkeys(
    ('split', 'tools', 'system', 'images', 'text', 'prompt', 'conversations')
  )
  empty = dict.fromkeys(
    ('name', 'weight', 'tool_calls', 'tool_responses', 'reasoning')
    + ('reasoning_content', 'function_call', 'tool_call_id', 'images', 'value')
  )
  record = chat({**QUESTION, **empty}, {**ANSWER, **empty}, **nothing)
  assert learn(tmp_path, chat_tokenizer, record) == PLAIN
  text = {'text': 'word ' * 50, 'split': None, 'messages': None, 'x': None}
  read = load(tmp_path, chat_tokenizer, [text, text])
  assert len(read.train) == len(read.heldout) == 2 and not read.notes


BAD_LINES = [
  chat(QUESTION, {'role': 'assistant', 'content': ' '}),
  chat({'role': 'user', 'content': 'x ' * 300}, ANSWER),
  chat(QUESTION, {'role': 'assistant', 'content': 'a<turn|>'}),
  chat({'role': 'tool', 'name': 'f', 'content': 'r'}, ANSWER),
  {'text': 'short'},
  'damaged',
]


def test_bad_lines_stop_a_run_or_are_left_out_and_told(
  tmp_path, chat_tokenizer
):
  good = chat(QUESTION, ANSWER)
  lines = [good, *BAD_LINES, good]
  settings = {'sequence_length': 64}
  for bad in BAD_LINES:
    with pytest.raises(corpus.DataError, match='line 2'):
      load(tmp_path, chat_tokenizer, [good, bad, good], **settings)
  settings['on_error'] = 'skip'
  read = load(tmp_path, chat_tokenizer, lines, **settings)
  assert len(read.train) == len(read.heldout) == 1
  count, *reasons, more = read.notes
  assert count == 'Left out (config.data.on_error=skip): 6.'
  # In the order in which lines are read, then tokenised.
  assert [r.split(', line ')[1][0] for r in reasons] == ['2', '7', '4']
  assert more == '  ...'


def test_damaged_bytes_are_one_line(tmp_path, chat_tokenizer):
  good = json.dumps(chat(QUESTION, ANSWER)).encode()
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'\n'.join([good, good[:-9], b'"\xff"', good]))
  config = DataConfig(path=str(path), on_error='skip')
  read = corpus.load_corpus(config, chat_tokenizer, C)
  assert len(read.train) == len(read.heldout) == 1
  assert 'line 2 is not JSON' in read.notes[1]
  assert 'line 3 is not UTF-8' in read.notes[2]


def test_of_a_long_chat_the_answers_that_fit_are_learnt(
  tmp_path, chat_tokenizer
):
  long = {'role': 'user', 'content': 'x ' * 300}
  lines = [chat(QUESTION, ANSWER, long, ANSWER), chat(QUESTION, ANSWER)]
  read = load(
    tmp_path, chat_tokenizer, lines, sequence_length=64, on_error='skip'
  )
  assert len(read.train) == 1
  assert 'skip): 1.' in read.notes[0] and 'line 1' in read.notes[1]


def test_nothing_but_bad_lines_is_an_error(tmp_path, chat_tokenizer):
  lines = [{'messages': 1}] * 2
  with pytest.raises(
    corpus.DataError, match='nothing to train on.*line 1: messages are a list'
  ):
    load(tmp_path, chat_tokenizer, lines, on_error='skip')


def test_alpaca_as_it_was_published(tmp_path, chat_tokenizer):
  """With the whole text beside its parts."""
  record = {'instruction': 'q', 'input': '', 'output': 'a', 'text': 'all'}
  path = tmp_path / 'a.jsonl'
  path.write_text(json.dumps(record))
  (document,) = corpus.read_documents(str(path))
  assert [m['content'] for m in document.messages] == ['q', 'a']
  assert "the key 'text'" in document.unread


def test_lines_of_blanks_are_empty(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('\u00a0\n{"text": "x"}\n \u2003\n', 'utf-8')
  (document,) = corpus.read_documents(str(path))
  assert document.text == 'x'
