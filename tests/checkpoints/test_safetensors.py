"""Files of strangers are read right or refused, and never do harm."""

import contextlib
import errno
import json
import os
import signal
import tracemalloc
import weakref

import disk
import hypothesis
from hypothesis import strategies as st
import ml_dtypes
import numpy as np
import pytest

from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import safetensors
from diffusiongemma.checkpoints import safetensors_writer

BF16 = np.dtype(ml_dtypes.bfloat16)
TYPES = {'F32': np.dtype('f4'), 'F16': np.dtype('f2'), 'BF16': BF16}
MEGABYTE = 2**20


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


# The library as the oracle.


def to_torch(torch, array):
  if array.dtype == BF16:
    bits = torch.from_numpy(array.view(np.int16).copy())
    return bits.view(torch.bfloat16)
  return torch.from_numpy(array.copy())


def from_torch(torch, tensor):
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(BF16)
  return tensor.numpy()


def test_reads_what_the_library_writes(tmp_path):
  torch = pytest.importorskip('torch', reason='bfloat16 of the oracle')
  oracle = pytest.importorskip('safetensors.torch', reason='the oracle')
  arrays = make_arrays()
  tensors = {name: to_torch(torch, x) for name, x in arrays.items()}
  path = tmp_path / 'model.safetensors'
  oracle.save_file(tensors, path, metadata={'format': 'pt'})
  assert agree(read(tmp_path), arrays)
  oracle.save_file(tensors, path)
  assert agree(read(tmp_path), arrays)


@pytest.mark.parametrize('room', [10**9, 64, 1])
def test_the_library_reads_what_is_written(tmp_path, room):
  torch = pytest.importorskip('torch', reason='bfloat16 of the oracle')
  oracle = pytest.importorskip('safetensors', reason='the oracle')
  arrays = make_arrays()
  write(tmp_path, arrays, max_shard_bytes=room)
  found = {}
  for path in tmp_path.glob('*.safetensors'):
    with oracle.safe_open(path, 'pt') as file:
      assert file.metadata() == {'format': 'pt'}
      for name in file.keys():  # noqa: SIM118 - no dictionary.
        assert name not in found
        found[name] = from_torch(torch, file.get_tensor(name))
  assert agree(found, arrays)


def test_files_are_filled_as_the_hub_does(tmp_path):
  """Where no tensor is larger than a file, and larger items come first, the
  files are those that `save_pretrained` writes."""
  hub = pytest.importorskip('huggingface_hub', reason='the oracle')
  torch = pytest.importorskip('torch', reason='huggingface_hub asks for it')
  rng = np.random.default_rng(1)
  for room in (100, 250, 10**6):
    sizes = rng.integers(0, 25, 40)
    arrays = {f't{i:02d}': np.ones(n, 'f4') for i, n in enumerate(sizes)}
    theirs, ours = tmp_path / f'theirs-{room}', tmp_path / f'ours-{room}'
    theirs.mkdir()
    ours.mkdir()
    state = {name: to_torch(torch, x) for name, x in arrays.items()}
    hub.save_torch_state_dict(state, theirs, max_shard_size=room)
    write(ours, arrays, max_shard_bytes=room)
    assert agree(read(theirs), arrays) and agree(read(ours), arrays)
    names = [sorted(p.name for p in x.iterdir()) for x in (theirs, ours)]
    assert names[0] == names[1]
    if room == 10**6:
      assert names[0] == ['model.safetensors']
      continue
    theirs, ours = (
      json.loads((x / 'model.safetensors.index.json').read_text())
      for x in (theirs, ours)
    )
    assert ours['weight_map'] == theirs['weight_map']
    total = theirs['metadata']['total_size']
    assert ours['metadata'] == {
      'total_size': total,
      'total_parameters': total // 4,
    }


# Writing.


@pytest.mark.parametrize('room', [10**9, 100, 64, 1])
def test_round_trip(tmp_path, room):
  arrays = make_arrays()
  write(tmp_path, arrays, max_shard_bytes=room)
  found = read(tmp_path)
  assert agree(found, arrays)
  for array in found.values():
    assert array.flags.c_contiguous and array.flags.writeable
    assert array.flags.owndata


def test_nothing_at_all(tmp_path):
  write(tmp_path, {})
  assert read(tmp_path) == {}


