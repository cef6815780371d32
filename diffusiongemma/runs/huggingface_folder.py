"""Recognises a Hugging Face folder, and reads its settings as a `Config`."""

import dataclasses
import os

from diffusiongemma import config as configs
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import foreign
from diffusiongemma.checkpoints import huggingface_config
from diffusiongemma.config import Config

CONFIG, GENERATION_CONFIG = 'config.json', 'generation_config.json'


def is_huggingface(path: str) -> bool:
  """Whether the folder has Hugging Face's config.json, or only weights, which
  `read_config` identifies in its error."""
  if not os.path.isfile(os.path.join(path, CONFIG)):
    return os.path.isdir(path) and foreign.has_weights(path)
  return huggingface_config.is_theirs(files.read_json(path, CONFIG))


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
  values = files.read_json(hf_dir, CONFIG)
  model = huggingface_config.model_config(values, path)
  generation = {}
  if os.path.lexists(os.path.join(hf_dir, GENERATION_CONFIG)):
    generation = files.read_json(hf_dir, GENERATION_CONFIG)
  diffusion = huggingface_config.diffusion_config(
    values, generation, model.vocab_size, hf_dir
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
