"""Process-wide settings: allocator, huge pages, compilation cache."""

import ctypes
import os
import sys

import jax


def reuse_memory() -> None:
  """Makes glibc keep memory that XLA frees, instead of mapping it again in each
  step, in pages of 2 MB if Linux supports them.

  The buffers of a training step on the CPU, hundreds of megabytes or more,
  would otherwise be mapped page by page. Without Linux and glibc, this does
  nothing."""
  M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
  libc = ctypes.CDLL(None)
  if sys.platform == 'linux' and hasattr(libc, 'mallopt'):
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # Never; a size would end at 2 GB.
    libc.mallopt(M_ARENA_MAX, 1)
    _ask_for_huge_pages(libc)


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
  """Requests huge pages for the future heap: a range of addresses for half of
  the machine's memory, which `malloc` keeps. It allocates no memory, and does
  nothing if addresses are limited."""
  MADV_HUGEPAGE = 14
  libc.malloc.restype = ctypes.c_void_p
  libc.malloc.argtypes = [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  page = os.sysconf('SC_PAGE_SIZE')
  size = page * os.sysconf('SC_PHYS_PAGES') // 2
  block = libc.malloc(size)
  if block:
    start = -(-block // page) * page
    libc.madvise(start, block + size - start, MADV_HUGEPAGE)
    libc.free(block)


def keep_compilations() -> None:
  """Enables JAX's persistent compilation cache, unless its own environment
  variable or setting is set."""
  is_chosen = 'JAX_COMPILATION_CACHE_DIR' in os.environ
  if not (is_chosen or jax.config.values['jax_compilation_cache_dir']):
    cache = os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache'))
    jax.config.update(
      'jax_compilation_cache_dir', os.path.join(cache, 'diffusiongemma')
    )
