r"""Writing from left to right against denoising blocks, in bits per byte.

  python -m experiments.shakespeare.compare --folder=runs/compare

trains `configs/tiny.py` four times, with nothing but its objective changed: as
an autoregressive network (`ar`), and as a denoiser whose logits are
leave-one-out (`loo_ce`), with canvases of 16, 32 and 64 tokens that cover all
of a row and without self-conditioning, which has no part in the bound. Each
sees the same tokens in the same order. What is held out then costs

  ar       exactly  -log2 p(text) / bytes
  loo_ce   at most  the NELBO, with its standard error (`--mode=evaluate`)

A denoiser learns both and is told both ways. Writes comparison.json and
comparison.png beside this file. A run that is already in the folder goes on, or
is only evaluated.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import matplotlib.figure

from experiments import machine
from experiments import plots

FOLDER = pathlib.Path(__file__).parent
CONFIG = FOLDER.parents[1] / 'configs' / 'tiny.py'
DENOISER = (
  'train.objective=loo_ce',
  'train.canvases=all',
  'train.self_conditioning_probability=0',
)
CANVASES = (16, 32, 64)


def run(*flags: str) -> str:
  """The command line; its output. Stops here if it fails."""
  command = [sys.executable, '-m', 'diffusiongemma.main', *flags]
  print(' '.join(['python', *command[1:]]), file=sys.stderr, flush=True)
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
  if done.returncode:
    sys.exit(f'It failed with {done.returncode}:\n{done.stdout}')
  return done.stdout


def measure(workdir: pathlib.Path, steps: int, *overrides: str) -> dict:
  """What a network costs and is worth, after so many steps."""
  settings = (f'train.steps={steps}', 'train.sample_prompt=', *overrides)
  run(
    f'--config={CONFIG}',
    f'--workdir={workdir}',
    *(f'--config.{setting}' for setting in settings),
  )
  numbers = json.loads(
    run('--mode=evaluate', '--format=json', f'--workdir={workdir}')
  )
  _, speeds = plots.series(
    plots.read_metrics(str(workdir)), 'tokens_per_second'
  )
  speed = float(sorted(speeds)[len(speeds) // 2])
  return {
    'settings': list(settings),
    'training_tokens_per_second': speed,
    **numbers,
  }


def draw(results: dict, path: pathlib.Path) -> None:
  """Bits per byte over the length of a canvas."""
  blue, red, *_ = plots.COLOURS
  figure = matplotlib.figure.Figure((6, 4), dpi=150, layout='constrained')
  axis = figure.subplots()
  denoisers = results['denoisers']
  lengths = [int(length) for length in denoisers]
  axis.errorbar(
    lengths,
    [d['nelbo_bits_per_byte'] for d in denoisers.values()],
    [2 * d['nelbo_standard_error_bits_per_byte'] for d in denoisers.values()],
    color=blue,
    marker='o',
    capsize=3,
    label='denoising: upper bound, two standard errors',
  )
  axis.plot(
    lengths,
    [d['ar_bits_per_byte'] for d in denoisers.values()],
    color=red,
    marker='D',
    fillstyle='none',
    label='left to right, same weights',
  )
  axis.axhline(
    results['ar']['ar_bits_per_byte'],
    color=red,
    linestyle='--',
    label='left to right, trained for it alone',
  )
  axis.set_xscale('log', base=2)
  axis.set_xticks(lengths, [str(length) for length in lengths])
  axis.set_xlabel('tokens in a canvas')
  axis.set_ylabel('held-out text, bits per byte')
  plots.tidy(axis)
  figure.legend(loc='outside lower center', frameon=False)
  figure.savefig(path)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--folder', type=pathlib.Path, required=True)
  parser.add_argument('--steps', type=plots.positive, default=900)
  given = parser.parse_args()
  results = {
    'ar': measure(given.folder / 'ar', given.steps, 'train.objective=ar'),
    'denoisers': {
      str(length): measure(
        given.folder / f'canvas_{length}',
        given.steps,
        f'diffusion.canvas_length={length}',
        *DENOISER,
      )
      for length in CANVASES
    },
    'command': machine.command('experiments.shakespeare.compare'),
    **machine.describe(),
  }
  machine.write(results, FOLDER / 'comparison.json')
  draw(results, FOLDER / 'comparison.png')
  print(json.dumps(results, indent=1))


if __name__ == '__main__':
  main()
