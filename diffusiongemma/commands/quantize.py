"""Quantises a run, or a Hugging Face folder, to a new run."""

from absl import flags

from diffusiongemma import config as configs
from diffusiongemma.commands import shared

_SOURCE = shared.path(
  flags.DEFINE_string(
    'source', None, 'The run, or the Hugging Face folder, to read.'
  )
)


def run(overrides: dict[str, str]) -> int:
  """Quantises; returns the exit code."""
  from diffusiongemma.runs import convert
  from diffusiongemma.runs import overrides as overrides_lib

  why = (
    '--source is the run or Hugging Face folder to read, --workdir the new one'
  )
  shared.require('quantize', why, _SOURCE)
  shared.require('quantize', why, shared.WORKDIR)
  others = [f for f in overrides if not f.startswith('quantization.')]
  if others:
    raise configs.ConfigError(
      '--mode=quantize takes only --config.quantization.*; the rest is that of '
      '--source.'
    )
  config = overrides_lib.apply(overrides, configs.Config())
  configs.validate(config)
  shared.end_on_signals()
  workdir = shared.WORKDIR.value
  convert.quantize(_SOURCE.value, workdir, config.quantization)
  print(
    f'{workdir} is for sampling:\n'
    f'  python -m diffusiongemma.main --mode=sample --workdir={workdir} '
    f'--prompt="..."'
  )
  return 0
