"""Trains, or resumes a run that was stopped."""

import functools
import shlex
import sys

from absl import flags

from diffusiongemma.commands import shared
from diffusiongemma.config import ConfigError
from diffusiongemma.config import QuantizationConfig

_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'HOST:PORT of process 0 of a multi-process job; "auto" asks the cluster.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of processes of the job.', lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Index of this process, from 0.', lower_bound=0
)


def run(overrides: dict[str, str]) -> int:
  """Trains; returns the exit code."""
  from diffusiongemma.devices import processes
  from diffusiongemma.runs import load
  from diffusiongemma.training import quality
  from diffusiongemma.training import train

  processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  config, workdir = shared.load_config(overrides), shared.workdir()
  is_whole = config.quantization == QuantizationConfig()
  if not is_whole and not config.train.init_from:
    raise ConfigError(
      'config.quantization is for sampling; train without it, then '
      '--mode=quantize.'
    )
  load_base = functools.partial(load.load_base, config)
  code = train.train(
    config, workdir, load_base if config.train.init_from else None
  )
  if not processes.is_first():
    return code
  if code == 0:
    is_foreign = quality.has_foreign_prompt(config)
    prompt = '' if is_foreign else config.train.sample_prompt.strip()
    print(
      f'Done; the checkpoint is in {workdir}. Sample from it:\n'
      f'  python -m diffusiongemma.main --mode=sample --workdir={workdir} '
      f'--prompt={shlex.quote(prompt or "...")}'
    )
  elif code > 128:
    print(f'Stopped and saved in {workdir}; the same command resumes the run.')
  else:
    print(
      f'Error: the end of the run is not saved in {workdir}. The same command '
      'resumes from the newest checkpoint there, or starts again without one.',
      file=sys.stderr,
    )
  return code
