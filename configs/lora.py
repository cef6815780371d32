r"""Fine-tuning on chats with adapters of low rank, from a checkpoint.

Hardware: not measured. The weights stay in bfloat16; adapters, their gradients
  and moments are float32.
Command:  python -m diffusiongemma.main --config=configs/lora.py \
              --config.train.init_from=OUT --config.data.path=chats.jsonl
  Experts too: --config.lora.targets='*/attention/*,*/experts/*'. Data as in
  configs/sft.py. `--mode=sample` merges the adapters; so does `--mode=export`.
  OUT may be quantised; samples are then drawn with the adapters apart.
Expected: no result of ours yet.
"""

from diffusiongemma import config


def get_config() -> config.Config:
  return config.Config(
    # Network and sampler of a checkpoint take the place of these.
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
      param_dtype='bfloat16',
    ),
    diffusion=config.DiffusionConfig(canvas_length=64, stop_token_ids=(1,)),
    data=config.DataConfig(sequence_length=1024, batch_size=8),
    lora=config.LoraConfig(rank=16, alpha=32.0),
    optimizer=config.OptimizerConfig(weight_decay=0.0),
    train=config.TrainConfig(
      steps=1000, remat='full', sample_prompt='', evaluate_every=250
    ),
  )
