"""Files of strangers are read right or refused, and never do harm."""

import errno
import json
import os

import numpy as np
import pytest
import tensors

from diffusiongemma.checkpoints import safetensors

# What is no checkpoint.


def test_folders_without_one(tmp_path):
  tensors.list_refused(tmp_path / 'none', 'none', 'is not a folder')
  tensors.list_refused('a\0b', 'is not a folder')
  looked_for = ('model.safetensors', 'model.safetensors.index.json')
  tensors.list_refused(tmp_path, str(tmp_path), 'holds neither', *looked_for)
  for i in range(6):
    (tmp_path / f'other{i}.safetensors').touch()
  (tmp_path / 'other\x1b[31m\udcff.safetensors').touch()
  tensors.list_refused(
    tmp_path, *looked_for, "'other0.safe", r'\x1b', 'and 3 more'
  )
  (tmp_path / 'model.safetensors').touch()
  tensors.list_refused(tmp_path / 'model.safetensors', 'is not a folder')


@pytest.mark.parametrize(
  'name',
  [
    'pytorch_model.bin',
    'pytorch_model-00001-of-00002.bin',
    'pytorch_model.bin.index.json',
    'model.pt',
    'model.pth',
    'model.ckpt',
    'model.pkl',
  ],
)
def test_pickles_are_refused(tmp_path, name):
  (tmp_path / name).touch()
  tensors.list_refused(tmp_path, name, 'run any code', 'save_pretrained')


def test_pickles_beside_safetensors_are_ignored(tmp_path):
  tensors.write(tmp_path, tensors.make_arrays())
  (tmp_path / 'pytorch_model.bin').touch()
  assert tensors.agree(tensors.read(tmp_path), tensors.make_arrays())


def test_the_single_file_wins_over_the_index(tmp_path):
  tensors.write(tmp_path, tensors.make_arrays(1))
  (tmp_path / 'model.safetensors').rename(tmp_path / 'kept')
  tensors.write(tmp_path, tensors.make_arrays(2), max_shard_bytes=64)
  assert tensors.agree(tensors.read(tmp_path), tensors.make_arrays(2))
  (tmp_path / 'kept').rename(tmp_path / 'model.safetensors')
  assert tensors.agree(tensors.read(tmp_path), tensors.make_arrays(1))


# One file.

EIGHT, WEIRD = tensors.EIGHT, tensors.WEIRD
BAD_FILES = {}


def bad(what, content, *parts):
  BAD_FILES[what] = content, parts


def bad_entry(what, changes, *parts):
  """One tensor `a` of float32 [2], but for these fields."""
  bad(
    what, tensors.pack({'a': tensors.entry() | changes}, EIGHT), "'a'", *parts
  )


def bad_second(what, place, data, *parts, **changes):
  """Tensor `a` of eight bytes, and `b` from `place[0]` to `place[1]`."""
  header = {'b': tensors.entry(*place, **changes), 'a': tensors.entry()}
  bad(what, tensors.pack(header, EIGHT + data), "'b'", *parts)


bad('empty', b'', '0 bytes', 'too short')
bad('seven bytes', b'1234567', '7 bytes', 'too short')
bad(
  'header past the end',
  tensors.pack(b'{}')[:-1],
  'header is 2 bytes',
  'the file 9',
)
bad('no text', tensors.pack(b'{"\xff": 1}'), 'byte 2', 'UTF-8')
bad('UTF-16', tensors.pack('{}'.encode('utf-16')), 'UTF-8')
bad('no JSON', tensors.pack(b'{"a": '), 'not JSON', 'column 7')
bad('no header', tensors.pack(b''), 'not JSON')
bad('control character', tensors.pack(b'{"a\n": 1}'), 'not JSON')
bad('more after it', tensors.pack(b'{} {}'), 'not JSON', 'Extra data')
bad('nested lists', tensors.pack(b'{"a":' + b'[' * 200_000), 'too deeply')
bad('nested objects', tensors.pack(b'{"a":' * 200_000), 'too deeply')
bad('list', tensors.pack([]), 'not an object')
bad('number', tensors.pack(b'1'), 'not an object')
bad(
  'long number',
  tensors.pack(b'{"a": ' + b'9' * 5000 + b'}'),
  'has a number of 5000 digits',
)
bad(
  'longer number', tensors.pack(b'9' * 900_000), 'has a number of 900000 digits'
)
bad(
  'a number of a page',
  tensors.pack(b'{"a": ' + b'9' * 300 + b'}'),
  '300 digits',
)
bad(
  'NaN', tensors.pack({'a': tensors.entry(end=float('nan'))}), 'NaN', 'not JSON'
)
bad(
  'infinity',
  tensors.pack({'a': tensors.entry(begin=-float('inf'))}),
  '-Infinity',
)
TWICE = b'{"a":%b,"a":%b}' % ((json.dumps(tensors.entry()).encode(),) * 2)
bad('name twice', tensors.pack(TWICE, EIGHT), "'a'", 'twice')
bad('field twice', tensors.pack(b'{"a":{"b":1,"b":2}}'), "'b'", 'twice')
bad(
  'metadata of numbers', tensors.pack({'__metadata__': {'a': 1}}), 'not strings'
)
bad('metadata in a list', tensors.pack({'__metadata__': ['a']}), 'not strings')
bad(
  'half a character',
  tensors.pack({'\ud800': tensors.entry()}, EIGHT),
  r"'\ud800'",
  'text',
)
bad('no entry', tensors.pack({'a': [1]}), "'a'", 'fields')
bad(
  'field missing',
  tensors.pack({'a': {'dtype': 'F32', 'shape': []}}),
  "'a'",
  'fields',
)
bad(
  'hole at the start',
  tensors.pack({'a': tensors.entry(1, 9)}, b'_' + EIGHT),
  "'a'",
  'hole',
)
bad(
  'trailing',
  tensors.pack({'a': tensors.entry()}, EIGHT + b'_'),
  "1 bytes after the end of 'a'",
)
bad(
  'trailing alone',
  tensors.pack({}, b'_'),
  '1 bytes after the end of the header',
)
bad(
  'weird name',
  tensors.pack({WEIRD: tensors.entry(shape=[3])}, EIGHT),
  r"'we\x1b[31mird\n'",
)
bad(
  'long name',
  tensors.pack({'n' * 10**6: tensors.entry(shape=[3])}),
  "'nnnn",
  '...',
)

