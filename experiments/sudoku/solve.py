r"""How many puzzles a network solves: by denoising, and from left to right.

  python -m experiments.sudoku.solve --workdir=runs/sudoku \
      --puzzles=runs/sudoku6/heldout.jsonl [--ar_workdir=runs/sudoku_ar] \
      --name=6x6

gives held-out puzzles (`make_puzzles.py`) to
  * the sampler of the run, with every budget of denoising passes in --budgets,
    and with several seeds at the last;
  * the same with the givens pinned on the canvas;
  * the prefill pass of the same network, as an autoregressive model: greedily,
    a token after the other;
  * the same with --ar_workdir, a network that learnt nothing else,
and writes NAME.json and NAME.png beside this file (--output). A puzzle is
solved when every cell is right. Rows that have converged before the budget is
used up stop; `steps` is what they used, on average.
"""

import argparse
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.ticker
import numpy as np

import diffusiongemma as dg
from diffusiongemma.checkpoints import CheckpointError
from experiments import machine
from experiments import plots

EMPTY = '.'
FOLDER = pathlib.Path(__file__).parent


class PuzzleError(ValueError):
  """Puzzles that can't be measured on; the message says why."""


def read_puzzles(path: str, count: int) -> tuple[list[str], list[str]]:
  """(prompts, responses) of the first `count` lines, all of one length.

  Raises:
    PuzzleError: it can't be read, or a line is no puzzle with its solution.
  """
  puzzles = []
  try:
    with open(path, 'rb') as file:
      for line in itertools.islice(file, count):
        puzzles.append(_parse(line, len(puzzles[0][0]) if puzzles else None))
  except OSError as error:
    raise PuzzleError(f'{path} cannot be read: {error.strerror}.') from error
  except (ValueError, KeyError, TypeError) as error:
    raise PuzzleError(
      f'Line {len(puzzles) + 1} of {path} is no puzzle with its solution '
      f'({type(error).__name__}: {error}).'
    ) from error
  if not puzzles:
    raise PuzzleError(f'{path} has no puzzle.')
  prompts, responses = zip(*puzzles, strict=True)
  return list(prompts), list(responses)


def _parse(line: bytes, cells: int | None) -> tuple[str, str]:
  """(prompt, response) of one line; `cells` is what others have."""
  record = json.loads(line)
  prompt, response = record['prompt'], record['response']
  if not len(prompt) == len(response) == (cells or len(prompt)) > 0:
    raise ValueError('puzzles and solutions must have one length')
  if any(p not in (EMPTY, r) for p, r in zip(prompt, response, strict=True)):
    raise ValueError('the solution has other givens')
  return prompt, response


def encode(run: dg.Run, prompts: Sequence[str]) -> np.ndarray:
  """Token ids [B, P] of prompts of one length, bos first."""
  rows = [[run.tokenizer.bos_id, *run.tokenizer.encode(p)] for p in prompts]
  return np.array(rows, np.int32)


def read(run: dg.Run, prompts: Sequence[str]) -> dg.KVCache:
  """A cache that holds the prompts, which are all of one length."""
  tokens_BP = jnp.array(encode(run, prompts))
  B, P = tokens_BP.shape
  cache = dg.init_cache(run.config.model, B, P)
  return dg.prefill(
    run.config.model, run.params, tokens_BP, jnp.full(B, P), cache
  )


def pin_givens(run: dg.Run, prompts: Sequence[str]) -> dg.Pinned:
  """The givens, in their places on the canvas."""
  rows = [
    {i: int(row[1 + i]) for i, cell in enumerate(prompt) if cell != EMPTY}
    for row, prompt in zip(encode(run, prompts), prompts, strict=True)
  ]
  config = run.config
  return dg.pin(rows, config.diffusion.canvas_length, config.model.vocab_size)


