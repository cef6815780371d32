"""The tokenizers of the experiments that write text."""

from collections.abc import Iterable
import io

import sentencepiece


def train(lines: Iterable[str], pieces: int) -> bytes:
  """A byte-pair model that gives back exactly the text it was given.

  Byte pairs rather than a unigram model: at this size the latter spells rare
  words with a lone space piece, which then is the commonest token of all.
  Nothing is normalised and no space is added or removed. Line breaks are
  pieces of their own, since SentencePiece reads line by line.
  """
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=model,
    vocab_size=pieces,
    model_type='bpe',
    character_coverage=1.0,
    byte_fallback=True,
    normalization_rule_name='identity',
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    user_defined_symbols=['\n', '\n\n'],
    pad_id=0,
    eos_id=1,
    bos_id=2,
    unk_id=3,
    num_threads=1,
    minloglevel=2,
  )
  return model.getvalue()
