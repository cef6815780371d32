"""Reads GGUF files: metadata, tensors, and the config that they describe.

  file = 'GGUF' | version | counts | metadata | names and shapes | data

The text part of the network, `general.architecture = diffusion-gemma`. Tensors
get the names of Hugging Face, so that `contents` finds them. Files are
untrusted: lengths are checked before anything is read. The `gguf` package maps
whole files and reads a vocabulary as a million small arrays; it is what this is
tested against. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import math
import os
import re
import struct
from typing import Any
from typing import NamedTuple

import ml_dtypes
import numpy as np

from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints.formats import Array
from diffusiongemma.checkpoints.formats import ggml

ARCHITECTURE = 'diffusion-gemma'
# Of Gemma's vocabulary and merges there are 15 MB.
MAX_HEADER_BYTES = 2**26
_MAX_ITEMS = 2**22
_LARGEST = 2**63 - 1  # Bytes of an array.
_VERSIONS = (2, 3)
_FLOATS = {
  0: np.dtype('<f4'),
  1: np.dtype('<f2'),
  30: np.dtype(ml_dtypes.bfloat16),
}
_SCALARS = dict(enumerate('BbHhIif?')) | {10: 'Q', 11: 'q', 12: 'd'}
_STRING, _ARRAY = 8, 9
_CONTROL_TOKEN, _USER_TOKEN = 3, 4  # Kinds of tokens.
_SPACE = '\u2581'  # In the spelling of tokens.
# One of several files of a network.
_SHARD = re.compile(r'(.*)-(\d{5})-of-(\d{5})\.gguf')

_LAYER = {
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'attn_q_norm': 'self_attn.q_norm',
  'attn_k_norm': 'self_attn.k_norm',
  'post_attention_norm': 'post_attention_layernorm',
  'ffn_norm': 'pre_feedforward_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
  'post_ffw_norm_1': 'post_feedforward_layernorm_1',
  'pre_ffw_norm_2': 'pre_feedforward_layernorm_2',
  'ffn_gate_inp': 'router.proj',
  'ffn_gate_inp.scale': 'router.scale',
  'ffn_gate_up_exps': 'experts.gate_up_proj',
  'ffn_gate_exps': 'experts.switch_glu.gate_proj',
  'ffn_up_exps': 'experts.switch_glu.up_proj',
  'ffn_down_exps': 'experts.down_proj',
  'ffn_down_exps.scale': 'router.per_expert_scale',
  'post_ffw_norm_2': 'post_feedforward_layernorm_2',
  'post_ffw_norm': 'post_feedforward_layernorm',
  'layer_output_scale': 'layer_scalar',
}
_OTHERS = {
  'token_embd': 'embed_tokens',
  'output_norm': 'norm',
  **{
    f'self_cond_{ours}': f'self_conditioning.{theirs}'
    for ours, theirs in (
      ('pre_norm', 'pre_norm'),
      ('gate', 'gate_proj'),
      ('up', 'up_proj'),
      ('down', 'down_proj'),
    )
  },
}
_ROTATIONS = 'rope_freqs.weight'


class Tensor(NamedTuple):
  """A tensor.

  Attributes:
    array: its numbers, or uint8 [.., bytes] if it is of blocks.
    suffix: 'weight', or the kind of the blocks after `ggml.SUFFIX`.
  """

  array: Array
  suffix: str


class Contents(NamedTuple):
  """The contents of the files of a network.

  Attributes:
    metadata: by key; the values of arrays are lists.
    tensors: by name, those of several files together.
  """

  metadata: dict[str, Any]
  tensors: dict[str, Tensor]


def find_files(path: str) -> list[str]:
  """The GGUF files of the network at `path`, a file or a folder; [] if there is
  none.

  Raises:
    CheckpointError: a folder has the files of several networks, or shards are
      missing.
  """
  if os.path.isfile(path):
    folder, name = os.path.split(path)
    names = [name] if name.endswith('.gguf') else []
  elif os.path.isdir(path):
    folder = path
    names = [
      name
      for name in sorted(os.listdir(folder))
      if name.endswith('.gguf') and 'mmproj' not in name
    ]
  else:
    names = []
  if not names:
    return []
  networks = {(m := _SHARD.fullmatch(x)) and m[1] or x for x in names}
  if len(networks) > 1:
    raise CheckpointError(
      f'{path} holds {files.listed(names)}: give the path of one of them.'
    )
  if shard := _SHARD.fullmatch(names[0]):
    stem, _, count = shard.groups()
    names = [
      f'{stem}-{i:05}-of-{count}.gguf' for i in range(1, int(count) + 1)
    ][:_MAX_ITEMS]
  return [files.checked_path(folder or '.', name) for name in names]


def read(paths: list[str]) -> Contents:
  """Reads the headers of the files of a network. Raises `CheckpointError`."""
  metadata: dict[str, Any] = {}
  tensors: dict[str, Tensor] = {}
  for path in paths:
    more, found = _read_header(path)
    metadata = more | metadata  # The first file says what the network is.
    for name, tensor in found.items():
      if name in tensors:
        raise tensor.array.error(f'is in {tensors[name].array.path}, too')
      tensors[name] = tensor
  kind = metadata.get('general.architecture')
  if kind != ARCHITECTURE:
    raise CheckpointError(
      f'{paths[0]} has general.architecture {files.quote(str(kind))}; only '
      f'{ARCHITECTURE!r} '
      'can be read.'
    )
  return Contents(metadata, tensors)


class _Cursor:
  """Reads a header from its start to its end."""

  def __init__(self, data: bytearray, path: str, is_whole: bool):
    self._data, self._path, self._is_whole = data, path, is_whole
    self.position = 0

  def error(self, problem: str) -> CheckpointError:
    return CheckpointError(f'{self._path} {problem}.')

  def take(self, count: int) -> memoryview:
    end = self.position + count
    if end > len(self._data):
      if self._is_whole:
        raise self.error('is truncated within its header: download it again')
      raise self.error(
        f'has a header of more than {MAX_HEADER_BYTES} bytes: it is damaged'
      )
    view = memoryview(self._data)[self.position : end]
    self.position = end
    return view

  def number(self, code: str) -> Any:
    return struct.unpack(f'<{code}', self.take(struct.calcsize(code)))[0]

  def count(self, what: str) -> int:
    count = self.number('Q')
    if count > _MAX_ITEMS:
      raise self.error(f'claims to have {count} {what}: it is damaged')
    return count

  def text(self) -> str:
    data = bytes(self.take(self.number('Q')))
    try:
      return data.decode()
    except UnicodeDecodeError as error:
      raise self.error(
        f'has a text that is not UTF-8: {data[:40]!r}'
      ) from error

  def value(self, kind: int, is_inner: bool = False) -> Any:
    if kind in _SCALARS:
      return self.number(_SCALARS[kind])
    if kind == _STRING:
      return self.text()
    if kind == _ARRAY and not is_inner:
      inner, count = self.number('I'), self.count('values of an array')
      if inner in _SCALARS:
        code = f'{count}{_SCALARS[inner]}'
        return list(
          struct.unpack(f'<{code}', self.take(struct.calcsize('<' + code)))
        )
      return [self.value(inner, is_inner=True) for _ in range(count)]
    raise self.error(f'has a value of the unknown type {kind}')


def _read_header(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """(metadata, tensors) of one file."""
  with files.opened(path) as (descriptor, size):
    length = min(size, MAX_HEADER_BYTES)
    data = files.read_bytes(descriptor, 0, length, path)
  cursor = _Cursor(data, path, is_whole=length == size)
  if bytes(cursor.take(4)) != b'GGUF':
    raise cursor.error('is no GGUF file')
  version = cursor.number('I')
  if version not in _VERSIONS:
    raise cursor.error(f'has version {version} of GGUF; 2 and 3 are read')
  num_tensors = cursor.count('tensors')
  metadata: dict[str, Any] = {}
  for _ in range(cursor.count('keys')):
    key = cursor.text()
    if key in metadata:
      raise cursor.error(f'has {files.quote(key)} twice')
    metadata[key] = cursor.value(cursor.number('I'))
  entries = []
  for _ in range(num_tensors):
    name, num_axes = cursor.text(), cursor.number('I')
    if num_axes > 4:
      raise cursor.error(f'has {files.quote(name)} with {num_axes} axes')
    shape = tuple(cursor.number('Q') for _ in range(num_axes))[::-1]
    entries.append((name, shape, cursor.number('I'), cursor.number('Q')))
  alignment = metadata.get('general.alignment', 32)
  if type(alignment) is not int or not 8 <= alignment <= 2**16:
    shown = files.quote(str(alignment))
    raise cursor.error(f'has general.alignment = {shown}')
  start = -(-cursor.position // alignment) * alignment
  tensors: dict[str, Tensor] = {}
  last: dict[str, np.ndarray] = {}
  for name, shape, kind, offset in entries:
    if name in tensors:
      raise cursor.error(f'has {files.quote(name)} twice')
    tensors[name] = _tensor(name, path, shape, kind, start + offset, size, last)
  return metadata, tensors


def _tensor(name, path, shape, kind, offset, size, last) -> Tensor:
  """A tensor. `last` has the one that was read last, since several arrays are
  made of one of blocks."""
  problem = lambda text: CheckpointError(
    f'Tensor {files.quote(name)} in {path} {text}.'
  )
  if kind in _FLOATS:
    dtype, stored, suffix = _FLOATS[kind], shape, 'weight'
  elif kind in ggml.TYPES:
    kind_name, count, num_bytes = ggml.TYPES[kind]
    suffix = f'{ggml.SUFFIX}{kind_name}'
    if not shape or shape[-1] % count:
      raise problem(f'has rows that are no multiple of {count}')
    dtype = np.dtype(np.uint8)
    stored = (*shape[:-1], shape[-1] // count * num_bytes)
  else:
    names = ['F32', 'F16', 'BF16', *(x[0] for x in ggml.TYPES.values())]
    raise problem(
      f'has type {kind} of GGML; those that are read are {", ".join(names)}'
    )
  # NumPy has this limit even if another dimension is 0.
  if math.prod(x or 1 for x in stored) * dtype.itemsize > _LARGEST:
    raise problem(f'has a shape, {list(shape)}, that no array can have')
  length = math.prod(stored) * dtype.itemsize
  if offset + length > size:
    raise problem(
      f'ends at byte {offset + length}, and the file is {size} bytes long: '
      'download it again'
    )

  def read():
    if name not in last:
      last.clear()
      array = np.empty(stored, dtype)
      with files.opened(path) as (descriptor, _):
        view = array.reshape(-1).view(np.uint8).data
        files.read_into(view, descriptor, offset, repr(path))
      last[name] = array
    return last[name]

  return Tensor(Array(name, path, dtype, stored, read), suffix)


def with_their_names(contents: Contents) -> dict[str, Array]:
  """The tensors under the names of Hugging Face. Blocks have `ggml.SUFFIX` and
  their type at the end. Raises `CheckpointError` if a name is unknown."""
  named, unknown = {}, []
  for name, tensor in contents.tensors.items():
    theirs = _their_name(name, tensor.suffix)
    if theirs is not None:
      named[theirs] = tensor.array
    elif name != _ROTATIONS:
      unknown.append(name)
  if unknown:
    first = contents.tensors[unknown[0]].array
    raise CheckpointError(
      f'{first.path} has tensors that are none of this network: '
      f'{files.listed(unknown)}.'
    )
  return named


def _their_name(name: str, suffix: str) -> str | None:
  own, _, end = name.rpartition('.')
  match = re.fullmatch(r'blk\.(\d+)\.(.+)', own)
  if match is None and end != 'weight':
    return None
  if match is None:
    home = _OTHERS.get(own)
    return f'model.decoder.{home}.{suffix}' if home else None
  layer, part = match.groups()
  role = 'model.decoder'
  if part == 'enc_layer_output_scale':
    role, part = 'model.encoder.language_model', 'layer_output_scale'
  home = _LAYER.get(part if end == 'weight' else f'{part}.{end}')
  return f'{role}.layers.{layer}.{home}.{suffix}' if home else None


def config_values(
  contents: Contents, path: str
) -> tuple[dict[str, Any], dict[str, Any]]:
  """(config.json, generation_config.json) of Hugging Face for the network,
  without a vision encoder.

  Raises:
    CheckpointError: a key or the table of the vocabulary is missing.
  """
  metadata = contents.metadata
  table = contents.tensors.get('token_embd.weight')
  if table is None or len(table.array.shape) != 2:
    raise CheckpointError(f'{path} has no token_embd.weight.')

  def get(*names, default=None):
    """The first of these keys, which some writers group under attention."""
    for name in names:
      for key in f'{ARCHITECTURE}.{name}', f'{ARCHITECTURE}.attention.{name}':
        if key in metadata:
          return metadata[key]
    if default is None:
      raise CheckpointError(f'{path} lacks the key {ARCHITECTURE}.{names[0]}.')
    return default

  is_local = get('sliding_window_pattern')
  if not isinstance(is_local, list):
    raise CheckpointError(f'{path}: sliding_window_pattern is no list.')
  kinds = ['sliding_attention' if x else 'full_attention' for x in is_local]
  if 'full_attention' not in kinds:
    raise CheckpointError(
      f'{path}: sliding_window_pattern has no global layer.'
    )
  kv_heads = get('head_count_kv')
  if not isinstance(kv_heads, list):
    kv_heads = [kv_heads] * len(kinds)
  if len(kv_heads) != len(kinds):
    raise CheckpointError(
      f'{path}: head_count_kv has {len(kv_heads)} values for {len(kinds)} '
      'layers.'
    )
  heads_of = dict(zip(kinds, kv_heads, strict=True))
  if kv_heads != [heads_of[kind] for kind in kinds]:
    raise CheckpointError(
      f'{path}: head_count_kv differs among layers of one kind of attention.'
    )
  width, local_width = get('key_length'), get('key_length_swa', 'key_length')
  global_heads = heads_of['full_attention']
  rope = {
    'full_attention': {
      'rope_type': 'proportional',
      'rope_theta': get('rope.freq_base', default=1e6),
      'partial_rotary_factor': _rotated_fraction(contents),
    },
    'sliding_attention': {
      'rope_type': 'default',
      'rope_theta': get('rope.freq_base_swa', default=1e4),
    },
  }
  text = {
    'vocab_size': table.array.shape[0],
    'hidden_size': get('embedding_length'),
    'num_hidden_layers': get('block_count'),
    'layer_types': kinds,
    'num_attention_heads': get('head_count'),
    'num_key_value_heads': heads_of.get('sliding_attention', global_heads),
    'num_global_key_value_heads': global_heads,
    'head_dim': local_width,
    'global_head_dim': width,
    'sliding_window': get('sliding_window'),
    'intermediate_size': get('feed_forward_length'),
    'num_experts': get('expert_count'),
    'top_k_experts': get('expert_used_count'),
    'moe_intermediate_size': get('expert_feed_forward_length'),
    'max_position_embeddings': get('context_length'),
    'final_logit_softcapping': get('final_logit_softcapping', default=30.0),
    'rms_norm_eps': get('layer_norm_rms_epsilon', default=1e-6),
    'rope_parameters': rope,
    'bos_token_id': metadata.get('tokenizer.ggml.bos_token_id', 2),
  }
  is_float32 = table.array.dtype == np.float32
  keys = ('tokenizer.ggml.eos_token_id', 'tokenizer.ggml.eot_token_id')
  stops = {metadata[key] for key in keys if type(metadata.get(key)) is int}
  config = {
    'model_type': 'diffusion_gemma',
    'dtype': 'float32' if is_float32 else 'bfloat16',
    'text_config': text,
    'canvas_length': metadata.get('diffusion.canvas_length', 256),
    'eos_token_id': sorted(stops) or [1],
  }
  pad = metadata.get('tokenizer.ggml.padding_token_id', 0)
  sampler = {
    ours: metadata[f'diffusion.eb_{theirs}']
    for ours, theirs in (
      ('max_denoising_steps', 'max_steps'),
      ('t_min', 't_min'),
      ('t_max', 't_max'),
      ('stability_threshold', 'stability_threshold'),
      ('confidence_threshold', 'confidence_threshold'),
    )
    if f'diffusion.eb_{theirs}' in metadata
  }
  bound = metadata.get('diffusion.eb_entropy_bound')
  entropy = {} if bound is None else {'entropy_bound': bound}
  generation = {'pad_token_id': pad, **sampler, 'sampler_config': entropy}
  return _rounded(config), _rounded(generation)


def files_inside(contents: Contents, path: str) -> dict[str, bytes]:
  """{name: content} of the files that Hugging Face has beside the weights and
  GGUF in its metadata: tokenizer.json, of byte pairs, and the chat template.

  Raises:
    CheckpointError: a merge or a kind of a token is damaged.
  """
  found = {}
  template = contents.metadata.get('tokenizer.chat_template')
  if isinstance(template, str):
    found['chat_template.jinja'] = template.encode()
  lists: list[list[Any]] = []
  for name in ('tokens', 'merges', 'token_type'):
    values = contents.metadata.get(f'tokenizer.ggml.{name}')
    if not isinstance(values, list) or not values:
      return found
    lists.append(values)
  tokens, merges, kinds = lists
  pairs = [tuple(str(merge).split(' ')) for merge in merges]
  if len(kinds) != len(tokens) or any(len(pair) != 2 for pair in pairs):
    raise CheckpointError(
      f'{path}: tokenizer.ggml.merges or token_type is damaged.'
    )
  added = [
    {
      'id': index,
      'content': token,
      'single_word': False,
      'lstrip': False,
      'rstrip': False,
      'normalized': _SPACE in token,  # Else it would not be found in a text.
      'special': kind == _CONTROL_TOKEN,
    }
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
    if kind in (_CONTROL_TOKEN, _USER_TOKEN)
  ]
  space = {'String': ' '}
  decoders = [
    {'type': 'Replace', 'pattern': {'String': _SPACE}, 'content': ' '},
    {'type': 'ByteFallback'},
    {'type': 'Fuse'},
  ]
  tokenizer = {
    'version': '1.0',
    'added_tokens': added,
    'normalizer': {'type': 'Replace', 'pattern': space, 'content': _SPACE},
    'decoder': {'type': 'Sequence', 'decoders': decoders},
    'model': {
      'type': 'BPE',
      'unk_token': '<unk>',
      'fuse_unk': True,
      'byte_fallback': True,
      'vocab': {token: index for index, token in enumerate(tokens)},
      'merges': pairs,
    },
  }
  found['tokenizer.json'] = json.dumps(tokenizer).encode()
  return found


def _rotated_fraction(contents: Contents) -> float:
  """The fraction of a global head that is rotated: factors of the others are so
  large that they stand still."""
  tensor = contents.tensors.get(_ROTATIONS)
  if tensor is None:
    return 0.25
  if tensor.suffix != 'weight' or len(tensor.array.shape) != 1:
    raise tensor.array.error('is not a list of numbers')
  factors = tensor.array.read()
  return (
    float(np.mean(factors.astype(np.float32) < 1e6)) if factors.size else 1.0
  )


def _rounded(value: Any) -> Any:
  """Numbers as they were written before they were single: 0.1, for example."""
  if isinstance(value, dict):
    return {key: _rounded(x) for key, x in value.items()}
  return float(f'{value:.7g}') if isinstance(value, float) else value
