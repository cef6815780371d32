"""Text to tokens and back, from a SentencePiece model or a tokenizer.json.

Text never becomes control tokens: the four characters `</s>` in a document are
ordinary characters, not its end, and `<|turn>` in a message is no turn. Only
`encode_template` writes control tokens, and only where the template itself has
them.
"""

import abc
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import io
import os
import pathlib
import re

import sentencepiece
import tokenizers as huggingface_tokenizers

from diffusiongemma import paths
from diffusiongemma.errors import Error

ASSETS = pathlib.Path(__file__).parents[1] / 'assets'
SHIPPED_MODEL = ASSETS / 'shakespeare.model'
UNKNOWN = '\N{REPLACEMENT CHARACTER}'

# Tokenizer files don't distinguish `<|turn>` from `<h1>`: both are pieces that
# are never split. This matches those that mean something to the network.
_CONTROL = re.compile(
  r'<\|[^<>|\s]+\|?>|<[^<>|\s]+\|>|<mask>|<unused\d+>|\[multimodal\]'
)
# A byte of a character that is no piece.
_BYTE = re.compile(r'<0x([0-9A-F]{2})>')


class TokenizerError(Error, ValueError):
  """A tokenizer file that can't be used."""


class Tokenizer(abc.ABC):
  """Text to ids and back.

  Attributes:
    vocab_size: number of pieces.
    pad_id, bos_id, eos_id: ids of the control pieces.
    control_tokens: {spelling: id} of all pieces that text never becomes.
    model: the serialised model, so that a run can store a copy.
    file_name: name of that copy.
  """

  vocab_size: int
  pad_id: int
  bos_id: int
  eos_id: int
  control_tokens: dict[str, int]
  model: bytes
  file_name: str

  def encode(self, text: str) -> list[int]:
    """Ids of the pieces of `text`, without bos or eos; no control tokens.

    Raises:
      TokenizerError: `text` can't be UTF-8 (it holds half of a surrogate
        pair, as from a command line in another encoding).
    """
    segments = self._apart(_checked(text))
    return [i for segment in segments for i in self._encode(segment)]

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`, without control pieces and invalid ids."""
    control = self._control_ids
    ints = (int(i) for i in ids)
    return self._decode(
      [i for i in ints if 0 <= i < self.vocab_size and i not in control]
    )

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """The piece of each id; spaces for `▁`, bytes as `\\xe2` unless they are
    characters, `UNKNOWN` for an invalid id."""
    return [self._readable(int(i)) for i in ids]

  def _readable(self, token: int) -> str:
    if not 0 <= token < self.vocab_size:
      return UNKNOWN
    piece = self._piece(token)
    if byte := _BYTE.fullmatch(piece):
      value = int(byte[1], 16)
      return chr(value) if value < 0x80 else f'\\x{value:02x}'
    return piece.replace('▁', ' ')

  def escape(self, text: str, mark: str) -> str:
    """`text` with a `mark` inserted into every spelling of a control piece."""
    return mark.join(self._apart(text))

  def encode_template(self, text: str, mark: str) -> list[int]:
    """Ids of a rendered template, in which control pieces are control tokens.

    Args:
      text: the rendered template, with its variables escaped.
      mark: the mark of `escape`; it has no ids.
    """
    ids, start = [], 0
    while match := self._find_control(text, start):
      ids += self.encode(text[start : match.start()].replace(mark, ''))
      ids.append(self.control_tokens[match.group()])
      start = match.end()
    return ids + self.encode(text[start:].replace(mark, ''))

  def _set_control_tokens(self, pieces: dict[str, int]) -> None:
    self.control_tokens = pieces
    self._control_ids = set(pieces.values())
    # Thousands of alternatives would be slow; nearly all match one pattern.
    others = [re.escape(p) for p in pieces if not _CONTROL.fullmatch(p)]
    longest_first = sorted(others, key=len, reverse=True)
    self._candidate = re.compile('|'.join([*longest_first, _CONTROL.pattern]))

  def _find_control(self, text: str, start: int) -> re.Match[str] | None:
    """The first control piece that `text` spells from `start` on."""
    while match := self._candidate.search(text, start):
      if match.group() in self.control_tokens:
        return match
      start = match.start() + 1
    return None

  def _apart(self, text: str) -> Iterator[str]:
    """`text` in segments, cut after the first character of every spelling of a
    control piece."""
    start = 0
    while match := self._find_control(text, start):
      yield text[start : match.start() + 1]
      start = match.start() + 1
    yield text[start:]

  @abc.abstractmethod
  def _encode(self, text: str) -> list[int]: ...

  @abc.abstractmethod
  def _decode(self, ids: list[int]) -> str: ...

  @abc.abstractmethod
  def _piece(self, token: int) -> str: ...


class SentencePieceTokenizer(Tokenizer):
  """A tokenizer.model of SentencePiece."""

  file_name = 'tokenizer.model'

  def __init__(self, model: bytes):
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
      raise TokenizerError('Not a SentencePiece model.') from error
    self.model = model
    self.vocab_size = self._processor.vocab_size()
    self.pad_id = self._processor.pad_id()
    self.bos_id = self._processor.bos_id()
    self.eos_id = self._processor.eos_id()
    for name in ('pad', 'bos', 'eos'):
      if getattr(self, f'{name}_id') < 0:
        raise TokenizerError(f'The SentencePiece model has no {name} piece.')
    pieces = map(self._piece, range(self.vocab_size))
    self._set_control_tokens(
      {
        piece: i
        for i, piece in enumerate(pieces)
        if self._processor.is_control(i) or _CONTROL.fullmatch(piece)
      }
    )

  def _encode(self, text: str) -> list[int]:
    return self._processor.encode(text)

  def _decode(self, ids: list[int]) -> str:
    return self._processor.decode(ids)

  def _piece(self, token: int) -> str:
    return self._processor.id_to_piece(token)


class JsonTokenizer(Tokenizer):
  """A tokenizer.json of Hugging Face."""

  file_name = 'tokenizer.json'

  def __init__(self, model: bytes):
    try:
      self._tokenizer = huggingface_tokenizers.Tokenizer.from_buffer(model)
    except Exception as error:  # The library raises nothing narrower.
      raise TokenizerError(f'Not a tokenizer.json: {error}') from error
    self.model = model
    self.vocab_size = self._tokenizer.get_vocab_size()
    for name in ('pad', 'bos', 'eos'):
      token = self._tokenizer.token_to_id(f'<{name}>')
      if token is None:
        raise TokenizerError(f'The tokenizer.json has no <{name}> token.')
      setattr(self, f'{name}_id', token)
    special = {
      f'<{name}>': getattr(self, f'{name}_id') for name in ('pad', 'bos', 'eos')
    }
    for i, added in self._tokenizer.get_added_tokens_decoder().items():
      if added.special or _CONTROL.fullmatch(added.content):
        special[added.content] = i
    self._set_control_tokens(special)

  def _encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def _decode(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def _piece(self, token: int) -> str:
    piece = self._tokenizer.id_to_token(token)
    return UNKNOWN if piece is None else piece


def load_tokenizer(path: str = '') -> Tokenizer:
  """The tokenizer in the file `path`; empty is the shipped one. Raises
  `TokenizerError`."""
  file = pathlib.Path(paths.local(path)) if path else SHIPPED_MODEL
  if not os.path.isfile(file):
    raise TokenizerError(
      f'No tokenizer at {str(file)!r}. That of the released model: '
      'hf download google/diffusiongemma-26B-A4B-it tokenizer.json '
      '--local-dir=FOLDER. One for your text: --config.data.tokenizer=new:4096.'
    )
  return make_tokenizer(file.read_bytes(), str(file))


def make_tokenizer(content: bytes, name: str) -> Tokenizer:
  """The tokenizer in the content of a file: a tokenizer.json if `name` ends in
  `.json`, else a SentencePiece model.

  Raises:
    TokenizerError: the content is not that; the message has the name.
  """
  is_json = name.endswith('.json')
  kind = JsonTokenizer if is_json else SentencePieceTokenizer
  try:
    return kind(content)
  except TokenizerError as error:
    raise TokenizerError(f'{name}: {error}') from error


def train(
  lines: Iterable[str], pieces: int, symbols: Sequence[str] = ()
) -> bytes:
  """A byte-pair model that gives back exactly the text it was given.

  Byte pairs rather than a unigram model: at a few thousand pieces the latter
  spells rare words with a lone space piece, which then is the commonest token
  of all. Nothing is normalised and no space is added or removed. Line breaks
  are pieces of their own, since SentencePiece reads line by line.

  Args:
    lines: text without line breaks.
    pieces: how many there are, control pieces and 256 bytes included; fewer if
      the text has no more.
    symbols: further pieces, such as those of a chat.

  Raises:
    TokenizerError: the text has no characters, or more different ones than
      pieces.
  """
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=model,
      vocab_size=pieces,
      hard_vocab_limit=False,
      model_type='bpe',
      max_sentence_length=2**16,
      character_coverage=1.0,
      byte_fallback=True,
      normalization_rule_name='identity',
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      user_defined_symbols=['\n', '\n\n', *symbols],
      pad_id=0,
      eos_id=1,
      bos_id=2,
      unk_id=3,
      num_threads=1,
      minloglevel=2,
    )
  except RuntimeError as error:
    wanted = re.search(r'required_chars\. \d+ vs (\d+)', str(error))
    if wanted is None:
      raise TokenizerError('there is no text to train it on.') from error
    raise TokenizerError(
      f'{pieces} pieces are too few: the bytes and the different characters of '
      f'the text are {wanted[1]}.'
    ) from error
  return model.getvalue()


def _checked(text: str) -> str:
  """`text`. Raises `TokenizerError` if it can't be UTF-8."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise TokenizerError(
      f'Character {error.start} of the text is no Unicode character.'
    ) from error
  return text
