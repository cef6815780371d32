"""The released DiffusionGemma 26B-A4B: what its config.json says.

Hardware: 52 GB for the parameters in bfloat16; not run so far.
Command:  python -m diffusiongemma.main --mode=convert --hf_dir=IN --workdir=OUT
Expected: OUT has this config, and the weights, which this file has not.
"""

from diffusiongemma import config


def get_config() -> config.Config:
  return config.Config(
    model=config.ModelConfig(
      vocab_size=262144,
      embed_dim=2816,
      attention_pattern=(('local',) * 5 + ('global',)) * 5,
      num_heads=16,
      num_kv_heads=8,
      head_dim=256,
      num_global_kv_heads=2,
      global_head_dim=512,
      sliding_window=1024,
      local_rope_theta=1e4,
      global_rope_theta=1e6,
      global_rotary_fraction=0.25,
      mlp_dim=2112,
      num_experts=128,
      experts_per_token=8,
      expert_dim=704,
      context_length=262144,
      logit_softcap=30.0,
      norm_epsilon=1e-6,
      vision=config.VisionConfig(
        embed_dim=1152,
        num_layers=27,
        num_heads=16,
        num_kv_heads=16,
        head_dim=72,
        mlp_dim=4304,
        patch_size=16,
        pooling_kernel=3,
        position_table_size=10240,
        rope_theta=100.0,
        standardize=True,
        soft_tokens_per_image=280,
        image_token_id=258880,
        begin_image_token_id=255999,
        end_image_token_id=258882,
      ),
      dtype='bfloat16',
      param_dtype='bfloat16',
    ),
    diffusion=config.DiffusionConfig(
      canvas_length=256,
      max_denoising_steps=48,
      t_min=0.4,
      t_max=0.8,
      entropy_bound=0.1,
      stability_threshold=1,
      confidence_threshold=0.005,
      stop_token_ids=(1, 106, 50),
      pad_token_id=0,
      bos_token_id=2,
    ),
  )
