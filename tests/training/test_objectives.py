"""A file for each objective that the config names, and no other."""

import pathlib
import typing

from diffusiongemma import config as configs
from diffusiongemma.training import objectives

NAMES = typing.get_args(typing.get_type_hints(configs.TrainConfig)['objective'])


def test_every_objective_has_a_file_and_all_that_is_asked_of_it():
  folder = pathlib.Path(objectives.__file__).parent
  files = {path.stem for path in folder.glob('*.py')} - {'__init__'}
  assert files == set(NAMES)
  for name in NAMES:
    objective = objectives.find(name)
    assert callable(objective.draw) and callable(objective.loss)
    assert isinstance(objective.DENOISES, bool)
    assert objective.DENOISES or not objective.LEAVES_ONE_OUT
