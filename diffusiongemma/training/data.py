"""Documents on disk to batches of token windows, with Grain.

  files -> documents -> tokens -> windows -> global shuffle -> this process's
  share -> rows with a random split into prompt and canvases -> batches

Everything random follows from `DataConfig.seed` and the row's index, so the
iterator's state is one number and a resumed run reads on where it stopped.
"""

import glob
import json
import lzma
import pathlib
from typing import NamedTuple

import grain
import numpy as np

from diffusiongemma.config import DataConfig
from diffusiongemma.text import tokenizer as tokenizers

SHIPPED_CORPUS = tokenizers.ASSETS / 'shakespeare.jsonl.xz'
SUFFIXES = ('.txt', '.jsonl', '.jsonl.xz')


class DataError(ValueError):
  """Text that can't be used; the message names the file and the remedy."""


class Document(NamedTuple):
  """One text. `origin` says where it came from, for messages; `split` is
  'train', 'heldout' or '' (not said)."""

  text: str
  origin: str
  split: str = ''


class Corpus(NamedTuple):
  """Tokens of every document, int32, each ending in eos.

  Attributes:
    train: documents to learn from.
    heldout: documents to evaluate on.
    heldout_texts: their text.
  """

  train: list[np.ndarray]
  heldout: list[np.ndarray]
  heldout_texts: list[str]


def find_files(path: str) -> list[pathlib.Path]:
  """The text files of a file name, a folder (searched in depth) or a glob."""
  given = pathlib.Path(path)
  if given.is_file():
    if not given.name.endswith(SUFFIXES):
      raise DataError(
        f'{path!r} is neither text nor JSON lines; name it one of '
        f'{", ".join(SUFFIXES)}.'
      )
    return [given]
  if given.is_dir():
    candidates = given.rglob('*')
  else:
    candidates = map(pathlib.Path, glob.glob(path, recursive=True))
  files = sorted(
    file
    for file in candidates
    if file.is_file() and file.name.endswith(SUFFIXES)
  )
  if not files and not given.exists() and not glob.has_magic(path):
    raise DataError(f'There is nothing at {path!r}.')
  if not files:
    raise DataError(f'{path!r} holds no file named {" or ".join(SUFFIXES)}.')
  return files


def read_documents(path: str) -> list[Document]:
  """All documents at `path`; see `find_files`. Raises `DataError`.

  A text file is one document, a line of a JSON lines file another: an object
  with a `text` and, if it likes, a `split`.
  """
  documents = []
  for file in find_files(path):
    if file.name.endswith('.txt'):
      documents.append(Document(_read_text(file), str(file)))
      continue
    for number, line in enumerate(_read_text(file).split('\n'), 1):
      if line.strip():
        documents.append(_parse_line(line, f'{file}, line {number}'))
  documents = [d for d in documents if d.text]
  if not documents:
    raise DataError(f'The files at {path!r} are empty.')
  return documents


def _read_text(file: pathlib.Path) -> str:
  try:
    opener = lzma.open if file.suffix == '.xz' else open
    with opener(file, 'rb') as stream:
      return stream.read().decode('utf-8-sig')  # a byte order mark is no text
  except UnicodeDecodeError as error:
    raise DataError(
      f'{file} is not UTF-8: byte {error.start} is 0x'
      f'{error.object[error.start]:02x}. Convert it first, for example with '
      f'iconv -t UTF-8.'
    ) from error
  except lzma.LZMAError as error:
    raise DataError(f'{file} is not an xz file: {error}.') from error
  except OSError as error:
    raise DataError(f'{file} cannot be read: {error.strerror}.') from error


def _parse_line(line: str, origin: str) -> Document:
  try:
    record = json.loads(line)
  except (json.JSONDecodeError, RecursionError) as error:
    raise DataError(f'{origin} is not JSON: {error}.') from error
  if not isinstance(record, dict) or not isinstance(record.get('text'), str):
    raise DataError(f'{origin} is not an object with a text: {{"text": ...}}.')
  split = record.get('split', '')
  if split not in ('', 'train', 'heldout'):
    raise DataError(f'{origin}: split {split!r} is neither train nor heldout.')
  return Document(record['text'], origin, split)


def split_documents(
  documents: list[Document], every: int
) -> tuple[list[Document], list[Document]]:
  """(train, heldout): as the documents say, else every n-th is held out.

  With fewer than n documents, the last n-th of each is held out instead.
  """
  if any(d.split for d in documents):
    train = [d for d in documents if d.split != 'heldout']
    return train, [d for d in documents if d.split == 'heldout']
  if len(documents) >= every > 1:
    heldout = documents[every - 1 :: every]
    train = [d for i, d in enumerate(documents) if (i + 1) % every]
    return train, heldout
  train, heldout = [], []
  for document in documents:
    cut = len(document.text) - len(document.text) // max(every, 2)
    train.append(document._replace(text=document.text[:cut]))
    heldout.append(
      Document(document.text[cut:], f'{document.origin} (its held-out end)')
    )
  return train, heldout


