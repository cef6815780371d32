r"""Sudoku of nine: configs/sudoku.py for larger puzzles.

Hardware: 2 CPU cores.
Command:  python experiments/sudoku/make_puzzles.py --size=9 \
              --folder=runs/sudoku9
          python -m diffusiongemma.main --config=configs/sudoku9.py
Expected: 88 % of unseen puzzles in 48 passes, 99 % where it is asked again
          what it is not sure of, after five hours; see experiments/sudoku/. The
          run there had three schedules, the last one alone with guesses after
          1 to 8 passes.
"""

import dataclasses
import pathlib

from diffusiongemma import config

FOLDER = 'runs/sudoku9'
CELLS = 81
THETA = 315.0  # About (9 / 2 pi)^16.


def get_config() -> config.Config:
  six = config.load_config(str(pathlib.Path(__file__).parent / 'sudoku.py'))
  replace = dataclasses.replace
  return replace(
    six,
    model=replace(
      six.model,
      vocab_size=14,
      # The second pair of features turns once in about 9 cells, and in local
      # layers the fifth in about 27: what is in one column or band looks alike.
      local_rope_theta=THETA,
      global_rope_theta=THETA,
    ),
    diffusion=replace(
      six.diffusion,
      canvas_length=CELLS + 1,
      # Warm, and many passes: chosen on other puzzles than the held-out ones.
      max_denoising_steps=48,
      t_min=1.6,
      t_max=2.0,
    ),
    data=replace(
      six.data,
      path=f'{FOLDER}/train.jsonl',
      heldout_path=f'{FOLDER}/heldout.jsonl',
      tokenizer=f'{FOLDER}/sudoku.model',
      sequence_length=2 * (CELLS + 1),
    ),
    train=replace(
      six.train,
      steps=14000,
      self_conditioning_probability=0.75,
      self_conditioning_passes=8,
      ar_loss_weight=0.0,
      sample_prompt='..2.9.1..1..48.9....5.....4...9.....2...'
      '.....9....75.162.1.98.5.1.2.6.49.7.84...6',
    ),
  )