def test_files_keep_their_size_and_their_alignment(tmp_path):
  arrays = make_arrays() | {'big': np.ones(300, 'f2')}
  write(tmp_path, arrays, max_shard_bytes=100)
  listed = safetensors.list_tensors(str(tmp_path))
  files = {}
  for tensor in listed.values():
    files.setdefault(tensor.path, []).append(tensor)
    assert tensor.offset % tensor.dtype.itemsize == 0
  names = [f'model-{i:05d}-of-00004.safetensors' for i in (1, 2, 3, 4)]
  assert sorted(files) == [str(tmp_path / name) for name in names]
  for path, tensors in files.items():
    with open(path, 'rb') as file:
      assert int.from_bytes(file.read(8), 'little') % 8 == 0
    num_bytes = sum(x.nbytes for x in tensors)
    assert num_bytes <= 100 or [x.name for x in tensors] == ['big']
  text = (tmp_path / 'model.safetensors.index.json').read_text()
  index = json.loads(text)
  assert text == json.dumps(index, indent=2, sort_keys=True) + '\n'
  total = sum(x.nbytes for x in arrays.values())
  assert index['metadata'] == {
    'total_parameters': sum(x.size for x in arrays.values()),
    'total_size': total,
  }
  assert index['weight_map'] == {
    name: os.path.basename(tensor.path) for name, tensor in listed.items()
  }


@pytest.mark.parametrize(
  'sizes, count',
  [
    ([25, 25], 1),  # Full to the last byte.
    ([25, 26], 2),
    ([26, 25], 2),
    ([300, 1, 49], 2),
    ([0, 300, 0, 1], 3),
  ],
)
def test_no_file_is_split_too_early_or_left_empty(tmp_path, sizes, count):
  arrays = {f't{i}': np.ones(n, 'f2') for i, n in enumerate(sizes)}
  write(tmp_path, arrays, max_shard_bytes=100)
  assert len(list(tmp_path.glob('*.safetensors'))) == count
  assert agree(read(tmp_path), arrays)


def test_one_tensor_at_a_time_in_the_order_written(tmp_path):
  arrays = make_arrays()
  alive, asked, told = [], [], []

  def make(name):
    assert not any(reference() is not None for reference in alive)
    asked.append(name)
    array = arrays[name].copy()
    alive.append(weakref.ref(array))
    return array

  specs = {name: (x.shape, x.dtype) for name, x in arrays.items()}
  safetensors_writer.write_folder(
    str(tmp_path),
    specs,
    make,
    max_shard_bytes=120,
    on_bytes=told.append,
  )
  assert sorted(asked) == sorted(arrays)
  assert told == [arrays[name].nbytes for name in asked]
  assert asked == list(safetensors.list_tensors(str(tmp_path)))


def test_no_copies(tmp_path):
  """Memory is what the tensor takes, and nothing beside it."""
  array = np.ones((4, MEGABYTE), BF16)
  with bounded(10, MEGABYTE):
    write(tmp_path, {'a': array})
  listed = safetensors.list_tensors(str(tmp_path))
  with bounded(10, array.nbytes + MEGABYTE):
    assert safetensors.read_tensor(listed['a']).nbytes == array.nbytes


def test_strided_arrays(tmp_path):
  array = np.arange(24, dtype='f4').reshape(4, 6)
  arrays = {'t': array.T, 'strides': array[::2, ::-1], 'all': array}
  arrays |= {'row': array[0, ::2], 'backwards': array[0, ::-1]}
  write(tmp_path, arrays)
  assert agree(read(tmp_path), arrays)


def test_short_reads_and_writes(tmp_path, monkeypatch):
  """The system may do less than it was asked to."""
  arrays = make_arrays()
  os_write, os_preadv = os.write, os.preadv
  monkeypatch.setattr(os, 'write', lambda fd, data: os_write(fd, data[:5]))
  write(tmp_path, arrays, max_shard_bytes=100)
  monkeypatch.setattr(
    os, 'preadv', lambda fd, parts, place: os_preadv(fd, [parts[0][:3]], place)
  )
  assert agree(read(tmp_path), arrays)
  monkeypatch.undo()
  assert agree(read(tmp_path), arrays)


def test_chunks(tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'CHUNK_BYTES', 7)
  written, asked = [], []
  os_write, os_preadv = os.write, os.preadv

  def measured_write(descriptor, data):
    written.append(len(data))
    return os_write(descriptor, data)

  def measured_read(descriptor, parts, place):
    asked.append(sum(map(len, parts)))
    return os_preadv(descriptor, parts, place)

  monkeypatch.setattr(os, 'write', measured_write)
  monkeypatch.setattr(os, 'preadv', measured_read)
  arrays = make_arrays()
  write(tmp_path, arrays)
  assert agree(read(tmp_path), arrays)
  assert max(written) == max(asked) == 7


def test_files_are_closed(tmp_path):
  before = set(os.listdir('/dev/fd'))
  for room in (10**9, 100):
    folder = tmp_path / str(room)
    folder.mkdir()
    write(folder, make_arrays(), max_shard_bytes=room)
    read(folder)
  (folder / 'model.safetensors').write_bytes(b'')
  list_refused(folder, 'too short')
  assert set(os.listdir('/dev/fd')) <= before


