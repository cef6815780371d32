"""Files on disk to tokenised examples: documents, and responses to prompts.

  .txt             one document
  .jsonl, .json    a document a line, see `lines`; a .json may also be an array

A line that can't be used is an error, or is skipped and counted, as
`config.data.on_error` says; a file that can't be read is always an error.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import glob
import lzma
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np

from diffusiongemma import paths
from diffusiongemma.config import DataConfig
from diffusiongemma.text import exchanges
from diffusiongemma.text import template as templates
from diffusiongemma.text import tokenizer as tokenizers
from diffusiongemma.training import lines
from diffusiongemma.training import messages as chats
from diffusiongemma.training.lines import Document
from diffusiongemma.training.messages import DataError

SHIPPED_CORPUS = tokenizers.ASSETS / 'shakespeare.jsonl.xz'
SUFFIXES = ('.txt', '.jsonl', '.jsonl.xz', '.json')
BYTE_ORDER_MARK = b'\xef\xbb\xbf'  # Not part of the text.
# Number of skipped lines whose reason is shown.
REASONS_TOLD = 3
THINKING = "thinking inside a content, which is learnt as 'reasoning' beside it"


class Example(NamedTuple):
  """The tokens of a document, int32, without bos.

  Attributes:
    tokens: a text that ends in eos, or a prompt and its response in whole
      canvases.
    prompt_length: tokens of the prompt, which is never learnt; None for a text,
      where any prefix may be the prompt.
    num_targets: tokens after the prompt that the AR loss predicts.
  """

  tokens: np.ndarray
  prompt_length: int | None = None
  num_targets: int = 0

  @property
  def targets(self) -> np.ndarray:
    """The tokens that the AR loss predicts."""
    if self.prompt_length is None:
      return self.tokens
    end = self.prompt_length + self.num_targets
    return self.tokens[self.prompt_length : end]


class Corpus(NamedTuple):
  """Tokenised documents.

  Attributes:
    train: examples to train on.
    heldout: examples to evaluate on.
    heldout_texts: the evaluated text of each of `heldout`: all of a text, or
      the targets of a response, without control tokens.
    notes: lines for the user about skipped or unread data.
  """

  train: list[Example]
  heldout: list[Example]
  heldout_texts: list[str]
  notes: tuple[str, ...] = ()


def find_files(path: str) -> list[pathlib.Path]:
  """The text files at a file name, in a folder (recursively) or of a glob."""
  path = paths.local(path)
  location = pathlib.Path(path)
  if location.is_file():
    if not location.name.endswith(SUFFIXES):
      raise DataError(
        f'{path!r} is neither text nor JSON; name it one of '
        f'{", ".join(SUFFIXES)}.'
      )
    return [location]
  candidates: Iterable[pathlib.Path]
  if location.is_dir():
    candidates = location.rglob('*')
  else:
    candidates = map(pathlib.Path, glob.glob(path, recursive=True))
  files = sorted(
    file
    for file in candidates
    if file.is_file() and file.name.endswith(SUFFIXES)
  )
  if not files and not location.exists() and not glob.has_magic(path):
    raise DataError(f'There is nothing at {path!r}.')
  if not files:
    raise DataError(f'{path!r} holds no file named {" or ".join(SUFFIXES)}.')
  return files


def stop(error: DataError) -> None:
  """Raises the error of a line."""
  raise error


def read_documents(
  path: str, on_error: Callable[[DataError], Any] = stop
) -> list[Document]:
  """All documents at `path`; see `find_files`.

  Args:
    path: of text files, one document each, and of JSON files, one document per
      line.
    on_error: called with the error of each line that can't be used.

  Raises:
    DataError: a file can't be read, or all are empty.
  """
  documents, is_empty = [], True
  for file in find_files(path):
    for document in _read_file(file):
      if isinstance(document, DataError):
        is_empty = False
        on_error(document)
      elif document.text or not document.stands_alone:
        is_empty = False
        documents.append(document)
  if is_empty:
    raise DataError(f'The files at {path!r} are empty.')
  return documents


def _read_file(file: pathlib.Path) -> Iterator[Document | DataError]:
  """The documents of a file, and an error for each line that can't be used."""
  try:
    opener = lzma.open if file.suffix == '.xz' else open
    with opener(file, 'rb') as stream:
      if file.suffix == '.txt':
        yield Document(_decode(stream.read(), str(file)), str(file))
      elif file.suffix == '.json' and _is_array(stream.peek()):
        text = _decode(stream.read(), str(file))
        for number, record in enumerate(_parse(text, str(file)), 1):
          origin = f'{file}, element {number}'
          yield from _attempt(lines.read_record, record, origin)
      else:
        for number, line in enumerate(stream, 1):
          origin = f'{file}, line {number}'
          yield from _attempt(_read_line, line, origin)
  except (lzma.LZMAError, EOFError) as error:
    raise DataError(f'{file} is not an xz file: {error}.') from error
  except OSError as error:
    raise DataError(f'{file} cannot be read: {error.strerror}.') from error