def make_solver(
  run: dg.Run,
  diffusion: dg.DiffusionConfig,
  self_conditioning: bool = True,
) -> Callable:
  """(cache, key, pinned or None) -> (tokens_BL, denoising passes_B), jitted."""
  model = run.config.model

  @jax.jit
  def solve(params, cache, key, pinned):
    denoise_fn = dg.make_denoise_fn(model, params, cache)

    def without(tokens_BL, sc_BLD, *rest):
      return denoise_fn(tokens_BL, jnp.zeros_like(sc_BLD), *rest)

    state, _ = dg.sample_canvas(
      denoise_fn if self_conditioning else without,
      key,
      diffusion,
      dg.Sampling(pinned=pinned),
      batch_size=len(cache.length_B),
      vocab_size=model.vocab_size,
      embed_dim=model.embed_dim,
    )
    return state.draft_BL, state.steps_B

  return lambda cache, key, pinned=None: solve(run.params, cache, key, pinned)


def solve_all(
  solver: Callable,
  caches: Sequence[dg.KVCache],
  seed: int,
  pins: Sequence[dg.Pinned] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """(tokens_ML, denoising passes_M) of all batches; each has its own key."""
  tokens, steps = [], []
  for index, cache in enumerate(caches):
    key = jax.random.fold_in(jax.random.key(seed), index)
    tokens_BL, steps_B = solver(
      cache, key, None if pins is None else pins[index]
    )
    tokens.append(np.asarray(tokens_BL))
    steps.append(np.asarray(steps_B))
  return np.concatenate(tokens), np.concatenate(steps)


@functools.partial(jax.jit, static_argnames=('config', 'count'))
def write_greedily(
  config: dg.ModelConfig, params: dict, tokens_BP: jax.Array, count: int
) -> jax.Array:
  """The network as an autoregressive model: the most probable next token,
  `count` times.

  One loop on the device for all rows. Each token is a prefill pass of its own
  over the cached text, as it is when a canvas is committed.

  Args:
    config: the network.
    params: its parameters.
    tokens_BP: int32, prompts of one length.
    count: how many tokens to write; there is no stop.

  Returns:
    int32 [B, count].
  """
  model = dg.Denoiser(config, lower_once=True)
  apply = functools.partial(model.apply, {'params': params})
  B, P = tokens_BP.shape

  def append(tokens_BP, cache):
    length_B = jnp.full(B, tokens_BP.shape[1])
    h_BPD, cache, _ = apply(tokens_BP, length_B, cache, method='prefill')
    logits_BV = apply(h_BPD[:, -1], method='logits')
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), cache

  def body(index, carry):
    written_BL, next_B, cache = carry
    written_BL = written_BL.at[:, index].set(next_B)
    return written_BL, *append(next_B[:, None], cache)

  start = append(tokens_BP, dg.init_cache(config, B, P + count))
  written_BL = jnp.zeros((B, count), jnp.int32)
  written_BL, *_ = jax.lax.fori_loop(0, count, body, (written_BL, *start))
  return written_BL


def answers(tokenizer: dg.Tokenizer, tokens_ML: np.ndarray) -> list[str]:
  """One character a token, so that every cell stays in its place: a control
  token is a space. Spaces at the end are cut."""
  symbols = [
    tokenizer.decode([token]).strip()[:1] or ' '
    for token in range(tokenizer.vocab_size)
  ]
  return [''.join(symbols[t] for t in row).rstrip() for row in tokens_ML]


def score(
  texts: Sequence[str], prompts: Sequence[str], responses: Sequence[str]
) -> dict[str, float]:
  """What is right in the answers.

  Returns:
    `solved` and `cells_right`, shares of the puzzles and of their cells;
    `givens_altered`, the number of cells that are not what the prompt says.
  """
  cells, altered = [], 0
  for text, prompt, response in zip(texts, prompts, responses, strict=True):
    text = text.ljust(len(response))
    cells += [a == b for a, b in zip(text, response, strict=False)]
    altered += sum(
      p not in (EMPTY, a) for a, p in zip(text, prompt, strict=False)
    )
  right = [a == b for a, b in zip(texts, responses, strict=True)]
  return {
    'solved': float(np.mean(right)),
    'cells_right': float(np.mean(cells)),
    'givens_altered': altered,
  }


