"""Whatever the bytes are: read as the library reads them, or refused."""

import contextlib
import json
import os

import hypothesis
from hypothesis import strategies as st
import numpy as np
import tensors

from diffusiongemma.checkpoints import CheckpointError


def fuzz(count, **options):
  return hypothesis.settings(
    max_examples=int(os.environ.get('FUZZ', count)),
    deadline=2000,
    suppress_health_check=list(hypothesis.HealthCheck),
    derandomize='FUZZ' not in os.environ,
    **options,
  )


def check_any(folder, content):
  """Read whole, and as the library reads it, or refused in one line."""
  path = folder / 'model.safetensors'
  path.write_bytes(content)
  with tensors.bounded(2, 4 * tensors.MEGABYTE):
    try:
      arrays = tensors.read(folder)
    except CheckpointError as error:
      message = str(error)
      assert message.isprintable() and len(message) < 2000
      hypothesis.event('refused')
      return
  hypothesis.event('read')
  length = int.from_bytes(content[:8], 'little')
  assert b''.join(x.tobytes() for x in arrays.values()) == content[8 + length :]
  with contextlib.suppress(ImportError):
    from safetensors import safe_open

    with safe_open(path, 'np') as file:
      assert set(file.keys()) == set(arrays)
      for name, array in arrays.items():
        assert file.get_slice(name).get_shape() == list(array.shape)


@fuzz(200)
@hypothesis.given(st.binary(max_size=200), st.booleans())
def test_fuzz_random_bytes(tmp_path_factory, data, framed):
  folder = tmp_path_factory.getbasetemp()
  check_any(folder, tensors.pack(data) if framed else data)


@st.composite
def layouts(draw):
  """Header and data of a good file."""
  header, place = {}, 0
  for i in range(draw(st.integers(0, 5))):
    dtype = draw(st.sampled_from(['F32', 'F16', 'BF16']))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    num_bytes = tensors.TYPES[dtype].itemsize * int(np.prod(shape))
    name = draw(st.text(max_size=3)) + str(i)
    header[name] = tensors.entry(place, place + num_bytes, dtype, shape)
    place += num_bytes
  return header, draw(st.binary(min_size=place, max_size=place))


@fuzz(200)
@hypothesis.given(layouts(), st.data())
def test_fuzz_damaged_files(tmp_path_factory, layout, data):
  folder = tmp_path_factory.getbasetemp()
  content = bytearray(tensors.pack(*layout))
  spots = st.integers(0, len(content) - 1)
  for _ in range(data.draw(st.integers(0, 3))):
    kind = data.draw(st.sampled_from(['flip', 'byte', 'cut', 'splice', 'copy']))
    spot, other = sorted([data.draw(spots), data.draw(spots)])
    if kind == 'flip' and spot < len(content):
      content[spot] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == 'byte' and spot < len(content):
      content[spot] = data.draw(st.sampled_from(b'0123456789[]{},:"- eN'))
    elif kind == 'cut':
      del content[other:]
    elif kind == 'splice':
      content[spot:other] = data.draw(st.binary(max_size=8))
    else:
      content[spot:spot] = content[spot:other]
  check_any(folder, bytes(content))


odd_numbers = st.sampled_from(
  [-1, 1, 2, 3, 2**31, 2**32, 2**60, 2**62, 2**63, 2**64, 10**30, True, 1.0]
)
numbers = st.one_of(st.integers(0, 16), odd_numbers)
garbage = st.recursive(
  st.one_of(st.none(), numbers, st.floats(), st.text(max_size=5)),
  lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x),
  max_leaves=4,
)
odd_entries = st.fixed_dictionaries(
  {
    'dtype': st.sampled_from(['F32', 'F16', 'BF16', 'F64', 'f32', 0]) | garbage,
    'shape': st.lists(numbers, max_size=4) | garbage,
    'data_offsets': st.lists(numbers, min_size=2, max_size=2) | garbage,
  },
  optional={'more': garbage},
)


@fuzz(200)
@hypothesis.given(layouts(), st.data())
def test_fuzz_odd_headers(tmp_path_factory, layout, data):
  header, content = layout
  for _ in range(data.draw(st.integers(0, 2))):
    name = data.draw(
      st.sampled_from(['__metadata__', 'odd', '\ud800', '', *header])
    )
    kind = data.draw(st.sampled_from(['entry', 'garbage', 'field', 'drop']))
    if kind == 'entry':
      header[name] = data.draw(odd_entries)
    elif kind == 'garbage':
      header[name] = data.draw(garbage)
    elif kind == 'drop':
      header.pop(name, None)
    elif isinstance(header.get(name), dict):
      field = data.draw(st.sampled_from(['dtype', 'shape', 'data_offsets']))
      header[name] = header[name] | {field: data.draw(garbage)}
  content += data.draw(st.sampled_from([b'', b'', b'', b'_']))
  check_any(tmp_path_factory.getbasetemp(), tensors.pack(header, content))


@fuzz(200)
@hypothesis.given(st.data())
def test_fuzz_odd_indices(tmp_path_factory, data):
  """An index of anything over two good files."""
  folder = tmp_path_factory.getbasetemp() / 'indexed'
  folder.mkdir(exist_ok=True)
  tensors.write_two(folder)
  known = sorted(set(tensors.WEIGHT_MAP.values()))
  names = st.sampled_from([*known, '', '..', 'x.safetensors', '\ud800', 1])
  changes = st.dictionaries(st.sampled_from('abcde'), names, max_size=2)
  weight_map = tensors.WEIGHT_MAP | data.draw(changes)
  metadata = st.fixed_dictionaries({}, optional={'total_size': numbers})
  index = data.draw(
    st.fixed_dictionaries(
      {'weight_map': st.just(weight_map) | garbage},
      optional={'metadata': metadata | garbage},
    )
    | garbage
  )
  path = folder / 'model.safetensors.index.json'
  path.write_text(json.dumps(index))
  with tensors.bounded(2, 4 * tensors.MEGABYTE):
    try:
      assert ''.join(tensors.read(folder)) in ('abcd', 'ab', 'cd', '')
    except CheckpointError as error:
      assert str(error).isprintable()