def _is_array(start: bytes) -> bool:
  return start.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b'[')


def _attempt(
  read: Callable[..., Document | None], *given: Any
) -> Iterator[Document | DataError]:
  """Yields the document that `read` returns, if any, or its error."""
  try:
    document = read(*given)
  except DataError as error:
    yield error
  else:
    if document is not None:
      yield document


def _read_line(line: bytes, origin: str) -> Document | None:
  """The document of a line; None for an empty line."""
  text = _decode(line, origin)
  return (
    lines.read_record(_parse(text, origin), origin) if text.strip() else None
  )


def _parse(text: str, origin: str) -> Any:
  try:
    return chats.parse_json(text)
  except ValueError as error:
    raise DataError(f'{origin} is not JSON: {error}.') from error


def _decode(content: bytes, origin: str) -> str:
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise DataError(
      f'{origin} is not UTF-8: byte {error.start} is 0x'
      f'{error.object[error.start]:02x}. Convert it first, for example with '
      f'iconv -t UTF-8.'
    ) from error


def split_documents(
  documents: list[Document], every: int
) -> tuple[list[Document], list[Document]]:
  """(train, heldout): by `split` of the documents, else every n-th is held out.

  With fewer than n documents, the last n-th of each text is held out instead;
  with responses or chats, the last document; of a single chat, the last answer.
  """
  if any(d.split for d in documents):
    train = [d for d in documents if d.split != 'heldout']
    return train, [d for d in documents if d.split == 'heldout']
  if len(documents) >= every > 1:
    train = [d for i, d in enumerate(documents, 1) if i % every]
    return train, documents[every - 1 :: every]
  if not all(d.stands_alone for d in documents):
    *train, last = documents
    if train or len(last.targets) < 2:
      return train, [last]
    targets = last.targets
    return (
      [last._replace(targets=targets[:-1])],
      [last._replace(targets=targets[-1:])],
    )
  train, heldout = [], []
  for document in documents:
    cut = len(document.text) - len(document.text) // max(every, 2)
    train.append(document._replace(text=document.text[:cut]))
    heldout.append(
      Document(document.text[cut:], f'{document.origin} (its held-out end)')
    )
  return train, heldout


def load_corpus(
  data: DataConfig,
  tokenizer: tokenizers.Tokenizer,
  canvas_length: int,
  chat_template: str | None = None,
) -> Corpus:
  """Reads, splits and tokenises the text of a config. Raises `DataError`.

  Chats are rendered with `chat_template`, by default DiffusionGemma's.
  """
  skipped: list[DataError] = []
  on_error = skipped.append if data.on_error == 'skip' else stop
  documents = read_documents(data.path or str(SHIPPED_CORPUS), on_error)
  documents = list(_without_thinking(documents, tokenizer, on_error))
  unread = _note_unread(documents)
  if data.heldout_path:
    others = read_documents(data.heldout_path, on_error)
    others = list(_without_thinking(others, tokenizer, on_error))
    unread += _note_unread(others)
    # A `split` in the data also holds where two paths are given.
    train = [d for d in documents if d.split != 'heldout']
    heldout = [d for d in others if d.split != 'train']
  else:
    train, heldout = split_documents(documents, data.heldout_every)

  def tokenize(documents, purpose, path):
    """(document, example) pairs."""
    pairs = []
    for document in documents:
      examples = _tokenize(document, data, tokenizer, canvas_length, template)
      for example in examples:
        if isinstance(example, DataError):
          on_error(example)
        else:
          pairs.append((document, example))
    if not pairs:
      remedy = 'give more documents'
      if not data.heldout_path:
        remedy += ', or name others in config.data.heldout_path'
      reason = f' The first line left out: {skipped[0]}' if skipped else ''
      raise DataError(
        f'{path!r} leaves nothing to {purpose}: {remedy}.{reason}'
      )
    return pairs

  template = chat_template
  if not template and templates.knows_turns(tokenizer):
    template = templates.default_template()
  train = tokenize(train, 'train on', data.path)
  heldout = tokenize(heldout, 'hold out', data.heldout_path or data.path)
  texts = [
    # A response may have been cut.
    d.text if d.stands_alone else tokenizer.decode(e.targets.tolist())
    for d, e in heldout
  ]
  return Corpus(
    [example for _, example in train],
    [example for _, example in heldout],
    texts,
    (*unread, *_note_skipped(skipped)),
  )


