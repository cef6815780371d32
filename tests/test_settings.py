"""The same tokens and losses under settings of JAX that a user may have."""

import dataclasses
import json

import jax
import micro_config
import numpy as np
import pytest

from diffusiongemma import config as configs
from diffusiongemma.diffusion.sampling import Sampling
from diffusiongemma.generation import generate
from diffusiongemma.training import train

SETTINGS = {
  'JAX_ENABLE_X64=1': lambda: jax.enable_x64(True),
  'JAX_NUMPY_RANK_PROMOTION=raise': lambda: jax.numpy_rank_promotion('raise'),
}
PROMPTS = [[2, 10, 20, 30], [2, 40]]


def write(config, params, **options):
  rows = generate.generate_tokens(
    config, params, PROMPTS, jax.random.key(3), 9, **options
  ).rows
  return [row.tokens for row in rows]


def keep_logits(canvas_BL, logits_BLV, time, state):
  return logits_BLV


@pytest.mark.parametrize('name', SETTINGS)
@pytest.mark.parametrize('strategy', ['entropy_bound', 'ancestral'])
def test_the_same_tokens(model_config, params, name, strategy):
  """On the device in one go; and step by step with whole logits and pins."""
  config = configs.Config(
    model=model_config,
    diffusion=configs.DiffusionConfig(
      canvas_length=6,
      max_denoising_steps=3,
      stop_token_ids=(),
      strategy=strategy,
    ),
  )
  watched = {
    'pinned': [{2: 7}, {}],
    'sampling': Sampling(logit_hook=keep_logits),
    'on_step': lambda step, state: None,
  }
  expected = [write(config, params), write(config, params, **watched)]
  with SETTINGS[name]():
    found = [write(config, params), write(config, params, **watched)]
  assert found == expected


def learn(folder):
  """Losses of a step, and held out."""
  config = micro_config.get_config()
  schedule = dataclasses.replace(
    config.train, steps=1, log_every=1, sample_prompt=''
  )
  config = dataclasses.replace(config, train=schedule)
  assert train.train(config, str(folder)) == 0
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return {
    key: value
    for line in lines
    for key, value in json.loads(line).items()
    if 'loss' in key
  }


@pytest.fixture(scope='module')
def losses(tmp_path_factory):
  return learn(tmp_path_factory.mktemp('plain') / 'run')


@pytest.mark.parametrize('name', SETTINGS)
def test_the_same_losses(tmp_path, losses, name):
  with SETTINGS[name]():
    found = learn(tmp_path / 'run')
  assert found.keys() == losses.keys() and len(losses) > 3
  for key, value in losses.items():
    np.testing.assert_allclose(found[key], value, rtol=1e-4, err_msg=key)
