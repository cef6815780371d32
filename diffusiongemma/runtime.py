"""What a process is told before it computes anything."""

import ctypes
import os
import sys

import jax


def reuse_memory() -> None:
  """Lets glibc keep what XLA frees, instead of mapping it anew each step.

  A training step on the CPU works in hundreds of megabytes, or in gigabytes,
  that would come back from the kernel page by page. Elsewhere than on Linux
  with glibc, nothing happens.
  """
  M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if sys.platform == 'linux' and mallopt is not None:
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # Never; a size would end at 2 GB.
    mallopt(M_ARENA_MAX, 1)


def keep_compilations() -> None:
  """Compiles once a machine, not once a start; see JAX's own variable."""
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache'))
    jax.config.update(
      'jax_compilation_cache_dir', os.path.join(cache, 'diffusiongemma')
    )
