"""A training loop of one's own: `dg.loss` with an optimiser of optax.

`dg.loss` is a pure function of parameters, batch and key: differentiate it,
compile it, put it into any loop. The batches come from the package's data
functions here; any arrays of the same shapes and types do.

Command:  python examples/own_training_loop.py
Expected: the loss falls from about 15 to about 11 nats in 40 steps; then 16
  tokens of the network that was trained.
"""

# %%
import jax
import optax
from small import get_config

import diffusiongemma as dg
from diffusiongemma.text import tokenizer as tokenizers
from diffusiongemma.training import corpus
from diffusiongemma.training import data

config = get_config()
tokenizer = tokenizers.load_tokenizer()
C = config.diffusion.canvas_length

# %% [markdown]
# The shipped Shakespeare as batches of token ids. `batch` has five arrays; what
# each of them means is said by `diffusiongemma.diffusion.loss.check_batch`.

# %%
texts = corpus.load_corpus(config.data, tokenizer, C)
batches = iter(data.make_dataset(texts.train, config.data, C, tokenizer))
batch = next(batches)
for name, array in batch.items():
  print(name, array.dtype, array.shape)

# %% [markdown]
# Any optimiser. The loss is the denoising loss of a canvas in each row plus,
# times `config.train.ar_loss_weight`, the loss from left to right.

# %%
params = dg.init_params(dg.Denoiser(config.model), jax.random.key(0))
optimizer = optax.adamw(1e-2)
opt_state = optimizer.init(params)


@jax.jit
def step(params, opt_state, batch, key):
  value_and_grad = jax.value_and_grad(dg.loss, argnums=1, has_aux=True)
  (_, metrics), gradients = value_and_grad(config, params, batch, key)
  updates, opt_state = optimizer.update(gradients, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, metrics


key = jax.random.key(1)
losses = []
for n in range(40):
  params, opt_state, metrics = step(
    params, opt_state, next(batches), jax.random.fold_in(key, n)
  )
  losses.append(float(metrics['loss']))
  if n % 10 == 9:
    print(n + 1, {name: round(float(x), 2) for name, x in metrics.items()})
assert losses[-1] < losses[0] - 1

# %% [markdown]
# The parameters write like those of any run.

# %%
run = dg.Run(config, tokenizer, 40, params)
print(repr(dg.generate(run, 'ROMEO.', max_new_tokens=16).text))
