"""A conversation: messages in, a parsed reply out, nothing read twice.

  messages --template--> tokens = what is in a cache already + what is new
  new tokens + cache --generate--> reply, longer caches

A reply is split at the control tokens that the model wrote: the thinking
channel, calls of tools, and the answer itself.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import itertools
import json
import re
from typing import Any
from typing import NamedTuple

import jax

from diffusiongemma.config import Config
from diffusiongemma.diffusion.sampling import AS_CONFIGURED
from diffusiongemma.diffusion.sampling import Sampling
from diffusiongemma.errors import Error
from diffusiongemma.generation import engine
from diffusiongemma.generation import generate
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.ops.weights import Params
from diffusiongemma.text import call_syntax
from diffusiongemma.text import template as templates
from diffusiongemma.text.tokenizer import Tokenizer

# Of a model's turn, whatever else a checkpoint lists as the end of a text.
TURN_ENDS = ('<turn|>', '<|tool_response>')


class ToolsError(Error, ValueError):
  """Declarations of tools that can't be used."""

  exit_code = 2


class Model(NamedTuple):
  """What a conversation is held with.

  Attributes:
    config, params, tokenizer: of a run.
    template: its chat template, in Jinja.
    tools: declarations, see `read_tools`.
    thinking: whether it is asked to think before it answers.
    max_new_tokens: of each reply.
  """

  config: Config
  params: Params
  tokenizer: Tokenizer
  template: str
  tools: tuple[dict[str, Any], ...] = ()
  thinking: bool = False
  max_new_tokens: int = 1024


class Reply(NamedTuple):
  """What the model said.

  Attributes:
    text: the answer.
    thinking: what it thought before, apart from it.
    tool_calls: `{'name': ..., 'arguments': {...}}` each.
    problem: why this is no whole answer; empty when it is.
    written: the tokens, steps and so on behind it.
  """

  text: str
  thinking: str
  tool_calls: list[dict[str, Any]]
  problem: str
  written: generate.Generation


@dataclasses.dataclass(frozen=True)
class _Read:
  """Tokens that a cache holds, and how many pictures are among them."""

  tokens: tuple[int, ...]
  num_pictures: int
  cache: kv_cache.KVCache


@dataclasses.dataclass(frozen=True)
class Conversation:
  """All that was said; never changed, a turn makes a new one.

  Attributes:
    messages: as the template takes them.
    pictures: one for each image part of the messages, in order.
    read: what caches hold of it, longest last.
  """

  messages: tuple[dict[str, Any], ...] = ()
  pictures: tuple[Any, ...] = ()
  read: tuple[_Read, ...] = ()


def user_message(text: str, num_pictures: int = 0) -> dict[str, Any]:
  """A message of the user's, pictures first."""
  if not num_pictures:
    return {'role': 'user', 'content': text}
  parts = [{'type': 'image'}] * num_pictures
  return {'role': 'user', 'content': [*parts, {'type': 'text', 'text': text}]}


def tool_message(name: str, call_id: str, result: str) -> dict[str, Any]:
  """What a tool answered, as text; JSON is text too."""
  return {
    'role': 'tool',
    'name': name,
    'tool_call_id': call_id,
    'content': result,
  }