def test_what_is_read_has_the_declared_shape_and_type(tmp_path):
  for wrong in (np.ones(4, 'f4'), np.ones((2, 2), 'f2'), [[1, 1], [1, 1]]):
    answers = {'good': np.ones(2, 'f4'), 'bad': wrong}
    specs = {'good': ((2,), 'f4'), 'bad': ((2, 2), 'f4')}
    refused(
      lambda s=specs, a=answers: safetensors_writer.write_folder(
        str(tmp_path), s, a.__getitem__
      ),
      "'bad'",
      'model.safetensors',
      'float32 (2, 2) was declared',
    )
    assert not list(tmp_path.iterdir())


def test_names_and_types_that_no_file_can_have(tmp_path):
  array = np.ones(2, 'f4')
  for name in ('__metadata__', '\ud800'):
    refused(lambda n=name: write(tmp_path, {n: array}), repr(name), 'the name')
  for dtype in ('f8', 'i4', '>f4', 'bool'):
    refused(
      lambda d=dtype: write(tmp_path, {'a': array.astype(d)}),
      "'a'",
      'written in BF16, F16, F32',
    )
  assert not list(tmp_path.iterdir())


def test_headers_of_others_have_a_limit(tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'MAX_JSON_BYTES', 100)
  refused(
    lambda: write(tmp_path, make_arrays()), 'a header of', 'are the limit'
  )


@pytest.mark.parametrize('failing', ['read', 'on_bytes'])
def test_a_failed_call_removes_its_files(tmp_path, failing):
  arrays = make_arrays()
  calls = []

  def fail(*_):
    calls.append(1)
    if len(calls) == 4:
      raise KeyError('of the caller')

  def get(name):
    if failing == 'read':
      fail()
    return arrays[name]

  specs = {name: (x.shape, x.dtype) for name, x in arrays.items()}
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(KeyError, match='of the caller'):
    safetensors_writer.write_folder(
      str(tmp_path),
      specs,
      get,
      max_shard_bytes=64,
      on_bytes=fail if failing == 'on_bytes' else None,
    )
  assert [p.name for p in tmp_path.iterdir()] == ['config.json']


def test_an_error_of_read_is_not_one_of_the_file(tmp_path):
  def fail(name):
    raise FileNotFoundError(errno.ENOENT, 'of the caller')

  with pytest.raises(FileNotFoundError, match='of the caller'):
    safetensors_writer.write_folder(str(tmp_path), {'a': ((2,), 'f4')}, fail)


def test_files_that_exist_are_kept(tmp_path):
  arrays = make_arrays()
  name = 'model-00002-of-00004.safetensors'
  (tmp_path / name).write_text('precious')
  refused(
    lambda: write(tmp_path, arrays, max_shard_bytes=64), name, 'File exists'
  )
  assert [p.name for p in tmp_path.iterdir()] == [name]
  assert (tmp_path / name).read_text() == 'precious'
  link = tmp_path / 'model.safetensors'
  link.symlink_to('elsewhere')
  refused(lambda: write(tmp_path, arrays), 'File exists')
  assert link.is_symlink() and not (tmp_path / 'elsewhere').exists()
  refused(lambda: write(tmp_path / 'none', arrays), 'No such file')


def test_room_is_claimed_before_anything_is_read(tmp_path, monkeypatch):
  def never(name):
    raise AssertionError('asked for a tensor')

  specs = {name: ((1000,), 'f4') for name in 'abc'}
  action = lambda: safetensors_writer.write_folder(
    str(tmp_path), specs, never, max_shard_bytes=5000
  )
  with disk.full_disk(4000):
    refused(action, 'model-00001-of-00003', 'File too large')
  assert not list(tmp_path.iterdir())

  claimed = []

  def full(descriptor, offset, num_bytes):
    claimed.append(num_bytes)
    if len(claimed) == 3:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, 'posix_fallocate', full)
  refused(action, 'model-00003-of-00003', 'bytes)', 'No space left on device')
  assert not list(tmp_path.iterdir()) and min(claimed) > 4000


def test_a_disk_that_fills_while_writing(tmp_path, monkeypatch):
  """File systems that can't claim room, as some over a network."""

  def unable(*_):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

  monkeypatch.setattr(os, 'posix_fallocate', unable)
  arrays = {name: np.ones(1000, 'f4') for name in 'abc'}
  with disk.full_disk(8000):
    refused(
      lambda: write(tmp_path, arrays), 'model.safetensors', 'File too large'
    )
  assert not list(tmp_path.iterdir())
  write(tmp_path, arrays)
  assert agree(read(tmp_path), arrays)


def test_no_fallocate(tmp_path, monkeypatch):
  monkeypatch.delattr(os, 'posix_fallocate')
  write(tmp_path, make_arrays())
  assert agree(read(tmp_path), make_arrays())


