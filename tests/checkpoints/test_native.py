"""Nothing damaged is restored, and nothing good is lost."""

import contextlib
import pathlib
import signal
import subprocess
import sys

import disk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import config as configs
from diffusiongemma.checkpoints import digest as digest_lib
from diffusiongemma.checkpoints import native


def make(seed):
  key = jax.random.key(seed)
  params = {
    'layer': {'w': jax.random.normal(key, (300, 40))},
    'b': jnp.arange(5, dtype=jnp.bfloat16),
  }
  opt_state = ({'mu': params['layer']['w'] * 2}, jnp.int32(seed))
  return params, opt_state


@pytest.fixture
def manager(tmp_path):
  with contextlib.closing(
    native.open_checkpoints(str(tmp_path / 'checkpoints'), keep=2)
  ) as manager:
    yield manager


def save(manager, step):
  params, opt_state = make(step)
  place = {'next_index': 10 * step}
  native.save(manager, step, params, opt_state, place, configs.Config())


def equal(a, b):
  return all(
    x.dtype == y.dtype and (np.asarray(x) == np.asarray(y)).all()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def test_round_trip(manager):
  save(manager, 3)
  restored = native.restore_newest(manager, *make(0))
  params, opt_state = make(3)
  assert restored.step == 3 and restored.data == {'next_index': 30}
  assert equal(restored.params, params)
  assert equal(restored.opt_state, opt_state)
  alone = native.restore_newest(manager, make(0)[0])
  assert equal(alone.params, params) and alone.opt_state is None


def test_nothing_there(manager):
  assert native.restore_newest(manager, make(0)[0]) is None


def test_only_the_newest_are_kept(manager):
  for step in (1, 2, 3):
    save(manager, step)
  assert sorted(manager.all_steps()) == [2, 3]


def largest_file(folder):
  files = [f for f in pathlib.Path(folder).rglob('*') if f.is_file()]
  return max(files, key=lambda f: f.stat().st_size)


@pytest.mark.parametrize('item', ['params', 'opt_state'])
def test_a_flipped_bit_is_found_wherever_it_is(manager, tmp_path, item):
  """Bits of the largest data file are flipped in turn: each one is noticed,
  and the step before is restored instead."""
  save(manager, 1)
  save(manager, 2)
  file = largest_file(tmp_path / 'checkpoints' / '2' / item)
  good = file.read_bytes()
  for place in np.linspace(0, len(good) - 1, 12).astype(int):
    bad = bytearray(good)
    bad[place] ^= 0x10
    file.write_bytes(bytes(bad))
    restored = native.restore_newest(manager, *make(0))
    found = (restored.params, restored.opt_state)
    assert restored.step in (1, 2) and equal(found, make(restored.step))
  file.write_bytes(good)
  assert native.restore_newest(manager, *make(0)).step == 2


@pytest.mark.parametrize(
  ('item', 'old', 'new'),
  [
    ('digests', '"params"', '"parans"'),
    ('digests', '"opt_state"', '"opt_stale"'),
    ('digests', '{', '[]'),
    ('digests', '{', 'null'),
    ('data', '20', '24'),
    ('data', 'next_index', 'text_index'),
  ],
)
def test_a_damaged_note_sends_back_to_the_step_before(
  manager, tmp_path, item, old, new
):
  """Digests that tell nothing, and another place in the data."""
  save(manager, 1)
  save(manager, 2)
  file = tmp_path / 'checkpoints' / '2' / item / 'metadata'
  text = file.read_text()
  assert old in text
  file.write_text(new if old == '{' else text.replace(old, new))
  restored = native.restore_newest(manager, *make(0))
  assert restored.step == 1 and restored.data == {'next_index': 10}


def test_damage_is_named(manager, monkeypatch):
  save(manager, 4)
  monkeypatch.setattr(
    digest_lib, 'digest', lambda array: 'x' if array.ndim == 2 else 'y'
  )
  with pytest.raises(native.CheckpointError) as caught:
    native.restore_newest(manager, make(0)[0])
  assert 'No checkpoint' in str(caught.value)
  assert "params ['b'], ['layer']['w'] differ" in str(caught.value)


def test_truncated_and_missing_files(manager, tmp_path):
  save(manager, 1)
  save(manager, 2)
  file = largest_file(tmp_path / 'checkpoints' / '2' / 'params')
  file.write_bytes(file.read_bytes()[:100])
  assert native.restore_newest(manager, *make(0)).step == 1
  file.unlink()
  assert native.restore_newest(manager, *make(0)).step == 1


def test_another_shape_is_refused(manager):
  save(manager, 1)
  params, opt_state = make(0)
  params['b'] = jnp.zeros((6,), jnp.bfloat16)
  with pytest.raises(native.CheckpointError, match='No checkpoint'):
    native.restore_newest(manager, params, opt_state)


def test_a_full_disk_keeps_the_last_good_checkpoint(manager):
  save(manager, 1)
  failure = pytest.raises(native.CheckpointError, match='Step 2 could not be')
  with disk.full_disk(4000), failure:
    save(manager, 2)
  restored = native.restore_newest(manager, *make(0))
  assert restored.step == 1 and equal(restored.params, make(1)[0])
  save(manager, 3)
  assert native.restore_newest(manager, *make(0)).step == 3


def test_half_a_save_is_ignored(manager, tmp_path):
  """What a killed process leaves behind: a folder that was never renamed."""
  save(manager, 1)
  folder = tmp_path / 'checkpoints'
  (folder / '2.orbax-checkpoint-tmp' / 'params').mkdir(parents=True)
  with contextlib.closing(
    native.open_checkpoints(str(folder), keep=2)
  ) as again:
    assert native.restore_newest(again, *make(0)).step == 1
    save(again, 2)
    assert native.restore_newest(again, *make(0)).step == 2


def test_room_that_a_killed_save_has_claimed_is_free_again(tmp_path):
  """What claims it has no name; what older versions have left goes when the run
  goes on, and nothing else."""
  script = """
import os, signal, sys
from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import native
claim = files.claim_room
files.claim_room = lambda *room: (claim(*room), os.kill(os.getpid(), 9))
native._check_room(sys.argv[1], 10**6)
"""
  folder = tmp_path / 'checkpoints'
  folder.mkdir()
  done = subprocess.run([sys.executable, '-c', script, folder], check=False)
  assert done.returncode == -signal.SIGKILL
  assert not list(folder.iterdir())
  ours, theirs = folder / 'room-a1_b2c3d', folder / 'room-temperature'
  ours.touch()
  theirs.touch()
  (folder / 'room-12345678').mkdir()
  (folder / 'room-abcdefgh').symlink_to(theirs)
  kept = {'room-temperature', 'room-12345678', 'room-abcdefgh'}
  native.open_checkpoints(str(folder)).close()
  assert ours.exists(), 'one who reads removes nothing'
  native.open_checkpoints(str(folder), keep=2).close()
  assert {path.name for path in folder.iterdir()} == kept


def test_damaged_steps_are_set_aside(manager, tmp_path):
  save(manager, 1)
  save(manager, 2)
  native.set_aside_after(manager, 1)
  assert manager.all_steps() == [1]
  assert (tmp_path / 'checkpoints' / 'damaged-2' / 'params').is_dir()
  save(manager, 2)
  assert native.restore_newest(manager, *make(0)).step == 2


def test_digest_sees_type_and_shape():
  zeros = np.zeros((2, 3), np.float32)
  others = (
    zeros.T,
    zeros.view(np.int32),
    np.zeros((6,), np.float32),
    zeros + 1,
  )
  assert digest_lib.digest(zeros) == digest_lib.digest(jnp.zeros((2, 3)))
  assert digest_lib.digest(zeros) not in map(digest_lib.digest, others)
