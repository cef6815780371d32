r"""Fine-tuning on chats, from a checkpoint.

Hardware: not measured. All weights are learnt, in float32 with two moments.
Command:  python -m diffusiongemma.main --config=configs/sft.py \
              --config.train.init_from=OUT --config.data.path=chats.jsonl
  OUT is a run, or a folder of Hugging Face; lines of chats.jsonl are
  {"messages": [...]} or {"prompt": ..., "response": ...}. Without them it runs
  as well: a small random network, on the shipped Shakespeare.
Expected: the recipe of the released model's fine-tuning; no result of ours.
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
    ),
    diffusion=config.DiffusionConfig(canvas_length=64, stop_token_ids=(1,)),
    data=config.DataConfig(sequence_length=1024, batch_size=8),
    # The router stays as it was trained.
    optimizer=config.OptimizerConfig(freeze=('*/router/*',)),
    train=config.TrainConfig(
      steps=1000, remat='full', sample_prompt='', evaluate_every=250
    ),
  )
