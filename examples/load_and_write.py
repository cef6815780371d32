"""Load a run and write with it.

A run, or a Hugging Face folder, is loaded by its path. With it a text is gone
on with, whole or piece by piece, holes are filled, and the probability of a
text is measured.

Command:  RUN=runs/tiny python examples/load_and_write.py
  Without RUN a network of `examples/small.py` is trained for 20 steps first.
Expected: with `runs/tiny`, lines in the manner of Shakespeare; with the small
  network, commas, line breaks and a few words. Then the log-likelihood of a
  line, and None, as the network has no bound.
"""

# %%
import os
import tempfile

from small import get_config

import diffusiongemma as dg
from diffusiongemma.training import train

folder = os.environ.get('RUN')
if not folder:
  folder = tempfile.mkdtemp()
  train.train(get_config(), folder)

# %% [markdown]
# A prompt is a text, token ids that begin with bos, or a list of either. The
# same seed writes the same text.

# %%
run = dg.load(folder)
written = dg.generate(run, 'ROMEO.', max_new_tokens=32, key=0)
print(written.text)
print(len(written.tokens), 'tokens in', written.steps, 'denoising steps')

# %% [markdown]
# `stream` yields each canvas as soon as it is denoised.

# %%
for piece in dg.stream(run, 'ROMEO.', max_new_tokens=32):
  print(piece.text, end='', flush=True)

# %% [markdown]
# Strategy, temperature and steps may differ from call to call.

# %%
rows = dg.generate(
  run,
  ['ROMEO.', 'JULIET.'],
  max_new_tokens=16,
  strategy='confidence',
  temperature=0.7,
)
for row in rows:
  print(repr(row.text))

# %% [markdown]
# Infilling: `pinned` gives tokens of the new text by their position. The
# network sees them from the first denoising step on.

# %%
love = run.tokenizer.encode('love')
pinned = {8 + i: token for i, token in enumerate(love)}
written = dg.generate(run, 'ROMEO.', max_new_tokens=16, pinned=pinned)
print(repr(written.text))
assert written.tokens[8 : 8 + len(love)] == love

# %% [markdown]
# The exact likelihood of a text, read from left to right. A run trained with
# the objective `loo_ce` has a bound of the denoising likelihood too.

# %%
likelihood = dg.log_likelihood(run, 'O, speak again, bright angel!')
per_token = likelihood.log_p / len(likelihood.log_p_of_token)
print(f'{likelihood.log_p:.1f} nats, {per_token:.2f} a token')
print('denoising bound:', likelihood.denoising_bound)
