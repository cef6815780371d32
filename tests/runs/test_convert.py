"""From a Hugging Face folder to a run and back: the same bits, or a reason."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import time

import disk
import jax
import jax.numpy as jnp
import many_devices
import ml_dtypes
import numpy as np
import pytest

import diffusiongemma
from diffusiongemma import config as configs
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import digest as digest_lib
from diffusiongemma.checkpoints import huggingface
from diffusiongemma.checkpoints import huggingface_config
from diffusiongemma.checkpoints import native
from diffusiongemma.checkpoints import safetensors
from diffusiongemma.checkpoints import safetensors_writer
from diffusiongemma.model import denoiser
from diffusiongemma.runs import companions
from diffusiongemma.runs import convert as conversion
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.runs import load

MODEL = configs.ModelConfig(
  vocab_size=61,
  embed_dim=16,
  attention_pattern=('local', 'global'),
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  num_global_kv_heads=1,
  global_head_dim=8,
  sliding_window=4,
  mlp_dim=12,
  num_experts=3,
  experts_per_token=2,
  expert_dim=12,
  context_length=128,
  vision=configs.VisionConfig(
    embed_dim=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=6,
    patch_size=2,
    pooling_kernel=2,
    position_table_size=8,
    image_token_id=58,
    begin_image_token_id=59,
    end_image_token_id=60,
  ),
  dtype='float32',
)
DIFFUSION = configs.DiffusionConfig(canvas_length=8, stop_token_ids=(1, 50))
TYPES = {
  'float32': np.dtype(np.float32),
  'float16': np.dtype(np.float16),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
}


def make_folder(folder, dtype='float32', max_shard_bytes=10**9):
  """A Hugging Face folder of random tensors; `{name: array}`."""
  folder.mkdir()
  table = huggingface.tensor_table(denoiser.abstract_params(MODEL))
  rng = np.random.default_rng(0)
  arrays = {
    name: rng.normal(size=entry.their_shape).astype(TYPES[dtype])
    for name, entry in table.items()
  }
  safetensors_writer.write_folder(
    str(folder),
    {name: (a.shape, a.dtype) for name, a in arrays.items()},
    arrays.__getitem__,
    max_shard_bytes,
  )
  values = huggingface_config.to_config(MODEL, DIFFUSION, dtype)
  values['initializer_range'] = 0.01  # Something that we know nothing of.
  (folder / 'config.json').write_text(json.dumps(values))
  generation = huggingface_config.to_generation_config(DIFFUSION)
  (folder / 'generation_config.json').write_text(json.dumps(generation))
  (folder / 'chat_template.jinja').write_text('{{ messages }}')
  return arrays


@pytest.fixture(scope='module')
def hf_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('huggingface') / 'checkpoint'
  make_folder(folder)
  return folder


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, hf_dir):
  folder = tmp_path_factory.mktemp('run') / 'converted'
  diffusiongemma.convert(str(hf_dir), str(folder))
  return folder


def contents(folder):
  """`{name: (type, shape, bytes)}` of a Hugging Face folder."""
  return {
    name: (
      tensor.dtype,
      tensor.shape,
      safetensors.read_tensor(tensor).tobytes(),
    )
    for name, tensor in safetensors.list_tensors(str(folder)).items()
  }


def same_trees(a, b):
  return jax.tree.all(
    jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)
  )


@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('shard_bytes', [10**9, 2000])
def test_round_trip_is_byte_identical(tmp_path, dtype, shard_bytes):
  """One file and many; what lies beside the weights comes along."""
  source, run, back = (tmp_path / name for name in ('in', 'run', 'out'))
  make_folder(source, dtype, shard_bytes)
  diffusiongemma.convert(str(source), str(run))
  diffusiongemma.export(str(run), str(back))
  assert contents(source) == contents(back)
  for name in ('config.json', 'generation_config.json', 'chat_template.jinja'):
    assert (source / name).read_bytes() == (back / name).read_bytes()
  assert os.stat(run).st_mode == os.stat(tmp_path).st_mode | 0o055


def test_load_reads_either_kind(hf_dir, workdir):
  theirs, ours = diffusiongemma.load(str(hf_dir)), diffusiongemma.load(workdir)
  assert same_trees(theirs.params, ours.params)
  assert theirs.config == ours.config and theirs.config.model == MODEL
  assert ours.config.diffusion == DIFFUSION
  assert theirs.tokenizer is None and theirs.step == ours.step == 0


def test_loaded_parameters_compute(workdir):
  run = diffusiongemma.load(workdir)
  (written,), *_ = diffusiongemma.generate(
    run.config, run.params, [[2, 5, 6]], jax.random.key(0), max_new_tokens=8
  )
  assert written.tokens


def test_transformers_loads_what_is_exported(hf_dir, workdir, tmp_path):
  """No key missing, unexpected or mismatched, and the same logits; also in
  several files, whose index adds up."""
  parity = pytest.importorskip('parity', reason='needs torch, transformers')
  torch = pytest.importorskip('torch')
  arrays = {n: np.frombuffer(x[2], x[0]) for n, x in contents(hf_dir).items()}
  run = diffusiongemma.load(workdir)

  @jax.jit
  def logits(tokens, cache):
    network, bound = diffusiongemma.Denoiser(MODEL), {'params': run.params}
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
    cache = diffusiongemma.init_cache(MODEL, 1, 6)
    cache = diffusiongemma.prefill(
      MODEL, run.params, jnp.asarray(tokens), jnp.array([6]), cache
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
  assert same_trees(again.params, params)
  assert again.tokenizer.encode('ROMEO.') == companions.find_tokenizer(
    config, str(workdir)
  ).encode('ROMEO.')


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
        assert same_trees(loaded, good)  # A byte that nothing depends on.
  assert named >= 5
  assert same_trees(diffusiongemma.load(str(copy), verify=False).params, good)


def test_export_reports_a_flipped_bit_and_leaves_nothing(
  workdir, tmp_path, monkeypatch
):
  monkeypatch.setattr(digest_lib, 'digest', lambda array: 'other')
  with pytest.raises(CheckpointError, match=r"\['embedding'\] differs"):
    diffusiongemma.export(str(workdir), str(tmp_path / 'out'))
  assert not os.listdir(tmp_path)


def edit_header(folder, change):
  """Rewrites the JSON of model.safetensors."""
  path = folder / 'model.safetensors'
  data = path.read_bytes()
  (length,) = struct.unpack('<Q', data[:8])
  header = json.loads(data[8 : 8 + length])
  change(header)
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text)) + text + data[8 + length :])


def truncate(folder):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-10])


def rename(old, new):
  def change(header):
    header[new] = header.pop(old)

  return lambda folder: edit_header(folder, change)


def reshape(folder):
  def change(header):
    entry = header['model.decoder.norm.weight']
    entry['shape'] = [4, 4]

  edit_header(folder, change)


def retype(folder):
  def change(header):
    header['model.decoder.norm.weight']['dtype'] = 'I32'

  edit_header(folder, change)


def only_pickle(folder):
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')


def outside(folder):
  (folder / 'model.safetensors').unlink()
  (folder / 'model.safetensors.index.json').write_text(
    json.dumps({'weight_map': {'a': '../elsewhere.safetensors'}})
  )


def link_outside(folder):
  path = folder / 'model.safetensors'
  path.rename(folder.parent / 'elsewhere.safetensors')
  path.symlink_to(folder.parent / 'elsewhere.safetensors')


def config_link_outside(folder):
  path = folder / 'config.json'
  path.rename(folder.parent / 'elsewhere.json')
  path.symlink_to(folder.parent / 'elsewhere.json')


def other_model(folder):
  (folder / 'config.json').write_text('{"model_type": "llama"}')


def no_config(folder):
  (folder / 'config.json').unlink()


NORM = 'model.decoder.norm.weight'


@pytest.mark.parametrize(
  ('damage', 'messages'),
  [
    (truncate, ['model.safetensors']),
    (rename(NORM, 'model.decoder.nrom.weight'), ['missing', NORM, 'nrom']),
    (reshape, [NORM, 'model.safetensors', '[4, 4]', '[16]']),
    (retype, [NORM, 'model.safetensors', 'int32']),
    (only_pickle, ['pickle', 'pytorch_model.bin']),
    (outside, ['elsewhere.safetensors']),
    (link_outside, ['model.safetensors', 'outside']),
    (config_link_outside, ['config.json', 'outside']),
    (other_model, ['config.json', 'llama', 'diffusion_gemma']),
    (no_config, ['There is no', 'config.json']),
  ],
)
def test_refusals_say_why_and_leave_nothing(tmp_path, hf_dir, damage, messages):
  folder, out = tmp_path / 'in', tmp_path / 'runs' / 'out'
  shutil.copytree(hf_dir, folder)
  damage(folder)
  (tmp_path / 'runs').mkdir()
  with pytest.raises(CheckpointError) as caught:
    diffusiongemma.convert(str(folder), str(out))
  for message in messages:
    assert message in str(caught.value)
  assert '\n' not in str(caught.value)
  assert not os.listdir(tmp_path / 'runs')
  if damage is not no_config:
    with pytest.raises(CheckpointError):
      diffusiongemma.load(str(folder))


# Names of tied tensors, and what may be left out.

DECODER, ENCODER = 'model.decoder.', 'model.encoder.language_model.'


def copies_of(arrays):
  """What `transformers` ties: every name of every tensor, and its array."""
  copies = {'lm_head.weight': arrays[f'{DECODER}embed_tokens.weight']}
  for name, array in arrays.items():
    rest = name.removeprefix(DECODER)
    if rest != name and not rest.startswith('self_conditioning'):
      copies[ENCODER + rest] = arrays.get(ENCODER + rest, array)
  return copies


@pytest.fixture
def stored(tmp_path, hf_dir):
  """A function from arrays to a folder that holds them, with config.json."""

  def store(arrays, **changes):
    folder = tmp_path / 'in'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    values = json.loads((hf_dir / 'config.json').read_text()) | changes
    (folder / 'config.json').write_text(json.dumps(values))
    safetensors_writer.write_folder(
      str(folder),
      {name: (a.shape, a.dtype) for name, a in arrays.items()},
      arrays.__getitem__,
      5000,
    )
    return folder

  return store


def arrays_of(folder):
  return {
    name: safetensors.read_tensor(tensor)
    for name, tensor in safetensors.list_tensors(str(folder)).items()
  }


@pytest.fixture(scope='module')
def arrays(hf_dir):
  return arrays_of(hf_dir)


def without(arrays, *parts):
  return {n: a for n, a in arrays.items() if not any(p in n for p in parts)}


def encoder_names(arrays):
  kept = {n: a for n, a in arrays.items() if f'{DECODER}self_cond' in n}
  kept |= without(arrays, DECODER) | copies_of(arrays)
  return without(kept, 'lm_head')


VARIANTS = {
  'all copies': lambda a: a | copies_of(a),
  'the head alone': lambda a: without(
    a | copies_of(a), f'{DECODER}embed_tokens', f'{ENCODER}embed'
  ),
  'one copy': lambda a: (
    a | {f'{ENCODER}norm.weight': a[f'{DECODER}norm.weight']}
  ),
  'encoder names and scalars of both': lambda a: (
    encoder_names(a) | {n: x for n, x in a.items() if 'layer_scalar' in n}
  ),
  'no prefix': lambda a: {n.removeprefix('model.'): x for n, x in a.items()},
  'two prefixes': lambda a: {f'model.{n}': x for n, x in a.items()},
  'some without a prefix': lambda a: {
    n.replace('model.decoder', 'decoder'): x for n, x in a.items()
  },
  'with and without': lambda a: (
    a | {n.removeprefix('model.'): x for n, x in a.items()}
  ),
  'copies without a prefix': lambda a: {
    n.removeprefix('model.'): x for n, x in (a | copies_of(a)).items()
  },
  'what follows from the config': lambda a: (
    a
    | dict.fromkeys(
      (
        'model.decoder.layers.0.self_attn.rotary_emb.inv_freq',
        'model.decoder.rotary_emb.full_attention_inv_freq',
        'model.encoder.vision_tower.patch_embedder.position_ids',
        'model.decoder.embed_tokens.embed_scale',
      ),
      np.ones(3, np.float32),
    )
  ),
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_names_that_transformers_loads(stored, arrays, workdir, variant):
  """The same parameters, and `transformers` reads the same from the folder."""
  folder = stored(VARIANTS[variant](arrays))
  expected = diffusiongemma.load(workdir).params
  assert same_trees(diffusiongemma.load(str(folder)).params, expected)
  assert theirs_of(folder, expected)


def theirs_of(folder, expected):
  """Whether `transformers` loads the folder with these parameters."""
  parity = pytest.importorskip('parity', reason='needs torch, transformers')
  kind = parity.modeling_diffusion_gemma.DiffusionGemmaForBlockDiffusion
  model, report = kind.from_pretrained(str(folder), output_loading_info=True)
  missing = {k: v for k, v in report.items() if k != 'unexpected_keys'}
  assert not any(missing.values()), report
  return same_trees(parity.convert(model, MODEL), expected)


def test_copies_make_the_same_run(stored, arrays, hf_dir, tmp_path):
  """Exported as without them: the same tensors, each once."""
  folder = stored(arrays | copies_of(arrays), tie_word_embeddings=False)
  diffusiongemma.convert(str(folder), str(tmp_path / 'run'))
  diffusiongemma.export(str(tmp_path / 'run'), str(tmp_path / 'out'))
  assert contents(tmp_path / 'out') == contents(hf_dir)


@pytest.mark.parametrize(
  'name',
  [
    'lm_head.weight',
    f'{ENCODER}embed_tokens.weight',
    f'{ENCODER}layers.1.experts.gate_up_proj',
    f'{ENCODER}layers.0.router.per_expert_scale',
    'decoder.norm.weight',
  ],
)
def test_a_copy_that_differs_is_named(stored, arrays, tmp_path, name):
  """By one bit of the sign of a zero, too, which is equal as a number."""
  copies = arrays | copies_of(arrays)
  copies['decoder.norm.weight'] = arrays[NORM]
  copies[name] = copies[name].copy()
  copies[name].flat[-1] *= -1
  folder = stored(copies)
  with pytest.raises(CheckpointError) as caught:
    diffusiongemma.convert(str(folder), str(tmp_path / 'out'))
  message = str(caught.value)
  assert name in message and 'one weight for both roles' in message
  assert sorted(p.name for p in tmp_path.iterdir()) == ['in']


def test_a_copy_of_another_type_or_shape_is_named(stored, arrays):
  for array, reason in (
    (arrays[NORM].astype(np.float16), 'one weight for both roles'),
    (arrays[NORM].reshape(4, 4), 'has the shape'),
    (arrays[NORM][:-1], 'has the shape'),
  ):
    folder = stored(arrays | {f'{ENCODER}norm.weight': array})
    with pytest.raises(CheckpointError, match=reason) as caught:
      diffusiongemma.load(str(folder))
    assert f'{ENCODER}norm.weight' in str(caught.value)


def test_comparing_copies_holds_one_tensor(stored, arrays, monkeypatch):
  """And a piece of its copy."""
  folder = stored(arrays | copies_of(arrays))
  monkeypatch.setattr(safetensors.files, 'CHUNK_BYTES', 64)
  read, sizes = safetensors.files.read_bytes, []

  def read_bytes(descriptor, offset, nbytes, path):
    sizes.append(nbytes)
    return read(descriptor, offset, nbytes, path)

  table = huggingface.tensor_table(denoiser.abstract_params(MODEL))
  found = huggingface.find_tensors(str(folder), table)
  monkeypatch.setattr(safetensors.files, 'read_bytes', read_bytes)
  for name, entry in table.items():
    assert huggingface.read_array(entry, found[name]).shape == entry.shape
  assert max(sizes) == 64
  assert sum(sizes) == sum(
    tensor.nbytes for _, *copies in found.values() for tensor in copies
  )


@pytest.mark.parametrize('role', ['prefill', 'denoise'])
def test_scalars_of_one_role_stand_in_for_the_other(
  stored, arrays, workdir, role
):
  """transformers fills the encoder's with whatever is in memory."""
  absent = {'prefill': ENCODER, 'denoise': DECODER}[role]
  present = {'prefill': DECODER, 'denoise': ENCODER}[role]
  kept = {
    name: array
    for name, array in arrays.items()
    if not (name.startswith(absent) and name.endswith('layer_scalar'))
  }
  params = diffusiongemma.load(str(stored(kept))).params
  for index in range(2):
    layer = params[f'layer_0{index}']
    scalar = arrays[f'{present}layers.{index}.layer_scalar']
    assert layer['prefill_scalar'] == layer['denoise_scalar'] == scalar
  few = without(arrays, f'{absent}layers.1.layer_scalar')
  with pytest.raises(CheckpointError, match=r'missing: .*1\.layer_scalar'):
    diffusiongemma.load(str(stored(few)))
  none = without(arrays, 'layer_scalar')
  with pytest.raises(CheckpointError, match='missing: .*layer_scalar'):
    diffusiongemma.load(str(stored(none)))


