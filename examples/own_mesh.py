"""A mesh of one's own: gradients and text on several devices.

Four devices, here four threads of one CPU, divide batch, heads, experts and
vocabulary. Which axis of an array lies along which axis of the mesh is one
table, `RULES` in `diffusiongemma/devices/sharding.py`.

Command:  python examples/own_mesh.py
Expected: how parameters are divided; a loss and a text that are the same on
  four devices as on one.
"""

# %%
import jax
import numpy as np
from small import get_config

import diffusiongemma as dg
from diffusiongemma import config as configs
from diffusiongemma.devices import sharding
from diffusiongemma.text import tokenizer as tokenizers
from diffusiongemma.training import corpus
from diffusiongemma.training import data

# Before JAX is asked for its devices. On GPUs or TPUs, leave these two out.
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)

# %% [markdown]
# Two devices along `fsdp`, which divides the batch and the parameters, times
# two along `tensor`, which divides heads, experts and vocabulary. On a command
# line this is `--config.mesh.fsdp=2 --config.mesh.tensor=2`, and nothing else
# is needed.

# %%
mesh = sharding.make_mesh(configs.MeshConfig(data=1, fsdp=2, tensor=2))
place = sharding.parameter_sharding(mesh)

# %% [markdown]
# `place` says where a parameter lies, by its path and shape. A run is loaded
# straight onto the devices with `dg.load(folder, sharding=place)`; here random
# parameters are moved there.

# %%
config = get_config()
on_one = dg.init_params(dg.Denoiser(config.model), jax.random.key(0))


def move(path, array):
  names = tuple(key.key for key in path)
  return jax.device_put(array, place(names, array.shape))


on_four = jax.tree_util.tree_map_with_path(move, on_one)
query = on_four['layer_00']['attention']['q_proj']
for name, array in (('embedding', on_four['embedding']), ('query', query)):
  print(name, array.shape, array.sharding.spec)
  print('  on each device', array.addressable_shards[0].data.shape)

# %% [markdown]
# The functions of the package use the mesh around the call. Gradients lie where
# their parameters lie.

# %%
tokenizer = tokenizers.load_tokenizer()
C = config.diffusion.canvas_length
texts = corpus.load_corpus(config.data, tokenizer, C)
batch = next(iter(data.make_dataset(texts.train, config.data, C, tokenizer)))
gradient_fn = jax.jit(
  jax.value_and_grad(dg.loss, argnums=1, has_aux=True), static_argnums=0
)
key = jax.random.key(1)
(loss_on_one, _), _ = gradient_fn(config, on_one, batch, key)
with jax.set_mesh(mesh):
  batch = jax.device_put(batch, sharding.batch_sharding(mesh))
  (loss_on_four, _), gradients = gradient_fn(config, on_four, batch, key)
print('loss', loss_on_one, 'on one device,', loss_on_four, 'on four')
print('gradient of embedding', gradients['embedding'].sharding.spec)
np.testing.assert_allclose(loss_on_one, loss_on_four, rtol=1e-5)

# %%
written = dg.generate(
  dg.Run(config, tokenizer, 0, on_one), 'ROMEO.', max_new_tokens=16
)
with jax.set_mesh(mesh):
  run = dg.Run(config, tokenizer, 0, on_four)
  divided = dg.generate(run, 'ROMEO.', max_new_tokens=16)
print(repr(divided.text))
assert divided.tokens == written.tokens
