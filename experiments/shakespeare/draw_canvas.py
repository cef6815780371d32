"""Draws a canvas through its denoising steps, as the terminal shows it.

  python experiments/shakespeare/draw_canvas.py --workdir=runs/tiny

Writes `canvas.svg` beside this file: the picture in README.md.
"""

import pathlib

from absl import app
from absl import flags
from absl import logging
import jax
import numpy as np
from rich import console as rich_console
from rich import text as rich_text

import diffusiongemma
from diffusiongemma.generation import live

_WORKDIR = flags.DEFINE_string('workdir', 'runs/tiny', 'A trained run.')
_PROMPT = flags.DEFINE_string('prompt', 'ROMEO.\n', 'What to go on from.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the noise.')
_SHOWN = flags.DEFINE_list('steps', ['0', '8', '16', '24', '32'], 'To draw.')

OUTPUT = pathlib.Path(__file__).parent / 'canvas.svg'
WIDTH = 78


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  run = diffusiongemma.load(_WORKDIR.value)
  states = {}
  diffusiongemma.generate(
    run.config,
    run.params,
    [[run.tokenizer.bos_id] + run.tokenizer.encode(_PROMPT.value)],
    jax.random.key(_SEED.value),
    run.config.diffusion.canvas_length,
    on_step=states.__setitem__,
  )
  # The last canvas is shown as it is committed: its draft.
  console = rich_console.Console(record=True, width=WIDTH, file=None)
  for step in map(int, _SHOWN.value):
    state, last = states[step], step == max(states)
    tokens_L = np.asarray(state.draft_BL[0] if last else state.canvas_BL[0])
    accepted_L = np.asarray(state.accepted_BL[0]) | last
    console.print(rich_text.Text(f'step {step}', live.STATUS))
    text = live.canvas_text(run.tokenizer, tokens_L, accepted_L)
    prompt = rich_text.Text().append(_PROMPT.value, live.PROMPT)
    console.print(prompt + text)
    console.print()
  title = f'a canvas of {run.config.diffusion.canvas_length} tokens'
  OUTPUT.write_text(console.export_svg(title=title))
  print(f'{OUTPUT} written')


if __name__ == '__main__':
  app.run(main)
