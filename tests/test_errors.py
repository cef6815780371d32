"""All errors that a person can meet have one base class."""

import importlib
import inspect
import pkgutil

import pytest

import diffusiongemma as dg


def exceptions() -> dict[str, type]:
  """All that the package defines, but for those that never leave a file."""
  found = {}
  for info in pkgutil.walk_packages(dg.__path__, 'diffusiongemma.'):
    parts = info.name.split('.')
    if 'gpu' in parts or 'tpu' in parts:
      continue  # Need not be importable here, and define none.
    module = importlib.import_module(info.name)
    for name, value in vars(module).items():
      if inspect.isclass(value) and issubclass(value, BaseException):
        if value.__module__ == info.name and not name.startswith('_'):
          found[name] = value
  return found


EXCEPTIONS = exceptions()


def test_they_are_found():
  assert {'Error', 'ConfigError', 'TooLarge', 'SampleError'} <= set(EXCEPTIONS)


@pytest.mark.parametrize('name', sorted(EXCEPTIONS))
def test_one_base_class(name):
  kind = EXCEPTIONS[name]
  assert issubclass(kind, dg.Error)
  assert kind.exit_code in (1, 2)
  assert name == 'Error' or issubclass(kind, (ValueError, RuntimeError))