def take_turn(
  model: Model,
  conversation: Conversation,
  messages: Sequence[dict[str, Any]],
  key: jax.Array,
  sampling: Sampling = AS_CONFIGURED,
  *,
  pictures: Sequence[Any] = (),
  on_step: engine.OnStep | None = None,
  on_canvas: Callable[[list[list[int]]], None] | None = None,
) -> tuple[Reply, Conversation]:
  """Says `messages` and returns the reply, and the conversation after it.

  Args:
    model: whom to ask.
    conversation: what was said before.
    messages: what is new; see `user_message`, `tool_message`.
    key: the noise.
    sampling: what is not as the config says.
    pictures: one for each image part of `messages`.
    on_step, on_canvas: see `generate`.

  Raises:
    TemplateError: the template refuses the messages.
    PromptError: it does not fit the context.
    ImageError: a picture can't be used.
  """
  messages = (*conversation.messages, *messages)
  pictures = (*conversation.pictures, *pictures)
  tokens = tuple(
    templates.encode_chat(
      model.tokenizer,
      model.template,
      messages,
      tools=model.tools,
      thinking=model.thinking,
    )
  )
  known = _longest_read(conversation.read, tokens)
  generated = generate.generate_tokens(
    with_turn_ends(model.config, model.tokenizer),
    model.params,
    [tokens[len(known.tokens) if known else 0 :]],
    key,
    model.max_new_tokens,
    sampling,
    pictures=[pictures[known.num_pictures if known else 0 :]],
    cache=known.cache if known else None,
    keep_cache=True,
    on_step=on_step,
    on_canvas=on_canvas,
  )
  (written,) = generated.rows
  reply = parse_reply(model, tokens, written)
  # The template drops the thinking of earlier turns: what can be read on from
  # is then the prompt alone.
  answered = (*tokens, *written.tokens)
  read = tuple(
    _Read(ids, len(pictures), cache)
    for ids, cache in (
      (tokens, generated.prompt_cache),
      (answered, generated.cache),
    )
    if cache is not None
  )
  said = _assistant_message(reply, turn=len(messages))
  return reply, Conversation((*messages, said), pictures, read)


def with_turn_ends(config: Config, tokenizer: Tokenizer) -> Config:
  """`config` with the ends of a turn among its stop tokens; itself, which
  compiles nothing anew, where they are."""
  ends = map(tokenizer.control_tokens.get, TURN_ENDS)
  known = config.diffusion.stop_token_ids
  missing = [end for end in ends if end is not None and end not in known]
  if not missing:
    return config
  diffusion = dataclasses.replace(
    config.diffusion, stop_token_ids=(*known, *missing)
  )
  return dataclasses.replace(config, diffusion=diffusion)


def _longest_read(
  read: Sequence[_Read], tokens: tuple[int, ...]
) -> _Read | None:
  """The longest text in a cache that `tokens` go on from."""
  for known in reversed(read):
    length = len(known.tokens)
    if length < len(tokens) and tokens[:length] == known.tokens:
      return known
  return None


def _assistant_message(reply: Reply, turn: int) -> dict[str, Any]:
  message: dict[str, Any] = {'role': 'assistant', 'content': reply.text}
  if reply.thinking:
    message['reasoning'] = reply.thinking
  if reply.tool_calls:
    message['tool_calls'] = [
      {'id': call_id(turn, index), 'type': 'function', 'function': call}
      for index, call in enumerate(reply.tool_calls)
    ]
  return message


def call_id(turn: int, index: int) -> str:
  """The name that ties a tool's answer to call `index` of message `turn`."""
  return f'{turn}.{index}'


def parse_reply(
  model: Model, prompt: Sequence[int], written: generate.Generation
) -> Reply:
  """Splits what the model wrote at the control tokens in it.

  Args:
    model: its tokenizer names the control tokens.
    prompt: what it was asked with; it may end inside of the thinking channel.
    written: what it wrote.
  """
  tokenizer = model.tokenizer
  of_name = tokenizer.control_tokens.get
  opens = {of_name('<|channel>'): 'thinking', of_name('<|tool_call>'): 'call'}
  opens.pop(None, None)
  closes = {
    of_name(name) for name in ('<channel|>', '<tool_call|>', *TURN_ENDS)
  }
  closes.add(tokenizer.eos_id)
  kind = _last_channel(prompt, of_name)
  parts: list[tuple[str, list[int]]] = [(kind, [])]
  for token in written.tokens:
    if token in opens:
      parts.append((opens[token], []))
    elif token in closes:
      parts.append(('text', []))
    else:
      parts[-1][1].append(token)

  def joined(wanted):
    return [tokenizer.decode(ids) for kind, ids in parts if kind == wanted]

  last = parts[-1][0]
  if written.stopped_by == 'max_new_tokens' and last == 'call':
    parts.pop()  # What it lacks may be anything.
  text = ''.join(joined('text')).strip()
  thinking = '\n'.join(
    re.sub(r'\A\s*thought\n', '', t).strip() for t in joined('thinking')
  ).strip()
  calls, unread = [], []
  for raw in [_spell_call(tokenizer, i) for kind, i in parts if kind == 'call']:
    if call := call_syntax.read(raw):
      calls.append(call)
    else:
      unread.append(raw.replace(call_syntax.QUOTE, '"'))
  problem = _problem(text, thinking, calls, unread, last, written)
  return Reply(text, thinking, calls, problem, written)


