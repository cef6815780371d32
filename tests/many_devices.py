"""Processes of their own with as many CPU devices as a test needs."""

import os
import subprocess
import sys


def environment(devices: int) -> dict[str, str]:
  """What a process is started with to see so many devices."""
  flags = os.environ.get('XLA_FLAGS', '')
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count={devices}',
  }


def run(script: str, *arguments: object, devices: int = 1) -> str:
  """Runs a script, which must end well; its standard output."""
  done = subprocess.run(
    [sys.executable, '-c', script, *map(str, arguments)],
    env=environment(devices),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
  return done.stdout