def test_all_files_are_flushed(tmp_path, monkeypatch):
  flushed = set()
  os_fsync = os.fsync

  def noted(descriptor):
    status = os.fstat(descriptor)
    flushed.add((status.st_ino, status.st_size))
    os_fsync(descriptor)

  monkeypatch.setattr(os, 'fsync', noted)
  monkeypatch.delattr(os, 'posix_fallocate')  # Sizes tell of what is written.
  write(tmp_path, make_arrays(), max_shard_bytes=64)
  sizes = [path.stat() for path in tmp_path.iterdir()]
  assert {(x.st_ino, x.st_size) for x in sizes} <= flushed


# What is no checkpoint.


def test_folders_without_one(tmp_path):
  list_refused(tmp_path / 'none', 'none', 'is not a folder')
  list_refused('a\0b', 'is not a folder')
  looked_for = ('model.safetensors', 'model.safetensors.index.json')
  list_refused(tmp_path, str(tmp_path), 'holds neither', *looked_for)
  for i in range(6):
    (tmp_path / f'other{i}.safetensors').touch()
  (tmp_path / 'other\x1b[31m\udcff.safetensors').touch()
  list_refused(tmp_path, *looked_for, "'other0.safe", r'\x1b', 'and 3 more')
  (tmp_path / 'model.safetensors').touch()
  list_refused(tmp_path / 'model.safetensors', 'is not a folder')


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
  list_refused(tmp_path, name, 'run any code', 'save_pretrained')


def test_pickles_beside_safetensors_are_ignored(tmp_path):
  write(tmp_path, make_arrays())
  (tmp_path / 'pytorch_model.bin').touch()
  assert agree(read(tmp_path), make_arrays())


def test_the_single_file_wins_over_the_index(tmp_path):
  write(tmp_path, make_arrays(1))
  (tmp_path / 'model.safetensors').rename(tmp_path / 'kept')
  write(tmp_path, make_arrays(2), max_shard_bytes=64)
  assert agree(read(tmp_path), make_arrays(2))
  (tmp_path / 'kept').rename(tmp_path / 'model.safetensors')
  assert agree(read(tmp_path), make_arrays(1))


# One file.

EIGHT = b'12345678'
WEIRD = 'we\x1b[31mird\n'
BAD_FILES = {}


def bad(what, content, *parts):
  BAD_FILES[what] = content, parts


def bad_entry(what, changes, *parts):
  """One tensor `a` of float32 [2], but for these fields."""
  bad(what, pack({'a': entry() | changes}, EIGHT), "'a'", *parts)


def bad_second(what, place, data, *parts, **changes):
  """Tensor `a` of eight bytes, and `b` from `place[0]` to `place[1]`."""
  header = {'b': entry(*place, **changes), 'a': entry()}
  bad(what, pack(header, EIGHT + data), "'b'", *parts)


bad('empty', b'', '0 bytes', 'too short')
bad('seven bytes', b'1234567', '7 bytes', 'too short')
bad('header past the end', pack(b'{}')[:-1], 'header is 2 bytes', 'the file 9')
bad('no text', pack(b'{"\xff": 1}'), 'byte 2', 'UTF-8')
bad('UTF-16', pack('{}'.encode('utf-16')), 'UTF-8')
bad('no JSON', pack(b'{"a": '), 'not JSON', 'column 7')
bad('no header', pack(b''), 'not JSON')
bad('control character', pack(b'{"a\n": 1}'), 'not JSON')
bad('more after it', pack(b'{} {}'), 'not JSON', 'Extra data')
bad('nested lists', pack(b'{"a":' + b'[' * 200_000), 'too deeply')
bad('nested objects', pack(b'{"a":' * 200_000), 'too deeply')
bad('list', pack([]), 'not an object')
bad('number', pack(b'1'), 'not an object')
bad(
  'long number',
  pack(b'{"a": ' + b'9' * 5000 + b'}'),
  'has a number of 5000 digits',
)
bad('longer number', pack(b'9' * 900_000), 'has a number of 900000 digits')
bad('a number past 64 bits', pack(b'{"a": ' + b'9' * 30 + b'}'), '30 digits')
bad('NaN', pack({'a': entry(end=float('nan'))}), 'NaN', 'not JSON')
bad('infinity', pack({'a': entry(begin=-float('inf'))}), '-Infinity')
TWICE = b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)
bad('name twice', pack(TWICE, EIGHT), "'a'", 'twice')
bad('field twice', pack(b'{"a":{"b":1,"b":2}}'), "'b'", 'twice')
bad('metadata of numbers', pack({'__metadata__': {'a': 1}}), 'not strings')
bad('metadata in a list', pack({'__metadata__': ['a']}), 'not strings')
bad('half a character', pack({'\ud800': entry()}, EIGHT), r"'\ud800'", 'text')
bad('no entry', pack({'a': [1]}), "'a'", 'fields')
bad(
  'field missing', pack({'a': {'dtype': 'F32', 'shape': []}}), "'a'", 'fields'
)
bad('hole at the start', pack({'a': entry(1, 9)}, b'_' + EIGHT), "'a'", 'hole')
bad(
  'trailing', pack({'a': entry()}, EIGHT + b'_'), "1 bytes after the end of 'a'"
)
bad('trailing alone', pack({}, b'_'), '1 bytes after the end of the header')
bad('weird name', pack({WEIRD: entry(shape=[3])}, EIGHT), r"'we\x1b[31mird\n'")
bad('long name', pack({'n' * 10**6: entry(shape=[3])}), "'nnnn", '...')

