r"""Two billion parameters, from scratch, for one accelerator of 80 GB.

Hardware: one NVIDIA H100 80 GB by the arithmetic below; not measured. On a
  laptop it does not fit: configs/tiny.py does.
Command:  python -m diffusiongemma.main --config=configs/2b.py \
              --config.data.path=FOLDER --config.data.tokenizer=FILE
  Without them, on the shipped Shakespeare and its small tokenizer.
Expected: no result of ours yet. Weights, gradients and two moments in float32
  take 33 GB, activations a few more: layers are computed again in the backward
  pass.
"""

from diffusiongemma import config


def get_config() -> config.Config:
  return config.Config(
    model=config.ModelConfig(
      vocab_size=262144,
      embed_dim=1024,
      attention_pattern=(('local',) * 5 + ('global',)) * 4,
      num_heads=8,
      num_kv_heads=4,
      head_dim=128,
      num_global_kv_heads=2,
      global_head_dim=256,
      sliding_window=512,
      mlp_dim=2048,
      num_experts=40,
      experts_per_token=4,
      expert_dim=512,
      context_length=32768,
    ),
    diffusion=config.DiffusionConfig(),
    data=config.DataConfig(sequence_length=2048, batch_size=16, packing=True),
    optimizer=config.OptimizerConfig(
      peak_learning_rate=4e-4, warmup_steps=1000, weight_decay=0.1
    ),
    train=config.TrainConfig(
      steps=100_000,
      canvases='all',
      remat='full',
      evaluate_every=1000,
      sample_every=1000,
      checkpoint_every=1000,
    ),
  )
