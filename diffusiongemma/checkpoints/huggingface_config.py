"""Reads and writes Hugging Face's config.json and generation_config.json.

One table per object: (our field, their key, the default in `transformers` 5.24,
or the type of a key without default). Null counts as absent, and keys that do
not change the numbers are ignored; options that this network does not have are
errors. Files written here are read by `transformers` 5.11 and later.
"""

import os
from typing import Any

from absl import logging

from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files
from diffusiongemma.config import DiffusionConfig
from diffusiongemma.config import ModelConfig
from diffusiongemma.config import VisionConfig

MODEL_TYPE = 'diffusion_gemma'

_TEXT_FIELDS = (
  ('vocab_size', 'vocab_size', 262144),
  ('embed_dim', 'hidden_size', 2304),
  ('num_heads', 'num_attention_heads', 8),
  ('num_kv_heads', 'num_key_value_heads', 4),
  ('head_dim', 'head_dim', 256),
  ('sliding_window', 'sliding_window', 512),
  ('mlp_dim', 'intermediate_size', 9216),
  ('num_experts', 'num_experts', int),
  ('experts_per_token', 'top_k_experts', int),
  ('expert_dim', 'moe_intermediate_size', int),
  ('context_length', 'max_position_embeddings', 131072),
  ('logit_softcap', 'final_logit_softcapping', 30.0),
  ('norm_epsilon', 'rms_norm_eps', 1e-6),
)
_VISION_FIELDS = (
  ('embed_dim', 'hidden_size', 768),
  ('num_layers', 'num_hidden_layers', 16),
  ('num_heads', 'num_attention_heads', 12),
  ('num_kv_heads', 'num_key_value_heads', 12),
  ('head_dim', 'head_dim', 64),
  ('mlp_dim', 'intermediate_size', 3072),
  ('patch_size', 'patch_size', 16),
  ('pooling_kernel', 'pooling_kernel_size', 3),
  ('position_table_size', 'position_embedding_size', 10240),
  ('norm_epsilon', 'rms_norm_eps', 1e-6),
  ('standardize', 'standardize', False),
)
_IMAGE_FIELDS = (
  ('soft_tokens_per_image', 'vision_soft_tokens_per_image', 280),
  ('image_token_id', 'image_token_id', 258880),
  ('begin_image_token_id', 'boi_token_id', 255999),
  ('end_image_token_id', 'eoi_token_id', 258882),
)
_GENERATION_FIELDS = (
  ('max_denoising_steps', 'max_denoising_steps', 48),
  ('t_min', 't_min', 0.4),
  ('t_max', 't_max', 0.8),
  ('stability_threshold', 'stability_threshold', 1),
  ('confidence_threshold', 'confidence_threshold', 0.005),
  ('pad_token_id', 'pad_token_id', 0),
)
# Their options with only one value that this network supports.
_FIXED_TEXT = {
  'hidden_activation': 'gelu_pytorch_tanh',
  'attention_bias': False,
}
_FIXED_VISION = {
  'hidden_activation': 'gelu_pytorch_tanh',
  'attention_bias': False,
  'model_type': 'gemma4_vision',
  'use_clipped_linears': False,
}
_KINDS = {'sliding_attention': 'local', 'full_attention': 'global'}
_LARGEST = 2**31 - 1
_MAX_LAYERS = 1000


def is_theirs(values: dict[str, Any]) -> bool:
  """Whether a config.json is Hugging Face's, of any network."""
  return 'model_type' in values or 'architectures' in values


def model_config(
  values: dict[str, Any], path: str = 'config.json'
) -> ModelConfig:
  """The network that a Hugging Face config describes.

  Args:
    values: the contents of their config.json.
    path: of that file, for messages.

  Raises:
    CheckpointError: another `model_type`, an option that this network does
      not have, or a value that is missing or of the wrong type.
  """
  if values.get('model_type') != MODEL_TYPE:
    if {'model', 'diffusion'} <= values.keys():
      raise CheckpointError(
        f'{path} is that of a run, which needs no conversion: give its folder '
        'as --workdir.'
      )
    raise CheckpointError(
      f'{path} has model_type {values.get("model_type")!r}; only '
      f'{MODEL_TYPE!r} can be read.'
    )
  text = _Reader(values, path).group('text_config')
  text.check_fixed(_FIXED_TEXT)
  text.check_empty('rope_scaling')
  fields = text.fields(_TEXT_FIELDS)
  if not fields['logit_softcap']:
    raise CheckpointError(
      f'{text.where("final_logit_softcapping")} cannot be 0: transformers '
      'divides by it.'
    )
  fields['attention_pattern'] = _attention_pattern(text)
  fields |= _global_heads(text, fields)
  fields |= _rotations(text, fields['attention_pattern'])
  fields |= dict(vision=_vision_config(values, path), **_dtypes(values))
  return ModelConfig(**fields)


