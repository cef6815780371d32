"""A network that is opened: what it says of itself, and one array at a time."""

import contextlib
import dataclasses
import subprocess
import sys

from flax import traverse_util
import jax
import numpy as np
import pytest

import diffusiongemma as dg
from diffusiongemma import config as configs
from diffusiongemma.checkpoints import digest
from diffusiongemma.checkpoints import native
from diffusiongemma.model import denoiser
from diffusiongemma.model import lora
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.runs import source as sources

FEW = configs.QuantizationConfig('int4', 'int8', 'int8', group_size=4)


def adapt(folder, config, start, base):
  """A run of adapters, neither A nor B of which is zero, of the weights `base`
  in the folder `start`."""
  config = dataclasses.replace(
    config,
    lora=configs.LoraConfig(rank=2),
    train=dataclasses.replace(config.train, init_from=start),
  )
  adapters = lora.init_adapters(config.lora, base, jax.random.key(1))
  adapters = jax.tree.map(lambda x: x + 0.01, adapters)
  folder.mkdir()
  (folder / 'config.json').write_bytes(workdirs.encode_config(config))
  directory = workdirs.checkpoint_dir(str(folder))
  with contextlib.closing(native.open_checkpoints(directory, 1)) as manager:
    native.save(manager, 3, adapters, {'none': np.zeros(1)}, {}, config)
  workdirs.check_base(str(folder), digest.digests(base), note=True)
  return str(folder)


@pytest.fixture
def opened(request, hf_dir, workdir, tmp_path):
  """The path of each kind of source."""
  if request.param == 'huggingface':
    return str(hf_dir)
  if request.param == 'run':
    return str(workdir)
  config, start = workdirs.read_config(str(workdir)), ''
  base = denoiser.fresh_params(config)
  if request.param == 'adapters':
    start, base = str(workdir), dg.load(str(workdir)).params
  return adapt(tmp_path / 'adapted', config, start, base)


@pytest.mark.parametrize(
  ('opened', 'kind', 'step'),
  [
    ('run', 'run', 0),
    ('huggingface', 'huggingface', 0),
    ('adapters', 'adapters', 3),
    ('random', 'adapters', 3),
  ],
  indirect=['opened'],
)
def test_one_by_one_and_all_at_once_are_the_same(opened, kind, step):
  source = sources.open_source(opened)
  arrays, run = source.arrays(), dg.load(opened)
  assert (source.kind, arrays.step, run.step) == (kind, step, step)
  assert source.config == run.config
  loaded = traverse_util.flatten_dict(run.params)
  assert list(arrays.types) == list(loaded)
  for path, w in loaded.items():
    array = arrays.read(path)
    assert isinstance(array, np.ndarray)
    assert (array.shape, array.dtype) == (w.shape, w.dtype), path
    assert arrays.types[path].shape == w.shape, path
    assert arrays.types[path].dtype == w.dtype, path
    np.testing.assert_array_equal(array, w)
  assert arrays.num_bytes == sum(w.nbytes for w in loaded.values())
  assert source.chat_template() == run.chat_template


def test_adapters_of_other_weights_are_not_read(workdir, tmp_path):
  base = jax.tree.map(lambda x: x + 1, dg.load(str(workdir)).params)
  config = workdirs.read_config(str(workdir))
  folder = adapt(tmp_path / 'adapted', config, str(workdir), base)
  with pytest.raises(workdirs.WorkdirError, match='trained on other weights'):
    sources.open_source(folder).arrays()


def test_quantised_parameters_are_two_arrays(workdir, tmp_path):
  target = str(tmp_path / 'few')
  dg.quantize(str(workdir), target, FEW)
  source = sources.open_source(target)
  arrays, run = source.arrays(), dg.load(target)
  path = ('layer_00', 'experts', 'down')
  assert path not in arrays.types
  down = run.params['layer_00']['experts']['down']
  for name in ('values', 'scales'):
    np.testing.assert_array_equal(
      arrays.read((*path, name)), np.asarray(down.stored()[name])
    )
  with pytest.raises(workdirs.WorkdirError, match='is for sampling'):
    sources.check_not_quantized(source)


def test_opening_reads_the_config_alone(workdir, tmp_path):
  """What else is missing is told when it is asked for."""
  folder = tmp_path / 'run'
  folder.mkdir()
  content = (workdir / 'config.json').read_bytes()
  (folder / 'config.json').write_bytes(content)
  source = sources.open_source(str(folder))
  assert source.config == workdirs.read_config(str(workdir))
  assert source.tokenizer() is None and source.chat_template() is None
  for ask in (source.arrays, lambda: source.restore(None, True)):
    with pytest.raises(workdirs.WorkdirError, match='no finished checkpoint'):
      ask()


def test_what_lies_beside_is_there(hf_dir, workdir):
  for path in (hf_dir, workdir):
    beside = dict(sources.open_source(str(path)).companions())
    assert set(beside) == {
      f'huggingface/{name}'
      for name in ('config.json', 'generation_config.json')
    } | {'huggingface/chat_template.jinja'}


def test_to_load_a_run_no_optimiser_is_imported(workdir):
  script = (
    'import sys, diffusiongemma as dg\n'
    'dg.load(sys.argv[1])\n'
    'found = [m for m in sys.modules if m.startswith("optax") or '
    '"diffusiongemma.training" in m]\n'
    'assert not found, found'
  )
  command = [sys.executable, '-c', script, str(workdir)]
  subprocess.run(command, check=True)
