"""What a person types and reads: chat, text, infilling, traces."""

import dataclasses
import io
import json

import numpy as np
import pytest

from diffusiongemma.commands import chats
from diffusiongemma.commands import sample
from diffusiongemma.commands import texts
from diffusiongemma.commands.request import Request
from diffusiongemma.commands.request import SampleError
from diffusiongemma.config import ConfigError
from diffusiongemma.generation import chat
from diffusiongemma.generation import generate
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.text import template as templates
from diffusiongemma.text import tokenizer as tokenizers

SHIPPED = tokenizers.load_tokenizer()


@pytest.fixture
def write(chat_run, capsys, monkeypatch):
  """Samples with a random network: (exit code, stdout, stderr)."""

  def sampled(typed='', run=chat_run, **request):
    monkeypatch.setattr('sys.stdin', io.StringIO(typed))
    code = sample.sample(run, Request(**request))
    return code, *capsys.readouterr()

  return sampled


@pytest.fixture
def script(chat_run, monkeypatch):
  """Makes the network write given replies; returns what it was asked."""

  def replies(*texts):
    asked, remaining = [], iter(texts)

    def generated(config, params, prompts, key, max_new_tokens, *_, **options):
      asked.append((chat_run.tokenizer.decode(prompts[0]), options))
      text = next(remaining)
      tokens = chat_run.tokenizer.encode_template(text, '\ue000')
      stopped_by = 'stop_token' if '|>' in text[-8:] else 'max_new_tokens'
      row = generate.Generation(tokens, 4, len(tokens) / 4, stopped_by)
      return generate.Generated([row], 'cache', 'cache')

    monkeypatch.setattr(generate, 'generate_tokens', generated)
    return asked

  return replies


def test_one_message(write, script):
  asked = script('I am fine.<turn|>')
  assert write(prompt='what is this') == (0, 'I am fine.\n', '')
  assert asked[0][0] == 'user\nwhat is this\nmodel\n'


def test_a_random_network_answers_the_same_twice(write):
  code, output, _ = write(prompt='what', as_json=True, max_new_tokens=11)
  result = json.loads(output)
  assert code == 0 and len(result['tokens']) <= 11
  assert write(prompt='what', as_json=True, max_new_tokens=11)[1] == output
  assert write(prompt='what', as_json=True, seed=1)[1] != output
  fields = {'text', 'thinking', 'tool_calls', 'problem', *result}
  assert set(result) == fields and 'stopped_by' in result


def test_thinking_is_shown_apart(write, script):
  script('<|channel>thought\nIt is this.<channel|>what<turn|>')
  output = write(prompt='what', thinking=True)[1]
  assert output == '[thinking]\nIt is this.\n[answer]\nwhat\n'


def test_what_is_no_whole_answer_says_so(write, script):
  script('<|channel>thought\nhm hm hm')
  _, output, errors = write(prompt='what', thinking=True)
  assert output == '[thinking]\nhm hm hm\n'
  assert 'There is no answer: thinking used up all' in errors


def test_typed_turns_have_a_history(write, script):
  asked = script('one<turn|>', 'two<turn|>', 'three<turn|>')
  typed = 'what\n\n//think\n/new\nthis\\\nis\n'
  code, output, _ = write(typed, system='be this')
  assert (code, output) == (0, 'one\ntwo\nthree\n')
  system = 'system\nbe this\n'
  assert [text for text, _ in asked] == [
    f'{system}user\nwhat\nmodel\n',
    '\nuser\n/think\nmodel\n',  # What comes after the reply.
    f'{system}user\nthis\nis\nmodel\n',
  ]


def test_mistakes_in_a_chat_end_no_chat(write, script, tmp_path):
  script('one<turn|>')
  typed = '/dance\n/image none.png\n/think\n/help\nwhat\n/quit\nnever\n'
  code, output, errors = write(typed)
  assert code == 1 and output.endswith('one\n')
  assert 'Thinking is on.' in output and chats.HELP in output
  assert '/dance is not a command' in errors
  assert "'none.png' is not a file" in errors


