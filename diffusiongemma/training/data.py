"""Examples to batches of token rows, with Grain.

  documents -> windows, each with a random split into prompt and canvases
  prompts with a response -> one row each
  rows -> global shuffle -> this process's share -> batches

Everything random follows from `DataConfig.seed` and the row's index, so the
iterator's state is one number and a resumed run reads on where it stopped.
"""

from typing import NamedTuple

import grain
import numpy as np

from diffusiongemma.config import DataConfig
from diffusiongemma.text import tokenizer as tokenizers
from diffusiongemma.training.corpus import DataError
from diffusiongemma.training.corpus import Example


def make_row(
  document: np.ndarray, start: int, length: int, bos_id: int, pad_id: int
) -> tuple[np.ndarray, int]:
  """(bos and up to `length` - 1 tokens from `start`, padded; its length)."""
  tokens = document[start : start + length - 1]
  row = np.full(length, pad_id, np.int32)
  row[0] = bos_id
  row[1 : len(tokens) + 1] = tokens
  return row, len(tokens) + 1


class _Rows(grain.transforms.RandomMap):
  """The place of an example to its row; see `make_dataset`."""

  def __init__(self, examples, length, canvas_length, tokenizer):
    self.examples = examples
    self.length = length
    self.canvas_length = canvas_length
    self.bos_id = tokenizer.bos_id
    self.pad_id = tokenizer.pad_id

  def random_map(self, place, rng: np.random.Generator):
    index, start = place
    example = self.examples[index]
    position = np.arange(self.length)
    if example.prompt_length is None:
      row, length = self._window(example.tokens, start, rng)
      prompt_length = int(rng.integers(1, length - self.canvas_length + 1))
      targets = (position > 0) & (position < length)
    else:
      row, length = make_row(
        example.tokens, 0, self.length, self.bos_id, self.pad_id
      )
      prompt_length = 1 + example.prompt_length
      end = prompt_length + example.num_targets
      targets = (position >= prompt_length) & (position < end)
    return {
      'tokens_BS': row,
      'length_B': np.int32(length),
      'prompt_length_B': np.int32(prompt_length),
      'target_mask_BS': targets,
    }

  def _window(self, document, start, rng):
    """A row from somewhere in the window that begins at `start`."""
    stride = self.length - 1
    start = start + int(rng.integers(stride))
    start = min(start, max(0, len(document) - stride))
    return make_row(document, start, self.length, self.bos_id, self.pad_id)


def make_dataset(
  examples: list[Example],
  data: DataConfig,
  canvas_length: int,
  tokenizer: tokenizers.Tokenizer,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.IterDataset:
  """An endless dataset of batches (see `diffusion.loss.check_batch`).

  Every epoch visits each window of a document once, with its own offset and
  its own split into prompt and canvases, and each prompt with a response once;
  in its own order. The processes of a job take turns over one global order.

  Args:
    examples: what to learn from.
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
  places = []
  for index, example in enumerate(examples):
    windows = 1
    if example.prompt_length is None:
      windows = -(-len(example.tokens) // stride)
    places += [(index, stride * window) for window in range(windows)]
  rows = _Rows(examples, data.sequence_length, canvas_length, tokenizer)
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
  examples: list[Example], length: int, bos_id: int, pad_id: int
) -> Windows:
  """A row for each response, and windows of each document.

  Consecutive windows share half, so that all but the first tokens of a
  document have length / 2 tokens of context or more.
  """
  rows, lengths, masks = [], [], []
  position = np.arange(length)

  def add(tokens, start, first, count):
    """A row from `start`, of which `count` tokens from `first` are targets;
    returns where in `tokens` it ends."""
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
