"""Where the time of a denoising step goes on a GPU, kernel by kernel.

  python -m experiments.benchmarks.canvas --out=canvas.json \\
    --config.quantization.experts=int4

writes a canvas with `configs/26b_a4b.py` and random weights, in 16 steps after
a context, and gives for a step its time, and what the profiler saw of each
kernel, those of one name together, the slowest first.
"""

import argparse
import collections
from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import json
import pathlib
import re
import statistics
import sys
import tempfile
from typing import Any

import jax

from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma.diffusion import sampler
from diffusiongemma.tools import benchmark
from experiments import machine

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / '26b_a4b.py'
REPEATS = 5


def events(run: Callable[[], Any]) -> Iterator[tuple[str, float]]:
  """(name, seconds) of every kernel that GPUs run for it."""
  with tempfile.TemporaryDirectory() as folder:
    jax.profiler.start_trace(folder)
    jax.block_until_ready(run())
    jax.profiler.stop_trace()
    for path in pathlib.Path(folder).rglob('*.xplane.pb'):
      for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith('/device:GPU'):
          continue
        for line in plane.lines:
          if line.name.startswith('Stream'):
            yield from ((e.name, e.duration_ns * 1e-9) for e in line.events)


def by_name(found: Iterator[tuple[str, float]]) -> list[dict[str, Any]]:
  """Kernels whose names differ in a number at the end, together."""
  taken = collections.defaultdict(list)
  for name, seconds in found:
    taken[re.sub(r'[._]\d+$', '', name)].append(seconds)
  rows = [
    {
      'name': name,
      'count': len(seconds),
      'seconds': sum(seconds),
      'median_seconds': statistics.median(seconds),
    }
    for name, seconds in taken.items()
  ]
  return sorted(rows, key=lambda row: -row['seconds'])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', required=True, help='JSON file to write')
  parser.add_argument('--context', type=int, default=1024)
  given, overrides = parser.parse_known_args()
  if jax.default_backend() != 'gpu':
    sys.exit(f'Only GPUs are seen here; this is {jax.devices()[0]}.')
  config = configs.load_config(str(CONFIG))
  for override in overrides:
    name, _, value = override.partition('=')
    if not name.startswith('--config.'):
      parser.error(f'{override} is not known.')
    config = fields.override(config, name.removeprefix('--config.'), value)
  text = dataclasses.replace(config.model, vision=None)
  config = dataclasses.replace(config, model=text)
  params = benchmark.random_params(config, jax.random.key(0))
  ours = benchmark.Ours(config, params, 1, given.context)
  ours.write()  # The first call is another.
  seconds = [benchmark.seconds(ours.write) for _ in range(REPEATS)]
  rows = by_name(events(ours.write))
  results = {
    'command': machine.command('experiments.benchmarks.canvas'),
    'steps': sampler.TYPICAL_STEPS,
    'step_seconds': statistics.median(seconds) / sampler.TYPICAL_STEPS,
    'step_spread': [
      t / sampler.TYPICAL_STEPS for t in (min(seconds), max(seconds))
    ],
    'peak_bytes': ours.need.peak,
    'kernels': rows,
    **machine.describe(),
  }
  machine.write(results, given.out)
  print(json.dumps({**results, 'kernels': rows[:12]}, indent=1))


if __name__ == '__main__':
  main()
