"""Files on disk to tokenised examples: documents, and answers to prompts.

.txt                                     one document
.jsonl   {"text": ...}                   a document a line
         {"prompt": ..., "response": ...}  a prompt and what is to be written
         {"messages": [...], "tools": [...]}  a chat, and what it could call
         and, if it likes, a "split" of "train" or "heldout"
"""

import glob
import itertools
import json
import lzma
import pathlib
from typing import NamedTuple

import numpy as np

from diffusiongemma.config import DataConfig
from diffusiongemma.text import template as templates
from diffusiongemma.text import tokenizer as tokenizers

SHIPPED_CORPUS = tokenizers.ASSETS / 'shakespeare.jsonl.xz'
# What an assistant may say besides, or instead of, a content.
SAID_BESIDE = ('tool_calls', 'tool_responses', 'reasoning', 'reasoning_content')
ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
SUFFIXES = ('.txt', '.jsonl', '.jsonl.xz')


class DataError(ValueError):
  """Text that can't be used; the message names the file and the remedy."""


class Document(NamedTuple):
  """One text, or a response to a prompt, or a message in a chat.

  Attributes:
    text: what is to be learnt; empty in a chat, where the template writes it.
    origin: where it came from, for messages.
    split: 'train', 'heldout' or '' (not said).
    prompt: what the text answers; None where it stands alone.
    messages: the chat up to and with the text, if it is part of one.
    tools: what could be called in the chat.
  """

  text: str
  origin: str
  split: str = ''
  prompt: str | None = None
  messages: tuple[dict, ...] = ()
  tools: tuple[dict, ...] = ()

  @property
  def stands_alone(self) -> bool:
    """Whether any part of it may be the prompt of the rest."""
    return self.prompt is None and not self.messages


class Example(NamedTuple):
  """The tokens of a document, int32, without bos.

  Attributes:
    tokens: a text that ends in eos, or a prompt and its response in whole
      canvases.
    prompt_length: how many of them are the prompt, which is never learnt; None
      for a text, of which any part may be the prompt.
    num_targets: how many after the prompt the AR loss predicts.
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
    train: to learn from.
    heldout: to evaluate on.
    heldout_texts: what is evaluated: their text, or what of a response there
      are targets for, without control tokens.
  """

  train: list[Example]
  heldout: list[Example]
  heldout_texts: list[str]


def find_files(path: str) -> list[pathlib.Path]:
  """The text files of a file name, a folder (searched in depth) or a glob."""
  given = pathlib.Path(path)
  if given.is_file():
    if not given.name.endswith(SUFFIXES):
      raise DataError(
        f'{path!r} is neither text nor JSON lines; name it one of '
        f'{", ".join(SUFFIXES)}.'
      )
    return [given]
  if given.is_dir():
    candidates = given.rglob('*')
  else:
    candidates = map(pathlib.Path, glob.glob(path, recursive=True))
  files = sorted(
    file
    for file in candidates
    if file.is_file() and file.name.endswith(SUFFIXES)
  )
  if not files and not given.exists() and not glob.has_magic(path):
    raise DataError(f'There is nothing at {path!r}.')
  if not files:
    raise DataError(f'{path!r} holds no file named {" or ".join(SUFFIXES)}.')
  return files


def read_documents(path: str) -> list[Document]:
  """All documents at `path`; see `find_files`. Raises `DataError`.

  A text file is one document, a line of a JSON lines file another; see the top
  of this file.
  """
  documents = []
  for file in find_files(path):
    if file.name.endswith('.txt'):
      documents.append(Document(_read_text(file), str(file)))
      continue
    for number, line in enumerate(_read_text(file).split('\n'), 1):
      if line.strip():
        documents += _parse_line(line, f'{file}, line {number}')
  documents = [d for d in documents if d.text or not d.stands_alone]
  if not documents:
    raise DataError(f'The files at {path!r} are empty.')
  return documents


