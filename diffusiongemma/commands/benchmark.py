"""Measures speed."""

import json

from absl import flags

from diffusiongemma.commands import shared

_GRID = flags.DEFINE_list(
  'grid',
  ['1x256'],
  'Batches and contexts to sample with: 1x256,1x4096,8x256.',
)
_PEER = flags.DEFINE_bool(
  'peer', True, 'Measure transformers too, if it is installed.'
)


def run(overrides: dict[str, str]) -> int:
  """Prints the measurements; returns the exit code."""
  from diffusiongemma.tools import benchmark

  config = shared.load_config(overrides)
  grid = benchmark.parse_grid(config, _GRID.value)
  measured = benchmark.run(config, grid, _PEER.value)
  if shared.FORMAT.value == 'json':
    print(json.dumps(measured))
  else:
    print(benchmark.to_text(measured))
  return 0
