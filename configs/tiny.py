"""Shakespeare on a laptop: 2.4 million parameters, five minutes of training.

Hardware: 2 CPU cores (memory: not measured).
Command:  python -m diffusiongemma.main --config=configs/tiny.py
Expected: after 900 steps, held-out plays cost about 2.2 bits a byte in the
  prefill pass (bzip2 -9: 2.67); experiments/README.md has the numbers, and
  those of an hour's run.
"""

from diffusiongemma import config


def get_config() -> config.Config:
  return config.Config(
    model=config.ModelConfig(
      vocab_size=2048,
      embed_dim=128,
      attention_pattern=('local',) * 5 + ('global',),
      num_heads=2,
      num_kv_heads=1,
      head_dim=64,
      num_global_kv_heads=1,
      global_head_dim=64,
      sliding_window=64,
      mlp_dim=256,
      num_experts=8,
      experts_per_token=2,
      expert_dim=64,
      context_length=1024,
      dtype='float32',
    ),
    # The released model's bound of 0.1 nats is for a network that is sure of
    # most of a canvas; this one never is, and writes better when it may
    # settle more in each of fewer steps.
    diffusion=config.DiffusionConfig(
      canvas_length=64,
      max_denoising_steps=32,
      t_min=0.6,
      t_max=0.9,
      entropy_bound=3.0,
      stop_token_ids=(1,),
    ),
    data=config.DataConfig(sequence_length=256, batch_size=8),
    optimizer=config.OptimizerConfig(
      peak_learning_rate=4e-3,
      warmup_steps=60,
      final_rate_fraction=0.02,
      b1=0.9,
      weight_decay=0.0,
    ),
    train=config.TrainConfig(
      steps=900, evaluate_every=300, sample_every=300, checkpoint_every=300
    ),
  )
