"""Examples to batches of token rows, with Grain.

  documents -> windows, each with a random split into prompt and canvases
  prompts with a response -> one piece each
  pieces -> global shuffle -> rows -> batches -> this process's share of each

A row is one piece, or with `packing` as many pieces as fit, which don't see
each other; then pieces are shared among processes instead of rows. Everything
random follows from `DataConfig.seed` and the position in the order, so the
iterator's state is small, and a resumed run continues where it stopped.
"""

import hashlib
import itertools
from typing import Any
from typing import NamedTuple

import grain
import jax
import numpy as np

from diffusiongemma.config import DataConfig
from diffusiongemma.devices import sharding
from diffusiongemma.text import tokenizer as tokenizers
from diffusiongemma.training.corpus import DataError
from diffusiongemma.training.corpus import Example

# Rows that are packed at the same time; more of them leave less padding.
PACKING_BINS = 32


def make_row(
  document: np.ndarray, start: int, length: int, bos_id: int, pad_id: int
) -> tuple[np.ndarray, int]:
  """(bos and up to `length` - 1 tokens from `start`, padded; its length)."""
  tokens = document[start : start + length - 1]
  row = np.full(length, pad_id, np.int32)
  row[0] = bos_id
  row[1 : len(tokens) + 1] = tokens
  return row, len(tokens) + 1


class _Pieces(grain.transforms.RandomMap):
  """(index of an example, bounds of a part of it) -> a piece.

  `tokens` begin with bos; `targets` marks tokens that the AR loss predicts,
  `canvas` those where a canvas may start.
  """

  def __init__(self, examples, length, canvas_length, bos_id):
    self.examples = examples
    self.length = length
    self.canvas_length = canvas_length
    self.bos_id = bos_id

  def random_map(self, place, rng: np.random.Generator):
    index, part = place
    example, C = self.examples[index], self.canvas_length
    if example.prompt_length is None:
      text = self._window(example.tokens, part, rng)
      # A text shorter than a canvas is for the AR loss only.
      room = max(len(text) + 1 - C, 1)
      prompt_length = int(rng.integers(1, room + 1))
      first, end = 1, len(text) + 1
    else:
      text = example.tokens
      first = prompt_length = 1 + example.prompt_length
      end = first + example.num_targets
    position = np.arange(len(text) + 1)
    fits = position <= len(text) + 1 - C
    on_grid = (position - prompt_length) % C == 0
    return {
      'tokens': np.concatenate([[self.bos_id], text]).astype(np.int32),
      'targets': (position >= first) & (position < end),
      'canvas': (position >= prompt_length) & fits & on_grid,
    }

  def _window(self, document, part, rng):
    """Up to length - 1 tokens around a random token of a part of the document;
    clipped to the document, so that its ends are read as often as the rest."""
    size = self.length - 1
    start = int(rng.integers(*part)) - size // 2
    start = max(0, min(start, len(document) - size))
    return document[start : start + size]


class _Row(grain.transforms.Map):
  """One piece, or several packed ones, to a row of a batch."""

  def __init__(self, length, canvas_length, pad_id):
    self.length = length
    self.most_canvases = (length - 1) // canvas_length
    self.pad_id = pad_id

  def map(self, pieces):
    # A packed row names the piece of each token, from 1 on; 0 is padding.
    of_token = pieces.get('tokens_segment_ids')
    if of_token is None:
      of_token = np.ones_like(pieces['tokens'])
    length = int(np.sum(of_token > 0))
    row = {
      'tokens_BS': np.full(self.length, self.pad_id, np.int32),
      'first_BS': np.zeros(self.length, np.int32),
      'target_mask_BS': np.zeros(self.length, bool),
    }
    row['tokens_BS'][:length] = pieces['tokens'][:length]
    row['target_mask_BS'][:length] = pieces['targets'][:length]
    # Pieces are consecutive: each begins where its number first occurs.
    row['first_BS'][:length] = np.searchsorted(
      of_token[:length], of_token[:length]
    )
    starts = np.flatnonzero(pieces['canvas'][:length])
    row['canvas_start_BK'] = np.full(self.most_canvases, -1, np.int32)
    row['canvas_start_BK'][: len(starts)] = starts
    return {**row, 'length_B': np.int32(length)}


