"""Files to batches: order, shares, places, and every kind of bad input."""

import dataclasses
import itertools
import json
import lzma

import grain
import jax
import numpy as np
import pytest

from diffusiongemma.config import DataConfig
from diffusiongemma.devices import sharding
from diffusiongemma.text import tokenizer as tokenizers
from diffusiongemma.training import corpus
from diffusiongemma.training import data

TOKENIZER = tokenizers.load_tokenizer()
C = 8
# Token i of document d is 10 + 1000 d + i: a row tells where it is from.
DOCUMENTS = [
  corpus.Example(10 + 1000 * d + np.arange(n, dtype=np.int32))
  for d, n in enumerate((100, 431, 40))
]
CONFIG = DataConfig(sequence_length=32, batch_size=4)


def batches(count, config=CONFIG, share=sharding.WHOLE_BATCH):
  dataset = data.make_dataset(DOCUMENTS, config, C, TOKENIZER, share)
  return list(itertools.islice(iter(dataset), count))


def same(a, b):
  return all((a[name] == b[name]).all() for name in a)


def test_rows_are_windows_of_one_document():
  for batch in batches(20):
    for tokens, length, start_K, mask in zip(
      batch['tokens_BS'],
      batch['length_B'],
      batch['canvas_start_BK'],
      batch['target_mask_BS'],
      strict=True,
    ):
      text = tokens[1:length]
      assert tokens[0] == TOKENIZER.bos_id
      assert (np.diff(text) == 1).all() and len(text) == min(31, len(text))
      assert (tokens[length:] == TOKENIZER.pad_id).all()
      prompt = start_K[0]
      assert 1 <= prompt <= length - C
      starts = list(range(prompt, length - C + 1, C))
      assert start_K.tolist() == starts + [-1] * (3 - len(starts))
      assert mask.tolist() == [0 < i < length for i in range(32)]


