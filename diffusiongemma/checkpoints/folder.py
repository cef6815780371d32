"""Writes files and folders atomically: complete, or not at all.

with appearing('runs/new') as folder, progress('convert', size) as advance:
  write_file(os.path.join(folder, 'config.json'), content)
  advance(len(content))
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import glob
import os
import shutil
import tempfile

from rich import console as rich_console
from rich import progress as rich_progress

from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files

_QUICK_BYTES = 100e6  # Written before a bar could be read.


def write_file(path: str, content: bytes) -> None:
  """Writes a file. Raises `CheckpointError` for a full disk or a missing
  permission."""
  with (
    files.system_errors(f'{path!r} cannot be written'),
    open(path, 'wb') as file,
  ):
    file.write(content)


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
  """Writes a temporary file beside `path`, flushes it to disk and renames it.
  After an error `path` is unchanged and nothing is left. Raises `OSError`."""
  temporary = f'{os.fspath(path)}.{os.getpid()}.tmp'
  try:
    with open(temporary, 'wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(temporary)
    raise


def remove_unfinished(path: str) -> None:
  """Removes temporary files of `replace_file` that killed processes left beside
  `path`. No other process may be replacing it meanwhile."""
  for left in glob.glob(f'{glob.escape(path)}.*.tmp'):
    process = left.removeprefix(f'{path}.').removesuffix('.tmp')
    if process.isdecimal():
      with contextlib.suppress(OSError):
        os.remove(left)


@contextlib.contextmanager
def appearing(path: str) -> Iterator[str]:
  """A temporary folder that is renamed to `path` after the block, and removed
  if the block fails."""
  path = os.path.abspath(path)
  if os.path.lexists(path) and not (
    os.path.isdir(path) and not os.listdir(path)
  ):
    raise CheckpointError(f'{path} exists already; give a new folder.')
  with files.system_errors(f'{path} cannot be created'):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = tempfile.mkdtemp(
      prefix=f'.{os.path.basename(path)}-', dir=os.path.dirname(path)
    )
  try:
    yield temporary
    with files.system_errors(f'{path} cannot be created'):
      os.chmod(temporary, 0o777 & ~_umask())
      os.rename(temporary, path)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


def _umask() -> int:
  """The umask; `mkdtemp` ignores it and creates folders for the owner only."""
  mask = os.umask(0)
  os.umask(mask)
  return mask


@contextlib.contextmanager
def progress(what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
  """A function to call with the bytes just done; shows a bar, or prints a line
  for every tenth; nothing for small files."""
  console = rich_console.Console(stderr=True)
  if num_bytes < _QUICK_BYTES:
    yield lambda nbytes: None
    return
  if console.file.isatty():
    columns = (
      rich_progress.TextColumn(what),
      rich_progress.BarColumn(bar_width=None),
      rich_progress.DownloadColumn(),
      rich_progress.TransferSpeedColumn(),
      rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console) as bar:
      task = bar.add_task(what, total=num_bytes)
      yield lambda nbytes: bar.advance(task, nbytes)
    return
  done, tenths = 0, 0

  def advance(nbytes: int) -> None:
    nonlocal done, tenths
    done += nbytes
    reached = 10 * done // max(1, num_bytes)
    if reached > tenths:
      tenths = reached
      console.print(
        f'{what}: {10 * tenths} % of {num_bytes / 1e9:.3f} GB',
        highlight=False,
      )

  yield advance
