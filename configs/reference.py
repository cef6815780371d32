r"""The shape that speed is compared at on a CPU; random weights.

Hardware: 2 CPU cores.
Command:  python -m diffusiongemma.main --mode=benchmark \
              --config=configs/reference.py
Expected: see experiments/benchmarks/.
"""

from diffusiongemma import config


def get_config() -> config.Config:
  return config.Config(
    model=config.ModelConfig(
      vocab_size=32768,
      embed_dim=512,
      attention_pattern=('local',) * 5 + ('global',),
      num_heads=8,
      num_kv_heads=4,
      head_dim=64,
      num_global_kv_heads=2,
      global_head_dim=128,
      mlp_dim=512,
      num_experts=32,
      experts_per_token=4,
      expert_dim=256,
      context_length=65536,
      dtype='float32',
    ),
    data=config.DataConfig(sequence_length=512, batch_size=4),
  )
