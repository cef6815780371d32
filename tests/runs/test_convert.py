"""From a Hugging Face folder to a run and back: the same bits, or a reason."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import time

import disk
import hf_folder as hf
import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import pytest

import diffusiongemma
from diffusiongemma import config as configs
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import digest as digest_lib
from diffusiongemma.checkpoints import native
from diffusiongemma.checkpoints import safetensors
from diffusiongemma.model import denoiser
from diffusiongemma.runs import companions
from diffusiongemma.runs import convert as conversion
from diffusiongemma.runs import folder as workdirs


@pytest.mark.parametrize('dtype', hf.TYPES)
@pytest.mark.parametrize('shard_bytes', [10**9, 2000])
def test_round_trip_is_byte_identical(tmp_path, dtype, shard_bytes):
  """One file and many; what lies beside the weights comes along."""
  source, run, back = (tmp_path / name for name in ('in', 'run', 'out'))
  hf.make_folder(source, dtype, shard_bytes)
  diffusiongemma.convert(str(source), str(run))
  diffusiongemma.export(str(run), str(back))
  assert hf.contents(source) == hf.contents(back)
  for name in ('config.json', 'generation_config.json', 'chat_template.jinja'):
    assert (source / name).read_bytes() == (back / name).read_bytes()
  assert os.stat(run).st_mode == os.stat(tmp_path).st_mode | 0o055


def test_transformers_loads_what_is_exported(hf_dir, workdir, tmp_path):
  """No key missing, unexpected or mismatched, and the same logits; also in
  several files, whose index adds up."""
  parity = pytest.importorskip('parity', reason='needs torch, transformers')
  torch = pytest.importorskip('torch')
  arrays = {
    n: np.frombuffer(x[2], x[0]) for n, x in hf.contents(hf_dir).items()
  }
  run = diffusiongemma.load(workdir)

  @jax.jit
  def logits(tokens, cache):
    network, bound = (
      diffusiongemma.Denoiser(hf.MODEL),
      {'params': run.params},
    )
    zeros = jnp.zeros((1, 6, 16))
    h = network.apply(bound, tokens, zeros, cache, method='denoise')
    return network.apply(bound, h, method='logits')

  for shard_bytes in (10**9, 4000):
    out = tmp_path / str(shard_bytes)
    conversion.export(str(workdir), str(out), shard_bytes)
    kind = parity.modeling_diffusion_gemma.DiffusionGemmaForBlockDiffusion
    model, report = kind.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    tokens = np.array([[2, 5, 9, 33, 7, 21]])
    with torch.no_grad():
      read = model.model.encoder(input_ids=torch.tensor(tokens))
      theirs = model(
        decoder_input_ids=torch.tensor(tokens),
        cache=read.cache,
      ).logits
    cache = diffusiongemma.init_cache(hf.MODEL, 1, 6)
    cache = diffusiongemma.prefill(
      hf.MODEL, run.params, jnp.asarray(tokens), jnp.array([6]), cache
    )
    assert parity.difference(logits(tokens, cache), theirs) < 1e-4
  index = json.loads((out / 'model.safetensors.index.json').read_text())
  total = sum(array.nbytes for array in arrays.values())
  count = sum(array.size for array in arrays.values())
  assert index['metadata'] == {'total_size': total, 'total_parameters': count}
  files = sorted(set(index['weight_map'].values()))
  assert len(files) > 3
  for file in files:
    with open(out / file, 'rb') as stream:
      (length,) = struct.unpack('<Q', stream.read(8))
      header = json.loads(stream.read(length))
    assert header.pop('__metadata__') == {'format': 'pt'}
    size = (out / file).stat().st_size - 8 - length
    assert size <= 4000 or len(header) == 1


def test_a_text_network_gets_an_encoder_of_nothing(tmp_path):
  """transformers' class always has one; ours then has it too."""
  parity = pytest.importorskip('parity', reason='needs torch, transformers')
  import micro_config

  config = micro_config.get_config()
  workdir, out = tmp_path / 'run', tmp_path / 'out'
  workdirs.claim(str(workdir), config, companions.load_tokenizer(config))
  params = jax.tree.map(
    lambda x: jax.random.normal(jax.random.key(0), x.shape, x.dtype),
    denoiser.abstract_params(config.model),
  )
  with native.open_checkpoints(str(workdir / 'checkpoints'), 1) as manager:
    native.save(manager, 7, params, {'m': jnp.zeros(3)}, {}, config)
  diffusiongemma.export(str(workdir), str(out))
  kind = parity.modeling_diffusion_gemma.DiffusionGemmaForBlockDiffusion
  _, report = kind.from_pretrained(out, output_loading_info=True)
  assert not any(report.values()), report
  again = diffusiongemma.load(str(out))
  assert again.params.pop('vision').keys() == {
    'input_proj', 'position_table', 'projection'
  }  # fmt: skip
  assert hf.same_trees(again.params, params)
  assert again.tokenizer.encode('ROMEO.') == companions.find_tokenizer(
    config, str(workdir)
  ).encode('ROMEO.')