bad_entry('field too many', {'more': 1}, 'fields')
bad_entry('other type', {'dtype': 'F8_E4M3'}, "'F8_E4M3'", 'BF16, F16, F32')
bad_entry('type in a list', {'dtype': ['F32']}, 'dtype', 'not a string')
bad_entry('weird type', {'dtype': '\x9b' * 10**5}, r'\x9b', '...')
bad_entry('huge', entry(0, 2**62, shape=[2**60]), f'ends at byte {2**62}')
bad_entry('product that wraps', {'shape': [2**32, 2**32, 2]}, 'no array can')
bad_entry('product that wraps to 8', {'shape': [2**62 + 2]}, 'no array can')
bad_entry('empty, past NumPy', entry(0, 0, shape=[0, 2**63]), 'no array can')
bad_entry('the same', entry(0, 0, shape=[2**31, 0, 2**31]), 'no array can')
bad_entry('dimensions', {'shape': [2] + [1] * 32}, '33 dimensions')
bad_entry('too short', {'shape': [3]}, '8 bytes of data', 'needs 12')
bad_entry('too long', {'dtype': 'BF16'}, 'BF16 of shape [2] needs 4')
bad_entry('backwards', entry(8, 0), 'begin <= end')
bad_entry('out of range', entry(2**63, 2**63 + 8), 'truncated')

bad_second('truncated', (8, 16), b'1234567', 'byte 16', 'are 15', 'truncated')
bad_second('overlap', (7, 15), b'1234567', "1 bytes before the end of 'a'")
bad_second('same bytes', (0, 8), b'', 'overlap')
bad_second('empty inside another', (4, 4), b'', 'overlap', shape=[0])
bad_second('hole', (9, 17), b'_' + EIGHT, "1 bytes after the end of 'a'")

for _value in ('NaN', 2.0, True, -2, None, {'0': 2}):
  bad_entry(f'shape {_value}', {'shape': _value}, 'shape')
  bad_entry(f'shape with {_value}', {'shape': [_value]}, 'shape')
  bad_entry(f'begin {_value}', entry(begin=_value), 'data_offsets')
  bad_entry(f'end {_value}', entry(end=_value), 'data_offsets')
for _value in ([], [0], [0, 8, 8], 8, {'0': 8}):
  bad_entry(f'offsets {_value}', {'data_offsets': _value}, 'data_offsets')


@pytest.mark.parametrize('what', BAD_FILES)
def test_bad_files_are_refused(tmp_path, what):
  content, parts = BAD_FILES[what]
  (tmp_path / 'model.safetensors').write_bytes(content)
  list_refused(tmp_path, str(tmp_path / 'model.safetensors'), *parts)


SEAMS = {
  'z': entry(8, 8, shape=[0]),
  'a': entry(),
  'y': entry(16, 16, shape=[2, 0]),
  'b': entry(8, 16),
  'x': entry(0, 0, shape=[0, 5]),
}
LARGE = (2**29, 0, 2**31)
UNALIGNED = {'a': entry(0, 2, 'F16', [1]), 'b': entry(2, 10)}
GOOD_FILES = {
  'nothing': (pack({}), {}),
  'spaces': (pack(b' {}   '), {}),
  'metadata': (pack({'__metadata__': {'a': 'b'}}), {}),
  'no metadata': (pack({'a': entry()}, EIGHT), {'a': (2,)}),
  'empty tensors at every seam': (
    pack(SEAMS, 2 * EIGHT),
    {'x': (0, 5), 'a': (2,), 'z': (0,), 'b': (2,), 'y': (2, 0)},
  ),
  'large and empty': (pack({'a': entry(0, 0, shape=LARGE)}), {'a': LARGE}),
  'many dimensions': (
    pack({'a': entry(shape=[2] + [1] * 31)}, EIGHT),
    {'a': (2,) + (1,) * 31},
  ),
  'unaligned': (pack(UNALIGNED, b'__' + EIGHT), {'a': (1,), 'b': (2,)}),
}


