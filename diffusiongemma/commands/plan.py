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
_MACHINE = flags.DEFINE_string(
  'machine',
  None,
  'What the released model can do on h100, h200, a100-40, a100-80, l4, '
  'rtx3090, rtx4090, rtx5090, v5e-8, v6e-1 and so on. By arithmetic: nothing '
  'is compiled.',
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
  if _MACHINE.value is not None:
    return _show_machine(overrides)
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
      *what, batch_size=shared.BATCH_SIZE.value or 1, context=context
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


def _show_machine(overrides: dict[str, str]) -> int:
  """Prints what `--machine` can do. Raises `ConfigError` for flags of programs
  that are compiled."""
  from diffusiongemma.config import load_config
  from diffusiongemma.runs import overrides as overrides_lib
  from diffusiongemma.tools import machines

  for flag in (_TOPOLOGY, _PROGRAM, _CONTEXT, shared.BATCH_SIZE):
    if flag.present:
      raise ConfigError(
        f'--{flag.name} is for a program that is compiled; --machine compiles '
        'nothing.'
      )
  config = load_config(shared.CONFIG.value or '26b_a4b')
  config = overrides_lib.apply(overrides, config)
  machine = machines.find(_MACHINE.value or '')
  if shared.FORMAT.value == 'json':
    print(json.dumps(machines.to_json(config, machine)))
  else:
    print(machines.to_text(config, machine))
  return 0
