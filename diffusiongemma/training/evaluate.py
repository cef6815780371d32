"""Evaluation of a network on held-out text.

  AR bits per byte = sum_i -log2 p(x_i | x_<i) / bytes     (prefill pass, exact)
  NELBO, bits per byte: an upper bound of what denoising needs   (`likelihood`)
  denoising loss at noise level t = mean CE over corrupted (and kept) positions

The first is a likelihood, comparable with a compressor. The second bounds one;
it is measured only for networks trained with `loo_ce`. The third is a loss: it
bounds nothing, but a network that ignored the context could not get below the
unigram entropy on corrupted positions.
"""

import bz2
from collections.abc import Callable
import functools
import gzip
import lzma
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich import table as rich_table

from diffusiongemma.config import Config
from diffusiongemma.diffusion import cross_entropy
from diffusiongemma.diffusion import likelihood
from diffusiongemma.diffusion import loss
from diffusiongemma.diffusion import noise
from diffusiongemma.generation import network as network_lib
from diffusiongemma.ops.weights import Params
from diffusiongemma.training import corpus as corpora
from diffusiongemma.training import data
from diffusiongemma.training import objectives

NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


class DenoiseLoss(NamedTuple):
  """Cross entropy in nats per token, separate for both kinds of positions; NaN
  if there are none of a kind."""

  corrupted: float
  kept: float


@functools.partial(jax.jit, static_argnames='config')
def _ar_nats(config, params, tokens_BS, length_B, mask_BS):
  """Sum of -log p over the targets of a batch."""
  network = network_lib.bind(config, params)
  h_BSD, _, _ = network.prefill(tokens_BS, length_B)
  targets_BS = jnp.roll(tokens_BS, -1, axis=1)
  nats_BS, _ = cross_entropy.per_position(network.logits, h_BSD, targets_BS)
  return jnp.sum(jnp.where(jnp.roll(mask_BS, -1, axis=1), nats_BS, 0.0))


def ar_nats_per_token(
  config: Config,
  params: Params,
  windows: data.Windows,
  before_batch: Callable[[], None] = lambda: None,
) -> float:
  """Exact autoregressive loss over all targets of the windows."""
  total = 0.0
  for batch in _batches(windows, config.data.batch_size):
    before_batch()
    total += float(_ar_nats(config, params, *batch))
  return total / windows.target_mask_MS.sum()


@functools.partial(jax.jit, static_argnames='config')
def _denoise_sums(config, params, tokens_BS, length_B, key, t):
  """(CE sum, count) of corrupted and of kept positions of the last canvases."""
  network = network_lib.bind(config, params)
  C, (B, _) = config.diffusion.canvas_length, tokens_BS.shape
  start_BK = jnp.maximum(length_B - C, 0)[:, None]
  _, cache, _ = network.prefill(tokens_BS, length_B)
  clean_BL = loss.slice_canvases(tokens_BS, start_BK, C)
  t_BL = jnp.full((B, C), t)
  canvas_BL, corrupted_BL = noise.corrupt(
    key, clean_BL, t_BL, config.model.vocab_size
  )
  h_BLD = network.denoise(canvas_BL, None, cache, start_BK)
  objective = objectives.find(config.train.objective)
  evidence = (canvas_BL, t_BL) if objective.LEAVES_ONE_OUT else None
  nats_BL, _ = cross_entropy.per_position(
    network.logits, h_BLD, clean_BL, evidence
  )
  real_B1 = (length_B > C)[:, None]

  def sums(mask_BL):
    return jnp.sum(jnp.where(mask_BL, nats_BL, 0.0)), jnp.sum(mask_BL)

  return sums(corrupted_BL & real_B1), sums(~corrupted_BL & real_B1)


def denoise_nats_per_token(
  config: Config,
  params: Params,
  windows: data.Windows,
  t: float,
  before_batch: Callable[[], None] = lambda: None,
) -> DenoiseLoss:
  """Loss at noise level t in the last canvas of every window, first pass.

  The noise is the same in every call. Windows no longer than a canvas are
  ignored.
  """
  totals = np.zeros((2, 2))
  for index, batch in enumerate(_batches(windows, config.data.batch_size)):
    before_batch()
    key = jax.random.fold_in(jax.random.key(0), index)
    totals += np.array(_denoise_sums(config, params, *batch[:2], key, t))
  sums, counts = totals.T
  means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
  return DenoiseLoss(*means.tolist())


@functools.partial(jax.jit, static_argnames='config')
def _nelbo(config, params, key, canvases):
  return likelihood.nelbo(
    network_lib.bind(config, params),
    key,
    *canvases,
    config.model.vocab_size,
    likelihood.DRAWS,
  )


def nelbo_nats_per_token(
  config: Config, params: Params, canvases: data.Canvases
) -> tuple[float, float]:
  """(upper bound of -log p, its standard error) of a `loo_ce` network, in nats
  per token.

  The noise is the same in every call.
  """
  nats = []
  for index, batch in enumerate(_batches(canvases, config.data.batch_size)):
    key = jax.random.fold_in(jax.random.key(0), index)
    nats.append(np.asarray(_nelbo(config, params, key, batch)))
  total, error = likelihood.combine(np.concatenate(nats, axis=1))
  count = canvases.counted_ML.sum()
  return float(total / count), float(error / count)