@pytest.mark.parametrize('what', GOOD_FILES)
def test_good_files(tmp_path, what):
  content, shapes = GOOD_FILES[what]
  (tmp_path / 'model.safetensors').write_bytes(content)
  with bounded(10, 8 * MEGABYTE):
    found = read(tmp_path)
  assert {name: x.shape for name, x in found.items()} == shapes
  data = b''.join(x.tobytes() for x in found.values())
  assert content.endswith(data)


def test_headers_are_bounded_before_they_are_read(tmp_path):
  path = tmp_path / 'model.safetensors'
  path.write_bytes((10_000_001).to_bytes(8, 'little'))
  os.truncate(path, 200_000_000)
  list_refused(tmp_path, str(path), '10000001 bytes', 'the limit')
  path.write_bytes(b'\xff' * 8)
  list_refused(tmp_path, str(path), '18446744073709551615 bytes', 'the limit')
  path.write_bytes((9_000_000).to_bytes(8, 'little') + b'{}')
  list_refused(tmp_path, str(path), 'truncated', 'the file 10')


def test_files_that_change_after_they_were_listed(tmp_path, monkeypatch):
  arrays = make_arrays()
  write(tmp_path, arrays)
  path = tmp_path / 'model.safetensors'
  listed = list(safetensors.list_tensors(str(tmp_path)).values())
  last = [tensor for tensor in listed if tensor.nbytes][-1]
  action = lambda: safetensors.read_tensor(last)
  names = (repr(last.name), str(path))
  with monkeypatch.context() as patch:
    patch.setattr(os, 'preadv', lambda *_: 0)
    refused(action, *names, 'the file ends', 'while it is read')
  with monkeypatch.context() as patch:

    def fail(*_):
      raise OSError(errno.EIO, os.strerror(errno.EIO))

    patch.setattr(os, 'preadv', fail)
    refused(action, str(path), 'Input/output error')
  with monkeypatch.context() as patch:

    def no_memory(*_):
      raise MemoryError

    patch.setattr(np, 'empty', no_memory)
    refused(action, *names, f'{last.nbytes} bytes of memory')
  os.truncate(path, path.stat().st_size - 1)
  refused(action, *names, 'has changed')
  first = safetensors.read_tensor(listed[0])
  assert same(first, arrays[listed[0].name])
  path.unlink()
  refused(action, str(path), 'No such file')
  os.mkfifo(path)
  refused(action, str(path), 'not a regular file')


def test_special_files_are_refused_at_once(tmp_path):
  path = tmp_path / 'model.safetensors'
  os.mkfifo(path)
  list_refused(tmp_path, str(path), 'not a regular file')
  path.unlink()
  path.mkdir()
  list_refused(tmp_path, str(path), 'not a regular file')
  path.rmdir()
  index = tmp_path / 'model.safetensors.index.json'
  os.mkfifo(index)
  list_refused(tmp_path, str(index), 'not a regular file')
  index.unlink()
  index.write_text(json.dumps({'weight_map': {'a': 'x.safetensors'}}))
  os.mkfifo(tmp_path / 'x.safetensors')
  list_refused(tmp_path, 'x.safetensors', 'not a regular file')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_files_that_may_not_be_read(tmp_path):
  write(tmp_path, make_arrays())
  (tmp_path / 'model.safetensors').chmod(0)
  list_refused(tmp_path, 'model.safetensors', 'Permission denied')


# Several files.

ONE, TWO = (f'model-0000{i}-of-00002.safetensors' for i in (1, 2))


@pytest.fixture
def sharded(tmp_path):
  """Tensors a, b in one file, c, d in the other; `save(index)`."""
  for name, tensors in ((ONE, 'ab'), (TWO, 'cd')):
    first, second = tensors
    header = {first: entry(), second: entry(8, 16)}
    (tmp_path / name).write_bytes(pack(header, 2 * EIGHT))
  weight_map = {'a': ONE, 'b': ONE, 'c': TWO, 'd': TWO}

  def save(index=None, **changes):
    if index is None:
      changed = {k: v for k, v in (weight_map | changes).items() if v}
      index = {'metadata': {'total_size': 32}, 'weight_map': changed}
    if not isinstance(index, bytes):
      index = json.dumps(index).encode()
    (tmp_path / 'model.safetensors.index.json').write_bytes(index)
    return tmp_path

  save.weight_map = weight_map
  return save


def test_a_good_index(sharded):
  folder = sharded()
  listed = safetensors.list_tensors(str(folder))
  assert list(listed) == ['a', 'b', 'c', 'd']
  assert {x.path for x in listed.values()} == {
    str(folder / ONE),
    str(folder / TWO),
  }
  weight_map = sharded.weight_map
  for metadata in ({}, {'total_size': 32.0}, {'total_size': 32, 'more': [1]}):
    sharded({'metadata': metadata, 'weight_map': weight_map})
    assert len(read(folder)) == 4
  (folder / 'stale.safetensors').write_bytes(b'unnamed, unread')
  sharded({'weight_map': weight_map})
  assert len(read(folder)) == 4