def test_an_epoch_visits_every_window_once():
  """571 tokens are 4 + 14 + 2 windows of 31, five batches of four."""
  for epoch in np.split(
    np.array([batch['tokens_BS'][:, 1] for batch in batches(15)]), 3
  ):
    documents, counts = np.unique((epoch - 10) // 1000, return_counts=True)
    assert documents.tolist() == [0, 1, 2] and counts.tolist() == [4, 14, 2]


@pytest.mark.parametrize('length', [64, 33, 200])
def test_no_place_of_a_document_is_rarely_read(length):
  """At its ends half as often as in the middle, or more."""
  document = corpus.Example(np.arange(length, dtype=np.int32))
  config = dataclasses.replace(CONFIG, sequence_length=33, batch_size=1)
  dataset = data.make_dataset([document], config, C, TOKENIZER)
  windows = -(-length // 32)
  epochs = 120
  read = [
    batch['tokens_BS'][batch['target_mask_BS']]
    for batch in itertools.islice(iter(dataset), epochs * windows)
  ]
  share = np.bincount(np.concatenate(read), minlength=length) / epochs
  assert share.min() > 0.4 and share.max() <= 2


def test_a_batch_may_be_one_row():
  config = dataclasses.replace(CONFIG, batch_size=1)
  one_by_one = np.concatenate([b['tokens_BS'] for b in batches(8, config)])
  together = np.concatenate([b['tokens_BS'] for b in batches(2)])
  np.testing.assert_array_equal(one_by_one, together)


def test_order_follows_the_seed():
  one, again = batches(6), batches(6)
  other = batches(6, DataConfig(sequence_length=32, batch_size=4, seed=1))
  assert all(map(same, one, again))
  assert not all(map(same, one, other))
  assert not same(one[0], one[5]), 'epochs differ'


def read_in_shares(count, batches, state=None):
  """(the next batches, put together from so many shares, and the state of each
  share after them)."""
  iterators = [
    iter(data.make_dataset(DOCUMENTS, CONFIG, C, TOKENIZER, share))
    for share in (sharding.Share(i, count) for i in range(count))
  ]
  for iterator in iterators:
    if state is not None:
      iterator.set_state(state)
  read = []
  for _ in range(batches):
    shares = [next(iterator) for iterator in iterators]
    read.append(jax.tree.map(lambda *x: np.concatenate(x), *shares))
  return read, [json.loads(json.dumps(i.get_state())) for i in iterators]


def test_any_number_of_shares_reads_the_same_batches():
  """Row by row, also when their number changes on the way: the state of one is
  that of all."""
  read, state = [], None
  for count in (1, 2, 4, 1):
    new, states = read_in_shares(count, 3, state)
    assert states == [states[0]] * count
    read, state = read + new, states[0]
  assert len(read) == 12 and all(map(same, read, batches(12)))


@pytest.mark.parametrize(
  ('counts', 'epochs'),
  [(range(1, 40), 2), ((255, 256, 257, 1025), 2), ((65537,), 1)],
)
def test_an_epoch_has_every_record_once(counts, epochs):
  """Whatever their number; of 4^n + 1 too, where Grain's shuffle alone leaves
  out the last."""
  for count in counts:
    order = data.shuffle_for_ever(range(count), 7)
    shown = np.array([order[i] for i in range(epochs * count)])
    for epoch in shown.reshape(epochs, count):
      assert (np.sort(epoch) == np.arange(count)).all(), count


@pytest.mark.parametrize('exponent', range(8, 13))
def test_the_last_of_very_many_records_ends_every_epoch(exponent):
  """Where Grain's shuffle would show the first again."""
  count = 4**exponent + 1
  order = data.shuffle_for_ever(range(count), 7)
  for epoch in range(3):
    assert order[(epoch + 1) * count - 1] == count - 1
    assert order[epoch * count] < count - 1


def test_orders_without_the_fault_are_those_of_grain():
  """So that runs go on in them."""
  for count in (7, 65538):
    grains = grain.MapDataset.source(range(count)).seed(5).shuffle().repeat()
    order = data.shuffle_for_ever(range(count), 5)
    chosen = [*range(9), count - 1, count, 2 * count - 1]
    assert [order[i] for i in chosen] == [grains[i] for i in chosen]


def test_batch_that_cannot_be_shared_out():
  with pytest.raises(corpus.DataError, match='multiple of the 3 shares'):
    batches(1, share=sharding.Share(0, 3))


@pytest.mark.parametrize('length', [9, 32, 700])
def test_heldout_windows_predict_every_token_once(length):
  windows = data.heldout_windows(DOCUMENTS, length, 2, 0)
  targets = windows.tokens_MS[windows.target_mask_MS]
  assert sorted(targets) == sorted(
    np.concatenate([d.tokens for d in DOCUMENTS])
  )
  for tokens, row_length, mask in zip(*windows, strict=True):
    assert tokens[0] == 2 and not mask[0] and not mask[row_length:].any()
    first = np.flatnonzero(mask)[0]
    at_start = tokens[1] in [d.tokens[0] for d in DOCUMENTS]
    assert at_start or first >= length // 2 - 1, 'too little context'


def test_a_description_tells_examples_from_others():
  """Of other tokens, in another order, divided otherwise, or of which another
  part is learnt."""
  a, b = corpus.Example(np.arange(9)), corpus.Example(np.arange(5), 2, 3)
  described = data.describe([a, b])
  assert described == data.describe([a, b]) and described[:2] == (2, 14)
  assert str(described) == '2 examples of 14 tokens'
  for others in (
    [b, a],
    [a],
    [a._replace(tokens=np.arange(8)), b],
    [a._replace(tokens=a.tokens + (a.tokens == 4)), b],
    [a, b._replace(prompt_length=3)],
    [a, b._replace(prompt_length=None)],
    [a, b._replace(num_targets=2)],
    [corpus.Example(x) for x in (np.arange(5), np.arange(9))],
  ):
    assert data.describe(others) != described


RESPONSES = [
  corpus.fill_canvases([50, 51], [60 + i] * i + [1], 32, C, 1)
  for i in (3, 8, 40)
]


def test_responses_are_filled_to_whole_canvases():
  """Room for 29 tokens after bos and prompt: three canvases of eight."""
  short, exact, long = RESPONSES
  assert short.tokens.tolist() == [50, 51] + [63] * 3 + [1] * 5
  assert exact.tokens.tolist() == [50, 51] + [68] * 8 + [1] * 8
  assert long.tokens.tolist() == [50, 51] + [100] * 24
  assert [r.num_targets for r in RESPONSES] == [4, 9, 24]
  assert [r.prompt_length for r in RESPONSES] == [2, 2, 2]


def test_rows_of_responses():
  dataset = data.make_dataset(RESPONSES, CONFIG, C, TOKENIZER)
  rows = {}
  for batch in itertools.islice(iter(dataset), 3):
    for i in range(4):
      row = {name: batch[name][i] for name in batch}
      rows[int(row['tokens_BS'][3])] = row
  assert set(rows) == {63, 68, 100}, 'an epoch has each once'
  for response in RESPONSES:
    row = rows[int(response.tokens[2])]
    n = len(response.tokens)
    assert row['tokens_BS'].tolist() == [2, *response.tokens] + [0] * (31 - n)
    assert row['length_B'] == n + 1 and not row['first_BS'].any()
    starts = list(range(3, n + 1, C))
    assert row['canvas_start_BK'].tolist() == starts + [-1] * (3 - len(starts))
    targets = np.flatnonzero(row['target_mask_BS'])
    assert targets.tolist() == list(range(3, 3 + response.num_targets))
  windows = data.heldout_windows(RESPONSES, 32, 2, 0)
  for i, response in enumerate(RESPONSES):
    row = rows[int(response.tokens[2])]
    assert (windows.tokens_MS[i] == row['tokens_BS']).all()
    assert (windows.target_mask_MS[i] == row['target_mask_BS']).all()
    assert windows.length_M[i] == row['length_B']


def test_responses_are_read_beside_documents(tmp_path):
  lines = [
    {'prompt': 'Who is there?', 'response': 'Nay, answer me.'},
    {'text': 'word ' * 50},
    {'prompt': '', 'response': 'Long live the king!', 'split': 'heldout'},
  ]
  path = write(tmp_path / 'a.jsonl', '\n'.join(map(json.dumps, lines)))
  read = corpus.load_corpus(DataConfig(path=str(path)), TOKENIZER, C)
  pair, text = read.train
  assert text.prompt_length is None
  assert TOKENIZER.decode(pair.tokens[: pair.prompt_length].tolist()) == (
    'Who is there?'
  )
  response = TOKENIZER.decode(pair.tokens[pair.prompt_length :].tolist())
  assert response == 'Nay, answer me.'
  assert read.heldout[0].prompt_length == 0
  assert read.heldout_texts == ['Long live the king!']


def test_what_is_cut_off_a_response_is_not_evaluated(tmp_path):
  """Its bytes count no more than its tokens do."""
  response = 'Never, never, never, never, never! ' * 9
  line = {'prompt': 'O', 'response': response, 'split': 'heldout'}
  lines = [line, {'prompt': 'Who?', 'response': 'I.', 'split': 'train'}]
  path = write(tmp_path / 'a.jsonl', '\n'.join(map(json.dumps, lines)))
  given = DataConfig(path=str(path), sequence_length=3 * C)
  read = corpus.load_corpus(given, TOKENIZER, C)
  (text,), (example,) = read.heldout_texts, read.heldout
  assert response.startswith(text) and 0 < len(text) < len(response)
  assert len(TOKENIZER.encode(text)) == example.num_targets


def read_chat(tmp_path, tokenizer, record, length=256):
  """What lines of a chat teach: [(prompt, response with its fill)]."""
  line = json.dumps({**record, 'split': 'train'})
  other = json.dumps({'text': 'word ' * 50, 'split': 'heldout'})
  path = write(tmp_path / 'chat.jsonl', f'{line}\n{other}')
  config = DataConfig(path=str(path), sequence_length=length)
  examples = corpus.load_corpus(config, tokenizer, C).train
  return [
    (e.tokens[: e.prompt_length].tolist(), e.tokens[e.prompt_length :].tolist())
    for e in examples
  ]


def test_chats_teach_what_the_assistant_says(tmp_path, chat_tokenizer):
  """With the prompts that sampling makes, and neither header nor more than
  the token that ends a turn to say."""
  spell = lambda text: chat_tokenizer.encode_template(text, '\ue000')
  call = {'id': 'a', 'function': {'name': 'f', 'arguments': {'x': 1}}}
  messages = [
    {'role': 'user', 'content': 'what'},
    {'role': 'assistant', 'content': 'this', 'reasoning': 'hm'},
    {'role': 'user', 'content': 'is'},
    {'role': 'assistant', 'content': '', 'tool_calls': [call]},
    {'role': 'tool', 'tool_call_id': 'a', 'content': 'yes'},
    {'role': 'assistant', 'content': 'what <mask>', 'reasoning': 'so'},
  ]
  system = '<|turn>system\n<|think|>\n<turn|>\n'
  past = '<|turn>user\nwhat<turn|>\n<|turn>model\n'
  later = past + 'this<turn|>\n<|turn>user\nis<turn|>\n<|turn>model\n'
  called = '<|tool_call>call:f{x:1}<tool_call|><|tool_response>'
  answered = f'{later}{called}response:f{{value:<|"|>yes<|"|>}}<tool_response|>'
  literal = chat_tokenizer.encode('what <mask>')
  expected = [
    (
      spell(system + past),
      spell('<|channel>thought\nhm\n<channel|>this<turn|>'),
    ),
    (spell(later), spell(called)),
    (
      spell(f'{system}{answered}<|channel>thought\n'),
      [*spell('so\n<channel|>'), *literal, *spell('<turn|>')],
    ),
  ]
  got = read_chat(tmp_path, chat_tokenizer, {'messages': messages})
  for (prompt, response), (wanted_prompt, wanted) in zip(
    got, expected, strict=True
  ):
    assert prompt == wanted_prompt
    assert response[: len(wanted)] == wanted
    assert set(response[len(wanted) :]) <= {1} and len(response) % C == 0
    assert len(response) - len(wanted) < C, 'no canvas of nothing but fill'


@pytest.mark.parametrize(
  'record, message',
  [
    ({'messages': 'x'}, 'line 1: messages are a list'),
    ({'messages': [{'content': 'x'}]}, 'message 1: role None is none of'),
    ({'messages': [{'role': 'user', 'content': 'x'}]}, 'no message of the ass'),
    (
      {'messages': [{'role': 'assistant', 'content': 'x'}], 'tools': 'f'},
      'tools are not JSON',
    ),
    (
      {
        'messages': [
          {'role': 'user', 'content': 'x ' * 300},
          {'role': 'assistant', 'content': 'x'},
        ]
      },
      'leaves no room for a canvas',
    ),
    (
      {
        'messages': [
          {
            'role': 'assistant',
            'tool_calls': [{'function': {'name': 'f', 'arguments': 'x'}}],
          }
        ]
      },
      "line 1, message 1: arguments of 'f' are not JSON",
    ),
    *(
      ({'messages': [{'role': 'assistant', **message}], **more}, expected)
      for message, more, expected in (
        ({'role': 'usr', 'content': 'x'}, {}, "role 'usr' is none of system"),
        ({'content': None}, {}, 'neither content nor reasoning'),
        ({'content': ''}, {}, 'neither content nor reasoning'),
        ({'content': 7}, {}, 'a content is a string or a list, not 7'),
        ({'content': ['x']}, {}, 'or a list of parts like'),
        ({'content': 'x'}, {'tools': ['f']}, 'tools are a list of functions'),
      )
    ),
  ],
)
def test_chats_that_cannot_be_learnt(tmp_path, chat_tokenizer, record, message):
  with pytest.raises(corpus.DataError, match=message):
    read_chat(tmp_path, chat_tokenizer, record)


def test_a_chat_is_held_out_as_a_whole():
  """Of what is learnt, nothing has a held-out answer in its prompt."""
  chats = [
    corpus.Document('', f'line {i}', messages=({},) * 4, targets=(1, 3))
    for i in range(5)
  ]
  train, heldout = corpus.split_documents(chats, 2)
  assert heldout == chats[1::2] and train == chats[0::2]
  train, heldout = corpus.split_documents(chats[:2], 9)
  assert (train, heldout) == (chats[:1], chats[1:2])
  (train,), (heldout,) = corpus.split_documents(chats[:1], 9)
  assert (train.targets, heldout.targets) == ((1,), (3,))


def test_a_chat_needs_a_tokenizer_with_turns(tmp_path):
  record = {'messages': [{'role': 'assistant', 'content': 'x'}]}
  with pytest.raises(corpus.DataError, match='needs a tokenizer that has'):
    read_chat(tmp_path, TOKENIZER, record)


def write(path, text):
  path.write_text(text, encoding='utf-8')
  return path


def test_files_folders_globs_and_formats(tmp_path):
  write(tmp_path / 'a.txt', 'text a')
  (tmp_path / 'deep').mkdir()
  write(tmp_path / 'deep' / 'b.jsonl', '{"text": "b 1"}\n\n{"text": "b 2"}\n')
  write(tmp_path / 'ignored.md', 'no')
  with lzma.open(tmp_path / 'c.jsonl.xz', 'wt') as stream:
    stream.write('{"text": "c", "split": "heldout"}')

  def texts(path):
    return [d.text for d in corpus.read_documents(str(path))]

  assert texts(tmp_path) == ['text a', 'c', 'b 1', 'b 2']
  assert texts(tmp_path / 'a.txt') == ['text a']
  assert texts(tmp_path / '*.txt') == ['text a']
  assert texts(tmp_path / '**' / '*.jsonl') == ['b 1', 'b 2']


@pytest.mark.parametrize(
  'name, content, message',
  [
    (None, b'', 'There is nothing at'),
    ('a.md', b'text', 'neither text nor JSON'),
    ('a.txt', b'', 'are empty'),
    ('a.txt', b'caf\xe9', r'a\.txt is not UTF-8: byte 3 is 0xe9'),
    ('a.txt', b'too short', 'tokens are shorter than a canvas of 8'),
    ('a.jsonl', b'{"prompt": "x"}', "has no 'response' that is text"),
    ('a.jsonl', b'{"response": "x"}', "has no 'prompt' that is text"),
    ('a.jsonl', b'{"prompt": 3, "response": "x"}', "no 'prompt' that"),
    (
      'a.jsonl',
      b'{"prompt": "x", "response": ""}',
      'the response is empty',
    ),
    ('a.jsonl', b'[1]', 'line 1 is not an object'),
    (
      'a.jsonl',
      b'{"prompt": "' + b'x ' * 2000 + b'", "response": "y"}\n{"text": "x"}',
      'line 1: a prompt of .* leaves no room for a canvas of 8',
    ),
    ('a.jsonl', b'{"text": "x"}\n{oops', 'line 2 is not JSON'),
    ('a.jsonl', b'{"txt": "x"}', "line 1: there is no 'txt'.*mean 'text'"),
    ('a.jsonl', b'{"rows": "x"}', 'line 1 is none of {"text": ...}'),
    ('a.jsonl', b'{"text": "x", "text": "y"}', "'text' occurs twice"),
    ('a.jsonl', b'{"text": NaN}', 'NaN is no number of JSON'),
    ('a.jsonl', b'{"text": "x"}\n"caf\xe9"', 'line 2 is not UTF-8: byte 4'),
    ('a.json', b'[{"text": "x"}, 3]', 'element 2 is not an object'),
    ('a.json', b'[{"text": "x"},]', r'a\.json is not JSON'),
    ('a.jsonl', b'[' * 100_000, 'line 1 is not JSON'),
    ('a.jsonl', b'{"text": "x", "split": "dev"}', 'neither train nor heldout'),
    ('a.jsonl', b'{"text": "\\ud800"}', 'line 1.*: Character 0 of the text'),
    ('a.jsonl', b'{"text": ' + b'9' * 5000 + b'}', 'line 1 is not JSON'),
    ('a.jsonl.xz', b'not xz', 'is not an xz file'),
    ('a.jsonl.xz', lzma.compress(b'x' * 99)[:-20], 'is not an xz file'),
  ],
)
def test_bad_input_is_named(tmp_path, name, content, message):
  path = tmp_path / (name or 'nowhere')
  if name:
    path.write_bytes(content)
  config = DataConfig(path=str(path))
  with pytest.raises(corpus.DataError, match=message):
    corpus.load_corpus(config, TOKENIZER, C)


def test_empty_folder_is_named(tmp_path):
  with pytest.raises(corpus.DataError, match='holds no file named .txt'):
    corpus.read_documents(str(tmp_path))


def documents(count):
  return [corpus.Document(f'{i} ' * 100, f'file {i}') for i in range(count)]


def test_splits():
  train, heldout = corpus.split_documents(documents(10), 5)
  assert [d.origin for d in heldout] == ['file 4', 'file 9']
  assert len(train) == 8
  train, heldout = corpus.split_documents(documents(2), 20)
  for whole, kept, cut in zip(documents(2), train, heldout, strict=True):
    assert kept.text + cut.text == whole.text
    assert len(cut.text) == len(whole.text) // 20
  marked = [documents(1)[0]._replace(split='heldout'), documents(1)[0]]
  train, heldout = corpus.split_documents(marked, 2)
  assert (train, heldout) == (marked[1:], marked[:1])


def test_what_is_marked_stays_apart_in_two_files(tmp_path):
  lines = [
    {'text': f'{split} ' * 50, 'split': split}
    for split in ('train', 'heldout', '')
  ]
  path = write(tmp_path / 'a.jsonl', '\n'.join(map(json.dumps, lines)))
  config = DataConfig(path=str(path), heldout_path=str(path))
  read = corpus.load_corpus(config, TOKENIZER, C)
  assert len(read.train) == 2
  assert [text.split(' ')[0] for text in read.heldout_texts] == ['heldout', '']


def test_nothing_to_hold_out_is_an_error(tmp_path):
  path = write(
    tmp_path / 'a.jsonl', json.dumps({'text': 'word ' * 50, 'split': 'train'})
  )
  with pytest.raises(corpus.DataError, match='nothing to hold out'):
    corpus.load_corpus(DataConfig(path=str(path)), TOKENIZER, C)


def test_shipped_corpus_holds_out_three_plays():
  shipped = corpus.read_documents(str(corpus.SHIPPED_CORPUS))
  assert len(shipped) == 42
  assert sum(d.split == 'heldout' for d in shipped) == 3
  shakespeare = corpus.load_corpus(DataConfig(), TOKENIZER, 64)
  assert (len(shakespeare.train), len(shakespeare.heldout)) == (39, 3)
  macbeth = shakespeare.heldout_texts[0]
  assert macbeth.startswith('THE TRAGEDY OF MACBETH') or 'Macbeth' in macbeth
  for example, text in zip(
    shakespeare.heldout, shakespeare.heldout_texts, strict=True
  ):
    assert TOKENIZER.decode(example.tokens.tolist()) == text
    assert example.tokens[-1] == TOKENIZER.eos_id
    assert example.prompt_length is None


PACKED = DataConfig(sequence_length=32, batch_size=2, packing=True)
TALES = [
  corpus.Example(10 + 1000 * d + np.arange(n, dtype=np.int32))
  for d, n in enumerate((3, 9, 12, 7, 20, 5, 40))
]


def pieces_of(batch):
  """(tokens, targets, canvas starts) of each piece of each row of a batch."""
  for row in range(len(batch['length_B'])):
    tokens, first = batch['tokens_BS'][row], batch['first_BS'][row]
    length, starts = batch['length_B'][row], batch['canvas_start_BK'][row]
    assert (tokens[length:] == TOKENIZER.pad_id).all()
    assert not batch['target_mask_BS'][row, length:].any()
    for start in np.unique(first[:length]):
      inside = np.flatnonzero((first == start) & (np.arange(32) < length))
      assert inside.tolist() == list(range(start, start + len(inside)))
      end = start + len(inside)
      here = starts[(starts >= start) & (starts < end)]
      yield tokens[inside], batch['target_mask_BS'][row, inside], here - start


def test_packed_rows_hold_whole_pieces():
  dataset = data.make_dataset(TALES, PACKED, C, TOKENIZER)
  batches = list(itertools.islice(iter(dataset), 40))
  seen, several = [], 0
  for batch in batches:
    for tokens, targets, starts in pieces_of(batch):
      assert tokens[0] == TOKENIZER.bos_id
      assert targets.tolist() == [False] + [True] * (len(tokens) - 1)
      assert (np.diff(tokens[1:]) == 1).all(), 'one document'
      if len(tokens) > C:
        assert starts[0] >= 1 and starts[-1] + C <= len(tokens)
        assert (np.diff(starts) == C).all()
      else:
        assert not len(starts)
      seen.append((tokens[1] - 10) // 1000)
    for first in batch['first_BS']:
      several += first.any()
  # Two of eight pieces fill a row; the others are half of all tokens.
  assert several >= 30, 'short ones share rows'
  # Two windows of the longest, one of each other, epoch after epoch.
  counts = np.bincount(seen)
  assert len(counts) == 7 and counts[6] > 1.6 * counts[:6].mean()
  assert counts[:6].max() < 1.3 * counts[:6].min()


@pytest.mark.parametrize(
  'examples, config, before', [(DOCUMENTS, CONFIG, 7), (TALES, PACKED, 25)]
)
def test_iterator_goes_on_where_it_was(examples, config, before):
  dataset = data.make_dataset(examples, config, C, TOKENIZER)
  iterator = iter(dataset)
  for _ in range(before):
    next(iterator)
  place = json.loads(json.dumps(iterator.get_state()))
  expected = [next(iterator) for _ in range(20)]
  resumed = iter(dataset)
  resumed.set_state(place)
  assert all(map(same, [next(resumed) for _ in range(20)], expected))


def test_short_documents_are_for_packing(tmp_path):
  lines = [{'text': 'Nay.'}, {'text': 'word ' * 50, 'split': 'heldout'}]
  path = write(tmp_path / 'a.jsonl', '\n'.join(map(json.dumps, lines)))
  with pytest.raises(corpus.DataError, match='config.data.packing=true'):
    corpus.load_corpus(DataConfig(path=str(path)), TOKENIZER, C)
  packed = DataConfig(path=str(path), packing=True)
  (short,) = corpus.load_corpus(packed, TOKENIZER, C).train
  assert len(short.tokens) < C


def test_heldout_canvases_count_every_token_once():
  for examples, length in ((DOCUMENTS, 32), (TALES, 20), (RESPONSES, 32)):
    canvases = data.heldout_canvases(examples, length, C, 2, 0)
    counted = []
    for tokens, row_length, start_K, counted_L in zip(*canvases, strict=True):
      assert tokens[0] == 2 and row_length <= length
      for start, counted_C in zip(
        start_K, counted_L.reshape(-1, C), strict=True
      ):
        if counted_C.any():
          assert 1 <= start <= row_length - C
          counted += tokens[start : start + C][counted_C].tolist()
    wanted = [
      e.tokens
      if e.prompt_length is None
      else e.tokens[e.prompt_length :][: e.num_targets]
      for e in examples
    ]
    assert sorted(counted) == sorted(np.concatenate(wanted))


def test_heldout_canvases_have_half_a_row_of_context():
  canvases = data.heldout_canvases(DOCUMENTS[1:2], 32, C, 2, 0)
  starts = canvases.start_MK[:, 0]
  assert starts[:3].tolist() == [1, 1 + C, 1 + 2 * C]
  assert (starts[3:] == 32 - C).all()
  last = canvases.tokens_MS[-1]
  fill = last[canvases.start_MK[-1, 0] :][~canvases.counted_ML[-1]]
  assert len(fill) == -431 % C and (fill == DOCUMENTS[1].tokens[-1]).all()
