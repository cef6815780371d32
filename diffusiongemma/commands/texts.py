"""Continues a --prompt, or fills the holes of a text.

continuation  --prompt="ROMEO.", with a network without turns
infilling     --infill="The capital of ___ is Rome."
"""

import json
import re

import jax
from rich import text as rich_text

from diffusiongemma.commands import chats
from diffusiongemma.commands import request as requests
from diffusiongemma.commands.request import Request
from diffusiongemma.generation import chat
from diffusiongemma.generation import generate
from diffusiongemma.generation import live
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.runs.load import Run
from diffusiongemma.text import template as templates
from diffusiongemma.text import tokenizer as tokenizers

HOLE = re.compile(r' ?(_{3,})')


def go_on(run: Run, request: Request) -> int:
  """Prints the continuation of a prompt; returns the exit code."""
  prompt = request.prompt or ''
  if not prompt:
    raise prompt_lib.PromptError(
      'The prompt is empty; give a few words to continue: --prompt="..."'
    )
  tokens = [run.tokenizer.bos_id]
  if request.images:
    encoder = run.config.model.image_encoder
    tokens += [encoder.image_token_id] * len(request.images)
  tokens += run.tokenizer.encode(prompt)
  with requests.watching(run, request, prompt) as callbacks:
    (written,), *_ = generate.generate_tokens(
      run.config,
      run.params,
      [tokens],
      jax.random.key(request.seed),
      requests.most_tokens(run, request),
      pictures=[request.images],
      **callbacks,
    )
  text = run.tokenizer.decode(written.tokens)
  if request.as_json:
    print(json.dumps({'text': text, **written._asdict()}))
    return 0
  whole = rich_text.Text().append(live.printable(prompt), live.PROMPT)
  requests.console().print(whole.append(live.printable(text), live.ACCEPTED))
  requests.print_statistics(written)
  return 0


def infill(run: Run, request: Request) -> int:
  """Prints a text with its holes filled, after the prompt if there is one;
  returns the exit code."""
  pins, holes, length = parse_infill(run.tokenizer, request.infill or '')
  if request.chat:
    model = chats.make_model(run, request)
    messages = [*chats.start(request).messages]
    if request.prompt:
      messages.append(chat.user_message(request.prompt, len(request.images)))
    tokens = templates.encode_chat(run.tokenizer, model.template, messages)
    end = run.tokenizer.control_tokens.get('<turn|>', run.tokenizer.eos_id)
  else:
    tokens = [run.tokenizer.bos_id, *run.tokenizer.encode(request.prompt or '')]
    end = run.tokenizer.eos_id
  pins[length] = end
  shown = request.prompt + '\n' if request.prompt else ''
  with requests.watching(run, request, shown) as callbacks:
    (written,), *_ = generate.generate_tokens(
      run.config,
      run.params,
      [tokens],
      jax.random.key(request.seed),
      length + 1,
      pictures=[request.images],
      pinned=[pins],
      **callbacks,
    )
  tokens = written.tokens[:length]
  fillings = [run.tokenizer.decode(tokens[a:b]) for a, b in holes]
  if request.as_json:
    text = run.tokenizer.decode(tokens)
    record = {'text': text, 'holes': fillings, 'steps': written.steps}
    print(json.dumps(record))
    return 0
  whole, start = rich_text.Text(), 0
  for (a, b), filling in zip(holes, fillings, strict=True):
    before = run.tokenizer.decode(tokens[start:a])
    whole.append(live.printable(before))
    whole.append(live.printable(filling), 'bold green')
    start = b
  rest = run.tokenizer.decode(tokens[start:])
  requests.console().print(whole.append(live.printable(rest)))
  return 0


def parse_infill(
  tokenizer: tokenizers.Tokenizer, text: str
) -> tuple[dict[int, int], list[tuple[int, int]], int]:
  """Parses a text with holes: three underscores or more, one for each token.

  Returns:
    (tokens around the holes by position, (start, end) of each hole, total
    number of tokens).

  Raises:
    SampleError: there is no hole.
  """
  pins: dict[int, int] = {}
  holes: list[tuple[int, int]] = []
  position, start = 0, 0

  def add(segment):
    nonlocal position
    for token in tokenizer.encode(segment):
      pins[position] = token
      position += 1

  for hole in HOLE.finditer(text):
    # The space before a word is part of its token.
    add(text[start : hole.start()])
    holes.append((position, position + len(hole.group(1))))
    position += len(hole.group(1))
    start = hole.end()
  if not holes:
    raise requests.SampleError(
      '--infill needs a hole: ___, three underscores or more, one for each '
      'token to fill in.'
    )
  add(text[start:])
  return pins, holes, position