def _read_text(file: pathlib.Path) -> str:
  try:
    opener = lzma.open if file.suffix == '.xz' else open
    with opener(file, 'rb') as stream:
      return stream.read().decode('utf-8-sig')  # a byte order mark is no text
  except UnicodeDecodeError as error:
    raise DataError(
      f'{file} is not UTF-8: byte {error.start} is 0x'
      f'{error.object[error.start]:02x}. Convert it first, for example with '
      f'iconv -t UTF-8.'
    ) from error
  except (lzma.LZMAError, EOFError) as error:
    raise DataError(f'{file} is not an xz file: {error}.') from error
  except OSError as error:
    raise DataError(f'{file} cannot be read: {error.strerror}.') from error


def _parse_line(line: str, origin: str) -> list[Document]:
  """What a line of JSON has to teach; see the top of this file."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise DataError(f'{origin} is not JSON: {error}.') from error
  if not isinstance(record, dict):
    raise DataError(f'{origin} is not an object: {{"text": ...}}.')
  split = record.pop('split', '')
  if split not in ('', 'train', 'heldout'):
    raise DataError(f'{origin}: split {split!r} is neither train nor heldout.')
  if 'messages' in record:
    return _parse_chat(record, origin, split)
  if 'prompt' in record or 'response' in record:
    wanted = ('prompt', 'response')
  else:
    wanted = ('text',)
  for name in wanted:
    if not isinstance(record.get(name), str):
      raise DataError(
        f'{origin} is not an object with a {name}: {{"text": ...}}, '
        '{"prompt": ..., "response": ...} or {"messages": [...]}.'
      )
  if wanted == ('text',):
    return [Document(record['text'], origin, split)]
  if not record['response']:
    raise DataError(f'{origin}: the response is empty.')
  return [Document(record['response'], origin, split, record['prompt'])]


def _parse_chat(record: dict, origin: str, split: str) -> list[Document]:
  """One document for each thing that the assistant says."""
  messages, tools = record['messages'], record.get('tools') or []
  if not isinstance(messages, list) or not all(
    isinstance(m, dict) and isinstance(m.get('role'), str) for m in messages
  ):
    raise DataError(
      f'{origin}: messages are a list of {{"role": ..., "content": ...}}.'
    )
  if not isinstance(tools, list) or not all(
    isinstance(tool, dict) and isinstance(tool.get('function'), dict)
    for tool in tools
  ):
    raise DataError(
      f'{origin}: tools are a list of functions, {{"type": "function", '
      '"function": {"name": ..., ...}}.'
    )
  for message in messages:
    _check_message(message, origin)
  documents = []
  for end, message in enumerate(messages, 1):
    if message['role'] == 'assistant':
      chat = tuple(messages[:end])
      documents.append(
        Document('', origin, split, messages=chat, tools=tuple(tools))
      )
  if not documents:
    raise DataError(f'{origin}: there is no message of the assistant to learn.')
  return documents


def _check_message(message: dict, origin: str) -> None:
  """Raises `DataError` for one that would teach something else than is
  meant."""
  role, content = message['role'], message.get('content')
  if role not in ROLES:
    raise DataError(f'{origin}: role {role!r} is none of {", ".join(ROLES)}.')
  if isinstance(content, list):
    if not all(isinstance(p, dict) and p.get('type') for p in content):
      raise DataError(
        f'{origin}: a content is a string, or a list of parts like '
        '{"type": "text", "text": ...}.'
      )
  elif content is not None and not isinstance(content, str):
    raise DataError(
      f'{origin}: a content is a string or a list, not {json.dumps(content)}.'
    )
  said = content.strip() if isinstance(content, str) else content
  if role == 'assistant' and not (said or any(map(message.get, SAID_BESIDE))):
    raise DataError(
      f'{origin}: a message of the assistant has neither content nor '
      f'{", ".join(SAID_BESIDE)}; there is nothing to learn.'
    )


def split_documents(
  documents: list[Document], every: int
) -> tuple[list[Document], list[Document]]:
  """(train, heldout): as the documents say, else every n-th is held out, of
  chats all that is said in it.

  With fewer than n documents, the last n-th of each is held out instead; of
  responses, the last.
  """
  if any(d.split for d in documents):
    train = [d for d in documents if d.split != 'heldout']
    return train, [d for d in documents if d.split == 'heldout']
  by_origin = itertools.groupby(documents, lambda document: document.origin)
  groups = [list(group) for _, group in by_origin]
  if len(groups) >= every > 1:
    heldout = groups[every - 1 :: every]
    del groups[every - 1 :: every]
    chain = itertools.chain.from_iterable
    return list(chain(groups)), list(chain(heldout))
  if not all(d.stands_alone for d in documents):
    count = len(groups[-1]) if len(groups) > 1 else 1
    return documents[:-count], documents[-count:]
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

  Chats are written by `chat_template`, or by DiffusionGemma's.
  """
  documents = read_documents(data.path or str(SHIPPED_CORPUS))
  if data.heldout_path:
    # What says so itself is kept apart also where two files are given.
    others = read_documents(data.heldout_path)
    train = [d for d in documents if d.split != 'heldout']
    heldout = [d for d in others if d.split != 'train']
  else:
    train, heldout = split_documents(documents, data.heldout_every)
  for name, part, path in (
    ('train on', train, data.path),
    ('hold out', heldout, data.heldout_path or data.path),
  ):
    if not part:
      remedy = 'give more documents'
      if not data.heldout_path:
        remedy += ', or name others in config.data.heldout_path'
      raise DataError(f'{path!r} leaves nothing to {name}: {remedy}.')

  template = chat_template or templates.default_template()
  tokenize = lambda d: _tokenize(d, data, tokenizer, canvas_length, template)
  train, examples = ([tokenize(d) for d in part] for part in (train, heldout))
  pairs = zip(heldout, examples, strict=True)
  texts = [
    # A response may have been cut.
    d.text if d.stands_alone else tokenizer.decode(e.targets.tolist())
    for d, e in pairs
  ]
  return Corpus(train, examples, texts)


