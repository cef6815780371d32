r"""What a run survives: kills at random moments, and a thousand steps.

  python -m experiments.reliability.measure --folder=/tmp/reliability

trains a network that takes seconds (`tests/micro_config.py`) three times:
straight; killed by SIGKILL --kills times at random moments, and its parameters,
optimiser state and place in the data are compared with the straight run's, bit
for bit; and for 1,000 steps, during which the memory of the process is read.
Writes results.json beside this file.
"""

import argparse
import json
import pathlib
import random
import re
import subprocess
import sys
import time

from diffusiongemma.checkpoints import digest
from diffusiongemma.checkpoints import native
from diffusiongemma.training import train_state
from diffusiongemma.training import workdir as workdirs
from experiments import machine

FOLDER = pathlib.Path(__file__).parent
CONFIG = FOLDER.parents[1] / 'tests' / 'micro_config.py'


def start(
  workdir, *overrides: str, stdout: int = subprocess.PIPE
) -> subprocess.Popen:
  """A training run in a process of its own."""
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      'diffusiongemma.main',
      f'--config={CONFIG}',
      f'--workdir={workdir}',
      *(f'--config.train.{override}' for override in overrides),
    ],
    stdout=stdout,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process: subprocess.Popen) -> str:
  """What it said; stops here if it failed."""
  output, _ = process.communicate()
  if process.returncode:
    sys.exit(f'A run failed with {process.returncode}:\n{output}')
  return output


def read_digests(workdir) -> dict:
  """Step, place in the data and a digest of every array of a run."""
  config = workdirs.read_config(workdir)
  items = train_state.to_items(workdirs.abstract_state(config))
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


def measure_kills(folder: pathlib.Path, kills: int, seed: int) -> dict:
  """Kills a run again and again; compares its end with the straight one's.

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
  began = time.monotonic()
  output = finish(start(folder / 'straight', *settings))
  of_steps = re.search(r'Goodput .*? of ([\d.]+) s', output)
  seconds_to_start = time.monotonic() - began - float(of_steps[1])
  rng, saved, workdir = random.Random(seed), [0], folder / 'killed'
  for number in range(1, kills + 1):
    process = start(workdir, *settings)
    if rng.random() < 0.25:
      time.sleep(rng.uniform(0, seconds_to_start))
    else:
      wanted = saved[-1] + 2 * rng.randint(1, 4)
      while has_saved(workdir) < wanted and process.poll() is None:
        time.sleep(0.01)
      time.sleep(rng.random())
    if process.poll() is not None:
      sys.exit(f'The run ended before kill {number}:\n{finish(process)}')
    process.kill()
    process.communicate()
    saved.append(has_saved(workdir))
    print(f'kill {number}: {saved[-1]} steps are saved', flush=True)
  finish(start(workdir, *settings))
  ends = [read_digests(folder / name) for name in ('straight', 'killed')]
  return {
    'kills': kills,
    'steps_saved_at_each': saved[1:],
    'steps': ends[0]['step'],
    'bit_equal': ends[0] == ends[1],
  }


def measure_memory(folder: pathlib.Path) -> dict:
  """Resident memory in megabytes over 1,000 steps."""
  workdir = folder / 'memory'
  process = start(
    workdir,
    'steps=1000',
    'log_every=1',
    'checkpoint_every=100',
    stdout=subprocess.DEVNULL,  # A pipe that is not read would fill up.
  )
  megabytes = {}
  while process.poll() is None:
    step = sum(1 for _ in _lines(workdir / 'metrics.jsonl'))
    status = pathlib.Path(f'/proc/{process.pid}/status')
    if step and (found := re.search(r'VmRSS:\s+(\d+)', _text(status))):
      megabytes[step] = int(found[1]) // 1024
    time.sleep(0.2)
  finish(process)
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
    'killed': measure_kills(given.folder, given.kills, given.seed),
    'thousand_steps': measure_memory(given.folder),
    'command': 'python -m experiments.reliability.measure',
    'seed': given.seed,
    **machine.describe(),
  }
  text = json.dumps(results, indent=1) + '\n'
  (FOLDER / 'results.json').write_text(text)
  print(text)


if __name__ == '__main__':
  main()
