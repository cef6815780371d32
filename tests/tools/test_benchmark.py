"""What is timed is what it says: fixed steps and the same weights."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import config as configs
from diffusiongemma import ops
from diffusiongemma.diffusion import sampler
from diffusiongemma.tools import benchmark
from diffusiongemma.tools import peer as peer_lib

MICRO = pathlib.Path(__file__).parents[1] / 'micro_config.py'


@pytest.fixture(scope='module')
def config():
  return configs.load_config(str(MICRO))


def test_all_steps_are_taken(config):
  params = benchmark.random_params(config, jax.random.key(0))
  ours = benchmark.Ours(config, params, 2, 16)
  assert ours.write().steps_B.tolist() == [sampler.TYPICAL_STEPS] * 2
  assert ours.cache.length_B.tolist() == [16, 16]
  assert ours.commit().length_B.tolist() == [24, 24]


def test_random_parameters_are_of_few_bits(config):
  kinds = configs.QuantizationConfig('int4', 'int8', 'int8', group_size=8)
  config = dataclasses.replace(config, quantization=kinds)
  params = benchmark.random_params(config, jax.random.key(0))
  down = params['layer_01']['experts']['down']
  assert isinstance(down, ops.weights.Quantized)
  assert down.values.dtype == jnp.int4
  rows = benchmark.measure(config, params, [(1, 8)], repeats=1)
  assert rows[0]['array_bytes']['parameters: experts'] > 0


def test_a_run_is_a_table_and_plain_values(config):
  made = benchmark.run(config, [(1, 8), (2, 16)], beside_peer=False)
  assert json.loads(json.dumps(made)) == made
  rows = made['sampling']
  assert [(r['batch'], r['context']) for r in rows] == [(1, 8), (2, 16)]
  for row in rows:
    C = config.diffusion.canvas_length
    seconds = (
      sampler.TYPICAL_STEPS * row['step_seconds'] + row['commit_seconds']
    )
    assert row['tokens_per_second'] == pytest.approx(row['batch'] * C / seconds)
    assert min(row['step_spread']) <= row['step_seconds']
  assert made['training']['tokens_per_second'] > 0
  text = benchmark.to_text(made)
  assert 'tokens/s' in text and 'training' in text
  assert 'times as fast' not in text


def test_the_peer_has_our_weights(config, monkeypatch):
  """Its hidden states after a prompt are ours."""
  torch = pytest.importorskip('torch', reason='needs torch')
  pytest.importorskip('transformers', reason='needs transformers')
  compiled = []  # Which would take a minute.
  monkeypatch.setattr(torch, 'compile', lambda f, **_: compiled.append(f) or f)
  peer = peer_lib.Transformers(config)
  tokens_BP = np.arange(3, 15, dtype=np.int32)[None]
  with torch.no_grad():
    theirs = peer.model.model.encoder(
      input_ids=torch.tensor(tokens_BP, dtype=torch.long)
    ).last_hidden_state
  ours, _, _ = benchmark.denoiser.Denoiser(config.model).apply(
    {'params': peer.params}, tokens_BP, jnp.array([12]), method='prefill'
  )
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
  # So it has them of a prompt that was read in pieces.
  monkeypatch.setattr(peer_lib, 'PIECE', 5)
  for is_static in (False, True):
    cache = peer.read_prompt(config, tokens_BP[:, :-1], is_static)
    with torch.no_grad():
      last = peer.model.model.encoder(
        input_ids=torch.tensor(tokens_BP[:, -1:], dtype=torch.long),
        position_ids=torch.tensor([[11]]),
        cache=cache,
      ).last_hidden_state
    np.testing.assert_allclose(last, theirs[:, -1:], rtol=1e-4, atol=1e-4)
  rows = benchmark.measure(config, peer.params, [(1, 8)], 1, peer)
  # At this size the difference of two times is noise.
  for name in ('peer', 'compiled_peer'):
    assert np.isfinite(rows[0][f'{name}_step_seconds'])
    assert np.isfinite(rows[0][f'times_as_fast_as_{name}'])
  assert peer.model.forward in compiled

  def refuse(f, **_):
    raise RuntimeError('no compiler\nis installed')

  monkeypatch.setattr(torch, 'compile', refuse)
  peer = peer_lib.Transformers(config)
  rows = benchmark.measure(config, peer.params, [(1, 8)], 1, peer)
  assert rows[0]['compiled_peer_refusal'] == 'RuntimeError: no compiler'
  made = {'sampling': rows, 'training': None, 'transformers': '5'}
  text = benchmark.to_text(made)
  assert 'could not be compiled: RuntimeError: no compiler' in text
  assert text.splitlines()[0].count('times as fast') == 1


def test_the_peer_learns(config):
  """A step of its training is one: its loss on a batch falls from where that
  of a random network is."""
  pytest.importorskip('torch', reason='needs torch')
  pytest.importorskip('transformers', reason='needs transformers')
  peer = peer_lib.Transformers(config)
  S, C = config.data.sequence_length, config.diffusion.canvas_length
  batch = {
    'tokens_BS': np.random.default_rng(0).integers(3, 2048, (2, S)),
    'canvas_start_BK': np.array([[C], [C]]),
    'target_mask_BS': np.ones((2, S), bool),
  }
  losses = [peer.learn(config, batch) for _ in range(30)]
  assert losses[0] == pytest.approx(2 * np.log(2048), rel=0.2)
  assert losses[-1] < losses[0] - 0.5
  numbers = benchmark.measure_training(config, 1, peer)
  assert np.isfinite(numbers['times_as_fast_as_peer'])
