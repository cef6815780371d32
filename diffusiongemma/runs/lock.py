"""The lock on a run's folder, held by the one process that trains there."""

from collections.abc import Iterator
import contextlib
import fcntl
import os

from absl import logging

from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import folder as folders
from diffusiongemma.runs import WorkdirError
from diffusiongemma.runs import companions
from diffusiongemma.runs import folder as workdirs

LOCK = 'lock'
# Files that a run replaces when it starts or is resumed; see
# `folder.replace_file`.
REPLACED = (
  *workdirs.FILES,
  *companions.TOKENIZERS,
  *companions.CHAT_TEMPLATES,
  *(
    os.path.join(companions.COMPANIONS_DIR, name)
    for name in companions.COMPANIONS
  ),
)


@contextlib.contextmanager
def held(workdir: str) -> Iterator[None]:
  """Holds the lock: no other process trains in the folder meanwhile, on this
  host or on others. On a file system without locks, nothing is locked.
  Half-written files of killed processes are removed by the holder of the lock.

  Raises:
    WorkdirError: another process holds the lock.
  """
  path, flags = os.path.join(workdir, LOCK), os.O_NOFOLLOW | os.O_CLOEXEC
  with contextlib.ExitStack() as until_done:
    try:
      try:
        descriptor = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
      except PermissionError:  # It is another user's, but can still be locked.
        descriptor = os.open(path, flags | os.O_RDONLY)
      until_done.callback(os.close, descriptor)
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      owner = os.pread(descriptor, 100, 0).decode(errors='replace')
      raise WorkdirError(
        f'Another run trains in {workdir} ({files.quote(owner)}). Wait for it, '
        'stop it, or give another --workdir.'
      ) from None
    except OSError as error:
      logging.warning('%s is not locked: %s.', workdir, error.strerror)
    else:
      # Otherwise a child that was forked meanwhile would keep the lock.
      until_done.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
      with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f'process {os.getpid()}'.encode())
      for name in REPLACED:
        folders.remove_unfinished(os.path.join(workdir, name))
    yield