@pytest.mark.parametrize(
  'index, parts',
  [
    (b'', ['not JSON']),
    (b'\xff', ['UTF-8']),
    (b'[]', ['not an object']),
    (b'[' * 200_000, ['too deeply']),
    (b'{"weight_map": {"a": "x.safetensors", "a": ""}}', ["'a'", 'twice']),
    ({}, ['weight_map']),
    ({'weight_map': [ONE]}, ['weight_map']),
    ({'weight_map': {'a': 1}}, ['weight_map']),
    ({'weight_map': {'a': None}}, ['weight_map']),
    ({'weight_map': {'a': '\ud800.safetensors'}}, ['weight_map']),
    ({'weight_map': {'\ud800': ONE}}, ['weight_map']),
  ],
)
def test_a_bad_index(sharded, index, parts):
  list_refused(sharded(index), 'model.safetensors.index.json', *parts)


def test_an_index_is_bounded_before_it_is_read(sharded):
  folder = sharded()
  os.truncate(folder / 'model.safetensors.index.json', 100_000_001)
  list_refused(folder, 'index.json', '100000001 bytes', 'the limit')


@pytest.mark.parametrize(
  'name',
  [
    '../x.safetensors',
    '/etc/x.safetensors',
    'sub/x.safetensors',
    'x.safetensors/..',
    './' + ONE,
    '..',
    '.',
    '',
    'x\0.safetensors',
    'pytorch_model.bin',
    'n' * 300 + '.safetensors',
    'n' * 10**6 + '.safetensors',
    WEIRD + '/x.safetensors',
  ],
)
def test_names_of_files_that_are_not_beside_the_index(sharded, name):
  index = {'weight_map': sharded.weight_map | {'a': name}}
  folder = sharded(index)
  list_refused(folder, 'index.json', repr(name)[:50], 'not the plain name')


def test_files_that_the_system_can_not_name(sharded):
  """255 characters are more bytes than a name may have."""
  folder = sharded(a='\u4f60' * 200 + '.safetensors')
  list_refused(folder, '.safetensors', 'is missing')


def test_a_missing_file_is_named(sharded):
  folder = sharded(a=WEIRD + '.safetensors')
  list_refused(folder, r'we\x1b[31mird\n.safetensors', 'is missing')
  sharded()
  os.truncate(folder / ONE, 0)  # What is missing is told first.
  (folder / TWO).unlink()
  list_refused(folder, str(folder / TWO), 'is missing')


def test_a_damaged_file_is_named(sharded):
  folder = sharded()
  os.truncate(folder / TWO, (folder / TWO).stat().st_size - 1)
  list_refused(folder, str(folder / TWO), "'d'", 'truncated')


def test_index_and_files_contradict_each_other(sharded):
  folder = sharded(e=ONE, f=ONE, g=ONE, h=ONE, i=ONE, j=ONE)
  list_refused(folder, 'index.json', "'e', 'f', 'g', 'h' and 2 more", ONE)
  sharded(c=None)
  list_refused(folder, TWO, "'c'", 'index.json', 'nowhere')
  sharded(a=TWO)
  list_refused(folder, ONE, "'a'", 'index.json', f"places in '{TWO}'")
  sharded()
  names = 'cdefgha'
  header = {x: entry(8 * i, 8 * i + 8) for i, x in enumerate(names)}
  (folder / TWO).write_bytes(pack(header, 7 * EIGHT))
  list_refused(folder, TWO, "'a', 'e', 'f', 'g' and 1 more", ONE, 'duplicates')


@pytest.mark.parametrize('total', [31, 33, 31.5, '32', None, [32], -32, 1e400])
def test_total_size(sharded, total):
  index = {'metadata': {'total_size': total}, 'weight_map': sharded.weight_map}
  index = json.dumps(index).replace('Infinity', '1e400').encode()
  list_refused(sharded(index), 'index.json', 'total_size', '32')


def test_metadata_that_is_no_object(sharded):
  index = {'metadata': [32], 'weight_map': sharded.weight_map}
  list_refused(sharded(index), 'index.json', 'metadata', 'not an object')


# Links.


def test_links_within_the_folder(sharded):
  folder = sharded()
  for name in (ONE, 'model.safetensors.index.json'):
    (folder / name).rename(folder / f'real-{name}')
    (folder / name).symlink_to(f'real-{name}')
  assert len(read(folder)) == 4
  beside = folder.parent / 'link to the folder'
  beside.symlink_to(folder)
  assert len(read(beside)) == 4


