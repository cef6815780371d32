"""How much is right after how many steps, for each strategy of the sampler.

  python experiments/sampling_quality/measure.py --workdir=runs/sudoku \\
      --puzzles=runs/sudoku6/heldout.jsonl

solves held-out puzzles (`experiments/sudoku`) with every strategy and every
budget of steps, with self-conditioning and without, and writes results.json and
curves.png beside this file. A puzzle counts as solved when every cell is right.
Rows that have converged before the budget is used up stop; `steps` is what they
used, on average.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

import diffusiongemma as dg

BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
FOLDER = pathlib.Path(__file__).parent
# Line, and what else it is told by than its colour.
LOOKS = {
  'entropy_bound': ('entropy bound', '#1f5fa8', 'o'),
  'confidence': ('confidence', '#c2571a', 's'),
  'top_k_confident': ('top-k confident', '#2c7a3f', '^'),
  'ancestral': ('ancestral', '#7a4fa3', 'D'),
}


def read_puzzles(path: str, count: int) -> tuple[list[str], list[str]]:
  """(prompts, responses) of the first `count` lines."""
  with open(path) as file:
    records = [json.loads(line) for line in file][:count]
  return [r['prompt'] for r in records], [r['response'] for r in records]


def make_solver(run, diffusion, self_conditioning: bool):
  """A jitted (cache, key) -> (text of each row as tokens, steps of each)."""
  model = run.config.model

  @jax.jit
  def solve(params, cache, key):
    denoise_fn = dg.make_denoise_fn(model, params, cache)

    def without(tokens_BL, sc_BLD, *rest):
      return denoise_fn(tokens_BL, jnp.zeros_like(sc_BLD), *rest)

    state, _ = dg.sample_canvas(
      denoise_fn if self_conditioning else without,
      key,
      diffusion,
      batch_size=len(cache.length_B),
      vocab_size=model.vocab_size,
      embed_dim=model.embed_dim,
    )
    return state.draft_BL, state.steps_B

  return lambda cache, key: solve(run.params, cache, key)


def read(run, prompts):
  """A cache that holds the prompts, which are all of one length."""
  tokens_BP = jnp.array(
    [[run.tokenizer.bos_id, *run.tokenizer.encode(p)] for p in prompts]
  )
  B, P = tokens_BP.shape
  cache = dg.init_cache(run.config.model, B, P)
  return dg.prefill(
    run.config.model, run.params, tokens_BP, jnp.full(B, P), cache
  )


def measure(run, prompts, responses, budgets, batch_size, seed) -> list[dict]:
  """One record for each way of sampling and budget."""
  batches = [
    slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)
  ]
  caches = [read(run, prompts[part]) for part in batches]
  records = []
  for self_conditioning, strategy, budget in itertools.product(
    (True, False), dg.strategies.STRATEGIES, budgets
  ):
    diffusion = dataclasses.replace(
      run.config.diffusion, strategy=strategy, max_denoising_steps=budget
    )
    solver = make_solver(run, diffusion, self_conditioning)
    texts, steps = [], []
    for index, cache in enumerate(caches):
      key = jax.random.fold_in(jax.random.key(seed), index)
      drafts_BL, steps_B = solver(cache, key)
      texts += [run.tokenizer.decode(row) for row in np.asarray(drafts_BL)]
      steps += steps_B.tolist()
    records.append(
      {
        'self_conditioning': self_conditioning,
        'strategy': strategy,
        'budget': budget,
        **score(texts, prompts, responses),
        'steps': float(np.mean(steps)),
      }
    )
    print(json.dumps(records[-1]), flush=True)
  return records


def score(texts, prompts, responses) -> dict:
  """Shares of puzzles and cells that are right; givens that were changed."""
  cells, altered = [], 0
  for text, prompt, response in zip(texts, prompts, responses, strict=True):
    text = text.ljust(len(response))
    cells += [a == b for a, b in zip(text, response, strict=False)]
    altered += sum(
      p not in ('.', a) for a, p in zip(text, prompt, strict=False)
    )
  right = [a == b for a, b in zip(texts, responses, strict=True)]
  return {
    'solved': float(np.mean(right)),
    'cells_right': float(np.mean(cells)),
    'givens_altered': altered,
  }


def draw(records: list[dict], title: str, path: pathlib.Path) -> None:
  """Share of solved puzzles over the budget of steps."""
  figure = matplotlib.figure.Figure((10, 4.2), dpi=150, layout='constrained')
  axes = figure.subplots(1, 2, sharey=True)
  for axis, on in zip(axes, (True, False), strict=True):
    for strategy, (name, colour, marker) in LOOKS.items():
      line = [
        r
        for r in records
        if r['strategy'] == strategy and r['self_conditioning'] == on
      ]
      axis.plot(
        [r['budget'] for r in line],
        [100 * r['solved'] for r in line],
        color=colour,
        marker=marker,
        markersize=5,
        label=name,
      )
    axis.set_title(f'{"with" if on else "without"} self-conditioning')
    axis.set_xscale('log', base=2)
    axis.xaxis.set_major_formatter('{x:g}')
    axis.set_xlabel('most denoising passes')
    axis.grid(alpha=0.25)
    axis.spines[['top', 'right']].set_visible(False)
  axes[0].set_ylabel('puzzles solved, %')
  axes[0].set_ylim(-2, 102)
  axes[1].legend(frameon=False, loc='lower right')
  figure.suptitle(title, x=0.01, ha='left')
  figure.savefig(path)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--puzzles', required=True)
  parser.add_argument('--count', type=int, default=1000)
  parser.add_argument('--batch_size', type=int, default=250)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--output', type=pathlib.Path, default=FOLDER)
  given = parser.parse_args()
  run = dg.load(given.workdir)
  prompts, responses = read_puzzles(given.puzzles, given.count)
  started = time.time()
  records = measure(
    run, prompts, responses, BUDGETS, given.batch_size, given.seed
  )
  results = {
    'puzzles': len(prompts),
    'training_steps': run.step,
    'seed': given.seed,
    'sampler': dataclasses.asdict(run.config.diffusion),
    'machine': f'{os.cpu_count()} cores, {platform.machine()}',
    'python': platform.python_version(),
    'jax': jax.__version__,
    'date': time.strftime('%Y-%m-%d', time.gmtime()),
    'seconds': round(time.time() - started),
    'records': records,
  }
  given.output.mkdir(parents=True, exist_ok=True)
  (given.output / 'results.json').write_text(
    json.dumps(results, indent=1) + '\n'
  )
  title = f'{len(prompts)} unseen puzzles, a network after {run.step} steps'
  draw(records, title, given.output / 'curves.png')


if __name__ == '__main__':
  main()
