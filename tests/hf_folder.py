"""Hugging Face folders of a tiny network, and their tensors by all names."""

import json

import jax
import ml_dtypes
import numpy as np

from diffusiongemma import config as configs
from diffusiongemma.checkpoints import huggingface
from diffusiongemma.checkpoints import huggingface_config
from diffusiongemma.checkpoints import safetensors
from diffusiongemma.checkpoints import safetensors_writer
from diffusiongemma.model import denoiser

MODEL = configs.ModelConfig(
  vocab_size=61,
  embed_dim=16,
  attention_pattern=('local', 'global'),
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  num_global_kv_heads=1,
  global_head_dim=8,
  sliding_window=4,
  mlp_dim=12,
  num_experts=3,
  experts_per_token=2,
  expert_dim=12,
  context_length=128,
  vision=configs.VisionConfig(
    embed_dim=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=6,
    patch_size=2,
    pooling_kernel=2,
    position_table_size=8,
    image_token_id=58,
    begin_image_token_id=59,
    end_image_token_id=60,
  ),
  dtype='float32',
)
DIFFUSION = configs.DiffusionConfig(canvas_length=8, stop_token_ids=(1, 50))
TYPES = {
  'float32': np.dtype(np.float32),
  'float16': np.dtype(np.float16),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
}
NORM = 'model.decoder.norm.weight'
DECODER, ENCODER = 'model.decoder.', 'model.encoder.language_model.'


def make_folder(folder, dtype='float32', max_shard_bytes=10**9):
  """A Hugging Face folder of random tensors; `{name: array}`."""
  folder.mkdir()
  table = huggingface.tensor_table(denoiser.abstract_params(MODEL))
  rng = np.random.default_rng(0)
  arrays = {
    name: rng.normal(size=entry.their_shape).astype(TYPES[dtype])
    for name, entry in table.items()
  }
  safetensors_writer.write_folder(
    str(folder),
    {name: (a.shape, a.dtype) for name, a in arrays.items()},
    arrays.__getitem__,
    max_shard_bytes,
  )
  values = huggingface_config.to_config(MODEL, DIFFUSION, dtype)
  values['initializer_range'] = 0.01  # Something that we know nothing of.
  (folder / 'config.json').write_text(json.dumps(values))
  generation = huggingface_config.to_generation_config(DIFFUSION)
  (folder / 'generation_config.json').write_text(json.dumps(generation))
  (folder / 'chat_template.jinja').write_text('{{ messages }}')
  return arrays


def contents(folder):
  """`{name: (type, shape, bytes)}` of a Hugging Face folder."""
  return {
    name: (
      tensor.dtype,
      tensor.shape,
      safetensors.read_tensor(tensor).tobytes(),
    )
    for name, tensor in safetensors.list_tensors(str(folder)).items()
  }


def same_trees(a, b):
  return jax.tree.all(
    jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)
  )


def copies_of(arrays):
  """What `transformers` ties: every name of every tensor, and its array."""
  copies = {'lm_head.weight': arrays[f'{DECODER}embed_tokens.weight']}
  for name, array in arrays.items():
    rest = name.removeprefix(DECODER)
    if rest != name and not rest.startswith('self_conditioning'):
      copies[ENCODER + rest] = arrays.get(ENCODER + rest, array)
  return copies


def arrays_of(folder):
  return {
    name: safetensors.read_tensor(tensor)
    for name, tensor in safetensors.list_tensors(str(folder)).items()
  }


def without(arrays, *parts):
  return {n: a for n, a in arrays.items() if not any(p in n for p in parts)}


def encoder_names(arrays):
  kept = {n: a for n, a in arrays.items() if f'{DECODER}self_cond' in n}
  kept |= without(arrays, DECODER) | copies_of(arrays)
  return without(kept, 'lm_head')
