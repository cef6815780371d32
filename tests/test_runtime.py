"""What a process is told before it computes anything."""

import ctypes
import os
import pathlib
import subprocess
import sys

import pytest

SETUP = """
import ctypes, re
from diffusiongemma import runtime

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.sbrk.argtypes = [ctypes.c_ssize_t]
before = libc.sbrk(0)
runtime.reuse_memory()
"""
HELD_BYTES = """
block = libc.malloc(3 << 30)  # Never written to: addresses, no memory.
assert block, '3 GB of addresses are refused'
libc.free(block)
print(libc.sbrk(0) - before)
"""
LARGE_PAGES = """
size = 64 << 20
ctypes.memset(libc.malloc(size), 1, size)
pages = re.findall(r'AnonHugePages: +([0-9]+)', open('/proc/self/smaps').read())
print(1024 * sum(map(int, pages)))
"""
THP = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')


def bytes_in_a_process(code, limit=None):
  """What a process of its own prints, with so many bytes of addresses."""
  if limit:
    set_limit = f'resource.setrlimit(resource.RLIMIT_AS, 2 * ({limit},))'
    code = f'import resource; {set_limit}\n{SETUP}{code}'
  else:
    code = SETUP + code
  run = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=True,
  )
  return int(run.stdout)


is_glibc = pytest.mark.skipif(
  not hasattr(ctypes.CDLL(None), 'mallopt'), reason='not glibc: no mallopt'
)


@is_glibc
def test_what_is_freed_stays_with_the_process_however_large_it_is():
  """Beyond 2 GB too, which is more than `mallopt` can be given as a number."""
  assert bytes_in_a_process(HELD_BYTES) > 0.9 * (3 << 30)


@is_glibc
@pytest.mark.skipif(
  not THP.exists() or '[never]' in THP.read_text(),
  reason='this kernel has no transparent huge pages',
)
def test_memory_is_in_large_pages():
  assert bytes_in_a_process(LARGE_PAGES) > 0.9 * (64 << 20)


@is_glibc
def test_a_limit_of_addresses_is_no_obstacle():
  """As many as the machine has memory, some of which JAX itself takes."""
  limit = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  assert bytes_in_a_process(HELD_BYTES, limit) > 0.9 * (3 << 30)
