"""The numbers of an evaluation, against their definitions."""

import bz2
import dataclasses
import math

import jax
import numpy as np
import pytest

from diffusiongemma.config import Config
from diffusiongemma.config import DataConfig
from diffusiongemma.config import DiffusionConfig
from diffusiongemma.generation import network as network_lib
from diffusiongemma.training import corpus as corpora
from diffusiongemma.training import data
from diffusiongemma.training import evaluate

C = 6


@pytest.fixture(scope='module')
def config(model_config):
  return Config(
    model=model_config,
    diffusion=DiffusionConfig(canvas_length=C, stop_token_ids=(1,)),
    data=DataConfig(sequence_length=16, batch_size=4),
  )


@pytest.fixture(scope='module')
def document():
  return np.random.default_rng(0).integers(3, 97, 41).astype(np.int32)


def test_ar_loss_is_that_of_one_token_after_the_other(config, params, document):
  """A document that fits one window, token by token from longer prefixes."""
  short = document[:12]
  windows = data.heldout_windows([corpora.Example(short)], 16, 2, 0)
  network = network_lib.bind(config, params)

  @jax.jit
  def log_p_after(prefix_P, length):
    h_BPD, _, _ = network.prefill(prefix_P[None], length[None])
    return jax.nn.log_softmax(network.logits(h_BPD[0, length - 1]))

  nats = []
  for end in range(len(short)):
    prefix_P = np.full(16, 7)  # Padding, which no real token sees.
    prefix_P[: end + 1] = [2, *short[:end]]
    log_p_V = log_p_after(prefix_P, np.int32(end + 1))
    nats.append(-float(log_p_V[short[end]]))
  got = evaluate.ar_nats_per_token(config, params, windows)
  np.testing.assert_allclose(got, np.mean(nats), rtol=1e-5)


def test_batching_does_not_matter(config, params, document):
  windows = data.heldout_windows(
    [corpora.Example(document), corpora.Example(document[:20])], 16, 2, 0
  )
  other = dataclasses.replace(
    config, data=dataclasses.replace(config.data, batch_size=3)
  )
  assert len(windows.length_M) % 3 and len(windows.length_M) % 4
  np.testing.assert_allclose(
    evaluate.ar_nats_per_token(config, params, windows),
    evaluate.ar_nats_per_token(other, params, windows),
    rtol=1e-5,
  )


def test_denoising_loss_by_noise_level(config, params, document):
  """All kept at t = 0, all corrupted at t = 1: the other mean is empty."""
  windows = data.heldout_windows([corpora.Example(document)], 16, 2, 0)
  clean = evaluate.denoise_nats_per_token(config, params, windows, 0.0)
  noisy = evaluate.denoise_nats_per_token(config, params, windows, 1.0)
  assert math.isnan(clean.corrupted) and math.isnan(noisy.kept)
  # An untrained network copies a kept token and can't guess a lost one.
  assert clean.kept < noisy.corrupted
  again = evaluate.denoise_nats_per_token(config, params, windows, 1.0)
  assert again.corrupted == noisy.corrupted


def test_unigram_entropy():
  documents = [
    corpora.Example(np.array([3, 3, 4])),
    corpora.Example(np.array([5])),
  ]
  assert evaluate.unigram_bits(documents, 8) == 1.5
  # Of a response neither the prompt nor the fill of its canvas.
  response = corpora.Example(np.array([6, 6, 3, 4, 1, 1, 1]), 2, 2)
  assert evaluate.unigram_bits([response], 8) == 1.0


def test_compressors_compress_each_text_alone():
  texts = ['to be or not to be ' * 50, 'that is the question']
  numbers = evaluate.compressors_bits_per_byte(texts)
  size = sum(len(bz2.compress(t.encode(), 9)) for t in texts)
  assert numbers['bzip2_9'] == 8 * size / sum(map(len, texts))
  assert set(numbers) == {'bzip2_9', 'xz_9e', 'gzip_9'}


def test_bits_per_byte_ties_tokens_to_bytes(config, params, document):
  example = corpora.Example(document)
  corpus = corpora.Corpus([example], [example], ['x' * 100])
  numbers = evaluate.evaluate(config, params, corpus)
  windows = data.heldout_windows([corpora.Example(document)], 16, 2, 0)
  nats = evaluate.ar_nats_per_token(config, params, windows)
  np.testing.assert_allclose(
    numbers['ar_bits_per_byte'], nats / math.log(2) * 41 / 100, rtol=1e-6
  )
  assert numbers['heldout_bytes'] == 100 and numbers['heldout_tokens'] == 41
  # A call of a tool may be control tokens alone.
  nothing = evaluate.evaluate(
    config, params, corpus._replace(heldout_texts=[''])
  )
  assert nothing['ar_bits_per_token'] == numbers['ar_bits_per_token']
  assert not [name for name in nothing if name.endswith('per_byte')]


def with_objective(config, objective):
  train = dataclasses.replace(config.train, objective=objective)
  return dataclasses.replace(config, train=train)


def test_nelbo_of_a_network_that_knows_nothing(config, params, document):
  """All logits are zero: log V nats a token, whatever the text."""
  blank = {**params, 'embedding': 0 * params['embedding']}
  examples = [
    corpora.Example(np.tile(document, 12)),
    corpora.fill_canvases([5, 6], list(range(7, 16)), 16, C, 1),
  ]
  canvases = data.heldout_canvases(examples, 16, C, 2, 0)
  nats, error = evaluate.nelbo_nats_per_token(config, blank, canvases)
  assert 0 < error < 0.25
  assert abs(nats - math.log(97)) < 4 * error
  assert evaluate.nelbo_nats_per_token(config, blank, canvases)[0] == nats


def test_what_is_told_of_each_objective(config, params, document):
  example = corpora.Example(document)
  corpus = corpora.Corpus([example], [example], ['x' * 100])
  told = {
    objective: set(
      evaluate.evaluate(with_objective(config, objective), params, corpus)
    )
    for objective in ('ce', 'loo_ce', 'ar')
  }
  nelbo = {name for name in told['loo_ce'] if name.startswith('nelbo')}
  assert len(nelbo) == 4 and told['loo_ce'] - nelbo == told['ce']
  denoising = {name for name in told['ce'] if name.startswith('denoise')}
  assert len(denoising) == 10 and told['ce'] - denoising == told['ar']
