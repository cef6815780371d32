"""Folders that hold something else: named, and what to do is said."""

import json
import shutil

import pytest
import tensors

import diffusiongemma
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import foreign

CONFIG = {'model_type': 'diffusion_gemma'}


def refused(folder, *parts):
  """By every way in, with one printable message and nothing written."""
  target = folder.parent / 'target'
  few = diffusiongemma.config.QuantizationConfig(experts='int4')
  for action in (
    lambda: diffusiongemma.load(str(folder)),
    lambda: diffusiongemma.convert(str(folder), str(target)),
    lambda: diffusiongemma.quantize(str(folder), str(target), few),
  ):
    tensors.refused(action, *parts)
  assert not target.exists()


@pytest.mark.parametrize(
  ('config', 'parts'),
  [
    ({'base_model_name_or_path': 'you/base'}, ["adapter of 'you/base'"]),
    ({'base_model_name_or_path': '\x1b' * 999}, [r"of '\x1b", '...']),
    ({'base_model_name_or_path': None}, ['is a PEFT adapter, and']),
    ({}, ['is a PEFT adapter, and']),
    ([], ['is a PEFT adapter, and']),
  ],
)
def test_an_adapter_is_named_with_its_base(tmp_path, config, parts):
  folder = tmp_path / 'adapter'
  folder.mkdir()
  (folder / 'adapter_config.json').write_text(json.dumps(config))
  (folder / 'adapter_model.safetensors').write_bytes(tensors.pack({}))
  refused(folder, str(folder), 'give the folder of a whole model', *parts)


@pytest.mark.parametrize(
  ('name', 'parts'),
  [
    ('model-Q4_K_M.gguf', ['truncated', 'download it again']),
    ('pytorch_model.bin', ['pickles', 'run any code']),
    ('model-00001-of-00002.safetensors', ['There is no', 'config.json']),
  ],
)
def test_files_of_weights_alone_are_named(tmp_path, name, parts):
  folder = tmp_path / 'weights'
  folder.mkdir()
  (folder / name).touch()
  refused(folder, str(folder), *parts)


def test_a_config_beside_other_files(tmp_path):
  text = dict(num_experts=1, top_k_experts=1, moe_intermediate_size=8)
  text |= dict(hidden_size=8, num_hidden_layers=1)
  vision = dict(num_hidden_layers=0)
  folder = tmp_path / 'folder'
  folder.mkdir()
  values = CONFIG | {'text_config': text, 'vision_config': vision}
  (folder / 'config.json').write_text(json.dumps(values))
  load = lambda: diffusiongemma.load(str(folder))
  tensors.refused(load, 'holds neither model.safetensors nor')
  (folder / 'adapter_config.json').write_text('{}')
  tensors.refused(load, 'PEFT adapter')


def test_a_git_lfs_pointer_beside_the_weights(tmp_path):
  pointer = 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n'
  for name in ('config.json', 'tokenizer.json'):
    folder = tmp_path / name
    folder.mkdir()
    (folder / 'model.safetensors').write_bytes(tensors.pack({}))
    (folder / name).write_text(pointer)
    with pytest.raises(CheckpointError, match=f'{name}.* a Git LFS pointer'):
      files.read_file(str(folder), name, 10**6)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
  ('name', 'whose'),
  [
    ('base_model.model.x.lora_A.weight', 'an adapter of PEFT'),
    ('x.mlp.up_proj.weight_packed', 'quantised weights'),
    ('x.mlp.up_proj.qweight', 'GPTQ'),
    ('x.mlp.up_proj.weight.absmax', 'bitsandbytes'),
    ('x.mlp.up_proj._weight_qdata', 'torchao'),
    ('x.mlp.up_proj.scales', 'MLX'),
    ('x.experts.gate_up_proj.weight', 'a model of MLX'),
    ('x.experts.0.up_proj.weight', 'one by one'),
  ],
)
def test_names_of_other_tools_are_recognised(name, whose):
  assert whose in foreign.describe_names(['other', name])
  assert foreign.describe_names(['other', 'x.norm.weight']) == ''
