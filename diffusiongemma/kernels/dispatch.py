"""Kernels, or other ways to compute, where there is a device for them, and
plain JAX everywhere else."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import re
from typing import Any

import jax

# Bytes of shared memory that a kernel's program takes at most, those for Hopper
# apart. An A100 has them, an H100, and newer ones of their kind.
SHARED_MEMORY = 160 * 1024
_switched_off = False


def run(
  plain: Callable,
  *given: Any,
  cpu: Callable | None = None,
  cuda: Callable | None = None,
  tpu: Callable | None = None,
) -> Any:
  """What `plain(*given)` is, by a kernel where the program runs on a device
  that has one, and room for it; the gradient is that of `plain` everywhere."""
  kernels = {'cpu': cpu, 'cuda': cuda, 'tpu': tpu}
  if cuda is not None and _has_small_gpu():
    del kernels['cuda']
  kernels = {where: k for where, k in kernels.items() if k is not None}
  if _switched_off or not kernels:
    return plain(*given)

  @jax.custom_vjp
  def anywhere(*given):
    return jax.lax.platform_dependent(*given, **kernels, default=plain)

  anywhere.defvjp(
    lambda *given: jax.vjp(plain, *given), lambda pullback, d: pullback(d)
  )
  return anywhere(*given)


def _has_small_gpu() -> bool:
  """Whether a GPU here could not run the kernels."""
  return any(
    getattr(device, 'shared_memory_per_block_optin', SHARED_MEMORY)
    < SHARED_MEMORY
    for device in jax.local_devices()
  )


def has_hopper() -> bool:
  """Whether all GPUs here are Hopper. Where there is none, a program for GPUs
  is compiled for an H100 or H200 (`plan`): then it is true."""
  return all(capability == (9, 0) for capability in _compute_capabilities())


def has_float8() -> bool:
  """Whether all GPUs here know float8, from Ada and Hopper on; for others the
  compiler of kernels ends the process. Where there is none, see `has_hopper`.
  """
  return all(capability >= (8, 9) for capability in _compute_capabilities())


def _compute_capabilities() -> list[tuple[int, ...]]:
  """Of the GPUs here; () of one that is not NVIDIA's."""
  gpus = [d for d in jax.local_devices() if d.platform == 'gpu']
  texts = [getattr(gpu, 'compute_capability', '') for gpu in gpus]
  return [
    tuple(map(int, text.split('.'))) if re.fullmatch(r'\d+\.\d+', text) else ()
    for text in texts
  ]


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
  """What is traced here has no kernels: to compare with. Traces that JAX keeps
  are forgotten before and after."""
  global _switched_off
  jax.clear_caches()
  _switched_off = True
  try:
    yield
  finally:
    _switched_off = False
    jax.clear_caches()
