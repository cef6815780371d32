"""Text to tokens and back: a SentencePiece model and its special ids."""

import os
import pathlib

import sentencepiece

ASSETS = pathlib.Path(__file__).parents[1] / 'assets'
SHIPPED_MODEL = ASSETS / 'shakespeare.model'


class TokenizerError(ValueError):
  """A tokenizer file that can't be used."""


class Tokenizer:
  """A SentencePiece model.

  Control pieces are never read out of text: the four characters `</s>` in a
  document are four ordinary characters, not the end of it.

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
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise TokenizerError(
        f'Character {error.start} of the text is no Unicode character.'
      ) from error
    return self._processor.encode(text)

  def decode(self, ids: list[int]) -> str:
    """Text of `ids`; control pieces are left out."""
    kept = [int(i) for i in ids if not self._processor.is_control(int(i))]
    return self._processor.decode(kept)

  def pieces(self, ids: list[int]) -> list[str]:
    """What each id alone looks like, a space for SentencePiece's `▁`."""
    return [self._processor.id_to_piece(int(i)).replace('▁', ' ') for i in ids]


def load_tokenizer(path: str = '') -> Tokenizer:
  """The tokenizer in the file `path`; empty is the shipped one."""
  file = pathlib.Path(path) if path else SHIPPED_MODEL
  if not os.path.isfile(file):
    raise TokenizerError(f'No tokenizer at {str(file)!r}.')
  return Tokenizer(file.read_bytes())
