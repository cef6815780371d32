"""Several files with an index: read right or refused, within their folder."""

import json
import os

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
  tensors.list_refused(folder, 'index.json', '100000001 bytes', 'the limit')


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
  index = {'weight_map': WEIGHT_MAP | {'a': name}}
  folder = sharded(index)
  tensors.list_refused(
    folder, 'index.json', repr(name)[:50], 'not the plain name'
  )


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


def test_index_and_files_contradict_each_other(sharded):
  folder = sharded(e=ONE, f=ONE, g=ONE, h=ONE, i=ONE, j=ONE)
  tensors.list_refused(
    folder, 'index.json', "'e', 'f', 'g', 'h' and 2 more", ONE
  )
  sharded(c=None)
  tensors.list_refused(folder, TWO, "'c'", 'index.json', 'nowhere')
  sharded(a=TWO)
  tensors.list_refused(folder, ONE, "'a'", 'index.json', f"places in '{TWO}'")
  sharded()
  names = 'cdefgha'
  header = {x: tensors.entry(8 * i, 8 * i + 8) for i, x in enumerate(names)}
  (folder / TWO).write_bytes(tensors.pack(header, 7 * EIGHT))
  tensors.list_refused(
    folder, TWO, "'a', 'e', 'f', 'g' and 1 more", ONE, 'duplicates'
  )


@pytest.mark.parametrize('total', [31, 33, 31.5, '32', None, [32], -32, 1e400])
def test_total_size(sharded, total):
  index = {'metadata': {'total_size': total}, 'weight_map': WEIGHT_MAP}
  index = json.dumps(index).replace('Infinity', '1e400').encode()
  tensors.list_refused(sharded(index), 'index.json', 'total_size', '32')


def test_metadata_that_is_no_object(sharded):
  index = {'metadata': [32], 'weight_map': WEIGHT_MAP}
  tensors.list_refused(
    sharded(index), 'index.json', 'metadata', 'not an object'
  )


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
