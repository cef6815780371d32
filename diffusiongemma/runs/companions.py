"""Files beside the weights: tokenizer, chat template, configs, licence.

A run has its tokenizer and template in its folder or, if they came with a
Hugging Face checkpoint, in the subfolder `huggingface`. Everything derived from
a network gets byte-for-byte copies.
"""

from collections.abc import Iterator
import os

from diffusiongemma import config as configs
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files
from diffusiongemma.config import Config
from diffusiongemma.runs import WorkdirError
from diffusiongemma.text import tokenizer as tokenizers

COMPANIONS_DIR = 'huggingface'
# Files of a Hugging Face folder that are copied with the weights.
COMPANIONS = (
  'config.json',
  'generation_config.json',
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
  'chat_template.json',
  'processor_config.json',
  'preprocessor_config.json',
  'README.md',
  'LICENSE',
)
TOKENIZERS = ('tokenizer.json', 'tokenizer.model')
CHAT_TEMPLATES = (
  'chat_template.jinja',
  'chat_template.json',
  'tokenizer_config.json',
)
MAX_TEXT_BYTES = 100_000_000  # Of a file beside the weights.


def no_tokenizer(folder: str) -> WorkdirError:
  """The error for a folder without a tokenizer."""
  return WorkdirError(
    f'{folder} has no tokenizer; put its tokenizer.json or tokenizer.model '
    'there. That of the released model: hf download '
    'google/diffusiongemma-26B-A4B-it tokenizer.json --local-dir=FOLDER.'
  )


def load_tokenizer(config: Config, start: str = '') -> tokenizers.Tokenizer:
  """The tokenizer of a training run, checked: the one in the folder `start`, or
  else the one that the config names.

  Raises:
    ConfigError: it does not match the config.
    WorkdirError: the folder has none.
  """
  if start:
    tokenizer = find_tokenizer(config, start)
    if tokenizer is None:
      raise no_tokenizer(start)
    return tokenizer
  tokenizer = tokenizers.load_tokenizer(config.data.tokenizer)
  name = config.data.tokenizer or 'the shipped one'
  check_tokenizer(config, tokenizer, name)
  return tokenizer


def files_beside(start: str) -> Iterator[tuple[str, bytes]]:
  """(name in the run's folder, content) of the files to copy from `start`, a
  run or a Hugging Face folder, into the folder of a run that starts from it."""
  companions = os.path.join(start, COMPANIONS_DIR)
  if os.path.isdir(os.path.join(start, 'checkpoints')):
    for name in (*TOKENIZERS, *CHAT_TEMPLATES):
      if os.path.lexists(os.path.join(start, name)):
        yield name, files.read_file(start, name, MAX_TEXT_BYTES)
  else:
    companions = start
  for name, content in read_companions(companions):
    yield os.path.join(COMPANIONS_DIR, name), content


def read_companions(folder: str) -> Iterator[tuple[str, bytes]]:
  """(name, content) of the files of `COMPANIONS` in a folder."""
  for name in COMPANIONS:
    if os.path.lexists(os.path.join(folder, name)):
      yield name, files.read_file(folder, name, MAX_TEXT_BYTES)


def find_tokenizer(config: Config, folder: str) -> tokenizers.Tokenizer | None:
  """The tokenizer in the folder of a run or of Hugging Face, None without one.

  Raises:
    ConfigError: it does not match the config.
    CheckpointError: the file is a link out of the folder, or is too large.
    TokenizerError: it is damaged.
  """
  for name in TOKENIZERS:
    for directory in (folder, os.path.join(folder, COMPANIONS_DIR)):
      path = os.path.join(directory, name)
      if os.path.lexists(path):
        content = files.read_file(directory, name, MAX_TEXT_BYTES)
        tokenizer = tokenizers.make_tokenizer(content, path)
        check_tokenizer(config, tokenizer, path)
        return tokenizer
  return None


def find_chat_template(folder: str) -> str | None:
  """The chat template in the folder of a run or of Hugging Face, None without
  one.

  Raises:
    CheckpointError: a file that may contain it can't be read.
  """
  for directory in (folder, os.path.join(folder, COMPANIONS_DIR)):
    if os.path.lexists(os.path.join(directory, 'chat_template.jinja')):
      content = files.read_file(
        directory, 'chat_template.jinja', MAX_TEXT_BYTES
      )
      try:
        return content.decode()
      except UnicodeDecodeError as error:
        raise CheckpointError(
          f'{directory}/chat_template.jinja is not UTF-8: byte {error.start}.'
        ) from error
    for name in ('chat_template.json', 'tokenizer_config.json'):
      if not os.path.lexists(os.path.join(directory, name)):
        continue
      template = files.read_json(directory, name).get('chat_template')
      if isinstance(template, list):  # Several, by name.
        named = [t for t in template if isinstance(t, dict)]
        of_name = {t.get('name'): t.get('template') for t in named}
        template = of_name.get('default')
      if isinstance(template, str):
        return template
  return None


def check_tokenizer(
  config: Config, tokenizer: tokenizers.Tokenizer, name: str
) -> None:
  """Raises `ConfigError` if a tokenizer does not match the config. The network
  may have more ids than the tokenizer: released vocabularies are rounded up."""
  diffusion = config.diffusion
  if tokenizer.vocab_size > config.model.vocab_size:
    raise configs.ConfigError(
      f'The tokenizer has {tokenizer.vocab_size} pieces ({name}), more than '
      f'config.model.vocab_size = {config.model.vocab_size}: raise it to '
      f'{tokenizer.vocab_size}.'
    )
  for name, wanted, actual in (
    ('diffusion.pad_token_id', diffusion.pad_token_id, tokenizer.pad_id),
    ('diffusion.bos_token_id', diffusion.bos_token_id, tokenizer.bos_id),
  ):
    if wanted != actual:
      raise configs.ConfigError(
        f'config.{name} is {wanted}; that of the tokenizer is {actual}.'
      )
  if tokenizer.eos_id not in diffusion.stop_token_ids:
    raise configs.ConfigError(
      f'config.diffusion.stop_token_ids lacks {tokenizer.eos_id}, which ends '
      "the tokenizer's documents."
    )
