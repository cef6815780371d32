"""A denoiser and a strategy of one's own.

The sampler knows of a network one function: what it predicts for a canvas. A
denoiser of ten lines takes its place here, an oracle that knows the text. A
strategy says which predictions a step accepts; one of six lines is used with
the oracle, and then with a network, without any change to the package.

Command:  python examples/own_denoiser_and_strategy.py
  With RUN=runs/tiny the strategy writes with that network.
Expected: the canvases of the oracle, with four more letters right at each step,
    to bembmbegneultnh
  up to the whole text; then a text of a network, which is random without RUN.
"""

# %%
import os

import jax
import jax.numpy as jnp
from small import get_config

import diffusiongemma as dg
from diffusiongemma.diffusion import sampler
from diffusiongemma.text import tokenizer as tokenizers

LETTERS = ' abcdefghijklmnopqrstuvwxyz'
TEXT = 'to be or not to be'
V, L = len(LETTERS), len(TEXT)
TARGET_L = jnp.array([LETTERS.index(letter) for letter in TEXT])

# %% [markdown]
# The oracle favours the right letter, the more the further left it is.
# `predict` makes of logits what the sampler asks for: a sample, the most
# probable token, entropy, confidence and the self-conditioning.


# %%
def oracle(tokens_BL, sc_BLD, temperature_B1, uniforms_BLU, left_B1):
  del tokens_BL, sc_BLD, left_B1
  certainty_L1 = jnp.linspace(12, 6, L)[:, None]
  logits_BLV = certainty_L1 * jax.nn.one_hot(TARGET_L, V)[None]
  embed = lambda p_BLV: p_BLV[..., :1]
  return sampler.predict(logits_BLV, temperature_B1, uniforms_BLU, embed)


# %% [markdown]
# The strategy accepts four more positions in each step, from left to right, and
# draws all others anew. It returns the next canvas, what it accepted, and None
# for the draft: the most probable tokens.


# %%
def left_to_right(config, canvas_BL, prediction, time, drawn):
  del config
  step_B1 = time.steps_B1 - time.left_B1 + 1
  positions_L = jnp.arange(canvas_BL.shape[-1])
  accepted_BL = positions_L < 4 * step_B1
  return dg.strategies.renoise(accepted_BL, prediction, drawn)


config = dg.DiffusionConfig(
  canvas_length=L, max_denoising_steps=6, confidence_threshold=1e-9
)


@jax.jit
def sample(key):
  sampling = dg.Sampling(strategy=left_to_right)
  return dg.sample_canvas(
    *(oracle, key, config, sampling),
    batch_size=1,
    vocab_size=V,
    embed_dim=1,
    trajectory=True,
  )


last, states = sample(jax.random.key(0))
spell = lambda tokens_L: ''.join(LETTERS[i] for i in tokens_L.tolist())
for canvas_BL in states.canvas_BL:
  print(spell(canvas_BL[0]))
assert spell(last.draft_BL[0]) == TEXT

# %% [markdown]
# The same function writes with a network: a run that is loaded, or here a
# random one.

# %%
if os.environ.get('RUN'):
  run = dg.load(os.environ['RUN'])
else:
  small = get_config()
  params = dg.init_params(dg.Denoiser(small.model), jax.random.key(0))
  run = dg.Run(small, tokenizers.load_tokenizer(), 0, params)
written = dg.generate(run, 'ROMEO.', max_new_tokens=16, strategy=left_to_right)
print(repr(written.text))
