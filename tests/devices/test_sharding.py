"""Eight devices against one: losses, gradients, tokens, and what is refused."""

import dataclasses
import pathlib

import jax
import many_devices
import pytest

from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma.devices import sharding

MICRO = pathlib.Path(__file__).parents[1] / 'micro_config.py'
MESHES = ((8, 1, 1, 1), (1, 8, 1, 1), (1, 2, 2, 2))

# Run with eight devices, in a process of its own.
SCRIPT = """
import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma.devices import sharding
from diffusiongemma.diffusion import chunks
from diffusiongemma.diffusion import loss
from diffusiongemma.model import denoiser
from diffusiongemma.generation import generate
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.model import lora
from diffusiongemma.ops import attention
from diffusiongemma.training import step as steps

micro = configs.load_config(sys.argv[1])
model = dataclasses.replace(
  micro.model,
  embed_dim=24,
  num_heads=4,
  num_kv_heads=2,
  num_experts=8,
  context_length=128,
)
config = dataclasses.replace(micro, model=model)
V = model.vocab_size
C, S, B = 8, 32, 8
key = jax.random.key(0)
params = denoiser.fresh_params(config)
batch = {
  'tokens_BS': jax.random.randint(key, (B, S), 3, V),
  'length_B': jnp.arange(S - B, S) + 1,
  'first_BS': jnp.zeros((B, S), jnp.int32),
  'canvas_start_BK': jnp.array([[4, 12, -1]] * B),
  'target_mask_BS': jnp.arange(S) < jnp.arange(S - B, S)[:, None],
}
drawn = loss.draw_noise(key, batch, C, V, 0.5)
compute = jax.jit(
  lambda *given: steps.compute_gradients(config, *given)
)
prompts = [[2, 5, 7, 9], [2, 11], [2, 3, 4, 5, 6, 7, 8, 9, 10]]
prompts = [prompts[i % 3] + [20 + i] for i in range(B)]


def write(params, prompts):
  written = generate.generate_tokens(config, params, prompts, key, C)
  return [row.tokens for row in written.rows]



def place(tree, mesh):
  shapes = sharding.with_sharding(jax.eval_shape(lambda: tree), mesh)
  return jax.device_put(tree, jax.tree.map(lambda x: x.sharding, shapes))


def compare(found, expected, what):
  # Relative to the largest: what is small may be left of larger numbers, which
  # were added up in another order.
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(expected),
    jax.tree.leaves(found),
    strict=True,
  ):
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(
      b, a, rtol=0, atol=2e-6 + 5e-5 * np.abs(a).max(),
      err_msg=f'{what} {jax.tree_util.keystr(path)}',
    )


# Local layers take blocks of queries with the keys that their window reaches.
attention._BLOCK_UNIT = 4
assert attention._has_bands(S, model.sliding_window)
# Logits of three positions at a time on eight devices.
chunks.CHUNK_LOGITS = 3 * V * B // 8
expected = compute(params, batch, drawn)
tokens, single = write(params, prompts), write(params, prompts[:1])


def read(params):
  # One row afresh, whose positions devices share.
  given = batch['tokens_BS'][:1], batch['length_B'][:1]
  return prompt_lib.read_tokens(config.model, params, *given, None)


expected_cache = read(params)
for sizes in MESHES:
  mesh = sharding.make_mesh(configs.MeshConfig(*sizes))
  placed = place(params, mesh)
  with jax.set_mesh(mesh):
    rows = sharding.batch_sharding(mesh)
    given = jax.device_put((batch, drawn), rows)
    program = compute.lower(placed, *given).compile()
    compare(program(placed, *given), expected, sizes)
    compare(read(placed), expected_cache, f'cache {sizes}')
    assert write(placed, prompts) == tokens, sizes
    if sizes[2] > 1:
      assert write(placed, prompts[:1]) == single, sizes
    text = program.as_text()
    parts = sizes[1] * sizes[2]
    whole = [f'f32[{V // n},24]' for n in (1, 2, 4) if n < parts]
    # Nor logits, probabilities or their gradients.
    whole += [f',{V // n}]' for n in (1, 2, 4, 8) if n <= parts]
    E, F = model.num_experts, model.expert_dim
    if sizes[3] > 1:
      whole += [f'f32[{E},{2 * F},24]', f'f32[{E},24,{F}]']
    gathers = [
      line for line in text.splitlines()
      if re.search('= .{0,40} all-gather', line)
      and any(shape in line.split(' all-gather')[0] for shape in whole)
    ]
    assert not gathers, (sizes, gathers)
  print(sizes, flush=True)

# What is computed again, the batch in two parts, and adapters.
chunks.CHUNK_LOGITS = 2**25
for field, value in (
  ('train.remat', 'full'),
  ('train.accumulate_steps', '2'),
  ('lora.rank', '2'),
  ('lora.targets', "('*/attention/*', '*/experts/*', '*/shared_mlp/*')"),
):
  config = fields.override(config, field, value)
adapters = lora.init_adapters(config.lora, params, key)
adapters = jax.tree.map(lambda x: x + 0.02, adapters)
compute = jax.jit(
  lambda *given: steps.compute_gradients(config, *given)
)
expected = compute(adapters, batch, drawn, params)
mesh = sharding.make_mesh(configs.MeshConfig(2, 1, 2, 2))
with jax.set_mesh(mesh):
  given = jax.device_put((batch, drawn), sharding.batch_sharding(mesh))
  found = compute(place(adapters, mesh), *given, place(params, mesh))
  compare(found, expected, 'adapters')

# Attention in blocks of queries, of which a device has 2 of 8 heads' scores,
# and in bands, a group of blocks at a time.
q_BLNH = jax.random.normal(key, (B, 12, 4, 8))
k_BSKH, v_BSKH = jax.random.normal(key, (2, B, 12, 2, 8))
i = jnp.arange(12)
mask_LL = (i <= i[:, None]) & (i > i[:, None] - 3)
mask_BLS = jnp.broadcast_to(mask_LL, (B, 12, 12))


def attend(mask, window, max_scores, *given):
  def total(q, k, v):
    out = attention.attend(q, [(k, v)], mask, max_scores, window)
    return jnp.sin(out).sum(), out

  return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*given)


# Along the batch, or along the length.
for rows, window in ((B, None), (1, None), (B, 3)):
  given = tuple(x[:rows] for x in (q_BLNH, k_BSKH, v_BSKH))
  expected = attend(mask_BLS[:rows], None, attention.MAX_SCORES, *given)
  with jax.set_mesh(mesh), sharding.activate(model, rows, 12):
    found = attend(mask_BLS[:rows], window, 60, *given)
  compare(found, expected, f'attention {rows} {window}')

with jax.set_mesh(sharding.make_mesh(configs.MeshConfig(1, 1, 8, 1))):
  try:
    generate.generate_tokens(config, params, prompts, key, C)
  except configs.ConfigError as error:
    assert 'config.model.num_heads = 4 cannot be divided' in str(error)
  else:
    raise AssertionError('eight parts of four heads')
print('equal')
"""


