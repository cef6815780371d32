"""A folder is held by one process."""

import pytest

from diffusiongemma.runs import folder as workdirs
from diffusiongemma.runs import lock


def test_a_lock_that_leads_elsewhere_is_none(tmp_path, caplog):
  """What a link names is not touched."""
  victim = tmp_path / 'victim'
  victim.write_text('dear')
  (tmp_path / 'lock').symlink_to(victim)
  with lock.held(str(tmp_path)):
    pass
  assert victim.read_text() == 'dear' and 'is not locked' in caplog.text


def test_what_killed_processes_left_half_written_is_removed(tmp_path):
  """By who holds the folder; what others have put there stays."""
  (tmp_path / 'huggingface').mkdir()
  left = [
    'config.json.12.tmp',
    'metrics.jsonl.7.tmp',
    'huggingface/LICENSE.9.tmp',
  ]
  kept = [
    'notes.12.tmp',
    'config.json.tmp',
    'config.json.old.tmp',
    'config.json',
  ]
  for name in (*left, *kept):
    (tmp_path / name).write_text('half')
  with lock.held(str(tmp_path)):
    there = lambda names: [name for name in names if (tmp_path / name).exists()]
    assert not there(left) and there(kept) == kept
    (tmp_path / left[0]).touch()
    second = pytest.raises(workdirs.WorkdirError, match='Another run trains')
    with second, lock.held(str(tmp_path)):
      pass
    assert there(left) == left[:1], 'it is being written'
