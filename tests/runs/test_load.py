"""A network read whole: the same of either kind, verified, on a mesh."""

import shutil

import hf_folder as hf
import jax
import many_devices
import numpy as np
import pytest

import diffusiongemma
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.runs import WorkdirError


def test_load_reads_either_kind(hf_dir, workdir):
  theirs, ours = diffusiongemma.load(str(hf_dir)), diffusiongemma.load(workdir)
  assert hf.same_trees(theirs.params, ours.params)
  assert theirs.config == ours.config and theirs.config.model == hf.MODEL
  assert ours.config.diffusion == hf.DIFFUSION
  assert theirs.step == ours.step == 0
  assert theirs.maybe_tokenizer is None
  with pytest.raises(
    WorkdirError, match=r'no tokenizer; put its tokenizer\.json'
  ):
    _ = theirs.tokenizer


def test_run_is_shown_in_three_lines(workdir):
  run = diffusiongemma.load(workdir)
  network, numbers, text = repr(run).splitlines()
  assert network.startswith('Run after 0 steps: 2 layers of width ')
  assert '(float32)' in numbers
  assert text.endswith(f'canvases of {run.config.diffusion.canvas_length}')


def test_loaded_parameters_compute(workdir):
  run = diffusiongemma.load(workdir)
  (written,), *_ = diffusiongemma.generate_tokens(
    run.config, run.params, [[2, 5, 6]], jax.random.key(0), max_new_tokens=8
  )
  assert written.tokens


def flip(path, places=9):
  """Flips a bit at several places of a file in turn, yielding each time."""
  good = path.read_bytes()
  for place in np.linspace(0, len(good) - 1, places).astype(int):
    bad = bytearray(good)
    bad[place] ^= 0x04
    path.write_bytes(bytes(bad))
    yield
  path.write_bytes(good)


def test_a_flipped_bit_is_reported_by_the_name_of_the_array(workdir, tmp_path):
  """In each file that holds arrays; `verify=False` is quicker and blind."""
  copy = tmp_path / 'copy'
  shutil.copytree(workdir, copy)
  good = diffusiongemma.load(str(copy)).params
  leaves = jax.tree_util.tree_leaves_with_path(good)
  names = [jax.tree_util.keystr(path) for path, _ in leaves]
  named = 0
  params = copy / 'checkpoints' / '0' / 'params'
  for file in params.rglob('d/*'):
    for _ in flip(file):
      try:
        loaded = diffusiongemma.load(str(copy)).params
      except CheckpointError as error:
        is_named = any(name in str(error) for name in names)
        assert is_named or 'the index of its arrays' in str(error), error
        named += is_named
      else:
        assert hf.same_trees(loaded, good)  # A byte that nothing depends on.
  assert named >= 5
  assert hf.same_trees(
    diffusiongemma.load(str(copy), verify=False).params, good
  )


ON_A_MESH = """
import sys
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import diffusiongemma

mesh = jax.make_mesh(
  (4, 2), ('x', 'y'), axis_types=(jax.sharding.AxisType.Auto,) * 2
)

def sharding(path, shape):
  axes = ['x' if n % 4 == 0 else 'y' if n % 2 == 0 else None for n in shape]
  first = {axis: i for i, axis in reversed(list(enumerate(axes)))}
  axes = [axis if first[axis] == i else None for i, axis in enumerate(axes)]
  return NamedSharding(mesh, PartitionSpec(*axes))

for path in sys.argv[1:]:
  plain = diffusiongemma.load(path).params
  spread = diffusiongemma.load(path, sharding=sharding).params
  def check(keys, a, b):
    wanted = sharding(tuple(key.key for key in keys), a.shape)
    assert b.sharding.is_equivalent_to(wanted, a.ndim), keys
    assert (np.asarray(a) == np.asarray(b)).all()
    return len({shard.data.shape for shard in b.addressable_shards})
  jax.tree_util.tree_map_with_path(check, plain, spread)
  assert spread['embedding'].addressable_shards[0].data.size < plain[
    'embedding'].size
  print('equal')
"""


def test_arrays_go_straight_to_their_shards(hf_dir, workdir):
  output = many_devices.run(ON_A_MESH, hf_dir, workdir, devices=8)
  assert output.split() == ['equal', 'equal']
