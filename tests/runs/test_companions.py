"""What lies beside the weights, checked."""

import pathlib

import pytest

from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma.runs import companions

MICRO = str(pathlib.Path(__file__).parents[1] / 'micro_config.py')


@pytest.fixture
def micro():
  return configs.load_config(MICRO)


def test_tokenizer_must_fit_the_network(micro):
  for field, value in (
    ('model.vocab_size', '2000'),
    ('diffusion.pad_token_id', '3'),
    ('diffusion.stop_token_ids', '50'),
  ):
    with pytest.raises(configs.ConfigError, match=field.replace('.', r'\.')):
      companions.load_tokenizer(fields.override(micro, field, value))
