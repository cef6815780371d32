"""A disk that is full, for tests of what writes."""

from collections.abc import Iterator
import contextlib
import resource


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
  """No file of this process may grow past `room` bytes."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