def test_the_encoder_s_names_alone(stored, arrays):
  """Its scalars are those of both roles."""
  params = diffusiongemma.load(str(stored(encoder_names(arrays)))).params
  for index in range(2):
    layer = params[f'layer_0{index}']
    scalar = arrays[f'{ENCODER}layers.{index}.layer_scalar']
    assert layer['prefill_scalar'] == layer['denoise_scalar'] == scalar


def test_untied_weights_need_their_copies(stored, arrays, workdir):
  """A config that unties them, with which transformers makes up the rest."""
  full = arrays | copies_of(arrays)
  expected = diffusiongemma.load(workdir).params
  folder = stored(full, tie_word_embeddings=False)
  assert same_trees(diffusiongemma.load(str(folder)).params, expected)
  for lost in ('lm_head.weight', f'{ENCODER}layers.1.mlp.up_proj.weight'):
    folder = stored(without(full, lost), tie_word_embeddings=False)
    with pytest.raises(CheckpointError) as caught:
      diffusiongemma.load(str(folder))
    for part in (lost, 'one weight for both roles', 'tie_word_embeddings'):
      assert part in str(caught.value)


def test_what_is_unknown_stays_an_error(stored, arrays):
  one = np.ones(1, np.float32)
  for name in (
    'foo.bar',
    'model.decoder.layers.2.norm.weight',
    'model.decoder.layers.1.self_attn.v_proj.weight',
    'module.model.decoder.norm.weight',
    f'{ENCODER}self_conditioning.pre_norm.weight',
  ):
    with pytest.raises(CheckpointError, match='unknown: ') as caught:
      diffusiongemma.load(str(stored(arrays | {name: one})))
    assert repr(name) in str(caught.value)
  renamed = arrays | {f'{NORM}_packed': one}
  del renamed[NORM]
  with pytest.raises(CheckpointError) as caught:
    diffusiongemma.load(str(stored(renamed)))
  for part in ('missing', 'unknown', 'these are names of quantised weights'):
    assert part in str(caught.value)


def test_a_file_that_shrinks_meanwhile_leaves_nothing(
  tmp_path, hf_dir, monkeypatch
):
  read = safetensors.read_tensor

  def read_or_fail(tensor):
    if tensor.name == NORM:
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
  assert workdirs.read_config(str(empty)).model == MODEL


def test_export_without_a_checkpoint(tmp_path):
  with pytest.raises(workdirs.WorkdirError, match='holds no run'):
    diffusiongemma.export(str(tmp_path), str(tmp_path / 'out'))


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
    lambda: load.adopt(
      configs.Config(train=configs.TrainConfig(init_from=str(target))),
      str(tmp_path / 'run'),
    ),
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