def _last_channel(prompt: Sequence[int], of_name: Callable[..., Any]) -> str:
  """'thinking' if the prompt ends in an open channel, else 'text'."""
  for token in reversed(prompt):
    if token == of_name('<|channel>'):
      return 'thinking'
    if token in (of_name('<channel|>'), of_name('<|turn>')):
      break
  return 'text'


def _problem(
  text: str,
  thinking: str,
  calls: list[Any],
  unread: list[str],
  last: str,
  written: generate.Generation,
) -> str:
  """Why a reply is no whole answer, for a person; empty when it is."""
  cut = written.stopped_by == 'max_new_tokens'
  count = len(written.tokens)
  if unread:
    return f'A call of a tool cannot be read: {unread[0]}'
  is_answered = text or calls or last == 'call'
  if cut and (last == 'thinking' or (thinking and not is_answered)):
    return (
      f'There is no answer: thinking used up all {count} tokens. Raise '
      '--max_new_tokens, or leave thinking off.'
    )
  if cut:
    return (
      f'The answer is not finished: no end came within {count} tokens. Raise '
      '--max_new_tokens.'
    )
  if not text and not calls:
    return 'The model ended its turn without an answer.'
  return ''


def parse_call(
  tokenizer: Tokenizer, tokens: Sequence[int]
) -> dict[str, Any] | None:
  """`{'name': ..., 'arguments': {...}}` of what the model wrote between the
  control tokens of a call; None if it has no reading, or several: see
  `call_syntax`.
  """
  return call_syntax.read(_spell_call(tokenizer, tokens))


def _spell_call(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
  """A call as text, control tokens that should not be there included."""
  spelled = {id_: piece for piece, id_ in tokenizer.control_tokens.items()}
  if quote := tokenizer.control_tokens.get('<|"|>'):
    spelled[quote] = call_syntax.QUOTE
  texts: list[str] = []
  for is_control, ids in itertools.groupby(tokens, spelled.__contains__):
    if is_control:
      texts += map(spelled.__getitem__, ids)
    else:
      texts.append(tokenizer.decode(list(ids)))
  return ''.join(texts)


def read_tools(text: str) -> tuple[dict[str, Any], ...]:
  """Declarations of tools from JSON: a list of `{'type': 'function',
  'function': {'name', 'description', 'parameters'}}`, or of the inner objects.

  Raises:
    ToolsError: it is something else.
  """
  try:
    tools = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ToolsError(f'Tools are not JSON: {error}.') from error
  if not isinstance(tools, list):
    raise ToolsError('Tools are a JSON list of functions.')
  declarations = []
  for index, tool in enumerate(tools):
    function = tool.get('function', tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict):
      raise ToolsError(f'Tool {index} is not an object.')
    for name in ('name', 'description'):
      if not isinstance(function.get(name), str):
        raise ToolsError(f'Tool {index} has no {name}.')
    parameters = function.get('parameters', {})
    properties = isinstance(parameters, dict) and parameters.get(
      'properties', {}
    )
    if not isinstance(properties, dict) or not all(
      isinstance(schema, dict) for schema in properties.values()
    ):
      raise ToolsError(
        f'The parameters of tool {index} are not a JSON schema of an object.'
      )
    declarations.append({'type': 'function', 'function': function})
  return tuple(declarations)
