"""What is written can be read back, or leaves no trace."""

import errno
import json
import os
import weakref

import disk
import numpy as np
import pytest
import tensors

from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import safetensors
from diffusiongemma.checkpoints import safetensors_writer

# The library as the oracle.


def to_torch(torch, array):
  if array.dtype == tensors.BF16:
    bits = torch.from_numpy(array.view(np.int16).copy())
    return bits.view(torch.bfloat16)
  return torch.from_numpy(array.copy())


def from_torch(torch, tensor):
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(tensors.BF16)
  return tensor.numpy()


def test_reads_what_the_library_writes(tmp_path):
  torch = pytest.importorskip('torch', reason='bfloat16 of the oracle')
  oracle = pytest.importorskip('safetensors.torch', reason='the oracle')
  arrays = tensors.make_arrays()
  theirs = {name: to_torch(torch, x) for name, x in arrays.items()}
  path = tmp_path / 'model.safetensors'
  oracle.save_file(theirs, path, metadata={'format': 'pt'})
  assert tensors.agree(tensors.read(tmp_path), arrays)
  oracle.save_file(theirs, path)
  assert tensors.agree(tensors.read(tmp_path), arrays)


@pytest.mark.parametrize('room', [10**9, 64, 1])
def test_the_library_reads_what_is_written(tmp_path, room):
  torch = pytest.importorskip('torch', reason='bfloat16 of the oracle')
  oracle = pytest.importorskip('safetensors', reason='the oracle')
  arrays = tensors.make_arrays()
  tensors.write(tmp_path, arrays, max_shard_bytes=room)
  found = {}
  for path in tmp_path.glob('*.safetensors'):
    with oracle.safe_open(path, 'pt') as file:
      assert file.metadata() == {'format': 'pt'}
      for name in file.keys():  # noqa: SIM118 - no dictionary.
        assert name not in found
        found[name] = from_torch(torch, file.get_tensor(name))
  assert tensors.agree(found, arrays)


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
    tensors.write(ours, arrays, max_shard_bytes=room)
    assert tensors.agree(tensors.read(theirs), arrays) and tensors.agree(
      tensors.read(ours), arrays
    )
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
  arrays = tensors.make_arrays()
  tensors.write(tmp_path, arrays, max_shard_bytes=room)
  found = tensors.read(tmp_path)
  assert tensors.agree(found, arrays)
  for array in found.values():
    assert array.flags.c_contiguous and array.flags.writeable
    assert array.flags.owndata


def test_nothing_at_all(tmp_path):
  tensors.write(tmp_path, {})
  assert tensors.read(tmp_path) == {}


def test_files_keep_their_size_and_their_alignment(tmp_path):
  arrays = tensors.make_arrays() | {'big': np.ones(300, 'f2')}
  tensors.write(tmp_path, arrays, max_shard_bytes=100)
  listed = safetensors.list_tensors(str(tmp_path))
  files = {}
  for tensor in listed.values():
    files.setdefault(tensor.path, []).append(tensor)
    assert tensor.offset % tensor.dtype.itemsize == 0
  names = [f'model-{i:05d}-of-00004.safetensors' for i in (1, 2, 3, 4)]
  assert sorted(files) == [str(tmp_path / name) for name in names]
  for path, held in files.items():
    with open(path, 'rb') as file:
      assert int.from_bytes(file.read(8), 'little') % 8 == 0
    num_bytes = sum(x.nbytes for x in held)
    assert num_bytes <= 100 or [x.name for x in held] == ['big']
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
  tensors.write(tmp_path, arrays, max_shard_bytes=100)
  assert len(list(tmp_path.glob('*.safetensors'))) == count
  assert tensors.agree(tensors.read(tmp_path), arrays)


def test_one_tensor_at_a_time_in_the_order_written(tmp_path):
  arrays = tensors.make_arrays()
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
  array = np.ones((4, tensors.MEGABYTE), tensors.BF16)
  with tensors.bounded(10, tensors.MEGABYTE):
    tensors.write(tmp_path, {'a': array})
  listed = safetensors.list_tensors(str(tmp_path))
  with tensors.bounded(10, array.nbytes + tensors.MEGABYTE):
    assert safetensors.read_tensor(listed['a']).nbytes == array.nbytes


def test_strided_arrays(tmp_path):
  array = np.arange(24, dtype='f4').reshape(4, 6)
  arrays = {'t': array.T, 'strides': array[::2, ::-1], 'all': array}
  arrays |= {'row': array[0, ::2], 'backwards': array[0, ::-1]}
  tensors.write(tmp_path, arrays)
  assert tensors.agree(tensors.read(tmp_path), arrays)


def test_short_reads_and_writes(tmp_path, monkeypatch):
  """The system may do less than it was asked to."""
  arrays = tensors.make_arrays()
  os_write, os_preadv = os.write, os.preadv
  monkeypatch.setattr(os, 'write', lambda fd, data: os_write(fd, data[:5]))
  tensors.write(tmp_path, arrays, max_shard_bytes=100)
  monkeypatch.setattr(
    os, 'preadv', lambda fd, parts, place: os_preadv(fd, [parts[0][:3]], place)
  )
  assert tensors.agree(tensors.read(tmp_path), arrays)
  monkeypatch.undo()
  assert tensors.agree(tensors.read(tmp_path), arrays)


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
  arrays = tensors.make_arrays()
  tensors.write(tmp_path, arrays)
  assert tensors.agree(tensors.read(tmp_path), arrays)
  assert max(written) == max(asked) == 7