def is_tied(values: dict[str, Any], path: str = 'config.json') -> bool:
  """Whether encoder and decoder, and embedding and head, are stored once. The
  key in text_config is ignored, as in `transformers`."""
  return _Reader(values, path).take('tie_word_embeddings', True)


def _attention_pattern(text: '_Reader') -> tuple[str, ...]:
  count = text.take('num_hidden_layers', 30)
  if count > _MAX_LAYERS:
    raise CheckpointError(f'{text.where("num_hidden_layers")} is {count}.')
  names = text.values.get('layer_types')
  if names is None:
    names = [
      'full_attention' if i % 6 == 5 else 'sliding_attention'
      for i in range(count)
    ]
  if not isinstance(names, list) or any(
    not isinstance(name, str) or name not in _KINDS for name in names
  ):
    raise CheckpointError(
      f'{text.where("layer_types")} must be a list of {" and ".join(_KINDS)}.'
    )
  if len(names) != count:
    raise CheckpointError(
      f'{text.where("layer_types")} has {len(names)} entries for '
      f'{count} layers.'
    )
  # transformers makes the last layer global, whatever the config says.
  return (*(_KINDS[name] for name in names[:-1]), 'global')


def _global_heads(text: '_Reader', fields: dict[str, Any]) -> dict[str, int]:
  """Sizes of global layers: in separate fields as released, or per layer as
  `save_pretrained` writes them."""
  pattern = fields['attention_pattern']
  by_layer = text.values.get('per_layer_config')
  if by_layer is None:
    kv_heads = text.values.get('num_global_key_value_heads')
    return {
      'num_global_kv_heads': fields['num_kv_heads']
      if kv_heads is None
      else text.take('num_global_key_value_heads', 0),
      'global_head_dim': text.take('global_head_dim', 512),
    }
  message = (
    f'{text.where("per_layer_config")} must give all full_attention layers '
    'the same head_dim and num_key_value_heads, and the others none but those '
    'of text_config.'
  )
  if not isinstance(by_layer, dict):
    raise CheckpointError(message)
  sizes: dict[str, set[Any]] = {kind: set() for kind in ('local', 'global')}
  try:
    layers = {int(k): _Reader(v, text.path) for k, v in by_layer.items()}
    # Keys that a layer lacks are those of text_config.
    for index, kind in enumerate(pattern):
      layer = layers.pop(index, _Reader({}, text.path))
      kv_heads = layer.take('num_key_value_heads', fields['num_kv_heads'])
      head_dim = layer.take('head_dim', fields['head_dim'])
      sizes[kind].add((kv_heads, head_dim))
      others = layer.values.keys() - {'num_key_value_heads', 'head_dim'}
      for key in sorted(others):
        if layer.values[key] != text.values.get(key):
          where = text.where(f'per_layer_config.{index}')
          raise CheckpointError(
            f'{where}: {files.quote(key)} differs from that of text_config, '
            'and layers may only differ in head_dim and num_key_value_heads.'
          )
  except (ValueError, AttributeError) as error:
    raise CheckpointError(message) from error
  in_all = {(fields['num_kv_heads'], fields['head_dim'])}
  if layers or len(sizes['global']) != 1 or sizes['local'] - in_all:
    raise CheckpointError(message)
  ((kv_heads, head_dim),) = sizes['global']
  return {'num_global_kv_heads': kv_heads, 'global_head_dim': head_dim}


def _rotations(
  text: '_Reader', pattern: tuple[str, ...]
) -> dict[str, float | int]:
  """Rotary bases of both kinds of layers, and the rotated fraction of a global
  head."""
  fields = {
    'local_rope_theta': 1e4,
    'global_rope_theta': 1e6,
    'global_rotary_fraction': 0.25,
  }
  if text.values.get('rope_parameters') is None:
    return fields
  for theirs, ours in _KINDS.items():
    rope = text.group('rope_parameters').group(theirs)
    if ours not in pattern:
      continue
    fields[f'{ours}_rope_theta'] = rope.take('rope_theta', float)
    fraction = rope.take('partial_rotary_factor', 1.0)
    # If whole heads are rotated, the two are the same.
    kinds = ['proportional'] + ['default'] * (fraction == 1.0)
    kind = rope.values.get('rope_type') or rope.values.get('type', 'default')
    if kind not in kinds:
      raise CheckpointError(
        f'{rope.where("rope_type")} = {kind!r} is not supported, only '
        f'{" and ".join(kinds)} with partial_rotary_factor = {fraction}.'
      )
    if kind == 'proportional':
      rope.check_fixed({'factor': 1.0})
    if ours == 'global':
      fields['global_rotary_fraction'] = fraction
    else:
      rope.check_fixed({'partial_rotary_factor': 1.0})
  return fields