def measure_denoising(
  run: dg.Run,
  prompts: Sequence[str],
  responses: Sequence[str],
  budgets: Sequence[int],
  batch_size: int,
  seeds: int,
) -> dict:
  """The run's sampler: every budget, then seeds, free and with givens pinned.

  Returns:
    {'budgets': a record for each budget, with seed 0; 'free', 'pinned': what
    `summarise` gives for the last}.
  """
  batches = split(prompts, batch_size)
  caches = [read(run, batch) for batch in batches]
  pins = [pin_givens(run, batch) for batch in batches]

  def record(solver, passes, seed, pins=None):
    tokens_ML, steps_M = solve_all(solver, caches, seed, pins)
    texts = answers(run.tokenizer, tokens_ML)
    facts = {
      'budget': passes,
      'seed': seed,
      **score(texts, prompts, responses),
      'steps': float(np.mean(steps_M)),
    }
    print(json.dumps({'pinned': pins is not None, **facts}), flush=True)
    return facts

  records = []
  for passes in budgets:
    diffusion = dataclasses.replace(
      run.config.diffusion, max_denoising_steps=passes
    )
    solver = make_solver(run, diffusion)
    records.append(record(solver, passes, 0))
  free = [records[-1], *(record(solver, passes, s) for s in range(1, seeds))]
  pinned = [record(solver, passes, s, pins) for s in range(seeds)]
  return {
    'budgets': records,
    'free': summarise(free),
    'pinned': summarise(pinned),
  }


def measure_ar(
  run: dg.Run,
  prompts: Sequence[str],
  responses: Sequence[str],
  batch_size: int,
) -> dict:
  """The run's prefill pass and head, greedily from left to right."""
  count = len(responses[0]) + 1  # And the end of the text.
  tokens_ML = np.concatenate(
    [
      np.asarray(
        write_greedily(run.config.model, run.params, encode(run, batch), count)
      )
      for batch in split(prompts, batch_size)
    ]
  )
  texts = answers(run.tokenizer, tokens_ML)
  record = {**score(texts, prompts, responses), 'steps': float(count)}
  print(json.dumps({'left_to_right': True, **record}), flush=True)
  return record


def split(items: Sequence, size: int) -> list[Sequence]:
  """Batches of `size`, the last one of what is left."""
  return [items[start : start + size] for start in range(0, len(items), size)]


def summarise(records: list[dict]) -> dict:
  """Mean, least and most over the seeds, and the records themselves."""
  summary = {}
  for name in ('solved', 'cells_right', 'givens_altered', 'steps'):
    values = [record[name] for record in records]
    summary[name] = {
      'mean': float(np.mean(values)),
      'least': min(values),
      'most': max(values),
    }
  return {**summary, 'records': records}


def describe_run(run: dg.Run, workdir: str) -> dict:
  """Where a network came from; `training_seconds` may be unknown: None."""
  return {
    'workdir': workdir,
    'parameters': sum(x.size for x in jax.tree.leaves(run.params)),
    'objective': run.config.train.objective,
    'batch_size': run.config.data.batch_size,
    'training_steps': run.step,
    'training_seconds': training_seconds(run, workdir),
  }


def training_seconds(run: dg.Run, workdir: str) -> float | None:
  """Time of the training steps, from the tokens per second in metrics.jsonl:
  saves and evaluations are not in it. None where it can't be read."""
  try:
    records = plots.read_metrics(workdir)
  except plots.MetricsError:
    return None
  data = run.config.data
  seconds, done = 0.0, 0
  for step, speed in zip(
    *plots.series(records, 'tokens_per_second'), strict=True
  ):
    if done < step <= run.step:
      tokens = (step - done) * data.batch_size * data.sequence_length
      seconds, done = seconds + tokens / speed, step
  return round(seconds) or None


