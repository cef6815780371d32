"""What a process is told before it computes anything."""

import ctypes
import subprocess
import sys

import pytest

HELD_BYTES = """
import ctypes
from diffusiongemma import runtime

runtime.reuse_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.sbrk.argtypes = [ctypes.c_ssize_t]
before = libc.sbrk(0)
block = libc.malloc(3 << 30)  # Never written to: addresses, no memory.
assert block, '3 GB of addresses are refused'
libc.free(block)
print(libc.sbrk(0) - before)
"""


@pytest.mark.skipif(
  not hasattr(ctypes.CDLL(None), 'mallopt'), reason='not glibc: no mallopt'
)
def test_what_is_freed_stays_with_the_process_however_large_it_is():
  """Beyond 2 GB too, which is more than `mallopt` can be given as a number."""
  run = subprocess.run(
    [sys.executable, '-c', HELD_BYTES],
    capture_output=True,
    text=True,
    check=True,
  )
  assert int(run.stdout) > 0.9 * (3 << 30)
