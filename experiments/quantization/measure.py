"""What few bits cost: a trained network against itself in float32.

  python -m experiments.quantization.measure --workdir=runs/tiny \
      --out=experiments/quantization/results.json

Held-out text is read by the prefill pass and a corrupted canvas is denoised;
an error is |few bits - float32| / |float32| in the Euclidean norm.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np

import diffusiongemma as dg
from diffusiongemma import checkpoints
from diffusiongemma import config as configs
from diffusiongemma import ops
from diffusiongemma.diffusion import noise
from diffusiongemma.model import denoiser
from diffusiongemma.model import parameters
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.training import corpus as corpora
from diffusiongemma.training import evaluate
from experiments import machine

Q = configs.QuantizationConfig
KINDS = {
  'int8': Q('int8', 'int8'),
  'int8, embedding too': Q('int8', 'int8', 'int8'),
  'fp8': Q('fp8', 'fp8'),
  'int4 experts, int8 linears, groups of 64': Q('int4', 'int8', group_size=64),
  'int4 experts, int8 linears, groups of 32': Q('int4', 'int8', group_size=32),
  'int4, groups of 32': Q('int4', 'int4', group_size=32),
}
WINDOWS, ROWS, T = 128, 64, 0.5
EXPECTED_ERRORS = (
  checkpoints.CheckpointError,
  configs.ConfigError,
  corpora.DataError,
  workdirs.WorkdirError,
)


def error(few: jax.Array, exact: jax.Array) -> float:
  few, exact = np.asarray(few, np.float64), np.asarray(exact, np.float64)
  return float(np.linalg.norm(few - exact) / np.linalg.norm(exact))


def matrix_errors(params: dict, exact: dict) -> list[float]:
  """Of each quantised matrix."""
  is_few = lambda w: isinstance(w, ops.weights.Quantized)
  few = jax.tree.leaves(params, is_leaf=is_few)
  pairs = zip(few, jax.tree.leaves(exact), strict=True)
  return [error(q.astype(jnp.float32), w) for q, w in pairs if is_few(q)]


def look(config, params, tokens_BS, length_B, canvas_BL):
  """(hidden states after each layer of the prefill, denoising logits)."""
  model = denoiser.Denoiser(config.model)
  is_layer = lambda module, method: isinstance(module, denoiser.Layer)

  @jax.jit
  def run(params):
    (_, cache, _), seen = model.apply(
      {'params': params},
      tokens_BS,
      length_B,
      method='prefill',
      capture_intermediates=is_layer,
      mutable=['intermediates'],
    )
    h_BLD = model.apply(
      {'params': params}, canvas_BL, None, cache, method='denoise'
    )
    logits_BLV = model.apply({'params': params}, h_BLD, method='logits')
    return seen['intermediates'], logits_BLV

  seen, logits_BLV = run(params)
  return [seen[k]['prefill'][0][0] for k in sorted(seen)], logits_BLV


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--out', required=True)
  given = parser.parse_args()
  try:
    run = dg.load(given.workdir)
    config, C = run.config, run.config.diffusion.canvas_length
    corpus = corpora.load_corpus(config.data, run.tokenizer, C)
  except EXPECTED_ERRORS as problem:
    sys.exit(str(problem))
  windows = evaluate.heldout_windows(config, corpus)
  count = len(windows.length_M)
  windows = windows.take(np.linspace(0, count - 1, WINDOWS).astype(int))
  tokens_BS = jnp.asarray(windows.tokens_MS[:ROWS])
  length_B = jnp.full((ROWS,), tokens_BS.shape[1] - C)
  canvas_BL, _ = noise.corrupt(
    jax.random.key(0),
    tokens_BS[:, -C:],
    jnp.full((ROWS, 1), T),
    config.model.vocab_size,
  )
  layers, logits = look(config, run.params, tokens_BS, length_B, canvas_BL)
  made = {
    'command': 'python -m experiments.quantization.measure '
    f'--workdir={given.workdir}',
    'step': run.step,
    **machine.describe(),
    'float32': {
      'ar_nats_per_token': evaluate.ar_nats_per_token(
        config, run.params, windows
      )
    },
  }
  for name, kinds in KINDS.items():
    params = parameters.quantize(kinds, run.params)
    few_layers, few = look(config, params, tokens_BS, length_B, canvas_BL)
    pairs = matrix_errors(params, run.params)
    made[name] = {
      'matrices': float(np.mean(pairs)),
      'after_layer': [
        error(a, b) for a, b in zip(few_layers, layers, strict=True)
      ],
      'logits': error(few, logits),
      'top1_agreement': float((few.argmax(-1) == logits.argmax(-1)).mean()),
      'ar_nats_per_token': evaluate.ar_nats_per_token(config, params, windows),
    }
    print(name, made[name], flush=True)
  machine.write(made, given.out)


if __name__ == '__main__':
  main()
