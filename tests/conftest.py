"""Shared by all tests: the CPU, a compilation cache and tiny networks."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest

from diffusiongemma import config as configs
from diffusiongemma.model import denoiser


@pytest.fixture(scope='session')
def model_config() -> configs.ModelConfig:
  """Two kinds of layers, experts, grouped heads; compiles in a second."""
  return configs.ModelConfig(
    vocab_size=97,
    embed_dim=24,
    attention_pattern=('local', 'global', 'local', 'global'),
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_global_kv_heads=1,
    global_head_dim=16,
    sliding_window=5,
    mlp_dim=20,
    num_experts=6,
    experts_per_token=2,
    expert_dim=12,
    context_length=256,
    dtype='float32',
  )


@pytest.fixture(scope='session')
def params(model_config):
  """Parameters in which norms, scalars and scales are random too."""
  model = denoiser.Denoiser(model_config)
  fresh = denoiser.init_params(model, jax.random.key(0))
  leaves, tree = jax.tree.flatten(fresh)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  leaves = [
    x * jax.random.uniform(k, x.shape, minval=0.6, maxval=1.4)
    for k, x in zip(keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(tree, leaves)