def _vision_config(values: dict[str, Any], path: str) -> VisionConfig:
  top = _Reader(values, path)
  vision = top.group('vision_config')
  vision.check_fixed(_FIXED_VISION)
  vision.check_empty('rope_scaling')
  rope = vision.group('rope_parameters')
  # 'default' is the released name of the axial rotation, 'axial' the name since
  # transformers 5.17.
  kind = rope.values.get('rope_type') or rope.values.get('type') or 'default'
  if kind not in ('default', 'axial'):
    raise CheckpointError(
      f'{rope.where("rope_type")} = {kind!r} is not supported, only default '
      'and axial, which are the same.'
    )
  bidirectional = top.group('text_config').values.get(
    'use_bidirectional_attention'
  )
  if bidirectional not in ('vision', None):
    raise CheckpointError(
      f'{path}: text_config.use_bidirectional_attention = {bidirectional!r} '
      "is not supported; 'vision' and null are."
    )
  config = VisionConfig(
    **vision.fields(_VISION_FIELDS),
    **top.fields(_IMAGE_FIELDS),
    rope_theta=rope.take('rope_theta', vision.take('rope_theta', 100.0)),
    bidirectional=bidirectional == 'vision',
  )
  if config.num_layers > _MAX_LAYERS:
    raise CheckpointError(f'{vision.where("num_hidden_layers")} is too large.')
  return config


def _dtypes(values: dict[str, Any]) -> dict[str, str]:
  """Computation in the type of the weights; float16 lacks the range for these
  activations and their sums and is computed in float32."""
  dtype = values.get('dtype') or values.get('torch_dtype')
  dtype = 'bfloat16' if dtype == 'bfloat16' else 'float32'
  return {'dtype': dtype, 'param_dtype': dtype}


def diffusion_config(
  values: dict[str, Any], generation: dict[str, Any], vocab_size: int, path: str
) -> DiffusionConfig:
  """The sampler of a checkpoint.

  Args:
    values: their config.json.
    generation: their generation_config.json, {} without one.
    vocab_size: stop ids beyond it are dropped.
    path: of the folder, for messages.
  """
  reader = _Reader(generation, os.path.join(path, 'generation_config.json'))
  text = _Reader(values, path).group('text_config')
  fields = reader.fields(_GENERATION_FIELDS)
  # transformers omits it; if present, it equals that of text_config.
  fields['bos_token_id'] = reader.take(
    'bos_token_id', text.take('bos_token_id', 2)
  )
  entropy = reader.group('sampler_config')
  kind = entropy.values.get('_cls_name', 'EntropyBoundSamplerConfig')
  if kind != 'EntropyBoundSamplerConfig':
    logging.warning('%s names the sampler %r; it is ignored.', path, kind)
    entropy = _Reader({}, entropy.path)
  stops = [x.get('eos_token_id') for x in (generation, values, text.values)]
  stop = next((x for x in stops if x is not None), 1)
  stop = stop if isinstance(stop, list) else [stop]
  if any(type(token) is not int or token < 0 for token in stop):
    raise CheckpointError(f'{reader.where("eos_token_id")} must be token ids.')
  return DiffusionConfig(
    canvas_length=_Reader(values, path).take('canvas_length', 256),
    entropy_bound=entropy.take('entropy_bound', 0.1),
    stop_token_ids=tuple(t for t in stop if t < vocab_size),
    **fields,
  )


