"""Opens, reads and parses untrusted files.

A file must be regular, inside its folder, and within a size limit; JSON must be
an object without duplicate keys. Errors are one line.
"""

import collections
from collections.abc import Collection
from collections.abc import Iterator
import contextlib
import errno
import json
import os
import stat
from typing import Any

from diffusiongemma.checkpoints import CheckpointError

# transformers writes 10^30 for no limit; parsing is quadratic in the digits.
MAX_DIGITS = 100
# More would take gigabytes to parse; the header of the released model's
# safetensors has a tenth of a megabyte.
MAX_JSON_BYTES = 10_000_000
CHUNK_BYTES = 64 * 2**20  # Of one system call; Linux stops short of 2**31.
# Start of the file that Git puts in place of a large one not yet downloaded.
_LFS_POINTER = b'version https://git-lfs.github.com/spec/v1'


def quote(text: str) -> str:
  """`text` quoted and shortened, with control characters escaped."""
  quoted = repr(text[:100])
  if len(text) > 100 or len(quoted) > 120:
    quoted = quoted[:100] + '...'
  return quoted


def listed(names: Collection[str]) -> str:
  """The first four names, and the number of the others."""
  more = f' and {len(names) - 4} more' if len(names) > 4 else ''
  return ', '.join(map(quote, sorted(names)[:4])) + more


@contextlib.contextmanager
def system_errors(what: str) -> Iterator[None]:
  """Raises `CheckpointError` for an `OSError` in the block."""
  try:
    yield
  except OSError as error:
    raise CheckpointError(f'{what}: {error.strerror or error}.') from error


def checked_path(folder: str, name: str) -> str:
  """The path of a file in `folder`. Raises `CheckpointError` if it is missing,
  or a link out of the folder."""
  path = os.path.join(folder, name)
  if not os.path.exists(path):
    reason = 'is missing'
    if os.path.islink(path):
      reason = f'is a link to {os.readlink(path)!r}, which is missing'
    raise CheckpointError(f'{path!r} {reason}: download it again.')
  real = os.path.realpath(path)
  root = os.path.realpath(folder)
  allowed = [root]
  # The cache stores files once, by their hash, and each revision as links:
  # models--owner--name/snapshots/<revision>/<file> -> ../../blobs/<hash>.
  snapshots = os.path.dirname(root)
  model = os.path.dirname(snapshots)
  if os.path.basename(snapshots) == 'snapshots':
    if os.path.basename(model).startswith('models--'):
      allowed.append(os.path.join(model, 'blobs'))
  if not any(os.path.commonpath([real, x]) == x for x in allowed):
    raise CheckpointError(
      f'{path!r} is a link to {real!r}, outside of its folder: put the file '
      'itself there if it is meant.'
    )
  return path


@contextlib.contextmanager
def opened(path: str) -> Iterator[tuple[int, int]]:
  """(descriptor, size in bytes) of a regular file; never blocks on a pipe."""
  with system_errors(f'{path!r} cannot be read'):
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
      status = os.fstat(descriptor)
      if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f'{path!r} is not a regular file.')
      if os.pread(descriptor, len(_LFS_POINTER), 0) == _LFS_POINTER:
        raise CheckpointError(
          f'{path!r} is a Git LFS pointer, which stands for the file itself: '
          'run `git lfs pull` in its folder, or download the file again.'
        )
      yield descriptor, status.st_size
    finally:
      os.close(descriptor)


def read_into(
  view: memoryview, descriptor: int, offset: int, what: str
) -> None:
  """Fills `view` from byte `offset` of a file."""
  done = 0
  while done < len(view):
    part = view[done : done + CHUNK_BYTES]
    count = os.preadv(descriptor, [part], offset + done)
    if not count:
      raise CheckpointError(
        f'{what}: the file ends at byte {offset + done} while it is read.'
      )
    done += count


def read_bytes(
  descriptor: int, offset: int, nbytes: int, path: str
) -> bytearray:
  """`nbytes` from byte `offset` of a file."""
  data = bytearray(nbytes)
  read_into(memoryview(data), descriptor, offset, repr(path))
  return data


def claim_room(descriptor: int, nbytes: int) -> None:
  """Allocates `nbytes` for a file. Raises `OSError` if the disk is too full."""
  if not hasattr(os, 'posix_fallocate'):
    return  # Not on macOS: a full disk is noticed while writing.
  try:
    os.posix_fallocate(descriptor, 0, max(1, nbytes))
  except OSError as error:
    # Some network file systems can't; there, too, it is noticed while writing.
    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
      raise


def parse_json(data: bytes | bytearray, what: str) -> dict[str, Any]:
  """Parses a JSON object in UTF-8 without duplicate keys."""

  def to_dict(pairs: list[Any]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
      counts = collections.Counter(key for key, _ in pairs)
      twice = {key for key, count in counts.items() if count > 1}
      raise CheckpointError(f'{what} names {listed(twice)} twice.')
    return result

  def to_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
      raise CheckpointError(
        f'{what} has a number of {len(digits)} digits: it is damaged.'
      )
    return int(digits)

  def no_constant(text: str) -> None:
    raise CheckpointError(f'{what} has {text}, which is not JSON.')

  try:
    result = json.loads(
      data.decode('utf-8'),
      object_pairs_hook=to_dict,
      parse_int=to_int,
      parse_constant=no_constant,
    )
  except UnicodeDecodeError as error:
    raise CheckpointError(
      f'{what} is not text: byte {error.start} is not UTF-8.'
    ) from error
  except (RecursionError, MemoryError) as error:
    raise CheckpointError(f'{what} is nested too deeply.') from error
  except ValueError as error:
    raise CheckpointError(f'{what} is not JSON: {error}.') from error
  if not isinstance(result, dict):
    raise CheckpointError(f'{what} is JSON, but not an object.')
  return result


def read_file(folder: str, name: str, max_bytes: int) -> bytes:
  """The content of a file in `folder`, at most `max_bytes` long."""
  path = checked_path(folder, name)
  with opened(path) as (descriptor, size):
    if size > max_bytes:
      raise CheckpointError(
        f'{path!r} has {size} bytes, more than {max_bytes}: it is not what '
        'its name says.'
      )
    return bytes(read_bytes(descriptor, 0, size, path))


def read_json(folder: str, name: str) -> dict[str, Any]:
  """The JSON object in a file in `folder`, at most `MAX_JSON_BYTES` long."""
  path = os.path.join(folder, name)
  return parse_json(read_file(folder, name, MAX_JSON_BYTES), repr(path))