def test_links_out_of_the_folder(sharded, tmp_path_factory):
  folder, outside = sharded(), tmp_path_factory.mktemp('outside')
  for name in (ONE, 'model.safetensors.index.json'):
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)
    list_refused(folder, str(folder / name), str(outside), 'outside')
    (folder / name).unlink()
    (outside / name).rename(folder / name)
  (folder / 'model.safetensors').symlink_to('/dev/zero')
  list_refused(folder, 'model.safetensors', '/dev/zero', 'outside')
  # A neighbour whose name begins alike is not inside.
  neighbour = folder.parent / (folder.name + '-2')
  neighbour.mkdir()
  (neighbour / 'x').write_bytes(pack({}))
  (folder / 'model.safetensors').unlink()
  (folder / 'model.safetensors').symlink_to(neighbour / 'x')
  list_refused(folder, 'model.safetensors', 'outside')


def test_links_to_nothing(sharded):
  folder = sharded()
  path = folder / 'model.safetensors'
  path.symlink_to('no\x1bthing')
  list_refused(folder, str(path), r"a link to 'no\x1bthing'", 'missing')
  path.unlink()
  path.symlink_to(path)
  list_refused(folder, str(path), 'a link to')


def make_cache(folder, model='models--x--y', revisions='snapshots'):
  """A folder moved to where the Hugging Face cache would keep it."""
  cache = folder / model
  snapshot = cache / revisions / '0123abc'
  snapshot.mkdir(parents=True)
  (cache / 'blobs').mkdir()
  for i, path in enumerate(p for p in folder.iterdir() if p.is_file()):
    path.rename(cache / 'blobs' / f'{i:040x}')
    (snapshot / path.name).symlink_to(f'../../blobs/{i:040x}')
  return snapshot


def test_links_of_the_hugging_face_cache(sharded):
  snapshot = make_cache(sharded())
  assert len(read(snapshot)) == 4
  assert len(read(f'{snapshot}/')) == 4


def test_links_of_what_only_looks_like_the_cache(sharded, tmp_path_factory):
  folder = sharded()
  snapshot = make_cache(folder)
  path = snapshot / ONE
  path.rename(folder / 'kept')
  for target in ('../../secret', '../other/x', '../../../secret'):
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    real = snapshot / target
    real.parent.mkdir(exist_ok=True)
    real.write_bytes(pack({}))
    list_refused(snapshot, ONE, 'outside')
  # Blobs may themselves be a link away.
  path.unlink()
  (folder / 'kept').rename(path)
  blobs = snapshot.parent.parent / 'blobs'
  outside = blobs.rename(tmp_path_factory.mktemp('outside') / 'blobs')
  blobs.symlink_to(outside)
  list_refused(snapshot, 'outside')


@pytest.mark.parametrize(
  'model, revisions',
  [
    ('datasets--x', 'snapshots'),
    ('other', 'snapshots'),
    ('models--x', 'other'),
  ],
)
def test_links_of_other_caches(sharded, model, revisions):
  list_refused(make_cache(sharded(), model, revisions), 'outside')


# Whatever the bytes are.


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
  with bounded(2, 4 * MEGABYTE):
    try:
      arrays = read(folder)
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
  check_any(folder, pack(data) if framed else data)


@st.composite
def layouts(draw):
  """Header and data of a good file."""
  header, place = {}, 0
  for i in range(draw(st.integers(0, 5))):
    dtype = draw(st.sampled_from(['F32', 'F16', 'BF16']))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    num_bytes = TYPES[dtype].itemsize * int(np.prod(shape))
    name = draw(st.text(max_size=3)) + str(i)
    header[name] = entry(place, place + num_bytes, dtype, shape)
    place += num_bytes
  return header, draw(st.binary(min_size=place, max_size=place))


@fuzz(200)
@hypothesis.given(layouts(), st.data())
def test_fuzz_damaged_files(tmp_path_factory, layout, data):
  folder = tmp_path_factory.getbasetemp()
  content = bytearray(pack(*layout))
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
  check_any(tmp_path_factory.getbasetemp(), pack(header, content))


@fuzz(200)
@hypothesis.given(st.data())
def test_fuzz_odd_indices(tmp_path_factory, data):
  """An index of anything over two good files."""
  folder = tmp_path_factory.getbasetemp() / 'indexed'
  folder.mkdir(exist_ok=True)
  for name, tensors in ((ONE, 'ab'), (TWO, 'cd')):
    first, second = tensors
    header = {first: entry(), second: entry(8, 16)}
    (folder / name).write_bytes(pack(header, 2 * EIGHT))
  names = st.sampled_from([ONE, TWO, '', '..', 'x.safetensors', '\ud800', 1])
  weight_map = {'a': ONE, 'b': ONE, 'c': TWO, 'd': TWO}
  changes = st.dictionaries(st.sampled_from('abcde'), names, max_size=2)
  weight_map |= data.draw(changes)
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
  with bounded(2, 4 * MEGABYTE):
    try:
      assert set(read(folder)) in (set('abcd'), set())
    except CheckpointError as error:
      assert str(error).isprintable()