def test_losses_gradients_and_tokens_equal_those_of_one_device():
  """And no program puts the embedding together, or any of its parts, or all
  experts of a layer where they are spread. So do the gradients of adapters, in
  two parts, computed again."""
  output = many_devices.run(f'MESHES = {MESHES}\n{SCRIPT}', MICRO, devices=8)
  assert output.endswith('equal\n')


def test_a_mesh_takes_what_is_left():
  shape = sharding.mesh_shape(configs.MeshConfig(tensor=2, expert=2), 8)
  assert shape == (2, 1, 2, 2)
  assert sharding.mesh_shape(configs.MeshConfig(), 1) == (1, 1, 1, 1)


@pytest.mark.parametrize('sizes', [(1, 3, 1, 1), (-1, 3, 1, 1), (2, 1, 1, 1)])
def test_a_mesh_of_another_number_of_devices_is_refused(sizes):
  with pytest.raises(configs.ConfigError, match='there are 8'):
    sharding.mesh_shape(configs.MeshConfig(*sizes), 8)


@pytest.mark.parametrize(
  ('field', 'size', 'shape'),
  [
    ('data.batch_size', 6, (4, 1, 1, 1)),
    ('model.embed_dim', 18, (1, 4, 1, 1)),
    ('model.num_heads', 4, (1, 1, 8, 1)),
    ('model.mlp_dim', 6, (1, 1, 4, 1)),
    ('model.num_experts', 4, (1, 1, 2, 4)),
    ('model.vocab_size', 97, (1, 2, 1, 1)),
  ],
)
def test_what_cannot_be_divided_is_named(field, size, shape):
  config = configs.Config(data=configs.DataConfig(batch_size=64))
  config = fields.override(config, field, str(size))
  if field == 'model.num_heads':
    config = fields.override(config, 'model.num_kv_heads', '4')
  with pytest.raises(configs.ConfigError, match=f'{field} = {size} ') as info:
    sharding.validate(config, shape)
  assert 'take a multiple of' in str(info.value)