def _batches(rows: data.Windows | data.Canvases, size: int):
  """Batches of one shape, the last padded with empty rows."""
  for start in range(0, len(rows.length_M), size):
    batch = rows.take(slice(start, start + size))
    missing = size - len(batch.length_M)
    yield type(rows)(
      *(np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for x in batch)
    )


def unigram_bits(examples: list[corpora.Example], vocab_size: int) -> float:
  """Entropy of the unigram distribution of target tokens, in bits per token."""
  tokens = np.concatenate([example.targets for example in examples])
  counts = np.bincount(tokens, minlength=vocab_size)
  p = counts[counts > 0] / counts.sum()
  return float(-np.sum(p * np.log2(p)))


def compressors_bits_per_byte(texts: list[str]) -> dict[str, float]:
  """Bits per byte of three well-known compressors, each text compressed on its
  own; NaN if there is no text."""
  raw = [text.encode() for text in texts]
  num_bytes = sum(map(len, raw)) or math.nan
  extreme = 9 | lzma.PRESET_EXTREME
  sizes = {
    'bzip2_9': [len(bz2.compress(b, 9)) for b in raw],
    'xz_9e': [len(lzma.compress(b, preset=extreme)) for b in raw],
    'gzip_9': [len(gzip.compress(b, 9)) for b in raw],
  }
  return {name: 8 * sum(size) / num_bytes for name, size in sizes.items()}


def quick(
  config: Config,
  params: Params,
  corpus: corpora.Corpus,
  batches: int,
  t: float,
  before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
  """Losses in nats per token on a few windows spread over the held-out text.
  `before_batch` is called before each batch and may raise to stop."""
  windows = heldout_windows(config, corpus)
  count, size = len(windows.length_M), batches * config.data.batch_size
  chosen = np.unique(np.linspace(0, count - 1, size).astype(int))
  windows = windows.take(chosen)
  nats = ar_nats_per_token(config, params, windows, before_batch)
  numbers = {'heldout_loss_ar': nats}
  if objectives.find(config.train.objective).DENOISES:
    denoise = denoise_nats_per_token(config, params, windows, t, before_batch)
    numbers['heldout_loss_corrupted'] = denoise.corrupted
    numbers['heldout_loss_kept'] = denoise.kept
  return _known(numbers)


def _known(numbers: dict[str, float]) -> dict[str, float]:
  """Without NaN: short texts have no canvas to denoise."""
  return {k: v for k, v in numbers.items() if not math.isnan(v)}


def heldout_windows(config: Config, corpus: corpora.Corpus) -> data.Windows:
  """Windows of the held-out text, as long as training rows."""
  return data.heldout_windows(
    corpus.heldout,
    config.data.sequence_length,
    config.diffusion.bos_token_id,
    config.diffusion.pad_token_id,
  )


def evaluate(
  config: Config,
  params: Params,
  corpus: corpora.Corpus,
  tell: Callable[[str], None] = lambda what: None,
) -> dict[str, float]:
  """All measures on all of the held-out text; names say the unit. `tell` is
  called with the name of the next measurement, which may take minutes."""
  windows = heldout_windows(config, corpus)
  num_bytes = sum(len(text.encode()) for text in corpus.heldout_texts)
  num_tokens = int(windows.target_mask_MS.sum())
  # Targets may be only control tokens, which have no text.
  tokens_per_byte = num_tokens / num_bytes if num_bytes else math.nan
  tell('from left to right')
  bits = ar_nats_per_token(config, params, windows) / math.log(2)
  numbers = {
    'heldout_bytes': num_bytes,
    'heldout_tokens': num_tokens,
    'ar_bits_per_token': bits,
    'ar_bits_per_byte': bits * tokens_per_byte,
  }
  for name, value in compressors_bits_per_byte(corpus.heldout_texts).items():
    numbers[f'{name}_bits_per_byte'] = value
  numbers['unigram_bits_per_token'] = unigram_bits(
    corpus.train, config.model.vocab_size
  )
  objective = objectives.find(config.train.objective)
  if objective.LEAVES_ONE_OUT:
    canvases = data.heldout_canvases(
      corpus.heldout,
      config.data.sequence_length,
      config.diffusion.canvas_length,
      config.diffusion.bos_token_id,
      config.diffusion.pad_token_id,
    )
    tell('the bound of denoising')
    nelbo, error = nelbo_nats_per_token(config, params, canvases)
    for name, nats in (('nelbo', nelbo), ('nelbo_standard_error', error)):
      bits = nats / math.log(2)
      numbers[f'{name}_bits_per_token'] = bits
      numbers[f'{name}_bits_per_byte'] = bits * tokens_per_byte
  for t in NOISE_LEVELS if objective.DENOISES else ():
    tell(f'denoising at t = {t}')
    at_t = denoise_nats_per_token(config, params, windows, t)
    numbers[f'denoise_loss_t{t}_corrupted_bits'] = at_t.corrupted / math.log(2)
    numbers[f'denoise_loss_t{t}_kept_bits'] = at_t.kept / math.log(2)
  return _known(numbers)


def to_table(numbers: dict[str, float]) -> rich_table.Table:
  """The result of `evaluate` as a table for the terminal."""
  table = rich_table.Table(
    title=f'held-out text of {numbers["heldout_bytes"]:,} bytes'
  )
  table.add_column('measure')
  table.add_column('value', justify='right')
  for name, value in numbers.items():
    if isinstance(value, float):
      table.add_row(name.replace('_', ' '), f'{value:.3f}')
  return table