def test_files_are_closed(tmp_path):
  before = set(os.listdir('/dev/fd'))
  for room in (10**9, 100):
    folder = tmp_path / str(room)
    folder.mkdir()
    tensors.write(folder, tensors.make_arrays(), max_shard_bytes=room)
    tensors.read(folder)
  (folder / 'model.safetensors').write_bytes(b'')
  tensors.list_refused(folder, 'too short')
  assert set(os.listdir('/dev/fd')) <= before


def test_what_is_read_has_the_declared_shape_and_type(tmp_path):
  for wrong in (np.ones(4, 'f4'), np.ones((2, 2), 'f2'), [[1, 1], [1, 1]]):
    answers = {'good': np.ones(2, 'f4'), 'bad': wrong}
    specs = {'good': ((2,), 'f4'), 'bad': ((2, 2), 'f4')}
    tensors.refused(
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
    tensors.refused(
      lambda n=name: tensors.write(tmp_path, {n: array}), repr(name), 'the name'
    )
  for dtype in ('f8', 'i4', '>f4', 'bool'):
    tensors.refused(
      lambda d=dtype: tensors.write(tmp_path, {'a': array.astype(d)}),
      "'a'",
      'written in BF16, F16, F32',
    )
  assert not list(tmp_path.iterdir())


def test_headers_of_others_have_a_limit(tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'MAX_JSON_BYTES', 100)
  tensors.refused(
    lambda: tensors.write(tmp_path, tensors.make_arrays()),
    'a header of',
    'are the limit',
  )


@pytest.mark.parametrize('failing', ['read', 'on_bytes'])
def test_a_failed_call_removes_its_files(tmp_path, failing):
  arrays = tensors.make_arrays()
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
  arrays = tensors.make_arrays()
  name = 'model-00002-of-00004.safetensors'
  (tmp_path / name).write_text('precious')
  tensors.refused(
    lambda: tensors.write(tmp_path, arrays, max_shard_bytes=64),
    name,
    'File exists',
  )
  assert [p.name for p in tmp_path.iterdir()] == [name]
  assert (tmp_path / name).read_text() == 'precious'
  link = tmp_path / 'model.safetensors'
  link.symlink_to('elsewhere')
  tensors.refused(lambda: tensors.write(tmp_path, arrays), 'File exists')
  assert link.is_symlink() and not (tmp_path / 'elsewhere').exists()
  tensors.refused(
    lambda: tensors.write(tmp_path / 'none', arrays), 'No such file'
  )


def test_room_is_claimed_before_anything_is_read(tmp_path, monkeypatch):
  def never(name):
    raise AssertionError('asked for a tensor')

  specs = {name: ((1000,), 'f4') for name in 'abc'}
  action = lambda: safetensors_writer.write_folder(
    str(tmp_path), specs, never, max_shard_bytes=5000
  )
  with disk.full_disk(4000):
    tensors.refused(action, 'model-00001-of-00003', 'File too large')
  assert not list(tmp_path.iterdir())

  claimed = []

  def full(descriptor, offset, num_bytes):
    claimed.append(num_bytes)
    if len(claimed) == 3:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, 'posix_fallocate', full)
  tensors.refused(
    action, 'model-00003-of-00003', 'bytes)', 'No space left on device'
  )
  assert not list(tmp_path.iterdir()) and min(claimed) > 4000


def test_a_disk_that_fills_while_writing(tmp_path, monkeypatch):
  """File systems that can't claim room, as some over a network."""

  def unable(*_):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

  monkeypatch.setattr(os, 'posix_fallocate', unable)
  arrays = {name: np.ones(1000, 'f4') for name in 'abc'}
  with disk.full_disk(8000):
    tensors.refused(
      lambda: tensors.write(tmp_path, arrays),
      'model.safetensors',
      'File too large',
    )
  assert not list(tmp_path.iterdir())
  tensors.write(tmp_path, arrays)
  assert tensors.agree(tensors.read(tmp_path), arrays)


def test_no_fallocate(tmp_path, monkeypatch):
  monkeypatch.delattr(os, 'posix_fallocate')
  tensors.write(tmp_path, tensors.make_arrays())
  assert tensors.agree(tensors.read(tmp_path), tensors.make_arrays())


def test_all_files_are_flushed(tmp_path, monkeypatch):
  flushed = set()
  os_fsync = os.fsync

  def noted(descriptor):
    status = os.fstat(descriptor)
    flushed.add((status.st_ino, status.st_size))
    os_fsync(descriptor)

  monkeypatch.setattr(os, 'fsync', noted)
  monkeypatch.delattr(os, 'posix_fallocate')  # Sizes tell of what is written.
  tensors.write(tmp_path, tensors.make_arrays(), max_shard_bytes=64)
  sizes = [path.stat() for path in tmp_path.iterdir()]
  assert {(x.st_ino, x.st_size) for x in sizes} <= flushed
