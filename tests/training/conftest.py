"""A run that takes seconds, for files that have no other."""

import dataclasses

import micro_config
import pytest


@pytest.fixture(scope='module')
def config():
  """That of a run of one layer."""
  config = micro_config.get_config()
  model = dataclasses.replace(config.model, attention_pattern=('global',))
  return dataclasses.replace(config, model=model)