def test_every_part_of_an_accumulated_batch_is_divided():
  config = configs.Config(
    data=configs.DataConfig(batch_size=8),
    train=configs.TrainConfig(accumulate_steps=4),
  )
  sharding.validate(config, (2, 1, 1, 1))
  with pytest.raises(configs.ConfigError, match='multiple of 16'):
    sharding.validate(config, (4, 1, 1, 1))


def test_heads_are_never_cut():
  """Fewer kv heads than devices: each device has them all."""
  mesh = jax.sharding.AbstractMesh((1, 1, 4, 1), sharding.AXES)
  where = sharding.parameter_sharding(mesh)
  path = ('layer_00', 'attention', 'k_proj')
  assert where(path, (16, 8, 4)).spec[1] == 'tensor'
  assert where(path, (16, 2, 4)).spec[1] is None


@dataclasses.dataclass(frozen=True)
class Device:
  """As much of a device as a mesh looks at."""

  id: int
  slice_index: int
  process_index: int
  platform: str = 'cpu'
  device_kind: str = 'cpu'


def test_slices_are_apart_along_data_alone():
  devices_of_two = [Device(i, i % 2, i % 2) for i in range(8)]
  mesh = sharding.make_mesh(configs.MeshConfig(4, 2), devices_of_two)
  slices = [{d.slice_index for d in row.flat} for row in mesh.devices]
  assert slices == [{0}, {0}, {1}, {1}]
  with pytest.raises(configs.ConfigError, match='a multiple of the 2 slices'):
    sharding.make_mesh(configs.MeshConfig(1, 8), devices_of_two)


def shares_of(mesh_config, processes, monkeypatch):
  """What each process reads, on eight devices that are spread like this."""
  spread = [Device(i, 0, process) for i, process in enumerate(processes)]
  mesh = sharding.make_mesh(mesh_config, spread)
  shares = []
  for process in sorted(set(processes)):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    shares.append(dataclasses.astuple(sharding.share_of_batch(mesh)))
  return shares


@pytest.mark.parametrize(
  ('sizes', 'processes', 'shares'),
  [
    ((8, 1, 1, 1), (0,) * 8, [(0, 1)]),
    ((8, 1, 1, 1), (0, 0, 0, 0, 1, 1, 1, 1), [(0, 2), (1, 2)]),
    ((2, 1, 2, 2), (1, 1, 1, 1, 0, 0, 0, 0), [(1, 2), (0, 2)]),
    # Heads over both: the same rows.
    ((1, 1, 8, 1), (0, 0, 0, 0, 1, 1, 1, 1), [(0, 1), (0, 1)]),
    ((2, 1, 4, 1), (0, 0, 1, 1, 2, 2, 3, 3), [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ((1, 1, 4, 2), (0, 1) * 4, [(0, 2), (1, 2)]),
  ],
)
def test_processes_of_the_same_rows_read_the_same(
  sizes, processes, shares, monkeypatch
):
  config = configs.MeshConfig(*sizes)
  assert shares_of(config, processes, monkeypatch) == shares


@pytest.mark.parametrize('processes', [(0, 0, 0, 1, 1, 1, 1, 1), (0, 1, 2) * 2])
def test_rows_shared_in_part_are_refused(processes, monkeypatch):
  spread = len(processes)
  with pytest.raises(configs.ConfigError, match='and not all'):
    shares_of(configs.MeshConfig(spread // 2, 1, 2), processes, monkeypatch)
