r"""What a run survives: kills at random moments, and a thousand steps.

  python -m experiments.reliability.measure --folder=/tmp/reliability

trains a network that takes seconds (`tests/micro_config.py`): straight; killed
by SIGKILL --kills times at random moments, and its parameters, optimiser state
and place in the data are compared with the straight run's, bit for bit; both
again as a job of two processes, of which a random one is killed; and for 1,000
steps, during which the memory of the process is read. Writes results.json
beside this file.
"""

import argparse
import json
import pathlib
import random
import re
import socket
import subprocess
import sys
import time

import jax

from diffusiongemma.checkpoints import digest
from diffusiongemma.checkpoints import native
from diffusiongemma.devices import sharding
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.training import step as steps
from diffusiongemma.training import train_state
from experiments import machine

FOLDER = pathlib.Path(__file__).parent
CONFIG = FOLDER.parents[1] / 'tests' / 'micro_config.py'


# How long the rest of a job may take to notice that a process is gone.
PATIENCE_SECONDS = 30


class Job:
  """A training run in one or several processes, each with one CPU device."""

  def __init__(
    self,
    workdir: pathlib.Path,
    *overrides: str,
    processes: int = 1,
    stdout: int = subprocess.PIPE,
  ):
    command = [
      sys.executable,
      '-m',
      'diffusiongemma.main',
      f'--config={CONFIG}',
      f'--workdir={workdir}',
      *(f'--config.train.{override}' for override in overrides),
    ]
    self.processes = [
      subprocess.Popen(
        command + flags,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
      )
      for flags in joining(processes)
    ]

  def is_running(self) -> bool:
    return all(process.poll() is None for process in self.processes)

  def finish(self) -> str:
    """What the first process said; stops the measurement if any failed."""
    outputs = [process.communicate()[0] for process in self.processes]
    for process, output in zip(self.processes, outputs, strict=True):
      if process.returncode:
        sys.exit(f'A run failed with {process.returncode}:\n{output}')
    return outputs[0]

  def kill(self, index: int) -> bool:
    """SIGKILL to one; whether the others then ended by themselves. Those that
    have not, after a while, are killed too."""
    self.processes[index].kill()
    deadline, alone = time.monotonic() + PATIENCE_SECONDS, True
    for process in self.processes:
      try:
        process.communicate(timeout=max(0, deadline - time.monotonic()))
      except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        alone = False
    return alone


def joining(processes: int) -> list[list[str]]:
  """The flags by which each process joins a job on this machine; one that is
  alone has none."""
  if processes == 1:
    return [[]]
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  return [
    [
      f'--coordinator=127.0.0.1:{port}',
      f'--num_processes={processes}',
      f'--process_id={index}',
    ]
    for index in range(processes)
  ]


def read_digests(workdir) -> dict:
  """Step, place in the data and a digest of every array of a run."""
  config = workdirs.read_config(workdir)
  mesh = sharding.make_mesh(config.mesh, jax.devices())
  items = train_state.to_items(steps.abstract_state(config, mesh))
  manager = native.open_checkpoints(workdirs.checkpoint_dir(str(workdir)))
  restored = native.restore_newest(manager, *items)
  manager.close()
  return {
    'step': restored.step,
    'data': restored.data,
    'params': digest.digests(restored.params),
    'opt_state': digest.digests(restored.opt_state),
  }


def has_saved(workdir) -> int:
  """The newest step that a killed run has left, 0 without any."""
  names = (workdir / 'checkpoints').glob('[0-9]*')
  return max((int(p.name) for p in names if p.name.isdigit()), default=0)


def measure_kills(
  folder: pathlib.Path, kills: int, seed: int, processes: int
) -> dict:
  """Kills a job again and again; compares its end with the straight one's.

  One kill in four comes at a random moment of the start of the program; the
  others a random while, up to a second, after a random save, which is in the
  middle of steps, of the next save or of what tidies up after one.
  """
  settings = (
    f'steps={16 * kills}',
    'checkpoint_every=2',
    'evaluate_every=1000',
    'sample_every=1000',
  )
  straight, killed = folder / 'straight', folder / 'killed'
  began = time.monotonic()
  output = Job(straight, *settings, processes=processes).finish()
  of_steps = re.search(r'Goodput .*? of ([\d.]+) s', output)
  seconds_to_start = time.monotonic() - began - float(of_steps[1])
  rng, saved, alone = random.Random(seed), [0], 0
  for number in range(1, kills + 1):
    job = Job(killed, *settings, processes=processes)
    if rng.random() < 0.25:
      time.sleep(rng.uniform(0, seconds_to_start))
    else:
      wanted = saved[-1] + 2 * rng.randint(1, 4)
      while has_saved(killed) < wanted and job.is_running():
        time.sleep(0.01)
      time.sleep(rng.random())
    if not job.is_running():
      sys.exit(f'The run ended before kill {number}:\n{job.finish()}')
    alone += job.kill(rng.randrange(processes))
    saved.append(has_saved(killed))
    print(f'kill {number}: {saved[-1]} steps are saved', flush=True)
  Job(killed, *settings, processes=processes).finish()
  ends = [read_digests(workdir) for workdir in (straight, killed)]
  return {
    'processes': processes,
    'kills': kills,
    'others_ended_by_themselves': alone if processes > 1 else None,
    'steps_saved_at_each': saved[1:],
    'steps': ends[0]['step'],
    'bit_equal': ends[0] == ends[1],
  }


def measure_memory(folder: pathlib.Path) -> dict:
  """Resident memory in megabytes over 1,000 steps."""
  job = Job(
    folder,
    'steps=1000',
    'log_every=1',
    'checkpoint_every=100',
    stdout=subprocess.DEVNULL,  # A pipe that is not read would fill up.
  )
  megabytes = {}
  while job.is_running():
    step = sum(1 for _ in _lines(folder / 'metrics.jsonl'))
    status = pathlib.Path(f'/proc/{job.processes[0].pid}/status')
    if step and (found := re.search(r'VmRSS:\s+(\d+)', _text(status))):
      megabytes[step] = int(found[1]) // 1024
    time.sleep(0.2)
  job.finish()
  chosen = {
    wanted: next((m for step, m in megabytes.items() if step >= wanted), None)
    for wanted in (50, 100, 200, 400, 600, 800, 990)
  }
  return {'megabytes_after_steps': chosen}


def _lines(path: pathlib.Path) -> list[str]:
  return _text(path).splitlines()


def _text(path: pathlib.Path) -> str:
  try:
    return path.read_text()
  except OSError:
    return ''


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--folder', type=pathlib.Path, required=True)
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  given = parser.parse_args()
  given.folder.mkdir(parents=True)
  results = {
    'killed': [
      measure_kills(
        given.folder / f'processes_{count}', given.kills, given.seed, count
      )
      for count in (1, 2)
    ],
    'thousand_steps': measure_memory(given.folder / 'memory'),
    'command': machine.command('experiments.reliability.measure'),
    'seed': given.seed,
    **machine.describe(),
  }
  machine.write(results, FOLDER / 'results.json')
  print(json.dumps(results, indent=1))


if __name__ == '__main__':
  main()
