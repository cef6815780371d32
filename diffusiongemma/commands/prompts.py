"""Many prompts at once: a file of JSON lines in, a JSON line each out.

  {"prompt": "ROMEO."}                                  a text or message
  {"messages": [{"role": "user", "content": "Hi"}]}     a chat so far
  "ROMEO."                                              the first, for short

A line may have a `seed`, which counts more than the flag; keys without a
meaning here, such as `id`, come back in its result. A line's noise follows from
its seed and its number, whatever it is batched with. Empty lines are skipped.
"""

from collections.abc import Iterator
import json
import os
import sys
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusiongemma.commands import chats
from diffusiongemma.commands.request import Request
from diffusiongemma.commands.request import SampleError
from diffusiongemma.commands.request import most_tokens
from diffusiongemma.errors import Error
from diffusiongemma.generation import chat
from diffusiongemma.generation import generate
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.runs.load import Run
from diffusiongemma.text import template as templates
from diffusiongemma.training.messages import parse_json

MAX_BYTES = 1 << 30  # Of the file.
KEYS = ('prompt', 'messages', 'seed')
# Keys that would be lost or would mean something: flags, and keys of a result.
REFUSED = frozenset(
  (*Request._fields, 'think', 'image', 'temperature', 'stop')
  + (*generate.Generation._fields, *chat.Reply._fields)
) - frozenset(KEYS)


class Line(NamedTuple):
  """A prompt to write after.

  Attributes:
    tokens: its ids.
    key: its noise.
    others: what else the line has, to give back.
  """

  tokens: list[int]
  key: jax.Array
  others: dict[str, Any]


def write(run: Run, request: Request) -> int:
  """Prints a JSON line for each line of `request.prompts`, in their order.

  Raises:
    SampleError: a line can't be used; then nothing is written.
  """
  model, config = None, run.config
  if request.chat:
    model = chats.make_model(run, request)
    config = chat.with_turn_ends(config, run.tokenizer)
  lines = list(_read(run, request, model))
  size, count = request.batch_size, most_tokens(run, request)
  for start in range(0, len(lines), size):
    batch = lines[start : start + size]
    # The last batch is filled up, so that it is the same program.
    filled = batch + batch[-1:] * (size - len(batch))
    rows = generate.generate_tokens(
      *(config, run.params, [line.tokens for line in filled]),
      jnp.stack([line.key for line in filled]),
      count,
    ).rows
    for line, row in zip(batch, rows, strict=False):
      record = {**line.others, **_result(run, model, line, row)}
      print(json.dumps(record), flush=True)
  return 0


def _result(
  run: Run, model: chat.Model | None, line: Line, row: generate.Generation
) -> dict[str, Any]:
  """What is printed of a text or a reply."""
  if model is None:
    return {'text': run.tokenizer.decode(row.tokens), **row._asdict()}
  reply = chat.parse_reply(model, line.tokens, row)._asdict()
  del reply['written']
  return reply | row._asdict()


def _read(
  run: Run, request: Request, model: chat.Model | None
) -> Iterator[Line]:
  name = 'Standard input' if request.prompts == '-' else request.prompts
  is_empty = True
  for number, text in enumerate(_texts(request.prompts), 1):
    if not text.strip():
      continue
    is_empty = False
    try:
      yield _line(run, request, model, text, number)
    except (Error, ValueError) as error:
      raise SampleError(f'Line {number} of {name}: {error}') from error
  if is_empty:
    raise SampleError(f'{name} has no line.')


def _texts(path: str) -> Iterator[str]:
  """The lines of a file, or of standard input. Raises `SampleError`."""
  if path == '-':
    yield from sys.stdin
    return
  try:
    with open(path, encoding='utf-8', newline='\n') as stream:
      if os.fstat(stream.fileno()).st_size > MAX_BYTES:
        raise SampleError(f'{path} has more than {MAX_BYTES:,} bytes.')
      yield from stream
  except OSError as error:
    raise SampleError(f'{path} cannot be read: {error.strerror}.') from error
  except UnicodeDecodeError as error:
    raise SampleError(f'{path} is no text in UTF-8: {error}.') from error


def _line(
  run: Run, request: Request, model: chat.Model | None, text: str, number: int
) -> Line:
  """Raises `ValueError` or an `Error` that does not say which line it is."""
  record = parse_json(text)
  if isinstance(record, str):
    record = {'prompt': record}
  if not isinstance(record, dict):
    raise ValueError('it is neither an object nor a string.')
  if ('prompt' in record) == ('messages' in record):
    raise ValueError('it needs either "prompt" or "messages".')
  seed = record.get('seed', request.seed)
  if type(seed) is not int or not 0 <= seed < 2**63:
    raise ValueError(f'its seed {seed!r} is no whole number from 0 on.')
  key = jax.random.fold_in(jax.random.key(seed), number - 1)
  if refused := REFUSED.intersection(record):
    raise ValueError(
      f'{min(refused)!r} is not read here: give it as a flag, for all lines, '
      'or call it something else.'
    )
  others = {name: x for name, x in record.items() if name not in KEYS}
  tokens = _tokens(run, request, model, record)
  # Pictures can't be given here.
  prompt_lib.with_pictures(run.config.model, run.params, [tokens], None)
  prompt_lib.check(run.config, tokens, most_tokens(run, request))
  return Line(tokens, key, others)


def _tokens(
  run: Run,
  request: Request,
  model: chat.Model | None,
  record: dict[str, Any],
) -> list[int]:
  if 'messages' in record and model is None:
    raise ValueError('it has "messages", and this network knows no turns.')
  prompt = record.get('prompt')
  if 'prompt' in record and not (isinstance(prompt, str) and prompt.strip()):
    raise ValueError('its "prompt" is no text, or empty.')
  if model is None:
    return [run.tokenizer.bos_id, *run.tokenizer.encode(str(prompt))]
  messages = record.get('messages')
  if messages is None:
    messages = [
      *chats.start(request).messages,
      chat.user_message(str(prompt)),
    ]
  elif request.system:
    raise ValueError('it has messages: --system would belong among them.')
  return templates.encode_chat(
    run.tokenizer,
    model.template,
    messages,
    tools=model.tools,
    thinking=model.thinking,
  )
