"""Process-wide settings: memory, and where compiled programs are kept."""

import ctypes
import os
import pathlib
import subprocess
import sys

import pytest

SETUP = """
import ctypes, re
from diffusiongemma.devices import runtime

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
IN_LARGE_PAGES = """
middle = libc.malloc(64 << 20) + (32 << 20)
for area in re.split(r'\\n(?=[0-9a-f]+-)', open('/proc/self/smaps').read()):
  first, last = (int(end, 16) for end in area.split()[0].split('-'))
  if first <= middle < last:
    print(int(' hg' in re.search('VmFlags:.*', area)[0]))
"""
LIMIT = """
import os, resource
half = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2
resource.setrlimit(resource.RLIMIT_AS, (half, half))
"""


def number_from_a_process(code):
  """What this code prints in a process of its own."""
  run = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  return int(run.stdout)


is_glibc = pytest.mark.skipif(
  not hasattr(ctypes.CDLL(None), 'mallopt'), reason='not glibc: no mallopt'
)


@is_glibc
def test_what_is_freed_stays_with_the_process_however_large_it_is():
  """Beyond 2 GB too, which is more than `mallopt` can be given as a number."""
  assert number_from_a_process(SETUP + HELD_BYTES) > 0.9 * (3 << 30)


@is_glibc
@pytest.mark.skipif(
  not pathlib.Path('/sys/kernel/mm/transparent_hugepage').exists(),
  reason='this kernel has no transparent huge pages',
)
def test_large_pages_are_asked_for():
  """Whether there are any is up to the kernel."""
  assert number_from_a_process(SETUP + IN_LARGE_PAGES)


@is_glibc
def test_a_limit_of_addresses_is_no_obstacle():
  taken = 'print(libc.sbrk(0) - before)'
  assert number_from_a_process(LIMIT + SETUP + taken) < (1 << 30)


@pytest.mark.parametrize(
  'environment, setting, kept',
  [
    ({}, None, 'CACHE/diffusiongemma'),
    ({}, '/elsewhere', '/elsewhere'),
    ({'JAX_COMPILATION_CACHE_DIR': ''}, None, None),
  ],
)
def test_compiled_programs_are_kept_where_nobody_says(
  environment, setting, kept, tmp_path
):
  script = (
    'import sys, jax\n'
    'from diffusiongemma.devices import runtime\n'
    'if sys.argv[1]:\n'
    '  jax.config.update("jax_compilation_cache_dir", sys.argv[1])\n'
    'runtime.keep_compilations()\n'
    'print(jax.config.jax_compilation_cache_dir or None)\n'
  )
  inherited = dict(os.environ)
  inherited.pop('JAX_COMPILATION_CACHE_DIR', None)
  found = subprocess.run(
    [sys.executable, '-c', script, setting or ''],
    env={**inherited, 'XDG_CACHE_HOME': str(tmp_path), **environment},
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()
  assert found == str(kept).replace('CACHE', str(tmp_path))
