"""How much memory a conversion takes: a checkpoint of zeros, of any size.

  python experiments/conversion/convert_zeros.py --config=configs/26b_a4b.py \\
      --folder=/tmp/zeros --output=experiments/conversion/results.json

The Hugging Face folder that is converted has the names, shapes and types of a
real one in sparse files, whose zeros take no room on the disk. Prints and
writes the bytes of all tensors and of the largest, the peak of resident
memory, and seconds.
"""

import json
import math
import os
import platform
import re
import struct
import time

from absl import app
from absl import flags
from absl import logging

from diffusiongemma import config as configs
from diffusiongemma.checkpoints import huggingface
from diffusiongemma.checkpoints import huggingface_config
from diffusiongemma.model import denoiser
from diffusiongemma.runs import convert as conversion

_CONFIG = flags.DEFINE_string('config', None, 'Config file.', required=True)
_FOLDER = flags.DEFINE_string('folder', None, 'New folder.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'JSON to write.')
MAX_SHARD_BYTES = 5 * 10**9


def write_zeros(config: configs.Config, folder: str) -> dict[str, int]:
  """A bfloat16 checkpoint in shards of 5 GB; `{name: bytes}`."""
  os.makedirs(folder)
  values = huggingface_config.to_config(
    config.model, config.diffusion, 'bfloat16'
  )
  with open(os.path.join(folder, 'config.json'), 'w') as file:
    json.dump(values, file)
  table = huggingface.tensor_table(denoiser.abstract_params(config.model))
  sizes = {n: 2 * math.prod(e.their_shape) for n, e in table.items()}
  shards, room = [], 0
  for name, size in sizes.items():
    if size > room:
      shards.append([])
      room = MAX_SHARD_BYTES
    shards[-1].append(name)
    room -= size
  weight_map = {}
  for index, names in enumerate(shards):
    file = f'model-{index + 1:05d}-of-{len(shards):05d}.safetensors'
    header, end = {}, 0
    for name in names:
      header[name] = {
        'dtype': 'BF16',
        'shape': table[name].their_shape,
        'data_offsets': [end, end + sizes[name]],
      }
      end += sizes[name]
      weight_map[name] = file
    text = json.dumps(header).encode()
    with open(os.path.join(folder, file), 'wb') as stream:
      stream.write(struct.pack('<Q', len(text)) + text)
      stream.truncate(8 + len(text) + end)
  index = {'metadata': {}, 'weight_map': weight_map}
  path = os.path.join(folder, 'model.safetensors.index.json')
  with open(path, 'w') as stream:
    json.dump(index, stream)
  return sizes


def peak_bytes() -> int:
  """The most resident memory this process ever had (Linux)."""
  with open('/proc/self/status') as status:
    return 1024 * int(re.search(r'VmHWM:\s+(\d+)', status.read())[1])


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)  # At INFO, Orbax tells every file.
  config = configs.load_config(_CONFIG.value)
  source = os.path.join(_FOLDER.value, 'huggingface')
  sizes = write_zeros(config, source)
  start = time.monotonic()
  conversion.convert(source, os.path.join(_FOLDER.value, 'run'))
  numbers = {
    'config': _CONFIG.value,
    'tensors': len(sizes),
    'bytes': sum(sizes.values()),
    'largest_bytes': max(sizes.values()),
    'peak_bytes': peak_bytes(),
    'seconds': round(time.monotonic() - start, 1),
    'machine': f'{platform.machine()}, {os.cpu_count()} cores',
  }
  print(json.dumps(numbers))
  if _OUTPUT.value:
    with open(_OUTPUT.value, 'w') as stream:
      json.dump(numbers, stream, indent=2)
      stream.write('\n')


if __name__ == '__main__':
  app.run(main)