def _without_thinking(
  documents: Sequence[Document],
  tokenizer: tokenizers.Tokenizer,
  on_error: Callable[[DataError], Any],
) -> Iterator[Document]:
  """The documents, with thinking removed from contents of the assistant."""
  for document in documents:
    try:
      messages = exchanges.drop_thinking(tokenizer, document.messages)
    except templates.TemplateError as error:
      on_error(DataError(f'{document.origin}: {error}'))
      continue
    if messages != list(document.messages):
      document = document._replace(
        messages=tuple(messages), unread=(*document.unread, THINKING)
      )
    yield document


def _note_unread(documents: Sequence[Document]) -> list[str]:
  """A note on each kind of content that is not read."""
  counts: collections.Counter[str] = collections.Counter()
  first: dict[str, str] = {}
  for document in documents:
    for what in set(document.unread):
      counts[what] += 1
      first.setdefault(what, document.origin)
  return [
    f'Not read: {what} ({count:,} of {len(documents):,}; the first is '
    f'{first[what]}).'
    for what, count in sorted(counts.items())
  ]


def _note_skipped(skipped: Sequence[DataError]) -> list[str]:
  """Notes on skipped lines: their number, and the first reasons."""
  if not skipped:
    return []
  notes = [f'Left out (config.data.on_error=skip): {len(skipped):,}.']
  notes += [f'  {error}' for error in skipped[:REASONS_TOLD]]
  if len(skipped) > REASONS_TOLD:
    notes.append('  ...')
  return notes


def _tokenize(
  document: Document,
  data: DataConfig,
  tokenizer: tokenizers.Tokenizer,
  canvas_length: int,
  chat_template: str | None,
) -> Iterator[Example | DataError]:
  """The example of a text or a response, or one per answer of a chat; an error
  for each that can't be used."""
  origin = document.origin
  try:
    pairs = _encode(document, tokenizer, chat_template)
  except (tokenizers.TokenizerError, templates.TemplateError) as error:
    yield DataError(f'{origin}: {error}')
    return
  for prompt, tokens in pairs:
    if document.stands_alone:
      # A row is bos and at least one canvas.
      if len(tokens) < canvas_length and not data.packing:
        yield DataError(
          f'{origin}: {len(tokens)} tokens are shorter than a canvas of '
          f'{canvas_length}. Leave it out (config.data.on_error=skip), pack it '
          'with others (config.data.packing=true), or lower '
          'config.diffusion.canvas_length.'
        )
      else:
        yield Example(np.array(tokens, np.int32))
    elif 1 + len(prompt) + canvas_length > data.sequence_length:
      yield DataError(
        f'{origin}: a prompt of {len(prompt)} tokens leaves no room for a '
        f'canvas of {canvas_length} in config.data.sequence_length = '
        f'{data.sequence_length}. Raise it, or leave the line out '
        '(config.data.on_error=skip).'
      )
    else:
      yield fill_canvases(
        prompt, tokens, data.sequence_length, canvas_length, tokenizer.eos_id
      )


def _encode(
  document: Document,
  tokenizer: tokenizers.Tokenizer,
  chat_template: str | None,
) -> list[tuple[list[int], list[int]]]:
  """(prompt without bos, response) token ids of everything to learn."""
  if not document.messages:
    if document.prompt is not None:
      for text in (document.prompt, document.text):
        exchanges.check_spelling(tokenizer, text)
    prompt = tokenizer.encode(document.prompt or '')
    return [(prompt, [*tokenizer.encode(document.text), tokenizer.eos_id])]
  if not chat_template:
    raise templates.TemplateError(
      'a chat needs a tokenizer that has <|turn>; this one has none.'
    )
  pairs = exchanges.encode_exchanges(
    tokenizer,
    chat_template,
    document.messages,
    document.targets,
    document.tools,
  )
  # Every row begins with one bos, whether the template writes it or not.
  return [
    (templates.without_bos(tokenizer, prompt), reply) for prompt, reply in pairs
  ]


def fill_canvases(
  prompt: list[int],
  response: list[int],
  sequence_length: int,
  canvas_length: int,
  eos_id: int,
) -> Example:
  """A response padded with eos to whole canvases, or truncated to them.

  The denoiser learns the padding too, the AR loss does not. A truncated
  response has no end token to learn.

  Args:
    prompt: token ids without bos.
    response: token ids with the end token.
    sequence_length: most tokens of a row, bos included.
    canvas_length: C.
    eos_id: the fill.
  """
  room = (sequence_length - 1 - len(prompt)) // canvas_length
  count = min(-(-len(response) // canvas_length), room)
  length = count * canvas_length
  filled = (response + [eos_id] * length)[:length]
  tokens = np.array(prompt + filled, np.int32)
  return Example(tokens, len(prompt), min(len(response), length))