def test_tools_are_asked_for_their_answers(write, script):
  tools = chat.read_tools('[{"name": "get", "description": "Gets."}]')
  asked = script(
    'Wait.<|tool_call>call:get{x:<|"|>a b<|"|>}<tool_call|>'
    '<|tool_call>call:get{}<tool_call|><|tool_response>',
    'It is this.<turn|>',
  )
  typed = 'what\n{"y": 1}\nnothing\n'
  code, output, _ = write(typed, tools=tools)
  lines = ['Wait.', 'get(x="a b")', 'get()', 'It is this.']
  assert code == 0 and output.splitlines() == lines
  assert 'declaration:get' in asked[0][0]
  assert 'response:get{value:{"y": 1}}' in asked[1][0]
  assert 'response:get{value:nothing}' in asked[1][0]


def test_pictures_come_before_the_message(write, script, tmp_path):
  Image = pytest.importorskip('PIL.Image', reason='Pillow is not installed')
  path = tmp_path / 'a.png'
  Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
  asked = script('one<turn|>', 'two<turn|>')
  write(f'/image {path}\nwhat\nthis\n')
  assert [o['pictures'] for _, o in asked] == [[(str(path),)], [()]]
  script('one<turn|>')
  with pytest.raises(prompt_lib.PromptError, match='say something'):
    write(prompt=' ')


def test_a_network_without_turns_goes_on(write, chat_run):
  model = dataclasses.replace(chat_run.config.model, vocab_size=2048)
  config = dataclasses.replace(chat_run.config, model=model)
  embedding = np.random.default_rng(0).normal(size=(2048, 16)) / 4
  params = {**chat_run.params, 'embedding': embedding.astype(np.float32)}
  run = chat_run.replace(config=config, params=params, maybe_tokenizer=SHIPPED)
  code, output, _ = write(run=run, prompt='To be', max_new_tokens=8)
  assert code == 0 and output.startswith('To be')
  with pytest.raises(SampleError, match='knows no turns.*--nochat'):
    write(run=run, prompt='To be', chat=True)
  for flag in ({'thinking': True}, {'system': 'x'}, {'tools': ({},)}):
    with pytest.raises(SampleError, match='is for a chat'):
      write(run=run, prompt='To be', **flag)
  with pytest.raises(prompt_lib.PromptError, match='The prompt is empty'):
    write(run=run)
  with pytest.raises(ConfigError, match='reads text only'):
    write(run=run, prompt='To be', images=('a.png',))


def test_a_chat_network_can_go_on_from_a_text(write):
  code, output, _ = write(prompt='what is', chat=False, max_new_tokens=8)
  assert code == 0 and output.startswith('what is')


def test_infilling_keeps_the_text_around_the_holes(write):
  """Three canvases; the answer's JSON names the holes."""
  text = 'what is ___ this thought ____, model'
  code, output, _ = write(infill=text, as_json=True)
  result = json.loads(output)
  assert code == 0 and len(result['holes']) == 2
  first, second = result['holes']
  assert result['text'] == f'what is{first} this thought{second}, model'
  _, plain, _ = write(infill=text)
  assert plain.startswith('what is') and plain.endswith(', model\n')
  after = json.loads(write(infill=text, prompt='what', as_json=True)[1])
  assert after['holes'] != result['holes']
  with pytest.raises(SampleError, match='needs a hole'):
    write(infill='no __ here')


def test_holes_have_a_token_for_each_underscore():
  pins, holes, length = texts.parse_infill(SHIPPED, '___ be, _____')
  after = SHIPPED.encode(' be,')
  assert holes == [(0, 3), (3 + len(after), 8 + len(after))]
  assert [pins[i] for i in sorted(pins)] == after
  assert length == holes[-1][1]


