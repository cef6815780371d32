"""Folders that are read, under whatever names; and those that are refused."""

import json
import os
import shutil
import struct

import hf_folder as hf
import numpy as np
import pytest

import diffusiongemma
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import contents
from diffusiongemma.checkpoints import huggingface
from diffusiongemma.checkpoints import safetensors
from diffusiongemma.checkpoints import safetensors_writer
from diffusiongemma.model import denoiser
from diffusiongemma.runs import huggingface_folder


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


@pytest.mark.parametrize(
  ('damage', 'messages'),
  [
    (truncate, ['model.safetensors']),
    (
      rename(hf.NORM, 'model.decoder.nrom.weight'),
      ['missing', hf.NORM, 'nrom'],
    ),
    (reshape, [hf.NORM, 'model.safetensors', '[4, 4]', '[16]']),
    (retype, [hf.NORM, 'model.safetensors', 'int32']),
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


@pytest.fixture(scope='module')
def arrays(hf_dir):
  return hf.arrays_of(hf_dir)


VARIANTS = {
  'all copies': lambda a: a | hf.copies_of(a),
  'the head alone': lambda a: hf.without(
    a | hf.copies_of(a),
    f'{hf.DECODER}embed_tokens',
    f'{hf.ENCODER}embed',
  ),
  'one copy': lambda a: (
    a | {f'{hf.ENCODER}norm.weight': a[f'{hf.DECODER}norm.weight']}
  ),
  'encoder names and scalars of both': lambda a: (
    hf.encoder_names(a) | {n: x for n, x in a.items() if 'layer_scalar' in n}
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
    n.removeprefix('model.'): x for n, x in (a | hf.copies_of(a)).items()
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
  assert hf.same_trees(diffusiongemma.load(str(folder)).params, expected)
  assert theirs_of(folder, expected)


def theirs_of(folder, expected):
  """Whether `transformers` loads the folder with these parameters."""
  parity = pytest.importorskip('parity', reason='needs torch, transformers')
  kind = parity.modeling_diffusion_gemma.DiffusionGemmaForBlockDiffusion
  model, report = kind.from_pretrained(str(folder), output_loading_info=True)
  missing = {k: v for k, v in report.items() if k != 'unexpected_keys'}
  assert not any(missing.values()), report
  return hf.same_trees(parity.convert(model, hf.MODEL), expected)


def test_copies_make_the_same_run(stored, arrays, hf_dir, tmp_path):
  """Exported as without them: the same tensors, each once."""
  folder = stored(arrays | hf.copies_of(arrays), tie_word_embeddings=False)
  diffusiongemma.convert(str(folder), str(tmp_path / 'run'))
  diffusiongemma.export(str(tmp_path / 'run'), str(tmp_path / 'out'))
  assert hf.contents(tmp_path / 'out') == hf.contents(hf_dir)


@pytest.mark.parametrize(
  'name',
  [
    'lm_head.weight',
    f'{hf.ENCODER}embed_tokens.weight',
    f'{hf.ENCODER}layers.1.experts.gate_up_proj',
    f'{hf.ENCODER}layers.0.router.per_expert_scale',
    'decoder.norm.weight',
  ],
)
def test_a_copy_that_differs_is_named(stored, arrays, tmp_path, name):
  """By one bit of the sign of a zero, too, which is equal as a number."""
  copies = arrays | hf.copies_of(arrays)
  copies['decoder.norm.weight'] = arrays[hf.NORM]
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
    (arrays[hf.NORM].astype(np.float16), 'one weight for both roles'),
    (arrays[hf.NORM].reshape(4, 4), 'has the shape'),
    (arrays[hf.NORM][:-1], 'has the shape'),
  ):
    folder = stored(arrays | {f'{hf.ENCODER}norm.weight': array})
    with pytest.raises(CheckpointError, match=reason) as caught:
      diffusiongemma.load(str(folder))
    assert f'{hf.ENCODER}norm.weight' in str(caught.value)


def test_comparing_copies_holds_one_tensor(stored, arrays, monkeypatch):
  """And a piece of its copy."""
  folder = stored(arrays | hf.copies_of(arrays))
  monkeypatch.setattr(safetensors.files, 'CHUNK_BYTES', 64)
  read, sizes = safetensors.files.read_bytes, []

  def read_bytes(descriptor, offset, nbytes, path):
    sizes.append(nbytes)
    return read(descriptor, offset, nbytes, path)

  table = huggingface.tensor_table(denoiser.abstract_params(hf.MODEL))
  network = huggingface_folder.open_network(str(folder))
  found = contents.find(str(folder), network.tensors, table)
  monkeypatch.setattr(safetensors.files, 'read_bytes', read_bytes)
  for entry in table.values():
    assert found[entry.path].read().shape == entry.shape
  assert max(sizes) == 64
  copies = hf.copies_of(arrays).items()
  assert sum(sizes) == sum(x.nbytes for name, x in copies if name not in arrays)


@pytest.mark.parametrize('role', ['prefill', 'denoise'])
def test_scalars_of_one_role_stand_in_for_the_other(
  stored, arrays, workdir, role
):
  """transformers fills the encoder's with whatever is in memory."""
  absent = {'prefill': hf.ENCODER, 'denoise': hf.DECODER}[role]
  present = {'prefill': hf.DECODER, 'denoise': hf.ENCODER}[role]
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
  few = hf.without(arrays, f'{absent}layers.1.layer_scalar')
  with pytest.raises(CheckpointError, match=r'missing: .*1\.layer_scalar'):
    diffusiongemma.load(str(stored(few)))
  none = hf.without(arrays, 'layer_scalar')
  with pytest.raises(CheckpointError, match='missing: .*layer_scalar'):
    diffusiongemma.load(str(stored(none)))


def test_the_encoder_s_names_alone(stored, arrays):
  """Its scalars are those of both roles."""
  params = diffusiongemma.load(str(stored(hf.encoder_names(arrays)))).params
  for index in range(2):
    layer = params[f'layer_0{index}']
    scalar = arrays[f'{hf.ENCODER}layers.{index}.layer_scalar']
    assert layer['prefill_scalar'] == layer['denoise_scalar'] == scalar


def test_untied_weights_need_their_copies(stored, arrays, workdir):
  """A config that unties them, with which transformers makes up the rest."""
  full = arrays | hf.copies_of(arrays)
  expected = diffusiongemma.load(workdir).params
  folder = stored(full, tie_word_embeddings=False)
  assert hf.same_trees(diffusiongemma.load(str(folder)).params, expected)
  for lost in (
    'lm_head.weight',
    f'{hf.ENCODER}layers.1.mlp.up_proj.weight',
  ):
    folder = stored(hf.without(full, lost), tie_word_embeddings=False)
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
    f'{hf.ENCODER}self_conditioning.pre_norm.weight',
  ):
    with pytest.raises(CheckpointError, match='unknown: ') as caught:
      diffusiongemma.load(str(stored(arrays | {name: one})))
    assert repr(name) in str(caught.value)
  renamed = arrays | {f'{hf.NORM}_packed': one}
  del renamed[hf.NORM]
  with pytest.raises(CheckpointError) as caught:
    diffusiongemma.load(str(stored(renamed)))
  for part in (repr('weight_packed'), hf.NORM, 'an array is missing'):
    assert part in str(caught.value)
