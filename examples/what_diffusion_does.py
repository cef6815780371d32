"""What diffusion does to a canvas.

A canvas begins as random tokens. In each pass the network predicts all of them
at once; the predictions of lowest entropy are accepted, as many as the entropy
bound allows, and all other positions become new random tokens. The network
`stories` comes with the package and writes simple English, 16 tokens a canvas.

Command:  python examples/what_diffusion_does.py
  PROMPT="..." begins otherwise, SEED=1 draws otherwise, PICTURE=FILE.svg saves
  the first figure.
Expected: a figure of the passes of a canvas, and one of the entropy of two.
"""

# %%
import os

import jax
from matplotlib import pyplot as plt
import numpy as np

import diffusiongemma as dg

PROMPT = os.environ.get('PROMPT', 'Once upon a time, there was a little fox')
CANVASES = 2
run = dg.load('stories')
print(run)

# %% [markdown]
# `on_step` is called before the first pass of a canvas and after each.

# %%
passes: list[dict[str, np.ndarray]] = []


def on_step(number, state):
  """Notes the canvas, what is accepted, and the entropy, in nats."""
  del number
  is_last = bool(state.is_frozen_B[0])
  passes.append(
    {
      'tokens': np.asarray((state.draft_BL if is_last else state.canvas_BL)[0]),
      'accepted': np.asarray(state.accepted_BL[0]) | is_last,
      'entropy': np.asarray(state.entropy_BL[0]),
    }
  )


tokens = [run.tokenizer.bos_id, *run.tokenizer.encode(PROMPT)]
length = run.config.diffusion.canvas_length
written = dg.generate_tokens(
  *(
    run.config,
    run.params,
    [tokens],
    jax.random.key(int(os.environ.get('SEED', 5))),
  ),
  CANVASES * length,
  on_step=on_step,
)
print(PROMPT + run.tokenizer.decode(written.rows[0].tokens))

# %% [markdown]
# The first canvas. Each row is a pass and each column a position: green are
# accepted tokens, grey is noise, which is drawn anew each time. What was
# accepted may change again: nothing is final before all of it is certain.

# %%
starts = [i for i, step in enumerate(passes) if not step['accepted'].any()]
starts = [i for i in starts if i == 0 or passes[i - 1]['accepted'].all()]
canvases = [
  passes[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)
]


def printable(piece):
  """A piece to draw; a dot stands for spaces and control characters."""
  piece = piece.strip()
  return piece if piece.isprintable() and piece else '·'


def draw(axes, canvas):
  """The tokens of each pass."""
  for row, step in enumerate(canvas):
    pieces = run.tokenizer.pieces(step['tokens'])
    for column, piece in enumerate(pieces):
      is_accepted = step['accepted'][column]
      axes.text(
        *(column, row, printable(piece)),
        ha='center',
        va='center',
        fontsize=7.5,
        color='#0b6b2f' if is_accepted else '#9a9a9a',
        fontweight='bold' if is_accepted else 'normal',
      )
  axes.set_xlim(-0.6, length - 0.4)
  axes.set_ylim(len(canvas) - 0.4, -0.6)
  axes.set_yticks(range(len(canvas)), ['noise', *range(1, len(canvas))])
  axes.set_xticks([])
  axes.set_ylabel('pass')
  axes.spines[:].set_visible(False)


first = canvases[0]
figure, axes = plt.subplots(
  figsize=(8.5, 0.22 * len(first) + 0.4), dpi=72, layout='constrained'
)
draw(axes, first)
if path := os.environ.get('PICTURE'):
  figure.savefig(path)
plt.show()

# %% [markdown]
# The entropy of the predictions falls from pass to pass. A canvas is finished
# when its mean is below the confidence threshold and the draft has not changed.

# %%
figure, axes = plt.subplots(figsize=(6, 2.6), dpi=80, layout='constrained')
for number, canvas in enumerate(canvases):
  means = [step['entropy'].mean() for step in canvas[1:]]
  axes.plot(
    range(1, len(canvas)), means, marker='o', label=f'canvas {number + 1}'
  )
axes.set_xlabel('pass')
axes.set_ylabel('mean entropy, nats')
axes.set_ylim(bottom=0)
axes.legend(frameon=False)
axes.spines[['top', 'right']].set_visible(False)
plt.show()
