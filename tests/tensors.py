"""Folders of safetensors, made by hand and compared, for tests."""

import contextlib
import json
import signal
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import safetensors
from diffusiongemma.checkpoints import safetensors_writer

BF16 = np.dtype(ml_dtypes.bfloat16)
TYPES = {'F32': np.dtype('f4'), 'F16': np.dtype('f2'), 'BF16': BF16}
MEGABYTE = 2**20
EIGHT = b'12345678'  # Data of a tensor of two floats.
WEIRD = 'we\x1b[31mird\n'
ONE, TWO = (f'model-0000{i}-of-00002.safetensors' for i in (1, 2))
WEIGHT_MAP = {'a': ONE, 'b': ONE, 'c': TWO, 'd': TWO}


def pack(header, data=b''):
  """A file: a header, as an object or as bytes, and data."""
  if not isinstance(header, bytes):
    header = json.dumps(header).encode()
  return len(header).to_bytes(8, 'little') + header + data


def entry(begin=0, end=8, dtype='F32', shape=(2,)):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


def make_arrays(seed=0):
  """All types, scalars, empty tensors and odd sizes."""
  rng = np.random.default_rng(seed)
  shapes = {
    'half': ((3,), 'F16'),
    'brain': ((5, 7), 'BF16'),
    'single': ((2, 3, 4), 'F32'),
    'scalar': ((), 'BF16'),
    'empty': ((0, 3), 'F32'),
    'straße.\u4f60': ((1,), 'F32'),
  }
  return {
    name: rng.normal(size=shape).astype(TYPES[dtype])
    for name, (shape, dtype) in shapes.items()
  }


def same(a, b):
  return (
    a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
  )


def write(folder, arrays, **options):
  specs = {name: (x.shape, x.dtype) for name, x in arrays.items()}
  safetensors_writer.write_folder(
    str(folder), specs, arrays.__getitem__, **options
  )


def write_two(folder):
  """The files of `WEIGHT_MAP`, without an index."""
  for path, names in ((folder / ONE, 'ab'), (folder / TWO, 'cd')):
    first, second = names
    header = {first: entry(), second: entry(8, 16)}
    path.write_bytes(pack(header, 2 * EIGHT))


def read(folder):
  listed = safetensors.list_tensors(str(folder))
  assert all(name == tensor.name for name, tensor in listed.items())
  return {name: safetensors.read_tensor(x) for name, x in listed.items()}


def agree(a, b):
  return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


@contextlib.contextmanager
def bounded(seconds, peak_bytes):
  """What takes longer, waits for ever or allocates more, fails."""

  def on_alarm(*_):
    raise AssertionError(f'not done in {seconds} s')

  before = signal.signal(signal.SIGALRM, on_alarm)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  tracemalloc.start()
  try:
    yield
    assert tracemalloc.get_traced_memory()[1] < peak_bytes
  finally:
    tracemalloc.stop()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def refused(action, *parts):
  """The error is one printable line with all of `parts`."""
  with bounded(10, 8 * MEGABYTE), pytest.raises(CheckpointError) as caught:
    action()
  message = str(caught.value)
  missing = [part for part in parts if part not in message]
  assert not missing, message
  assert message.isprintable() and len(message) < 1500, message


def list_refused(folder, *parts):
  refused(lambda: safetensors.list_tensors(str(folder)), *parts)
