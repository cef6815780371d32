"""A network of 0.1 million parameters, which trains in seconds on a CPU.

Hardware: any CPU.
Command:  python -m diffusiongemma.main --config=examples/small.py
Expected: nothing worth reading. It is there so that each example runs in less
  than half a minute; give the examples a run of your own for real text.
"""

import diffusiongemma as dg
from diffusiongemma import config


def get_config() -> dg.Config:
  return dg.Config(
    model=dg.ModelConfig(
      vocab_size=2048,
      embed_dim=32,
      attention_pattern=('global',),
      num_heads=2,
      num_kv_heads=1,
      head_dim=16,
      num_global_kv_heads=1,
      global_head_dim=16,
      sliding_window=32,
      mlp_dim=64,
      num_experts=4,
      experts_per_token=2,
      expert_dim=32,
      context_length=256,
      dtype='float32',
    ),
    diffusion=dg.DiffusionConfig(
      canvas_length=16,
      max_denoising_steps=8,
      t_min=0.6,
      t_max=0.9,
      entropy_bound=3.0,
      stop_token_ids=(1,),
    ),
    data=config.DataConfig(sequence_length=64, batch_size=8),
    optimizer=config.OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=10),
    train=config.TrainConfig(
      steps=20,
      self_conditioning_probability=0.0,
      log_every=200,
      evaluate_every=500,
      evaluate_batches=1,
      sample_prompt='',
      checkpoint_every=500,
    ),
  )
