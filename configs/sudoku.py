r"""Sudoku: the puzzle is the prompt, the solution one canvas.

Hardware: 2 CPU cores.
Command:  python experiments/sudoku/make_puzzles.py --size=6 \
              --folder=runs/sudoku6
          python -m diffusiongemma.main --config=configs/sudoku.py
Expected: 99 % of unseen puzzles within an hour; see experiments/sudoku/.
"""

from diffusiongemma import config

FOLDER = 'runs/sudoku6'
CELLS = 36


def get_config() -> config.Config:
  return config.Config(
    model=config.ModelConfig(
      vocab_size=11,
      embed_dim=128,
      # All layers see all cells; local ones have the rotary tables in which
      # every pair of features turns.
      attention_pattern=('local', 'local', 'local', 'global'),
      num_heads=4,
      num_kv_heads=2,
      head_dim=32,
      num_global_kv_heads=2,
      global_head_dim=32,
      sliding_window=256,
      mlp_dim=128,
      num_experts=4,
      experts_per_token=2,
      expert_dim=64,
      context_length=256,
      dtype='float32',
    ),
    # Warmer than what was learnt from: a network that hears itself less sure
    # than it was keeps more of its choices open. Chosen on other puzzles than
    # the held-out ones: experiments/sudoku/temperatures_6x6.json.
    diffusion=config.DiffusionConfig(
      canvas_length=CELLS + 1,
      max_denoising_steps=16,
      t_min=1.4,
      t_max=1.4,
      stop_token_ids=(1,),
    ),
    data=config.DataConfig(
      path=f'{FOLDER}/train.jsonl',
      heldout_path=f'{FOLDER}/heldout.jsonl',
      tokenizer=f'{FOLDER}/sudoku.model',
      sequence_length=2 * (CELLS + 1),
      batch_size=64,
    ),
    optimizer=config.OptimizerConfig(
      kind='muon',
      peak_learning_rate=4e-3,
      warmup_steps=100,
      final_rate_fraction=0.02,
      weight_decay=0.0,
    ),
    train=config.TrainConfig(
      steps=6000,
      log_every=50,
      evaluate_every=500,
      evaluate_batches=2,
      sample_every=1000,
      sample_prompt='1....2.3..4.....5.6.....1..2.3....4.',
      checkpoint_every=250,
    ),
  )