class _Reader:
  """Typed access to a JSON object; errors name file and key."""

  def __init__(self, values: Any, path: str, prefix: str = ''):
    if not isinstance(values, dict):
      name = prefix.rstrip('.') or 'the file'
      raise CheckpointError(f'{path}: {name} must be an object.')
    self.values, self.path, self._prefix = values, path, prefix

  def where(self, key: str) -> str:
    return f'{self.path}: {self._prefix}{key}'

  def group(self, key: str) -> '_Reader':
    """A nested object; empty if absent."""
    values = self.values.get(key)
    values = {} if values is None else values
    return _Reader(values, self.path, f'{self._prefix}{key}.')

  def take(self, key: str, default: Any) -> Any:
    """The value of a key, of the type of `default`; if `default` is a type, the
    key is required."""
    value = self.values.get(key)
    is_required = isinstance(default, type)
    if value is None:
      if is_required:
        raise CheckpointError(f'{self.where(key)} is missing.')
      return default
    kind = default if is_required else type(default)
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind:
      raise CheckpointError(
        f'{self.where(key)} must be of type {kind.__name__}, it is '
        f'{repr(value)[:100]}.'
      )
    if kind is not bool and not 0 <= value <= _LARGEST:
      raise CheckpointError(f'{self.where(key)} cannot be {value!r}.')
    return value

  def fields(self, fields: tuple[Any, ...]) -> dict[str, Any]:
    return {ours: self.take(key, default) for ours, key, default in fields}

  def check_fixed(self, fixed: dict[str, Any]) -> None:
    for key, supported in fixed.items():
      value = self.values.get(key)
      if value is not None and value != supported:
        raise CheckpointError(
          f'{self.where(key)} = {value!r} is not supported, only {supported!r}.'
        )

  def check_empty(self, key: str) -> None:
    if self.values.get(key):
      raise CheckpointError(f'{self.where(key)} is not supported.')


def to_config(
  model: ModelConfig, diffusion: DiffusionConfig, dtype: str
) -> dict[str, Any]:
  """Their config.json for a network with a vision encoder.

  Args:
    model: the network.
    diffusion: its canvas and stop ids.
    dtype: of the weights, 'bfloat16', 'float16' or 'float32'.

  Raises:
    CheckpointError: transformers has no such network.
  """
  if model.attention_pattern[-1] != 'global':
    raise CheckpointError(
      'The last layer is local; in transformers it is always a global one.'
    )
  if not model.logit_softcap:
    raise CheckpointError(
      'config.model.logit_softcap is 0, no softcap; transformers always has '
      'one.'
    )
  theirs = {ours: name for name, ours in _KINDS.items()}
  vision = model.image_encoder
  return {
    'architectures': ['DiffusionGemmaForBlockDiffusion'],
    'canvas_length': diffusion.canvas_length,
    'dtype': dtype,
    'eos_token_id': list(diffusion.stop_token_ids),
    'model_type': MODEL_TYPE,
    'text_config': {
      'bos_token_id': diffusion.bos_token_id,
      'dtype': dtype,
      'eos_token_id': next(iter(diffusion.stop_token_ids), None),
      'global_head_dim': model.global_head_dim,
      'layer_types': [theirs[kind] for kind in model.attention_pattern],
      'model_type': f'{MODEL_TYPE}_text',
      'num_global_key_value_heads': model.num_global_kv_heads,
      'num_hidden_layers': len(model.attention_pattern),
      'pad_token_id': diffusion.pad_token_id,
      'rope_parameters': {
        'full_attention': {
          'partial_rotary_factor': model.global_rotary_fraction,
          'rope_theta': model.global_rope_theta,
          'rope_type': 'proportional',
        },
        'sliding_attention': {
          'rope_theta': model.local_rope_theta,
          'rope_type': 'default',
        },
      },
      'use_bidirectional_attention': 'vision' if vision.bidirectional else None,
      **{key: getattr(model, ours) for ours, key, _ in _TEXT_FIELDS},
      **_FIXED_TEXT,
      'tie_word_embeddings': True,
    },
    'tie_word_embeddings': True,
    'vision_config': {
      'dtype': dtype,
      # transformers before 5.17 has no 'axial'; later 'default' means it here.
      'rope_parameters': {
        'rope_theta': vision.rope_theta,
        'rope_type': 'default',
      },
      **{key: getattr(vision, ours) for ours, key, _ in _VISION_FIELDS},
      **_FIXED_VISION,
    },
    **{key: getattr(vision, ours) for ours, key, _ in _IMAGE_FIELDS},
  }


def to_generation_config(diffusion: DiffusionConfig) -> dict[str, Any]:
  """Their generation_config.json, which has no bos_token_id."""
  return {
    'eos_token_id': list(diffusion.stop_token_ids),
    'max_new_tokens': diffusion.canvas_length,
    'sampler_config': {
      '_cls_name': 'EntropyBoundSamplerConfig',
      'entropy_bound': diffusion.entropy_bound,
    },
    **{key: getattr(diffusion, ours) for ours, key, _ in _GENERATION_FIELDS},
  }
