"""A tokenizer trained on the text of a run: `config.data.tokenizer=new:4096`.

It is saved in the folder of the run, and from then on is like any other.
"""

from collections.abc import Iterator
from collections.abc import Sequence

from diffusiongemma.config import DataConfig
from diffusiongemma.text import tokenizer as tokenizers
from diffusiongemma.training import corpus
from diffusiongemma.training.lines import Document
from diffusiongemma.training.messages import DataError

PREFIX = 'new:'
TURNS = ('<|turn>', '<turn|>')  # What a chat needs; see `text.template`.
MOST_CHARACTERS = 100_000_000  # More text makes it no better.
_LONGEST = 10_000  # Characters of a piece of text; a line may be a book.


def is_wanted(data: DataConfig) -> bool:
  """Whether the config asks for a new tokenizer."""
  return data.tokenizer.startswith(PREFIX)


def train(data: DataConfig) -> tokenizers.Tokenizer:
  """The tokenizer of the training text of a config. The same text gives the
  same tokenizer.

  Raises:
    DataError: the text can't be read, or has more characters than pieces.
  """
  name = f'config.data.tokenizer = {data.tokenizer!r}'
  size = data.tokenizer.removeprefix(PREFIX)
  if not (size.isascii() and size.isdigit() and 0 < int(size) < 10**6):
    raise DataError(
      f'{name}: after {PREFIX} comes a number of pieces, as in {PREFIX}4096.'
    )
  skipped: list[DataError] = []
  on_error = skipped.append if data.on_error == 'skip' else corpus.stop
  documents = corpus.read_documents(
    data.path or str(corpus.SHIPPED_CORPUS), on_error
  )
  if data.heldout_path:
    documents = [d for d in documents if d.split != 'heldout']
  else:
    documents, _ = corpus.split_documents(documents, data.heldout_every)
  symbols = TURNS if any(d.messages for d in documents) else ()
  try:
    model = tokenizers.train(_pieces(documents), int(size), symbols)
  except tokenizers.TokenizerError as error:
    raise DataError(f'{name}: {error}') from error
  return tokenizers.SentencePieceTokenizer(model)


def _pieces(documents: Sequence[Document]) -> Iterator[str]:
  """Lines of the documents, cut where they are long."""
  remaining = MOST_CHARACTERS
  for document in documents:
    for text in _texts(document):
      for line in text.splitlines():
        for start in range(0, min(len(line), remaining), _LONGEST):
          yield line[start : start + _LONGEST]
        remaining -= len(line)
    if remaining <= 0:
      return


def _texts(document: Document) -> Iterator[str]:
  yield document.prompt or ''
  yield document.text
  for message in document.messages:
    yield str(message.get('role', ''))
    content = message.get('content')
    parts = content if isinstance(content, list) else [{'text': content}]
    for part in parts:
      if isinstance(part, dict) and isinstance(part.get('text'), str):
        yield part['text']
