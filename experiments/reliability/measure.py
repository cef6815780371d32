r"""What a run survives: kills at random moments, and a thousand steps.

  python experiments/reliability/measure.py --folder=/tmp/reliability

trains a network that takes seconds (`tests/micro_config.py`) three times:
straight; killed by SIGKILL --kills times, each time after a random while, until
it is done, and its parameters, optimiser state and place in the data are
compared with the straight run's, bit for bit; and for 1,000 steps, during which
the memory of the process is read. Writes results.json beside this file.
"""

import argparse
import json
import os
import pathlib
import platform
import random
import re
import subprocess
import sys
import time

import jax

from diffusiongemma.checkpoints import native
from diffusiongemma.training import train_state
from diffusiongemma.training import workdir as workdirs

FOLDER = pathlib.Path(__file__).parent
CONFIG = FOLDER.parents[1] / 'tests' / 'micro_config.py'


def start(workdir, *overrides: str) -> subprocess.Popen:
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
    stdout=subprocess.PIPE,
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
    'params': native.digests(restored.params),
    'opt_state': native.digests(restored.opt_state),
  }


def has_saved(workdir) -> int:
  """The newest step that a killed run has left, 0 without any."""
  names = (workdir / 'checkpoints').glob('[0-9]*')
  return max((int(p.name) for p in names if p.name.isdigit()), default=0)


def measure_kills(folder: pathlib.Path, kills: int, seed: int) -> dict:
  """Kills a run again and again; compares its end with the straight one's.

  The whiles are drawn so that some end while the program starts, some while it
  steps and some while it saves: one is saved at every other step.
  """
  settings = (f'steps={8 * kills}', 'checkpoint_every=2')
  began = time.monotonic()
  output = finish(start(folder / 'straight', *settings))
  straight = time.monotonic() - began
  # Of which the program takes so long to start: the rest are steps.
  goodput = re.search(r'Goodput .*? of ([\d.]+) s', output)
  begin = straight - float(goodput[1])
  rng, steps, workdir = random.Random(seed), [], folder / 'killed'
  while len(steps) < kills:
    process = start(workdir, *settings)
    time.sleep(rng.uniform(0.5 * begin, begin + 0.4 * float(goodput[1])))
    if process.poll() is not None:
      break  # Done before the last kill.
    process.kill()
    process.communicate()
    steps.append(has_saved(workdir))
    print(f'kill {len(steps)}: {steps[-1]} steps are saved', flush=True)
  finish(start(workdir, *settings))
  ends = [read_digests(folder / name) for name in ('straight', 'killed')]
  return {
    'kills': len(steps),
    'saved_steps_after_each': steps,
    'steps': ends[0]['step'],
    'bit_equal': ends[0] == ends[1],
  }


def measure_memory(folder: pathlib.Path) -> dict:
  """Resident memory in megabytes over 1,000 steps."""
  workdir = folder / 'memory'
  process = start(workdir, 'steps=1000', 'log_every=1', 'checkpoint_every=100')
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
    'seed': given.seed,
    'machine': f'{os.cpu_count()} cores, {platform.machine()}',
    'python': platform.python_version(),
    'jax': jax.__version__,
    'date': time.strftime('%Y-%m-%d', time.gmtime()),
  }
  text = json.dumps(results, indent=1) + '\n'
  (FOLDER / 'results.json').write_text(text)
  print(text)


if __name__ == '__main__':
  main()
