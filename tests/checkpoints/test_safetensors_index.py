"""Several files with an index: read right or refused, within their folder.

The index says which files there are, and they say what they hold: so does
`transformers`, which reads no more of it."""

import json
import os

import numpy as np
import pytest
import tensors

from diffusiongemma.checkpoints import safetensors

ONE, TWO, WEIGHT_MAP = tensors.ONE, tensors.TWO, tensors.WEIGHT_MAP
EIGHT, WEIRD = tensors.EIGHT, tensors.WEIRD


@pytest.fixture
def sharded(tmp_path):
  """Tensors a, b in one file, c, d in the other; `save(index)`."""
  tensors.write_two(tmp_path)

  def save(index=None, **changes):
    if index is None:
      changed = {k: v for k, v in (WEIGHT_MAP | changes).items() if v}
      index = {'metadata': {'total_size': 32}, 'weight_map': changed}
    if not isinstance(index, bytes):
      index = json.dumps(index).encode()
    (tmp_path / 'model.safetensors.index.json').write_bytes(index)
    return tmp_path

  return save


def test_a_good_index(sharded):
  folder = sharded()
  listed = safetensors.list_tensors(str(folder))
  assert list(listed) == ['a', 'b', 'c', 'd']
  assert {x.path for x in listed.values()} == {
    str(folder / ONE),
    str(folder / TWO),
  }
  for metadata in ({}, {'total_size': 32.0}, {'total_size': 32, 'more': [1]}):
    sharded({'metadata': metadata, 'weight_map': WEIGHT_MAP})
    assert len(tensors.read(folder)) == 4
  (folder / 'stale.safetensors').write_bytes(b'unnamed, unread')
  sharded({'weight_map': WEIGHT_MAP})
  assert len(tensors.read(folder)) == 4


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
  tensors.list_refused(sharded(index), 'model.safetensors.index.json', *parts)


def test_an_index_is_bounded_before_it_is_read(sharded):
  folder = sharded()
  os.truncate(folder / 'model.safetensors.index.json', 100_000_001)
  tensors.list_refused(folder, 'index.json', '100000001 bytes', '10000000')


@pytest.mark.parametrize(
  'name',
  [
    '../x.safetensors',
    '/etc/x.safetensors',
    'sub/../x.safetensors',
    'sub/../../x.safetensors',
    'x.safetensors/..',
    '..',
    '.',
    '',
    'x\0.safetensors',
    'pytorch_model.bin',
    'n' * 1000 + '.safetensors',
    'n' * 10**6 + '.safetensors',
  ],
)
def test_names_of_files_that_are_not_in_the_folder(sharded, name):
  index = {'weight_map': WEIGHT_MAP | {'a': name}}
  folder = sharded(index)
  tensors.list_refused(
    folder, 'index.json', repr(name)[:50], 'not the path', 'in its folder'
  )


def test_files_in_folders_below(sharded):
  """Also one file by two names, which is read once."""
  folder = sharded(a='./' + ONE)
  assert len(tensors.read(folder)) == 4
  (folder / 'deep' / 'er').mkdir(parents=True)
  (folder / ONE).rename(folder / 'deep' / 'er' / ONE)
  sharded(a=f'deep/er/{ONE}', b=f'./deep//er/{ONE}')
  assert len(tensors.read(folder)) == 4


def test_a_folder_below_that_leads_elsewhere(sharded, tmp_path_factory):
  folder, outside = sharded(), tmp_path_factory.mktemp('outside')
  (folder / ONE).rename(outside / ONE)
  (folder / 'sub').symlink_to(outside)
  sharded(a=f'sub/{ONE}', b=f'sub/{ONE}')
  tensors.list_refused(folder, f'sub/{ONE}', str(outside), 'outside')


def test_files_that_the_system_can_not_name(sharded):
  """255 characters are more bytes than a name may have."""
  folder = sharded(a='\u4f60' * 200 + '.safetensors')
  tensors.list_refused(folder, '.safetensors', 'is missing')


def test_a_missing_file_is_named(sharded):
  folder = sharded(a=WEIRD + '.safetensors')
  tensors.list_refused(folder, r'we\x1b[31mird\n.safetensors', 'is missing')
  sharded()
  os.truncate(folder / ONE, 0)  # What is missing is told first.
  (folder / TWO).unlink()
  tensors.list_refused(folder, str(folder / TWO), 'is missing')


def test_a_damaged_file_is_named(sharded):
  folder = sharded()
  os.truncate(folder / TWO, (folder / TWO).stat().st_size - 1)
  tensors.list_refused(folder, str(folder / TWO), "'d'", 'truncated')


@pytest.fixture
def warnings(monkeypatch):
  """Warnings that are logged."""
  seen = []
  warn = lambda message, *args: seen.append(message % args)
  monkeypatch.setattr(safetensors.logging, 'warning', warn)
  return seen


def test_what_the_files_hold_counts(sharded, warnings):
  """An index that lacks a tensor, adds some, or places one elsewhere."""
  good = tensors.read(sharded())
  assert not warnings
  folder = sharded(c=None)
  assert tensors.agree(tensors.read(folder), good)
  assert "does not name 'c'; what" in warnings.pop()
  sharded(e=ONE, f=ONE, g=ONE, h=ONE, i=ONE, j=ONE)
  assert tensors.agree(tensors.read(folder), good)
  assert "names 'e', 'f', 'g', 'h' and 2 more; what" in warnings.pop()
  sharded(a=TWO)
  assert tensors.agree(tensors.read(folder), good)
  assert not warnings