def load_corpus(
  data: DataConfig, tokenizer: tokenizers.Tokenizer, canvas_length: int
) -> Corpus:
  """Reads, splits and tokenises the text of a config. Raises `DataError`."""
  documents = read_documents(data.path or str(SHIPPED_CORPUS))
  if data.heldout_path:
    train, heldout = documents, read_documents(data.heldout_path)
  else:
    train, heldout = split_documents(documents, data.heldout_every)
  for name, part in (('train on', train), ('hold out', heldout)):
    if not part:
      raise DataError(
        f'{data.path!r} leaves nothing to {name}: give more documents, or '
        'name others in config.data.heldout_path.'
      )

  def tokenize(document):
    try:
      tokens = tokenizer.encode(document.text) + [tokenizer.eos_id]
    except tokenizers.TokenizerError as error:
      raise DataError(f'{document.origin}: {error}') from error
    # A row is bos and, at least, a canvas.
    if len(tokens) < canvas_length:
      raise DataError(
        f'{document.origin}: {len(tokens)} tokens are shorter than a canvas '
        f'of {canvas_length}. Leave it out, join it with another, or lower '
        'config.diffusion.canvas_length.'
      )
    return np.array(tokens, np.int32)

  return Corpus(
    [tokenize(d) for d in train],
    [tokenize(d) for d in heldout],
    [d.text for d in heldout],
  )


def make_row(
  document: np.ndarray, start: int, length: int, bos_id: int, pad_id: int
) -> tuple[np.ndarray, int]:
  """(bos and up to `length` - 1 tokens from `start`, padded; its length)."""
  tokens = document[start : start + length - 1]
  row = np.full(length, pad_id, np.int32)
  row[0] = bos_id
  row[1 : len(tokens) + 1] = tokens
  return row, len(tokens) + 1


class _RandomRow(grain.transforms.RandomMap):
  """A window's place to a row, with random offset and prompt length."""

  def __init__(self, documents, length, canvas_length, bos_id, pad_id):
    self.documents = documents
    self.length = length
    self.canvas_length = canvas_length
    self.bos_id = bos_id
    self.pad_id = pad_id

  def random_map(self, place, rng: np.random.Generator):
    index, start = place
    document, stride = self.documents[index], self.length - 1
    start = start + int(rng.integers(stride))
    start = min(start, max(0, len(document) - stride))
    row, length = make_row(
      document, start, self.length, self.bos_id, self.pad_id
    )
    prompt_length = int(rng.integers(1, length - self.canvas_length + 1))
    position = np.arange(self.length)
    return {
      'tokens_BS': row,
      'length_B': np.int32(length),
      'prompt_length_B': np.int32(prompt_length),
      'target_mask_BS': (position > 0) & (position < length),
    }


def make_dataset(
  documents: list[np.ndarray],
  data: DataConfig,
  canvas_length: int,
  tokenizer: tokenizers.Tokenizer,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.IterDataset:
  """An endless dataset of batches (see `diffusion.loss.check_batch`).

  Every epoch visits each window once, in its own order and with its own
  offsets; the processes of a job take turns over one global order.

  Args:
    documents: tokens of each document.
    data: `batch_size` is that of the whole job.
    canvas_length: C, every row has room for one canvas at least.
    tokenizer: for its special ids.
    process_index: which share to yield.
    process_count: among how many; must divide the batch.
  """
  if data.batch_size % process_count:
    raise DataError(
      f'config.data.batch_size = {data.batch_size} must be a multiple of the '
      f'{process_count} processes.'
    )
  stride = data.sequence_length - 1
  places = [
    (index, start)
    for index, document in enumerate(documents)
    for start in range(0, len(document), stride)
  ]
  rows = _RandomRow(
    documents,
    data.sequence_length,
    canvas_length,
    tokenizer.bos_id,
    tokenizer.pad_id,
  )
  return (
    grain.MapDataset.source(places)
    .seed(data.seed)
    .shuffle()
    .repeat()
    .random_map(rows)[process_index::process_count]
    .batch(data.batch_size // process_count)
    .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
  )


class Windows(NamedTuple):
  """Held-out rows, each beginning with bos.

  Attributes:
    tokens_MS: int32, padded on the right.
    length_M: int32, real tokens of each row.
    target_mask_MS: bool, tokens to predict; every token of every document
      once.
  """

  tokens_MS: np.ndarray
  length_M: np.ndarray
  target_mask_MS: np.ndarray

  def take(self, rows) -> 'Windows':
    """Some of the rows, by index or slice."""
    return Windows(*(array[rows] for array in self))


def heldout_windows(
  documents: list[np.ndarray], length: int, bos_id: int, pad_id: int
) -> Windows:
  """Windows of `length` of which consecutive ones share half, so that all but
  the first tokens of a document have length / 2 tokens of context or more."""
  rows, lengths, masks = [], [], []
  stride = max(1, (length - 1) // 2)
  for document in documents:
    scored = 0  # tokens of the document that are targets already
    for start in range(0, len(document), stride):
      row, row_length = make_row(document, start, length, bos_id, pad_id)
      end = start + row_length - 1
      mask = np.zeros(length, bool)
      mask[scored - start + 1 : end - start + 1] = True
      rows.append(row)
      lengths.append(row_length)
      masks.append(mask)
      scored = end
      if end == len(document):
        break
  return Windows(np.stack(rows), np.array(lengths, np.int32), np.stack(masks))
