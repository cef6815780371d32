"""Compiles for devices that are not attached; estimates costs."""

import json

from absl import flags

from diffusiongemma.commands import shared
from diffusiongemma.config import ConfigError

_TOPOLOGY = flags.DEFINE_string(
  'topology',
  'local',
  'v5e:4x4, v5p:4x4x4, v6e:8x8, tpu7x:4x4x4, h100, h200, h100x8, h100x16 or '
  'local.',
)
_PROGRAM = flags.DEFINE_enum(
  'program', 'train', ['train', 'sample'], 'What to compile.'
)
_CONTEXT = flags.DEFINE_integer(
  'context',
  None,
  'Context length for sampling. Default: 8192, or that of the network if less.',
  lower_bound=1,
)


def run(overrides: dict[str, str]) -> int:
  """Prints the plan; returns the exit code."""
  from diffusiongemma.tools import plan

  config = shared.load_config(overrides)
  most = config.model.context_length
  context = _CONTEXT.value or min(8192, most)
  if context > most:
    raise ConfigError(
      f'--context={context} is more than config.model.context_length = {most}.'
    )
  what = (config, _TOPOLOGY.value, _PROGRAM.value)
  try:
    planned = plan.plan(
      *what, batch_size=(shared.BATCH_SIZE.value or 1), context=context
    )
    fits, text = planned.fits is not False, plan.to_text(planned)
    record = plan.to_json(planned)
  except plan.TooLarge as error:
    fits, text = False, str(error)
    record = {'fits': False, 'reason': text}
  change = None if fits else plan.nearest_fit(*what)
  if shared.FORMAT.value == 'json':
    print(json.dumps({**record, 'nearest_fit': change}))
    return 0
  print(text)
  if change:
    print(f'  It would fit with {change}.')
  elif not fits:
    print('  No small change makes it fit.')
  return 0