@pytest.mark.parametrize(
  'metadata',
  [
    *({'total_size': x} for x in (0, 31, 33, '32', None, [32], -32)),
    *(None, [32], 'x'),
  ],
)
def test_metadata_say_nothing(sharded, metadata):
  folder = sharded({'metadata': metadata, 'weight_map': WEIGHT_MAP})
  assert len(tensors.read(folder)) == 4


def test_a_tensor_in_two_files(sharded, monkeypatch):
  """Once where its bits are equal; else nobody knows which is meant."""
  monkeypatch.setattr(safetensors.files, 'CHUNK_BYTES', 3)
  folder = sharded()
  good = tensors.read(folder)
  header = {'c': tensors.entry(), 'a': tensors.entry(8, 16)}
  header |= {'d': tensors.entry(16, 24)}
  (folder / TWO).write_bytes(tensors.pack(header, 3 * EIGHT))
  assert tensors.agree(tensors.read(folder), good)
  for other in (b'12345679', b'\0' * 8):
    content = tensors.pack(header, EIGHT + other + EIGHT)
    (folder / TWO).write_bytes(content)
    tensors.list_refused(folder, "'a'", ONE, TWO, 'different checkpoints')
  header['a'] |= {'shape': (1, 2)}
  (folder / TWO).write_bytes(tensors.pack(header, 3 * EIGHT))
  tensors.list_refused(folder, "'a'", ONE, TWO, 'different checkpoints')


def test_an_index_that_names_the_single_file(tmp_path):
  """AutoRound writes one, with what belongs into it in another file."""
  arrays = tensors.make_arrays()
  names = sorted(arrays)
  files = {'model.safetensors': names[:3], 'extra.safetensors': names[3:]}
  for file, inside in files.items():
    tensors.write(tmp_path, {name: arrays[name] for name in inside})
    (tmp_path / 'model.safetensors').rename(tmp_path / f'{file}.part')
  for file in files:
    (tmp_path / f'{file}.part').rename(tmp_path / file)
  weight_map = {name: file for file, inside in files.items() for name in inside}
  index = {'metadata': {'total_size': 0}, 'weight_map': weight_map}
  path = tmp_path / 'model.safetensors.index.json'
  path.write_text(json.dumps(index))
  assert tensors.agree(tensors.read(tmp_path), arrays)


POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 4987654321
"""


@pytest.mark.parametrize('name', [ONE, 'model.safetensors.index.json'])
def test_a_git_lfs_pointer_is_named(sharded, name):
  folder = sharded()
  (folder / name).write_bytes(POINTER)
  tensors.list_refused(folder, name, 'Git LFS pointer', '`git lfs pull`')


def test_types_that_are_no_weights_are_listed(tmp_path):
  """Positions, masks, counts; whoever needs weights refuses them."""
  library = pytest.importorskip(
    'safetensors.numpy', reason='safetensors is installed by the [test] extra'
  )
  types = ('f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', '?')
  arrays = {name: np.arange(6).astype(name) for name in types}
  library.save_file(arrays, tmp_path / 'model.safetensors')
  assert tensors.agree(tensors.read(tmp_path), arrays)


# Links.


def test_links_within_the_folder(sharded):
  folder = sharded()
  for name in (ONE, 'model.safetensors.index.json'):
    (folder / name).rename(folder / f'real-{name}')
    (folder / name).symlink_to(f'real-{name}')
  assert len(tensors.read(folder)) == 4
  beside = folder.parent / 'link to the folder'
  beside.symlink_to(folder)
  assert len(tensors.read(beside)) == 4


def test_links_out_of_the_folder(sharded, tmp_path_factory):
  folder, outside = sharded(), tmp_path_factory.mktemp('outside')
  for name in (ONE, 'model.safetensors.index.json'):
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)
    tensors.list_refused(folder, str(folder / name), str(outside), 'outside')
    (folder / name).unlink()
    (outside / name).rename(folder / name)
  (folder / 'model.safetensors').symlink_to('/dev/zero')
  tensors.list_refused(folder, 'model.safetensors', '/dev/zero', 'outside')
  # A neighbour whose name begins alike is not inside.
  neighbour = folder.parent / (folder.name + '-2')
  neighbour.mkdir()
  (neighbour / 'x').write_bytes(tensors.pack({}))
  (folder / 'model.safetensors').unlink()
  (folder / 'model.safetensors').symlink_to(neighbour / 'x')
  tensors.list_refused(folder, 'model.safetensors', 'outside')


def test_links_to_nothing(sharded):
  folder = sharded()
  path = folder / 'model.safetensors'
  path.symlink_to('no\x1bthing')
  tensors.list_refused(folder, str(path), r"a link to 'no\x1bthing'", 'missing')
  path.unlink()
  path.symlink_to(path)
  tensors.list_refused(folder, str(path), 'a link to')


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
  assert len(tensors.read(snapshot)) == 4
  assert len(tensors.read(f'{snapshot}/')) == 4


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
    real.write_bytes(tensors.pack({}))
    tensors.list_refused(snapshot, ONE, 'outside')
  # Blobs may themselves be a link away.
  path.unlink()
  (folder / 'kept').rename(path)
  blobs = snapshot.parent.parent / 'blobs'
  outside = blobs.rename(tmp_path_factory.mktemp('outside') / 'blobs')
  blobs.symlink_to(outside)
  tensors.list_refused(snapshot, 'outside')


@pytest.mark.parametrize(
  'model, revisions',
  [
    ('datasets--x', 'snapshots'),
    ('other', 'snapshots'),
    ('models--x', 'other'),
  ],
)
def test_links_of_other_caches(sharded, model, revisions):
  tensors.list_refused(make_cache(sharded(), model, revisions), 'outside')
