"""Shared by all tests: the CPU, a compilation cache and tiny networks."""

import gc
import io
import os
import pathlib

# For the processes that tests start, too.
os.environ['HF_HUB_OFFLINE'] = '1'  # A mistyped path asks no server.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(pathlib.Path(__file__).parents[1] / '.cache' / 'jax'),
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')

import jax
import numpy as np
import pytest
import sentencepiece

from diffusiongemma import config as configs
from diffusiongemma.model import denoiser
from diffusiongemma.runs import load
from diffusiongemma.text import tokenizer as tokenizers

# Tests compile much and compute little: XLA need not optimise. Its older
# emitters of fused operations compile twice as fast; jax 0.12 is without them,
# 0.11 was not tried. Flags that are given count more.
FLAGS = '--xla_backend_optimization_level=0'
if jax.__version__.startswith('0.10.'):
  FLAGS += ' --xla_cpu_use_fusion_emitters=false'
os.environ['XLA_FLAGS'] = f'{FLAGS} {os.environ.get("XLA_FLAGS", "")}'

# What is imported stays: collecting garbage need not look at it again.
gc.freeze()


def pytest_collection_modifyitems(items):
  """From the last file to the first: those of training, which take longest, are
  not what one worker is left with."""
  items.sort(key=lambda item: item.path, reverse=True)


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """What a module has compiled goes with it: every program is mapped into
  memory in several pieces, of which Linux allows a process 65,530."""
  yield
  jax.clear_caches()


@pytest.fixture(scope='session')
def model_config() -> configs.ModelConfig:
  """Two kinds of layers, experts, grouped heads; compiles in a second."""
  return configs.ModelConfig(
    vocab_size=97,
    embed_dim=24,
    attention_pattern=('local', 'global'),
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
  rng = np.random.default_rng(1)
  scale = lambda x: x * rng.uniform(0.6, 1.4, x.shape).astype(np.float32)
  return jax.tree.map(scale, fresh)


@pytest.fixture(scope='session')
def chat_tokenizer() -> tokenizers.Tokenizer:
  """SentencePiece with pieces that are never split, as Gemma's."""
  names = ('turn', 'channel', 'tool', 'tool_call', 'tool_response', 'image')
  control = [f'<|{name}>' for name in names] + [f'<{name}|>' for name in names]
  control += ['<|think|>', '<|image|>', '<|"|>', '<unused7>', '<mask>']
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['user model thought what is this ' * 9]),
    model_writer=model,
    vocab_size=320,
    model_type='bpe',
    byte_fallback=True,
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    normalization_rule_name='identity',
    hard_vocab_limit=False,
    pad_id=0,
    eos_id=1,
    bos_id=2,
    unk_id=3,
    pad_piece='<pad>',
    eos_piece='<eos>',
    bos_piece='<bos>',
    user_defined_symbols=[*control, '[multimodal]', '<h1>', '\n'],
    minloglevel=2,
  )
  return tokenizers.SentencePieceTokenizer(model.getvalue())


@pytest.fixture(scope='session')
def chat_run(chat_tokenizer) -> load.Run:
  """A random network that knows turns, of canvases of eight tokens."""
  config = configs.Config(
    model=configs.ModelConfig(
      vocab_size=chat_tokenizer.vocab_size,
      embed_dim=16,
      attention_pattern=('local', 'global'),
      num_heads=2,
      num_kv_heads=1,
      head_dim=8,
      num_global_kv_heads=1,
      global_head_dim=8,
      sliding_window=8,
      mlp_dim=16,
      num_experts=2,
      experts_per_token=1,
      expert_dim=8,
      context_length=1024,
      dtype='float32',
    ),
    diffusion=configs.DiffusionConfig(
      canvas_length=8,
      max_denoising_steps=3,
      stop_token_ids=(1, chat_tokenizer.control_tokens['<turn|>']),
    ),
  )
  model = denoiser.Denoiser(config.model)
  params = denoiser.init_params(model, jax.random.key(0))
  return load.Run(config, chat_tokenizer, 0, params)