def test_export_reports_a_flipped_bit_and_leaves_nothing(
  workdir, tmp_path, monkeypatch
):
  monkeypatch.setattr(digest_lib, 'digest', lambda array: 'other')
  with pytest.raises(CheckpointError, match=r"\['embedding'\] differs"):
    diffusiongemma.export(str(workdir), str(tmp_path / 'out'))
  assert not os.listdir(tmp_path)


def test_a_file_that_shrinks_meanwhile_leaves_nothing(
  tmp_path, hf_dir, monkeypatch
):
  read = safetensors.read_tensor

  def read_or_fail(tensor):
    if tensor.name == hf.NORM:
      raise CheckpointError(f'{tensor.name} is gone.')
    return read(tensor)

  monkeypatch.setattr(safetensors, 'read_tensor', read_or_fail)
  with pytest.raises(CheckpointError, match='is gone'):
    diffusiongemma.convert(str(hf_dir), str(tmp_path / 'out'))
  assert not os.listdir(tmp_path)


def test_no_room_leaves_nothing(tmp_path, hf_dir, workdir):
  for function, source in (
    (diffusiongemma.convert, hf_dir),
    (diffusiongemma.export, workdir),
  ):
    with disk.full_disk(6000), pytest.raises(CheckpointError) as caught:
      function(str(source), str(tmp_path / 'out'))
    assert 'File too large' in str(caught.value)
    assert not os.listdir(tmp_path)


def test_nothing_is_overwritten(tmp_path, hf_dir, workdir):
  (tmp_path / 'mine').write_text('precious')
  for function, source in (
    (diffusiongemma.convert, hf_dir),
    (diffusiongemma.export, workdir),
  ):
    for target in (tmp_path, tmp_path / 'mine'):
      with pytest.raises(CheckpointError, match='exists already'):
        function(str(source), str(target))
  assert (tmp_path / 'mine').read_text() == 'precious'
  empty = tmp_path / 'empty'
  empty.mkdir()
  diffusiongemma.convert(str(hf_dir), str(empty))
  assert workdirs.read_config(str(empty)).model == hf.MODEL


def test_export_without_a_checkpoint(tmp_path):
  with pytest.raises(workdirs.WorkdirError, match='holds no run'):
    diffusiongemma.export(str(tmp_path), str(tmp_path / 'out'))


SCRIPT = pathlib.Path(__file__).parents[2] / 'experiments' / 'conversion'
LARGE_CONFIG = pathlib.Path(__file__).parents[1] / 'large_config.py'


@pytest.mark.skipif(
  not pathlib.Path('/proc/self/status').exists(), reason='needs Linux /proc'
)
def test_memory_does_not_grow_with_the_model(tmp_path):
  """Three times the budget of 1.5 GB + twice the largest tensor."""
  script = str(SCRIPT / 'convert_zeros.py')
  many_devices.run(
    f'import runpy; runpy.run_path({script!r}, run_name="__main__")',
    f'--config={LARGE_CONFIG}',
    f'--folder={tmp_path / "zeros"}',
    f'--output={tmp_path / "numbers.json"}',
  )
  numbers = json.loads((tmp_path / 'numbers.json').read_text())
  budget = 1.5e9 + 2 * numbers['largest_bytes']
  assert numbers['bytes'] > 3 * budget
  assert numbers['peak_bytes'] < budget, numbers


