"""Files to batches: order, shares, places, and every kind of bad input."""

import itertools
import json
import lzma

import numpy as np
import pytest

from diffusiongemma.config import DataConfig
from diffusiongemma.text import tokenizer as tokenizers
from diffusiongemma.training import data

TOKENIZER = tokenizers.load_tokenizer()
C = 8
# Token i of document d is 10 + 1000 d + i: a row tells where it is from.
DOCUMENTS = [
  10 + 1000 * d + np.arange(n, dtype=np.int32)
  for d, n in enumerate((100, 431, 40))
]
CONFIG = DataConfig(sequence_length=32, batch_size=4)


def batches(count, config=CONFIG, process=0, processes=1):
  dataset = data.make_dataset(
    DOCUMENTS, config, C, TOKENIZER, process, processes
  )
  return list(itertools.islice(iter(dataset), count))


def same(a, b):
  return all((a[name] == b[name]).all() for name in a)


def test_rows_are_windows_of_one_document():
  for batch in batches(20):
    for tokens, length, prompt, mask in zip(
      batch['tokens_BS'],
      batch['length_B'],
      batch['prompt_length_B'],
      batch['target_mask_BS'],
      strict=True,
    ):
      text = tokens[1:length]
      assert tokens[0] == TOKENIZER.bos_id
      assert (np.diff(text) == 1).all() and len(text) == min(31, len(text))
      assert (tokens[length:] == TOKENIZER.pad_id).all()
      assert 1 <= prompt <= length - C
      assert mask.tolist() == [0 < i < length for i in range(32)]


def test_an_epoch_visits_every_window_once():
  """571 tokens are 4 + 14 + 2 windows of 31, five batches of four."""
  for epoch in np.split(
    np.array([batch['tokens_BS'][:, 1] for batch in batches(15)]), 3
  ):
    documents, counts = np.unique((epoch - 10) // 1000, return_counts=True)
    assert documents.tolist() == [0, 1, 2] and counts.tolist() == [4, 14, 2]


def test_order_follows_the_seed():
  one, again = batches(6), batches(6)
  other = batches(6, DataConfig(sequence_length=32, batch_size=4, seed=1))
  assert all(map(same, one, again))
  assert not all(map(same, one, other))
  assert not same(one[0], one[5]), 'epochs differ'


def test_processes_share_out_one_global_order():
  shares = [batches(6, process=p, processes=2) for p in (0, 1)]
  for whole, left, right in zip(batches(6), *shares, strict=True):
    merged = np.empty_like(whole['tokens_BS'])
    merged[0::2], merged[1::2] = left['tokens_BS'], right['tokens_BS']
    np.testing.assert_array_equal(merged, whole['tokens_BS'])


def test_batch_that_processes_cannot_share():
  with pytest.raises(data.DataError, match='multiple of the 3 processes'):
    batches(1, processes=3)


def test_iterator_goes_on_where_it_was():
  dataset = data.make_dataset(DOCUMENTS, CONFIG, C, TOKENIZER)
  iterator = iter(dataset)
  for _ in range(7):
    next(iterator)
  place = json.loads(json.dumps(iterator.get_state()))
  expected = [next(iterator) for _ in range(3)]
  resumed = iter(dataset)
  resumed.set_state(place)
  assert all(map(same, [next(resumed) for _ in range(3)], expected))


@pytest.mark.parametrize('length', [9, 32, 700])
def test_heldout_windows_predict_every_token_once(length):
  windows = data.heldout_windows(DOCUMENTS, length, 2, 0)
  targets = windows.tokens_MS[windows.target_mask_MS]
  assert sorted(targets) == sorted(np.concatenate(DOCUMENTS))
  for tokens, row_length, mask in zip(*windows, strict=True):
    assert tokens[0] == 2 and not mask[0] and not mask[row_length:].any()
    first = np.flatnonzero(mask)[0]
    at_start = tokens[1] in [d[0] for d in DOCUMENTS]
    assert at_start or first >= length // 2 - 1, 'too little context'


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
    return [d.text for d in data.read_documents(str(path))]

  assert texts(tmp_path) == ['text a', 'c', 'b 1', 'b 2']
  assert texts(tmp_path / 'a.txt') == ['text a']
  assert texts(tmp_path / '*.txt') == ['text a']
  assert texts(tmp_path / '**' / '*.jsonl') == ['b 1', 'b 2']


@pytest.mark.parametrize(
  'name, content, message',
  [
    (None, b'', 'There is nothing at'),
    ('a.md', b'text', 'neither text nor JSON lines'),
    ('a.txt', b'', 'are empty'),
    ('a.txt', b'caf\xe9', r'a\.txt is not UTF-8: byte 3 is 0xe9'),
    ('a.txt', b'too short', 'tokens are shorter than a canvas of 8'),
    ('a.jsonl', b'{"text": "x"}\n{oops', 'line 2 is not JSON'),
    ('a.jsonl', b'{"txt": "x"}', 'line 1 is not an object with a text'),
    ('a.jsonl', b'[' * 100_000, 'line 1 is not JSON'),
    ('a.jsonl', b'{"text": "x", "split": "dev"}', 'neither train nor heldout'),
    ('a.jsonl', b'{"text": "\\ud800"}', 'line 1.*: Character 0 of the text'),
    ('a.jsonl.xz', b'not xz', 'is not an xz file'),
  ],
)
def test_bad_input_is_named(tmp_path, name, content, message):
  path = tmp_path / (name or 'nowhere')
  if name:
    path.write_bytes(content)
  config = DataConfig(path=str(path))
  with pytest.raises(data.DataError, match=message):
    data.load_corpus(config, TOKENIZER, C)


def test_empty_folder_is_named(tmp_path):
  with pytest.raises(data.DataError, match='holds no file named .txt'):
    data.read_documents(str(tmp_path))


def documents(count):
  return [data.Document(f'{i} ' * 100, f'file {i}') for i in range(count)]


def test_splits():
  train, heldout = data.split_documents(documents(10), 5)
  assert [d.origin for d in heldout] == ['file 4', 'file 9']
  assert len(train) == 8
  train, heldout = data.split_documents(documents(2), 20)
  for whole, kept, cut in zip(documents(2), train, heldout, strict=True):
    assert kept.text + cut.text == whole.text
    assert len(cut.text) == len(whole.text) // 20
  marked = [documents(1)[0]._replace(split='heldout'), documents(1)[0]]
  train, heldout = data.split_documents(marked, 2)
  assert (train, heldout) == (marked[1:], marked[:1])


def test_nothing_to_hold_out_is_an_error(tmp_path):
  path = write(
    tmp_path / 'a.jsonl', json.dumps({'text': 'word ' * 50, 'split': 'train'})
  )
  with pytest.raises(data.DataError, match='nothing to hold out'):
    data.load_corpus(DataConfig(path=str(path)), TOKENIZER, C)


def test_shipped_corpus_holds_out_three_plays():
  shipped = data.read_documents(str(data.SHIPPED_CORPUS))
  assert len(shipped) == 42
  assert sum(d.split == 'heldout' for d in shipped) == 3
  corpus = data.load_corpus(DataConfig(), TOKENIZER, 64)
  assert (len(corpus.train), len(corpus.heldout)) == (39, 3)
  macbeth = corpus.heldout_texts[0]
  assert macbeth.startswith('THE TRAGEDY OF MACBETH') or 'Macbeth' in macbeth
  for document, text in zip(corpus.heldout, corpus.heldout_texts, strict=True):
    assert TOKENIZER.decode(document.tolist()) == text
    assert document[-1] == TOKENIZER.eos_id