def draw(results: Mapping, path: pathlib.Path) -> None:
  """Solved puzzles and passes used, over the budget of passes."""
  blue, red, green, purple, *_, grey = plots.COLOURS
  figure = matplotlib.figure.Figure((10, 4.5), dpi=150, layout='constrained')
  solved, passes = figure.subplots(1, 2)
  denoising = results['denoising']
  records = denoising['budgets']
  budgets = [r['budget'] for r in records]
  dots = {'color': blue, 'marker': 'o', 'markersize': 5}
  solved.plot(
    budgets,
    [100 * r['solved'] for r in records],
    label='denoising',
    **dots,
  )
  solved.plot(
    budgets[-1:],
    [100 * denoising['pinned']['solved']['mean']],
    color=green,
    marker='D',
    markersize=7,
    fillstyle='none',
    linestyle='none',
    label='with givens pinned',
  )
  for name, colour, style, label in (
    ('ar', red, '--', 'left to right, same weights'),
    ('ar_alone', purple, '-.', 'left to right, trained for it alone'),
  ):
    if results.get(name):
      solved.axhline(
        100 * results[name]['solved'],
        color=colour,
        linestyle=style,
        label=label,
      )
  solved.set_ylabel('puzzles solved, %')
  solved.set_ylim(-2, 102)
  passes.plot(
    budgets, budgets, color=grey, linestyle=':', label='all of the budget'
  )
  passes.plot(budgets, [r['steps'] for r in records], label='denoising', **dots)
  passes.set_ylabel('passes used, mean')
  passes.set_ylim(0)
  passes.legend(frameon=False, loc='upper left')
  for axis in (solved, passes):
    axis.set_xlabel('most denoising passes')
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    plots.tidy(axis)
  title = (
    f'{results["puzzles"]} unseen puzzles, a network after '
    f'{results["run"]["training_steps"]} steps'
  )
  figure.legend(
    *solved.get_legend_handles_labels(),
    loc='outside lower center',
    ncols=4,
    frameon=False,
  )
  figure.suptitle(title, x=0.01, ha='left')
  figure.savefig(path)


def load(workdir: str, prompts: Sequence[str]) -> dg.Run:
  """The run, if it can answer these prompts. Raises `PuzzleError` if not."""
  run = dg.load(workdir)
  cells, canvas = len(prompts[0]), run.config.diffusion.canvas_length
  if canvas < cells or encode(run, prompts[:1]).shape[1] != 1 + cells:
    raise PuzzleError(
      f'{workdir} holds no network for puzzles of {cells} cells: its canvas '
      f'has {canvas} tokens, and each cell must be one token.'
    )
  return run


def make_parser(doc: str) -> argparse.ArgumentParser:
  """What all that measure a run on puzzles ask for."""
  parser = argparse.ArgumentParser(description=doc.split('\n')[0])
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--puzzles', required=True)
  parser.add_argument('--count', type=plots.positive, default=1000)
  parser.add_argument('--batch_size', type=plots.positive, default=250)
  return parser


def open_run(
  given: argparse.Namespace,
) -> tuple[dg.Run, list[str], list[str]]:
  """(run, prompts, responses); what is wrong with them ends the program."""
  try:
    prompts, responses = read_puzzles(given.puzzles, given.count)
    return load(given.workdir, prompts), prompts, responses
  except (OSError, ValueError, CheckpointError) as error:
    sys.exit(str(error))


def main() -> None:
  parser = make_parser(__doc__)
  parser.add_argument(
    '--ar_workdir', help='of a run with config.train.objective=ar'
  )
  parser.add_argument(
    '--budgets',
    type=plots.positive,
    nargs='+',
    default=range(1, 17),
    help='of denoising passes (1 to 16)',
  )
  parser.add_argument('--seeds', type=plots.positive, default=3)
  parser.add_argument('--output', type=pathlib.Path, default=FOLDER)
  parser.add_argument('--name', default='6x6', help='of the files written')
  given = parser.parse_args()
  started = time.time()
  run, *puzzles = open_run(given)
  prompts, _ = puzzles
  try:
    given.output.mkdir(parents=True, exist_ok=True)
    ar_run = load(given.ar_workdir, prompts) if given.ar_workdir else None
  except (OSError, ValueError, CheckpointError) as error:
    sys.exit(str(error))
  results = {
    'puzzles': len(prompts),
    'run': describe_run(run, given.workdir),
    'sampler': dataclasses.asdict(run.config.diffusion),
    'denoising': measure_denoising(
      run, *puzzles, given.budgets, given.batch_size, given.seeds
    ),
    'ar': measure_ar(run, *puzzles, given.batch_size),
  }
  if ar_run is not None:
    results['ar_run'] = describe_run(ar_run, given.ar_workdir)
    results['ar_alone'] = measure_ar(ar_run, *puzzles, given.batch_size)
  results |= {
    **machine.describe(),
    'seconds': round(time.time() - started),
    'command': machine.command('experiments.sudoku.solve'),
  }
  path = given.output / f'{given.name}.json'
  machine.write(results, path)
  draw(results, path.with_suffix('.png'))


if __name__ == '__main__':
  main()
