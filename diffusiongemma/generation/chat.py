"""A conversation: messages in, a parsed reply out, nothing read twice.

  messages --template--> tokens = those in a cache already + new tokens
  new tokens + cache --generate--> reply, longer caches

A reply is split at the control tokens that the model wrote: the thinking
channel, tool calls, and the answer itself.
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

# Tokens that end a turn of the model, besides the stop tokens of a checkpoint.
TURN_ENDS = ('<turn|>', '<|tool_response>')


class ToolsError(Error, ValueError):
  """Declarations of tools that can't be used."""

  exit_code = 2


class Model(NamedTuple):
  """A network with its chat settings.

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
  """A parsed reply of the model.

  Attributes:
    text: the answer.
    thinking: its thinking before the answer.
    tool_calls: `{'name': ..., 'arguments': {...}}` each.
    problem: why the answer is incomplete; empty if it is complete.
    written: its tokens, steps and so on.
  """

  text: str
  thinking: str
  tool_calls: list[dict[str, Any]]
  problem: str
  written: generate.Generation


@dataclasses.dataclass(frozen=True)
class _Read:
  """A cache, its tokens, and the number of pictures among them."""

  tokens: tuple[int, ...]
  num_pictures: int
  cache: kv_cache.KVCache


@dataclasses.dataclass(frozen=True)
class Conversation:
  """A conversation so far; immutable, each turn returns a new one.

  Attributes:
    messages: in the form of the template.
    pictures: one for each image part of the messages, in order.
    read: caches of its prefixes, longest last.
  """

  messages: tuple[dict[str, Any], ...] = ()
  pictures: tuple[Any, ...] = ()
  read: tuple[_Read, ...] = ()


def user_message(text: str, num_pictures: int = 0) -> dict[str, Any]:
  """A message of the user, pictures first."""
  if not num_pictures:
    return {'role': 'user', 'content': text}
  images = [{'type': 'image'}] * num_pictures
  return {'role': 'user', 'content': [*images, {'type': 'text', 'text': text}]}


def tool_message(name: str, call_id: str, result: str) -> dict[str, Any]:
  """A message with the result of a tool, as text, which may be JSON."""
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
  """Sends `messages`; returns the reply and the conversation after it.

  Args:
    model: the network.
    conversation: the conversation before.
    messages: new messages; see `user_message`, `tool_message`.
    key: for the noise.
    sampling: what differs from the config.
    pictures: one for each image part of `messages`.
    on_step, on_canvas: see `generate`.

  Raises:
    TemplateError: the template refuses the messages.
    PromptError: the conversation does not fit the context.
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
  # The template drops the thinking of earlier turns; then only the cache of the
  # prompt can be continued.
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
  """`config` with `TURN_ENDS` among its stop tokens; `config` itself, so that
  nothing is recompiled, if they are already."""
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
  """The longest cached text that `tokens` continue."""
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
  """The id that links a tool result to call `index` of message `turn`."""
  return f'{turn}.{index}'


def parse_reply(
  model: Model, prompt: Sequence[int], written: generate.Generation
) -> Reply:
  """Splits the tokens of a reply at the control tokens in them.

  Args:
    model: its tokenizer has the control tokens.
    prompt: token ids before the reply; may end inside the thinking channel.
    written: the reply.
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
  sections: list[tuple[str, list[int]]] = [(kind, [])]
  for token in written.tokens:
    if token in opens:
      sections.append((opens[token], []))
    elif token in closes:
      sections.append(('text', []))
    else:
      sections[-1][1].append(token)

  def joined(wanted):
    return [tokenizer.decode(ids) for kind, ids in sections if kind == wanted]

  last = sections[-1][0]
  if written.stopped_by == 'max_new_tokens' and last == 'call':
    sections.pop()  # An unfinished call could end in any way.
  text = ''.join(joined('text')).strip()
  thinking = '\n'.join(
    re.sub(r'\A\s*thought\n', '', t).strip() for t in joined('thinking')
  ).strip()
  calls, unread = [], []
  for raw in [
    _spell_call(tokenizer, i) for kind, i in sections if kind == 'call'
  ]:
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
  """Message on why a reply is incomplete; empty if it is complete."""
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
      f'The answer is not finished: no end within {count} tokens. Raise '
      '--max_new_tokens.'
    )
  if not text and not calls:
    return 'The model ended its turn without an answer.'
  return ''


def parse_call(
  tokenizer: Tokenizer, tokens: Sequence[int]
) -> dict[str, Any] | None:
  """`{'name': ..., 'arguments': {...}}` from the tokens between the control
  tokens of a call; None if they have no unique reading, see `call_syntax`.
  """
  return call_syntax.read(_spell_call(tokenizer, tokens))


def _spell_call(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
  """A call as text, including control tokens, which should not be there."""
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
  """Parses declarations of tools from JSON: a list of `{'type': 'function',
  'function': {'name', 'description', 'parameters'}}`, or of the inner objects.

  Raises:
    ToolsError: the text is not such a list.
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
