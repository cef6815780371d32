"""A run that takes seconds: for the tests of the command line.

Its text is one of the shipped corpus.
"""

import pathlib

from diffusiongemma import config


def get_config() -> config.Config:
  return config.Config(
    model=config.ModelConfig(
      vocab_size=2048,
      embed_dim=16,
      attention_pattern=('local', 'global'),
      num_heads=2,
      num_kv_heads=1,
      head_dim=8,
      num_global_kv_heads=1,
      global_head_dim=8,
      sliding_window=8,
      mlp_dim=16,
      num_experts=4,
      experts_per_token=2,
      expert_dim=8,
      context_length=64,
      dtype='float32',
    ),
    diffusion=config.DiffusionConfig(
      canvas_length=8, max_denoising_steps=4, stop_token_ids=(1,)
    ),
    data=config.DataConfig(
      path=str(
        pathlib.Path(__file__).parent / 'reference/lovers_complaint.txt'
      ),
      heldout_every=5,
      sequence_length=32,
      batch_size=2,
    ),
    optimizer=config.OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=5),
    train=config.TrainConfig(
      steps=60,
      log_every=5,
      evaluate_every=60,
      evaluate_batches=1,
      sample_every=60,
      checkpoint_every=10,
    ),
  )