def shuffle_for_ever(records: list[Any], seed: int) -> grain.MapDataset:
  """Endless epochs of the records, each in its own order."""
  count = len(records)
  shuffled = grain.MapDataset.source(records).seed(seed).shuffle()
  endless = shuffled.repeat()
  # With 4^n + 1 records, n > 7, Grain 0.2.18 repeats the first record of an
  # epoch at its end and never yields the last record; this puts it there.
  if count == 1 or shuffled[count - 1] != shuffled[0]:
    return endless
  last = records[-1]
  return endless.map_with_index(
    lambda index, record: last if (index + 1) % count == 0 else record
  )


def make_dataset(
  examples: list[Example],
  data: DataConfig,
  canvas_length: int,
  tokenizer: tokenizers.Tokenizer,
  share: sharding.Share = sharding.WHOLE_BATCH,
) -> grain.IterDataset:
  """An endless dataset of batches (see `diffusion.loss.check_batch`).

  A document is divided into equal parts, as many as the rows it would fill.
  Every epoch, in its own order, visits each part once, with a random window
  around it and a random split into prompt and canvases, and each prompt with a
  response once. The shares concatenated are the batch that a single process
  would read, and the state of the iterator is the same for each share; with
  packing, the shares take turns over the global order of pieces, and each packs
  its own.

  Args:
    examples: to train on.
    data: `batch_size` is that of the whole job.
    canvas_length: C; without packing, every row has room for at least one.
    tokenizer: for its special ids.
    share: of each batch, to yield; the number of shares must divide the batch.

  Raises:
    DataError: the number of shares does not divide the batch.
  """
  if data.batch_size % share.count:
    raise DataError(
      f'config.data.batch_size = {data.batch_size} must be a multiple of the '
      f'{share.count} shares in which it is read.'
    )
  length = data.sequence_length
  parts_of_examples = []
  for index, example in enumerate(examples):
    size, num_parts = len(example.tokens), 1
    if example.prompt_length is None:
      num_parts = -(-size // (length - 1))
    bounds = [size * part // num_parts for part in range(num_parts + 1)]
    parts_of_examples += [(index, part) for part in itertools.pairwise(bounds)]
  pieces = shuffle_for_ever(parts_of_examples, data.seed).random_map(
    _Pieces(examples, length, canvas_length, tokenizer.bos_id)
  )
  row = _Row(length, canvas_length, tokenizer.pad_id)
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
  size = data.batch_size // share.count
  if not data.packing:
    # Rows are endless, so nothing is dropped; rounding up their number, the
    # largest integer, would overflow.
    blocks = pieces.map(row).batch(size, drop_remainder=True)
    return blocks[share.index :: share.count].to_iter_dataset(options)
  packed = grain.experimental.FirstFitPackIterDataset(
    pieces[share.index :: share.count].to_iter_dataset(options),
    length_struct=dict.fromkeys(('tokens', 'targets', 'canvas'), length),
    num_packing_bins=PACKING_BINS,
    seed=data.seed,
  )
  return packed.map(row).batch(size)


class Description(NamedTuple):
  """Identifies a list of examples.

  Attributes:
    examples, tokens: their numbers.
    digest: of the tokens and of which of them are learnt.
  """

  examples: int
  tokens: int
  digest: str

  def __str__(self) -> str:
    examples = 'example' if self.examples == 1 else 'examples'
    return f'{self.examples:,} {examples} of {self.tokens:,} tokens'


def describe(examples: list[Example]) -> Description:
  """The `Description` of examples."""
  digest = hashlib.blake2b(digest_size=16)
  for example in examples:
    size, prompt_length = len(example.tokens), example.prompt_length
    digest.update(f'{size} {prompt_length} {example.num_targets} '.encode())
    digest.update(np.ascontiguousarray(example.tokens, np.int32).data)
  size = sum(len(example.tokens) for example in examples)
  return Description(len(examples), size, digest.hexdigest())


def abstract_batch(data: DataConfig, canvas_length: int) -> dict[str, Any]:
  """Shapes and types of a batch of the whole job; see `make_dataset`."""
  B, S = data.batch_size, data.sequence_length
  row = jax.ShapeDtypeStruct((B, S), np.int32)
  canvases = (B, (S - 1) // canvas_length)
  return {
    'tokens_BS': row,
    'first_BS': row,
    'target_mask_BS': jax.ShapeDtypeStruct((B, S), np.bool_),
    'canvas_start_BK': jax.ShapeDtypeStruct(canvases, np.int32),
    'length_B': jax.ShapeDtypeStruct((B,), np.int32),
  }


class Windows(NamedTuple):
  """Held-out rows that begin with bos.

  Attributes:
    tokens_MS: int32, padded on the right.
    length_M: int32, tokens of each row without padding.
    target_mask_MS: bool, tokens to predict; every token of every document
      exactly once.
  """

  tokens_MS: np.ndarray
  length_M: np.ndarray
  target_mask_MS: np.ndarray

  def take(self, rows) -> 'Windows':
    """Some of the rows, by index or slice."""
    return Windows(*(array[rows] for array in self))


def heldout_windows(
  examples: list[Example], length: int, bos_id: int, pad_id: int
) -> Windows:
  """A row for each response, and windows of each document.

  Consecutive windows overlap by half, so that all but the first tokens of a
  document have at least length / 2 tokens of context.
  """
  rows, lengths, masks = [], [], []
  position = np.arange(length)

  def add(tokens, start, first, count):
    """Adds the row of `tokens` from `start`, with `count` targets from position
    `first` of the row; returns the end of the row in `tokens`."""
    row, row_length = make_row(tokens, start, length, bos_id, pad_id)
    end = min(first + count, row_length)
    rows.append(row)
    lengths.append(row_length)
    masks.append((position >= first) & (position < end))
    return start + row_length - 1

  stride = max(1, (length - 1) // 2)
  for example in examples:
    tokens = example.tokens
    if example.prompt_length is not None:
      add(tokens, 0, 1 + example.prompt_length, example.num_targets)
      continue
    scored = 0  # tokens of the document that are targets already
    for start in range(0, len(tokens), stride):
      scored = add(tokens, start, scored - start + 1, length)
      if scored == len(tokens):
        break
  return Windows(np.stack(rows), np.array(lengths, np.int32), np.stack(masks))


class Canvases(NamedTuple):
  """Held-out rows that begin with bos and end in canvases.

  Attributes:
    tokens_MS: int32, padded on the right.
    length_M: int32, tokens of each row, with the fill of the last canvas but
      without padding.
    start_MK: int32, start of each canvas; 0 where a row has fewer.
    counted_ML: bool, tokens to predict, L = K * C; every token of every
      document exactly once.
  """

  tokens_MS: np.ndarray
  length_M: np.ndarray
  start_MK: np.ndarray
  counted_ML: np.ndarray

  def take(self, rows) -> 'Canvases':
    """Some of the rows, by index or slice."""
    return Canvases(*(array[rows] for array in self))


def heldout_canvases(
  examples: list[Example],
  length: int,
  canvas_length: int,
  bos_id: int,
  pad_id: int,
) -> Canvases:
  """Every document in canvases, half a row of them at a time after as much
  context as fits; every response in a row of its own. The last canvas of a
  document is filled up with its last token, eos, which is not counted."""
  C, rows = canvas_length, []
  most = max(1, (length - 1) // 2 // C)

  def add(tokens, context, count):
    """Adds a row of `context` tokens and the remaining ones in canvases, of
    which the first `count` tokens are counted."""
    num = -(-(len(tokens) - context) // C)
    filled = np.concatenate([tokens, np.full(num * C, tokens[-1])])
    row, row_length = make_row(
      filled[: context + num * C], 0, length, bos_id, pad_id
    )
    rows.append((row, row_length, 1 + context + C * np.arange(num), count))

  for example in examples:
    tokens = example.tokens
    if example.prompt_length is not None:
      add(tokens, example.prompt_length, example.num_targets)
      continue
    for start in range(0, len(tokens), most * C):
      new = tokens[start : start + most * C]
      context = min(start, length - 1 - most * C)
      add(tokens[start - context : start + len(new)], context, len(new))
  K = max(len(starts) for _, _, starts, _ in rows)
  start_MK = np.zeros((len(rows), K), np.int32)
  for start_K, (_, _, starts, _) in zip(start_MK, rows, strict=True):
    start_K[: len(starts)] = starts
  counts = np.array([count for *_, count in rows])
  return Canvases(
    np.stack([row for row, *_ in rows]),
    np.array([row_length for _, row_length, *_ in rows], np.int32),
    start_MK,
    np.arange(K * C) < counts[:, None],
  )
