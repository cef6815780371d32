"""A mesh of one's own: training and writing on several devices.

Four devices, here four threads of one CPU, divide batch, heads, experts and
vocabulary. Which axis of an array lies along which axis of the mesh is one
table, `RULES` in `diffusiongemma/devices/sharding.py`.

Command:  python examples/own_mesh.py
Expected: how parameters are divided; a training step; a text that is the same
  on four devices as on one.
"""

# %%
import dataclasses
import tempfile

import jax
from small import get_config

import diffusiongemma as dg
from diffusiongemma import config as configs
from diffusiongemma.devices import sharding
from diffusiongemma.training import train

# Before JAX is asked for its devices. On GPUs or TPUs, leave these two out.
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)

# %% [markdown]
# The mesh is part of the config of a run: two devices along `fsdp`, which
# divides the batch and the parameters, times two along `tensor`, which divides
# heads, experts and vocabulary. On a command line it is
# `--config.mesh.fsdp=2 --config.mesh.tensor=2`.

# %%
config = get_config()
config = dataclasses.replace(
  config,
  mesh=configs.MeshConfig(data=1, fsdp=2, tensor=2),
  train=dataclasses.replace(config.train, steps=10),
)
folder = tempfile.mkdtemp()
train.train(config, folder)

# %% [markdown]
# `load` puts each array straight onto its devices: `sharding` is a function of
# the path and the shape of an array.

# %%
mesh = sharding.make_mesh(config.mesh)
run = dg.load(folder, sharding=sharding.parameter_sharding(mesh))
query = run.params['layer_00']['attention']['q_proj']
for name, array in (('embedding', run.params['embedding']), ('query', query)):
  print(name, array.shape, array.sharding.spec)
  print('  on each device', array.addressable_shards[0].data.shape)

# %% [markdown]
# The functions of the package use the mesh around the call.

# %%
with jax.set_mesh(mesh):
  on_four = dg.generate(run, 'ROMEO.', max_new_tokens=16)
on_one = dg.generate(dg.load(folder), 'ROMEO.', max_new_tokens=16)
print(repr(on_four.text))
assert on_four.tokens == on_one.tokens
