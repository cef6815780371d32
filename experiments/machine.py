"""What a measurement was made with, and when; part of every results file."""

import os
import platform
import shlex
import sys
import time

import jax


def describe() -> dict[str, str]:
  """Machine, device, versions and the date."""
  return {
    'machine': f'{os.cpu_count()} cores, {platform.machine()}',
    'device': jax.devices()[0].device_kind,
    'python': platform.python_version(),
    'jax': jax.__version__,
    'date': time.strftime('%Y-%m-%d', time.gmtime()),
  }


def command(module: str) -> str:
  """The command line that runs this module as it was run."""
  return shlex.join(['python', '-m', module, *sys.argv[1:]])
