"""Text to tokens and back, from a SentencePiece model or a tokenizer.json.

Control pieces are never read out of text: the four characters `</s>` in a
document are four ordinary characters, not the end of it.
"""

import os
import pathlib

import sentencepiece
import tokenizers as huggingface_tokenizers

ASSETS = pathlib.Path(__file__).parents[1] / 'assets'
SHIPPED_MODEL = ASSETS / 'shakespeare.model'
UNKNOWN = '\N{REPLACEMENT CHARACTER}'


class TokenizerError(ValueError):
  """A tokenizer file that can't be used."""


class Tokenizer:
  """A SentencePiece model.

  Attributes:
    vocab_size: number of pieces.
    pad_id, bos_id, eos_id: ids of the control pieces.
    model: the serialised model, so that a run can keep a copy.
  """

  def __init__(self, model: bytes):
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
      raise TokenizerError(f'Not a SentencePiece model: {error}') from error
    self.model = model
    self.vocab_size = self._processor.vocab_size()
    self.pad_id = self._processor.pad_id()
    self.bos_id = self._processor.bos_id()
    self.eos_id = self._processor.eos_id()
    for name in ('pad', 'bos', 'eos'):
      if getattr(self, f'{name}_id') < 0:
        raise TokenizerError(f'The SentencePiece model has no {name} piece.')

  def encode(self, text: str) -> list[int]:
    """Ids of the pieces of `text`, without bos or eos.

    Raises:
      TokenizerError: `text` can't be UTF-8 (it holds half of a surrogate
        pair, as from a command line in another encoding).
    """
    return self._processor.encode(_checked(text))

  def decode(self, ids: list[int]) -> str:
    """Text of `ids`; control pieces, and ids past the last, are left out."""
    kept = [
      int(i)
      for i in ids
      if i < self.vocab_size and not self._processor.is_control(int(i))
    ]
    return self._processor.decode(kept)

  def pieces(self, ids: list[int]) -> list[str]:
    """What each id alone looks like, a space for SentencePiece's `▁`."""
    return [
      self._processor.id_to_piece(int(i)).replace('▁', ' ')
      if i < self.vocab_size
      else UNKNOWN
      for i in ids
    ]


class JsonTokenizer:
  """A tokenizer.json of Hugging Face; the interface of `Tokenizer`."""

  def __init__(self, model: bytes):
    try:
      self._tokenizer = huggingface_tokenizers.Tokenizer.from_buffer(model)
    except Exception as error:  # The library raises nothing narrower.
      raise TokenizerError(f'Not a tokenizer.json: {error}') from error
    self._tokenizer.encode_special_tokens = True
    self.model = model
    self.vocab_size = self._tokenizer.get_vocab_size()
    for name in ('pad', 'bos', 'eos'):
      token = self._tokenizer.token_to_id(f'<{name}>')
      if token is None:
        raise TokenizerError(f'The tokenizer.json has no <{name}> token.')
      setattr(self, f'{name}_id', token)

  def encode(self, text: str) -> list[int]:
    """See `Tokenizer.encode`."""
    return self._tokenizer.encode(_checked(text), add_special_tokens=False).ids

  def decode(self, ids: list[int]) -> str:
    """See `Tokenizer.decode`."""
    kept = [int(i) for i in ids if i < self.vocab_size]
    return self._tokenizer.decode(kept, skip_special_tokens=True)

  def pieces(self, ids: list[int]) -> list[str]:
    """See `Tokenizer.pieces`."""
    pieces = [self._tokenizer.id_to_token(int(i)) for i in ids]
    return [UNKNOWN if p is None else p.replace('▁', ' ') for p in pieces]


def load_tokenizer(path: str = '') -> Tokenizer | JsonTokenizer:
  """The tokenizer in the file `path`; empty is the shipped one."""
  file = pathlib.Path(path) if path else SHIPPED_MODEL
  if not os.path.isfile(file):
    raise TokenizerError(f'No tokenizer at {str(file)!r}.')
  kind = JsonTokenizer if file.suffix == '.json' else Tokenizer
  return kind(file.read_bytes())


def _checked(text: str) -> str:
  """`text`, if it can be UTF-8."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise TokenizerError(
      f'Character {error.start} of the text is no Unicode character.'
    ) from error
  return text