bad_entry('field too many', {'more': 1}, 'fields')
bad_entry('other type', {'dtype': 'F4'}, "'F4'", 'BF16, F16, F32')
bad_entry('type in a list', {'dtype': ['F32']}, 'dtype', 'not a string')
bad_entry('weird type', {'dtype': '\x9b' * 10**5}, r'\x9b', '...')
bad_entry(
  'huge', tensors.entry(0, 2**62, shape=[2**60]), f'ends at byte {2**62}'
)
bad_entry('product that wraps', {'shape': [2**32, 2**32, 2]}, 'no array can')
bad_entry('product that wraps to 8', {'shape': [2**62 + 2]}, 'no array can')
bad_entry(
  'empty, past NumPy', tensors.entry(0, 0, shape=[0, 2**63]), 'no array can'
)
bad_entry(
  'the same', tensors.entry(0, 0, shape=[2**31, 0, 2**31]), 'no array can'
)
bad_entry('dimensions', {'shape': [2] + [1] * 32}, '33 dimensions')
bad_entry('too short', {'shape': [3]}, '8 bytes of data', 'needs 12')
bad_entry('too long', {'dtype': 'BF16'}, 'BF16 of shape [2] needs 4')
bad_entry('backwards', tensors.entry(8, 0), 'begin <= end')
bad_entry('out of range', tensors.entry(2**63, 2**63 + 8), 'truncated')

bad_second('truncated', (8, 16), b'1234567', 'byte 16', 'are 15', 'truncated')
bad_second('overlap', (7, 15), b'1234567', "1 bytes before the end of 'a'")
bad_second('same bytes', (0, 8), b'', 'overlap')
bad_second('empty inside another', (4, 4), b'', 'overlap', shape=[0])
bad_second('hole', (9, 17), b'_' + EIGHT, "1 bytes after the end of 'a'")

for _value in ('NaN', 2.0, True, -2, None, {'0': 2}):
  bad_entry(f'shape {_value}', {'shape': _value}, 'shape')
  bad_entry(f'shape with {_value}', {'shape': [_value]}, 'shape')
  bad_entry(f'begin {_value}', tensors.entry(begin=_value), 'data_offsets')
  bad_entry(f'end {_value}', tensors.entry(end=_value), 'data_offsets')
for _value in ([], [0], [0, 8, 8], 8, {'0': 8}):
  bad_entry(f'offsets {_value}', {'data_offsets': _value}, 'data_offsets')


@pytest.mark.parametrize('what', BAD_FILES)
def test_bad_files_are_refused(tmp_path, what):
  content, parts = BAD_FILES[what]
  (tmp_path / 'model.safetensors').write_bytes(content)
  tensors.list_refused(tmp_path, str(tmp_path / 'model.safetensors'), *parts)


