"""A network of 5.7 GB with small tensors, to be converted, not run."""

from diffusiongemma import config


def get_config() -> config.Config:
  return config.Config(
    model=config.ModelConfig(
      vocab_size=65536,
      embed_dim=1024,
      attention_pattern=('local',) * 25 + ('global',),
      num_heads=4,
      num_kv_heads=2,
      head_dim=64,
      num_global_kv_heads=1,
      global_head_dim=128,
      mlp_dim=512,
      num_experts=64,
      experts_per_token=4,
      expert_dim=512,
      vision=config.VisionConfig(num_layers=1, embed_dim=64, mlp_dim=64),
      dtype='bfloat16',
    )
  )