@pytest.mark.parametrize(
  'request_', [{'max_new_tokens': 8}, {'infill': 'what ___'}]
)
def test_a_trace_of_what_was_written(write, tmp_path, request_):
  path = tmp_path / 'trace.html'
  options = {'prompt': 'what', **request_}
  quiet = write(**options)
  assert write(trace=str(path), **options) == quiet
  page = path.read_text()
  assert page.startswith('<!doctype html>')
  assert '"seed 0","entropy_bound","temperature 0.8 to 0.4"' in page


@pytest.mark.parametrize('option', [{'thinking': True}, {'max_new_tokens': 8}])
def test_an_infilling_takes_no_other_wishes(write, option):
  with pytest.raises(SampleError, match='is not for --infill'):
    write(infill='what ___', **option)


def test_a_trace_that_cannot_be_written_stops_before_anything(write, script):
  asked = script()
  with pytest.raises(SampleError, match='no folder'):
    write(prompt='what', trace='/nowhere/a.html')
  assert not asked


def test_a_checkpoint_brings_its_own_template(write, script, chat_run):
  own = "{{ bos_token }}{{ messages[-1]['content'] }}<|turn>"
  asked = script('one<turn|>')
  write(run=chat_run.replace(chat_template=own), prompt='what')
  assert asked[0][0] == 'what'
  broken = chat_run.replace(chat_template='{% if %}')
  with pytest.raises(templates.TemplateError, match='broken in line 1'):
    write(run=broken, prompt='what')


def test_many_prompts(write, tmp_path):
  """A line's reply does not depend on the lines it is batched with."""
  lines = [
    {'prompt': 'what', 'id': 7},
    {'messages': [{'role': 'user', 'content': 'what is this'}], 'seed': 3},
    'this',
  ]
  path = tmp_path / 'prompts.jsonl'
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  code, output, _ = write(prompts=str(path), batch_size=2, max_new_tokens=8)
  together = [json.loads(line) for line in output.splitlines()]
  assert code == 0 and len(together) == 3
  assert together[0]['id'] == 7 and 'prompt' not in together[0]
  assert {'text', 'thinking', 'tool_calls', 'steps'} <= set(together[1])
  output = write(prompts=str(path), batch_size=3, max_new_tokens=8)[1]
  others = [json.loads(line) for line in output.splitlines()]
  assert [r['tokens'] for r in others] == [r['tokens'] for r in together]
  with pytest.raises(SampleError, match='Line 2 .*--system would belong'):
    write(prompts=str(path), system='be brief')
  # A line separator inside of a text ends no line.
  path.write_text('\n' + json.dumps('what\u2028is', ensure_ascii=False))
  assert len(write(prompts=str(path), max_new_tokens=8)[1].splitlines()) == 1
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  with path.open('a') as stream:
    stream.write('{"prompt": "what", "messages": []}\n')
  with pytest.raises(SampleError, match='Line 4 of .*either "prompt" or'):
    write(prompts=str(path))
  with pytest.raises(SampleError, match='--trace is not for --prompts'):
    write(prompts=str(path), trace='x.html')


@pytest.mark.parametrize(
  'line, message',
  [
    ('{"prompt": "what"', 'Line 1 of .*delimiter'),
    ('3', 'neither an object nor a string'),
    ('{"prompt": ""}', 'no text, or empty'),
    ('{"prompt": "x", "seed": -1}', 'its seed -1 is no whole number'),
    ('{"messages": [{"role": "me"}]}', "has the role 'me'"),
    ('', 'has no line'),
    ('\n \n', 'has no line'),
    ('{"prompt": "x", "prompt": "y"}', "'prompt' occurs twice"),
    ('[' * 100000, 'nested too deeply'),
    ('{"prompt": "x", "temperature": 1}', "'temperature' is not read here"),
    ('{"prompt": "x", "text": "mine"}', "'text' is not read here"),
    ('{"prompt": "x", "images": []}', "'images' is not read here"),
    ('\n{"prompt": 3}', 'Line 2 of .*no text'),
  ],
)
def test_lines_that_are_no_prompts(write, tmp_path, line, message):
  path = tmp_path / 'prompts.jsonl'
  path.write_text(line)
  with pytest.raises(SampleError, match=message):
    write(prompts=str(path))
