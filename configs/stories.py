r"""Stories for children: a small network that writes simple English.

Hardware: 2 CPU cores.
Command:  python -m experiments.stories.make --out=runs/story_text/train.jsonl
          python -m experiments.stories.make --seed=1 --count=1000 \
              --tokenizer= --out=runs/story_text/heldout.jsonl
          python -m diffusiongemma.main --config=configs/stories.py
          python -m diffusiongemma.main --mode=quantize \
              --source=runs/stories --workdir=runs/stories_int8 \
              --config.quantization.experts=int8 \
              --config.quantization.linears=int8 \
              --config.quantization.embedding=int8
Expected: 5,000 steps in 76 minutes, beside other programs; held out 0.29 nats
  per token from left to right. It is the network `stories`; how its stories
  were judged is in diffusiongemma/networks/stories/README.md.
"""

from diffusiongemma import config

FOLDER = 'runs/story_text'


def get_config() -> config.Config:
  return config.Config(
    model=config.ModelConfig(
      vocab_size=2048,
      embed_dim=128,
      attention_pattern=('local',) * 3 + ('global',),
      num_heads=4,
      num_kv_heads=2,
      head_dim=32,
      num_global_kv_heads=2,
      global_head_dim=32,
      # All layers see a whole story.
      sliding_window=320,
      mlp_dim=256,
      num_experts=8,
      experts_per_token=2,
      expert_dim=64,
      context_length=320,
      dtype='float32',
    ),
    diffusion=config.DiffusionConfig(
      canvas_length=16,
      max_denoising_steps=24,
      t_min=0.4,
      t_max=0.8,
      # A story of a hundred words is thirteen canvases; one that is accepted
      # too early spoils the rest.
      entropy_bound=0.02,
      stop_token_ids=(1,),
    ),
    data=config.DataConfig(
      path=f'{FOLDER}/train.jsonl',
      heldout_path=f'{FOLDER}/heldout.jsonl',
      tokenizer=f'{FOLDER}/stories.model',
      # Of 3,000 stories the longest is 180 tokens, twelve canvases.
      sequence_length=224,
      batch_size=16,
    ),
    optimizer=config.OptimizerConfig(
      kind='muon',
      peak_learning_rate=4e-3,
      warmup_steps=100,
      final_rate_fraction=0.02,
      weight_decay=0.0,
    ),
    train=config.TrainConfig(
      steps=5000,
      canvases='all',
      ema_decay=0.998,
      log_every=20,
      evaluate_every=1000,
      evaluate_batches=4,
      sample_every=500,
      sample_prompt='Once upon a time',
      checkpoint_every=250,
    ),
  )
