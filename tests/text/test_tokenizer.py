"""Text comes back as it was; control pieces are never read out of text."""

import hypothesis
from hypothesis import strategies as st
import pytest

from diffusiongemma.text import tokenizer as tokenizers

TOKENIZER = tokenizers.load_tokenizer()


@pytest.mark.parametrize(
  'text',
  [
    'Fair is foul,\n\n\n  and  foul is fair:\n',
    ' leading and trailing ',
    '\ttabs, Ünïcode, 中文, 🎭, \x00 and \u2028',
    '',
  ],
)
def test_round_trip(text):
  assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@hypothesis.given(st.text(st.characters(exclude_categories=['Cs'])))
def test_round_trip_of_anything(text):
  # SentencePiece's own word boundary sign is the one character that it reads
  # as another: a space.
  hypothesis.assume('▁' not in text)
  assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize('text', ['<s>', '</s>', '<pad>', 'a</s>b'])
def test_control_pieces_in_text_are_text(text):
  ids = TOKENIZER.encode(text)
  special = {TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id}
  assert not special & set(ids)
  assert TOKENIZER.decode(ids) == text


def test_special_ids():
  ids = (TOKENIZER.pad_id, TOKENIZER.eos_id, TOKENIZER.bos_id)
  assert ids == (0, 1, 2)
  assert TOKENIZER.vocab_size == 2048
  hello = TOKENIZER.encode('hello')
  assert TOKENIZER.decode([2, *hello, 1, 0, 0]) == 'hello'


def test_half_a_surrogate_pair_is_refused():
  with pytest.raises(tokenizers.TokenizerError, match='Character 2 of the'):
    TOKENIZER.encode('ab\udc80')


def test_errors(tmp_path):
  with pytest.raises(tokenizers.TokenizerError, match='No tokenizer at'):
    tokenizers.load_tokenizer(str(tmp_path / 'none.model'))
  (tmp_path / 'bad.model').write_bytes(b'not a model')
  with pytest.raises(tokenizers.TokenizerError, match='Not a SentencePiece'):
    tokenizers.load_tokenizer(str(tmp_path / 'bad.model'))
