"""Folders through several versions of transformers, from its first to today's.

  python experiments/conversion/transformers_versions.py \\
      --fixtures=tests/reference/configs \\
      --output=experiments/conversion/transformers_versions.json

Each version is installed, without torch, into a folder that is removed at the
end. It writes a small random network, which is converted and exported: once as
it came, with its config files, and once as a network trained here, with ours.
The same version reads all three and computes logits and image features, which
should be equal to the bit. Tests read the configs that it writes. torch is that
of the environment that runs this.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from absl import app
from absl import flags
from absl import logging
import numpy as np

from diffusiongemma import config as configs
from diffusiongemma.checkpoints import huggingface_config
from diffusiongemma.checkpoints import safetensors
from diffusiongemma.runs import convert as conversion

_FIXTURES = flags.DEFINE_string('fixtures', None, 'Where configs are stored.')
_OUTPUT = flags.DEFINE_string('output', None, 'JSON to write.')
VERSIONS = ('5.11.0', '5.14.1', '5.17.0', '5.24.0')
# No size or setting is the default, and no two are equal by chance.
NETWORK = configs.ModelConfig(
  vocab_size=97,
  embed_dim=48,
  attention_pattern=('local', 'global', 'local', 'global'),
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  num_global_kv_heads=1,
  global_head_dim=16,
  sliding_window=5,
  mlp_dim=40,
  num_experts=6,
  experts_per_token=3,
  expert_dim=24,
  context_length=512,
  local_rope_theta=5000.0,
  global_rope_theta=70000.0,
  global_rotary_fraction=0.5,
  logit_softcap=20.0,
  norm_epsilon=2e-6,
  vision=configs.VisionConfig(
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    mlp_dim=20,
    patch_size=4,
    pooling_kernel=2,
    position_table_size=16,
    rope_theta=50.0,
    norm_epsilon=3e-6,
    standardize=True,
    soft_tokens_per_image=30,
    image_token_id=90,
    begin_image_token_id=91,
    end_image_token_id=92,
  ),
  dtype='float32',
)
DIFFUSION = configs.DiffusionConfig(
  canvas_length=8, stop_token_ids=(1, 50), max_denoising_steps=12, t_min=0.3
)

# What a version does: write CONFIG FOLDER, or read FOLDER NUMBERS.
PROGRAM = """
import json
import sys

import numpy as np
import torch
from transformers import DiffusionGemmaConfig
from transformers import DiffusionGemmaForBlockDiffusion
import transformers

transformers.utils.logging.disable_progress_bar()
action, source, target = sys.argv[1:]
torch.manual_seed(0)
if action == 'write':
  with open(source) as file:
    config = DiffusionGemmaConfig.from_dict(json.load(file))
  model = DiffusionGemmaForBlockDiffusion(config).float()
  with torch.no_grad():
    for name, tensor in model.state_dict().items():
      if 'norm' in name or 'scal' in name:
        tensor.uniform_(0.6, 1.4)
      else:
        tensor.normal_(0, tensor.shape[-1] ** -0.5)
  model.save_pretrained(target)
else:
  model, report = DiffusionGemmaForBlockDiffusion.from_pretrained(
    source, output_loading_info=True, attn_implementation='eager'
  )
  assert not any(report.values()), report
  text, canvas = torch.randint(3, 90, (1, 13)), torch.randint(97, (1, 8))
  pixels = torch.rand(1, 36, 48)
  side = torch.arange(6)
  places = torch.cartesian_prod(side, side)[None]
  with torch.no_grad():
    given = dict(input_ids=text, decoder_input_ids=canvas)
    first = model(**given).logits
    second = model(**given, self_conditioning_logits=first).logits
    tower = model.model.encoder.vision_tower
    image = tower(pixels, places).last_hidden_state
  np.savez(target, first=first, second=second, image=image)
"""


def install(version: str, folder: str) -> dict[str, str]:
  """Puts transformers and what it needs, but torch, into a folder; the
  environment that imports it from there."""
  subprocess.run(
    [
      *(sys.executable, '-m', 'pip', 'install', '--quiet'),
      *('--target', folder, f'transformers=={version}'),
    ],
    check=True,
  )
  return {**os.environ, 'PYTHONPATH': folder, 'HF_HUB_OFFLINE': '1'}


def act(environment: dict[str, str], *arguments: str | os.PathLike) -> None:
  subprocess.run(
    [sys.executable, '-c', PROGRAM, *map(str, arguments)],
    env=environment,
    check=True,
  )


def tensors_of(folder: pathlib.Path) -> dict[str, tuple]:
  """`{name: (type, shape, bytes)}`."""
  return {
    name: (x.dtype, x.shape, safetensors.read_tensor(x).tobytes())
    for name, x in safetensors.list_tensors(str(folder)).items()
  }


def try_version(
  version: str, config: pathlib.Path, room: pathlib.Path
) -> tuple[dict, dict[str, np.ndarray]]:
  """(results, what it computes with the network trained here)."""
  environment = install(version, str(room / 'installed'))
  written, run = room / 'written', room / 'run'
  act(environment, 'write', config, written)
  conversion.convert(str(written), str(run))
  conversion.export(str(run), str(room / 'as it came'))
  shutil.rmtree(run / 'huggingface')
  conversion.export(str(run), str(room / 'as trained here'))
  numbers, results = {}, {}
  for name in ('written', 'as it came', 'as trained here'):
    act(environment, 'read', room / name, room / f'{name}.npz')
    numbers[name] = dict(np.load(room / f'{name}.npz'))
    results[name] = {
      'same bits': tensors_of(room / name) == tensors_of(written),
      **{
        key: bool((numbers[name][key] == value).all())
        for key, value in numbers['written'].items()
      },
    }
  return results, numbers['as trained here']


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  results, said = {}, {}
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    config = folder / 'config.json'
    values = huggingface_config.to_config(NETWORK, DIFFUSION, 'float32')
    config.write_text(json.dumps(values))
    for version in VERSIONS:
      room = folder / version
      room.mkdir()
      results[version], said[version] = try_version(version, config, room)
      shutil.rmtree(room / 'installed')
      if _FIXTURES.value:
        target = pathlib.Path(_FIXTURES.value) / version
        target.mkdir(parents=True, exist_ok=True)
        for name in ('config.json', 'generation_config.json'):
          shutil.copyfile(room / 'written' / name, target / name)
  newest = said[VERSIONS[-1]]
  for version, numbers in said.items():
    results[version]['largest difference from the newest'] = {
      key: float(np.abs(value - newest[key]).max() / np.abs(newest[key]).max())
      for key, value in numbers.items()
    }
  print(json.dumps(results, indent=2))
  if _OUTPUT.value:
    with open(_OUTPUT.value, 'w') as stream:
      json.dump(results, stream, indent=2)
      stream.write('\n')


if __name__ == '__main__':
  app.run(main)
