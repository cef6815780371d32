"""Networks of other tools: what there is at a path, its settings, its tensors.

A Hugging Face folder of safetensors, in any of the formats of `contents`, or
GGUF files.
"""

import dataclasses
import os
from typing import Any
from typing import NamedTuple

from absl import logging

from diffusiongemma import config as configs
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import foreign
from diffusiongemma.checkpoints import gguf
from diffusiongemma.checkpoints import huggingface_config
from diffusiongemma.checkpoints import safetensors
from diffusiongemma.checkpoints.formats import Array
from diffusiongemma.config import Config

CONFIG, GENERATION_CONFIG = 'config.json', 'generation_config.json'
# Keys of quantising tools; MLX writes the last one.
_QUANTIZATIONS = ('quantization_config', 'compression_config', 'quantization')
_TOWER, _PROJECTION = 'vision_tower.', 'embed_vision.'


class Network(NamedTuple):
  """A network of another tool.

  Attributes:
    folder: of the files beside the weights.
    config: its settings; the parameters are not known to be quantised yet.
    tensors: by their names in Hugging Face; only their headers are read.
    is_tied: whether tied tensors are stored once.
    inside: {name: content} of files that are in that of the weights instead of
      beside it.
  """

  folder: str
  config: Config
  tensors: dict[str, Array]
  is_tied: bool = True
  inside: dict[str, bytes] | None = None


def is_huggingface(path: str) -> bool:
  """Whether this is a folder with Hugging Face's config.json, or only weights,
  which `open_network` identifies in its error, or a GGUF file."""
  if os.path.isfile(path):
    return path.endswith('.gguf')
  if not os.path.isfile(os.path.join(path, CONFIG)):
    return os.path.isdir(path) and foreign.has_weights(path)
  return huggingface_config.is_theirs(files.read_json(path, CONFIG))


def open_network(path: str) -> Network:
  """Opens a network of another tool; reads its settings and the names of its
  tensors. A network whose vision encoder is not there is one without.

  Raises:
    CheckpointError: there is none, or one of another kind, or it is damaged.
  """
  has_safetensors = os.path.isdir(path) and any(
    name.endswith('.safetensors') for name in os.listdir(path)
  )
  if not has_safetensors and (paths := gguf.find_files(path)):
    contents = gguf.read(paths)
    values, generation = gguf.config_values(contents, paths[0])
    config = _without_vision(_to_config(values, generation, paths[0]))
    folder = os.path.dirname(paths[0]) or '.'
    inside = gguf.files_inside(contents, paths[0])
    return Network(
      folder, config, gguf.with_their_names(contents), inside=inside
    )
  config = read_config(path)
  tensors = safetensors.list_tensors(path)
  if not any(_TOWER in name for name in tensors):
    config = _without_vision(config)
    rest = [name for name in tensors if _PROJECTION in name]
    if rest:
      logging.warning(
        '%s has no vision encoder; %s are not read.', path, files.listed(rest)
      )
    tensors = {name: x for name, x in tensors.items() if name not in rest}
  arrays = {name: _array(tensor) for name, tensor in tensors.items()}
  return Network(path, config, arrays, is_tied(path))


def _array(tensor: safetensors.Tensor) -> Array:
  return Array(
    *(tensor.name, tensor.path, tensor.dtype, tensor.shape),
    read=lambda: safetensors.read_tensor(tensor),
    has_bits=lambda array: safetensors.has_bits(tensor, array),
  )


def _without_vision(config: Config) -> Config:
  model = dataclasses.replace(config.model, vision=None)
  return dataclasses.replace(config, model=model)


def read_config(hf_dir: str) -> Config:
  """The config of a Hugging Face folder; fields that it lacks have their
  defaults.

  Raises:
    CheckpointError: it has no config.json, or that of another network.
  """
  path = os.path.join(hf_dir, CONFIG)
  if not os.path.lexists(path):
    message = os.path.isdir(hf_dir) and foreign.describe_folder(hf_dir)
    raise CheckpointError(
      message
      or f'There is no {path!r}: give the folder that has {CONFIG} beside its '
      'safetensors.'
    )
  values, generation = files.read_json(hf_dir, CONFIG), {}
  if os.path.lexists(os.path.join(hf_dir, GENERATION_CONFIG)):
    generation = files.read_json(hf_dir, GENERATION_CONFIG)
  return _to_config(values, generation, path)


def _to_config(
  values: dict[str, Any], generation: dict[str, Any], path: str
) -> Config:
  """The config of both of their configs; `path` is that of the first."""
  model = huggingface_config.model_config(values, path)
  diffusion = huggingface_config.diffusion_config(
    values, generation, model.vocab_size, os.path.dirname(path)
  )
  if model.context_length <= diffusion.canvas_length:
    raise CheckpointError(
      f'{path}: max_position_embeddings = {model.context_length} leaves no '
      f'room beside a canvas of {diffusion.canvas_length}.'
    )
  length = max(configs.DataConfig.sequence_length, 4 * diffusion.canvas_length)
  length = min(length, model.context_length)
  config = Config(
    model=model,
    diffusion=diffusion,
    data=configs.DataConfig(sequence_length=length),
  )
  try:
    configs.validate(config)
  except configs.ConfigError as error:
    raise CheckpointError(f'{path}: {error}') from error
  return config


def is_tied(hf_dir: str) -> bool:
  """Whether tied tensors are stored once. Raises `CheckpointError`."""
  values = files.read_json(hf_dir, CONFIG)
  return huggingface_config.is_tied(values, os.path.join(hf_dir, CONFIG))


def names_quantization(hf_dir: str) -> bool:
  """Whether a config.json says that the weights are quantised, which is
  otherwise not asked. Raises `CheckpointError`."""
  values = files.read_json(hf_dir, CONFIG)
  text = values.get('text_config')
  groups = (values, text if isinstance(text, dict) else {})
  return any(group.get(key) for group in groups for key in _QUANTIZATIONS)


def with_smallest_vision(config: Config) -> configs.ModelConfig:
  """The network with a vision encoder without layers, for one pixel."""
  no_token = config.diffusion.pad_token_id
  vision = configs.VisionConfig(
    embed_dim=4,
    num_layers=0,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=4,
    patch_size=1,
    pooling_kernel=1,
    position_table_size=1,
    standardize=False,
    image_token_id=no_token,
    begin_image_token_id=no_token,
    end_image_token_id=no_token,
  )
  return dataclasses.replace(config.model, vision=vision)