def _tokenize(
  document: Document,
  data: DataConfig,
  tokenizer: tokenizers.Tokenizer,
  canvas_length: int,
  chat_template: str,
) -> Example:
  try:
    if document.messages:
      if not templates.knows_turns(tokenizer):
        raise templates.TemplateError(
          'a chat needs a tokenizer that has <|turn>; this one has none.'
        )
      prompt, tokens = templates.encode_exchange(
        tokenizer,
        chat_template,
        document.messages,
        document.tools,
      )
      prompt = prompt[1:]  # Every row begins with bos.
    else:
      prompt = tokenizer.encode(document.prompt or '')
      tokens = [*tokenizer.encode(document.text), tokenizer.eos_id]
  except (tokenizers.TokenizerError, templates.TemplateError) as error:
    raise DataError(f'{document.origin}: {error}') from error
  if document.stands_alone:
    # A row is bos and, at least, a canvas.
    if len(tokens) < canvas_length and not data.packing:
      raise DataError(
        f'{document.origin}: {len(tokens)} tokens are shorter than a canvas '
        f'of {canvas_length}. Leave it out, pack it with others '
        '(config.data.packing=true), or lower config.diffusion.canvas_length.'
      )
    return Example(np.array(tokens, np.int32))
  if 1 + len(prompt) + canvas_length > data.sequence_length:
    raise DataError(
      f'{document.origin}: a prompt of {len(prompt)} tokens leaves no room for '
      f'a canvas of {canvas_length} in config.data.sequence_length = '
      f'{data.sequence_length}. Raise it, or leave the line out.'
    )
  return fill_canvases(
    prompt, tokens, data.sequence_length, canvas_length, tokenizer.eos_id
  )


def fill_canvases(
  prompt: list[int],
  response: list[int],
  sequence_length: int,
  canvas_length: int,
  eos_id: int,
) -> Example:
  """A response made up to whole canvases with eos, or cut to them.

  The denoiser learns the fill too, the AR loss does not. A response that had to
  be cut does not end, and is not taught to.

  Args:
    prompt: token ids without bos.
    response: token ids, the one that ends it included.
    sequence_length: the most tokens of a row, bos among them.
    canvas_length: C.
    eos_id: the fill.
  """
  room = (sequence_length - 1 - len(prompt)) // canvas_length
  count = min(-(-len(response) // canvas_length), room)
  length = count * canvas_length
  filled = (response + [eos_id] * length)[:length]
  tokens = np.array(prompt + filled, np.int32)
  return Example(tokens, len(prompt), min(len(response), length))
