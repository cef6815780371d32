"""What a measurement was made with, and when; part of every results file."""

import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time

import jax


def describe() -> dict[str, str]:
  """Machine, device, versions, the commit and the date."""
  return {
    'machine': f'{os.cpu_count()} cores, {_processor()}',
    'device': jax.devices()[0].device_kind,
    'python': platform.python_version(),
    'jax': jax.__version__,
    'commit': _commit(),
    'date': time.strftime('%Y-%m-%d', time.gmtime()),
  }


def _processor() -> str:
  """Its name where the system tells it (Linux), else its architecture."""
  try:
    found = pathlib.Path('/proc/cpuinfo').read_text()
  except OSError:
    found = ''
  name = re.search(r'model name\s*: (.*)', found)
  return name[1] if name else platform.machine()


def _commit() -> str:
  """Of the working tree, `-dirty` where it has changes; else 'unknown'."""
  command = ['git', 'describe', '--always', '--dirty']
  try:
    found = subprocess.run(
      command,
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
  return found.stdout.strip()


def command(module: str) -> str:
  """The command line that runs this module as it was run."""
  return shlex.join(['python', '-m', module, *sys.argv[1:]])


def run_main(*flags: str) -> dict:
  """What the program prints with these flags and `--format=json`, with the
  command and `describe()`. Exits with the program's words where it fails."""
  arguments = ['-m', 'diffusiongemma.main', *flags, '--format=json']
  done = subprocess.run(
    [sys.executable, *arguments], capture_output=True, text=True, check=False
  )
  if done.returncode:
    sys.exit(f'{shlex.join(arguments)}: {done.stderr[-3000:]}')
  return {
    'command': shlex.join(['python', *arguments]),
    **json.loads(done.stdout.splitlines()[-1]),
    **describe(),
  }


def write(results: dict, path: str | os.PathLike) -> None:
  """Writes a results file as a whole or not at all."""
  with open(f'{path}.tmp', 'w') as stream:
    json.dump(results, stream, indent=1)
    stream.write('\n')
  os.replace(f'{path}.tmp', path)