SEAMS = {
  'z': tensors.entry(8, 8, shape=[0]),
  'a': tensors.entry(),
  'y': tensors.entry(16, 16, shape=[2, 0]),
  'b': tensors.entry(8, 16),
  'x': tensors.entry(0, 0, shape=[0, 5]),
}
LARGE = (2**29, 0, 2**31)
UNALIGNED = {'a': tensors.entry(0, 2, 'F16', [1]), 'b': tensors.entry(2, 10)}
GOOD_FILES = {
  'nothing': (tensors.pack({}), {}),
  'spaces': (tensors.pack(b' {}   '), {}),
  'metadata': (tensors.pack({'__metadata__': {'a': 'b'}}), {}),
  'no metadata': (tensors.pack({'a': tensors.entry()}, EIGHT), {'a': (2,)}),
  'empty tensors at every seam': (
    tensors.pack(SEAMS, 2 * EIGHT),
    {'x': (0, 5), 'a': (2,), 'z': (0,), 'b': (2,), 'y': (2, 0)},
  ),
  'large and empty': (
    tensors.pack({'a': tensors.entry(0, 0, shape=LARGE)}),
    {'a': LARGE},
  ),
  'many dimensions': (
    tensors.pack({'a': tensors.entry(shape=[2] + [1] * 31)}, EIGHT),
    {'a': (2,) + (1,) * 31},
  ),
  'unaligned': (tensors.pack(UNALIGNED, b'__' + EIGHT), {'a': (1,), 'b': (2,)}),
}


@pytest.mark.parametrize('what', GOOD_FILES)
def test_good_files(tmp_path, what):
  content, shapes = GOOD_FILES[what]
  (tmp_path / 'model.safetensors').write_bytes(content)
  with tensors.bounded(10, 8 * tensors.MEGABYTE):
    found = tensors.read(tmp_path)
  assert {name: x.shape for name, x in found.items()} == shapes
  data = b''.join(x.tobytes() for x in found.values())
  assert content.endswith(data)


def test_headers_are_bounded_before_they_are_read(tmp_path):
  path = tmp_path / 'model.safetensors'
  path.write_bytes((10_000_001).to_bytes(8, 'little'))
  os.truncate(path, 200_000_000)
  tensors.list_refused(tmp_path, str(path), '10000001 bytes', 'the limit')
  path.write_bytes(b'\xff' * 8)
  tensors.list_refused(
    tmp_path, str(path), '18446744073709551615 bytes', 'the limit'
  )
  path.write_bytes((9_000_000).to_bytes(8, 'little') + b'{}')
  tensors.list_refused(tmp_path, str(path), 'truncated', 'the file 10')


def test_files_that_change_after_they_were_listed(tmp_path, monkeypatch):
  arrays = tensors.make_arrays()
  tensors.write(tmp_path, arrays)
  path = tmp_path / 'model.safetensors'
  listed = list(safetensors.list_tensors(str(tmp_path)).values())
  last = [tensor for tensor in listed if tensor.nbytes][-1]
  action = lambda: safetensors.read_tensor(last)
  names = (repr(last.name), str(path))
  with monkeypatch.context() as patch:
    patch.setattr(os, 'preadv', lambda *_: 0)
    tensors.refused(action, *names, 'the file ends', 'while it is read')
  with monkeypatch.context() as patch:

    def fail(*_):
      raise OSError(errno.EIO, os.strerror(errno.EIO))

    patch.setattr(os, 'preadv', fail)
    tensors.refused(action, str(path), 'Input/output error')
  with monkeypatch.context() as patch:

    def no_memory(*_):
      raise MemoryError

    patch.setattr(np, 'empty', no_memory)
    tensors.refused(action, *names, f'{last.nbytes} bytes of memory')
  os.truncate(path, path.stat().st_size - 1)
  tensors.refused(action, *names, 'has changed')
  first = safetensors.read_tensor(listed[0])
  assert tensors.same(first, arrays[listed[0].name])
  path.unlink()
  tensors.refused(action, str(path), 'No such file')
  os.mkfifo(path)
  tensors.refused(action, str(path), 'not a regular file')


def test_special_files_are_refused_at_once(tmp_path):
  path = tmp_path / 'model.safetensors'
  os.mkfifo(path)
  tensors.list_refused(tmp_path, str(path), 'not a regular file')
  path.unlink()
  path.mkdir()
  tensors.list_refused(tmp_path, str(path), 'not a regular file')
  path.rmdir()
  index = tmp_path / 'model.safetensors.index.json'
  os.mkfifo(index)
  tensors.list_refused(tmp_path, str(index), 'not a regular file')
  index.unlink()
  index.write_text(json.dumps({'weight_map': {'a': 'x.safetensors'}}))
  os.mkfifo(tmp_path / 'x.safetensors')
  tensors.list_refused(tmp_path, 'x.safetensors', 'not a regular file')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_files_that_may_not_be_read(tmp_path):
  tensors.write(tmp_path, tensors.make_arrays())
  (tmp_path / 'model.safetensors').chmod(0)
  tensors.list_refused(tmp_path, 'model.safetensors', 'Permission denied')