def test_a_stopped_conversion_leaves_nothing(tmp_path):
  """Stopped while it writes."""
  many_devices.run(
    'import runpy, sys; from diffusiongemma import config; '
    'script, path, folder = sys.argv[1:]; '
    'write_zeros = runpy.run_path(script)["write_zeros"]; '
    'write_zeros(config.load_config(path), folder)',
    *(SCRIPT / 'convert_zeros.py', LARGE_CONFIG, tmp_path / 'in'),
  )
  runs = tmp_path / 'runs'
  runs.mkdir()
  process = subprocess.Popen(
    [
      *(sys.executable, '-m', 'diffusiongemma.main', '--mode=convert'),
      *(f'--hf_dir={tmp_path / "in"}', f'--workdir={runs / "out"}'),
    ],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    stderr=subprocess.PIPE,
    text=True,
  )
  while not list(runs.glob('.out-*/checkpoints')):
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 143, errors
  assert 'Traceback' not in errors and not os.listdir(runs)


FEW = configs.QuantizationConfig('int4', 'int8', 'int8', group_size=4)


def test_few_bits_from_either_kind(hf_dir, workdir, tmp_path):
  """A folder, the run made from it, and quantising while loading: the same."""
  made = []
  for index, source in enumerate((hf_dir, workdir)):
    target = tmp_path / str(index)
    config = diffusiongemma.quantize(str(source), str(target), FEW)
    assert config.quantization == FEW
    run = diffusiongemma.load(str(target))
    assert run.config == config
    assert run.chat_template == '{{ messages }}'
    made.append(run.params)
  whole = diffusiongemma.load(str(hf_dir))
  config = dataclasses.replace(whole.config, quantization=FEW)
  made.append(diffusiongemma.load(str(hf_dir), config).params)
  for params in made[1:]:
    assert jax.tree.structure(params) == jax.tree.structure(made[0])
    jax.tree.map(np.testing.assert_array_equal, params, made[0])
  down = made[0]['layer_00']['experts']['down']
  exact = whole.params['layer_00']['experts']['down']
  assert down.values.dtype == jnp.int4
  error = np.abs(np.asarray(down.astype(jnp.float32) - exact))
  assert 0 < error.max() < 0.51 * float(down.scales.max())
  same = made[0]['vision']['projection'], whole.params['vision']['projection']
  np.testing.assert_array_equal(*same)


def test_a_flipped_bit_of_few_is_noticed(workdir, tmp_path):
  target = tmp_path / 'few'
  diffusiongemma.quantize(str(workdir), str(target), FEW)
  with contextlib.closing(workdirs.open_checkpoints(str(target))) as manager:
    read = native.array_reader(manager, 0)
    array = read(('layer_00', 'experts', 'down', 'values'))
  before = digest_lib.digest(array)
  array = np.array(array)
  array.flat[0] = -1 if array.flat[0] != -1 else 0
  assert digest_lib.digest(array) != before
  assert digest_lib.digest(jnp.asarray(array)) == digest_lib.digest(array)


def test_few_bits_are_for_sampling(hf_dir, workdir, tmp_path):
  target = tmp_path / 'few'
  diffusiongemma.quantize(str(workdir), str(target), FEW)
  for attempt in (
    lambda: diffusiongemma.export(str(target), str(tmp_path / 'out')),
    lambda: diffusiongemma.quantize(str(target), str(tmp_path / 'again'), FEW),
  ):
    with pytest.raises(workdirs.WorkdirError, match='is for sampling'):
      attempt()
  nothing = configs.QuantizationConfig()
  with pytest.raises(configs.ConfigError, match='leaves everything'):
    diffusiongemma.quantize(str(hf_dir), str(tmp_path / 'same'), nothing)
  odd = dataclasses.replace(FEW, group_size=5)
  with pytest.raises(configs.ConfigError, match='group_size = 5 does not'):
    diffusiongemma.quantize(str(hf_dir), str(tmp_path / 'odd'), odd)
  with pytest.raises(CheckpointError, match='exists already'):
    diffusiongemma.quantize(str(hf_dir), str(target), FEW)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['few']
