"""Kernels, or other ways to compute, where there is a device for them, and
plain JAX everywhere else."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import re
from typing import Any
from typing import Literal

import jax

from diffusiongemma.errors import Error

# Bytes of shared memory that a kernel's program takes at most, those for Hopper
# apart. An A100 has them, an H100, and newer ones of their kind.
SHARED_MEMORY = 160 * 1024
Implementation = Literal['plain', 'kernel'] | None
_switched_off = False
_target: str | None = None


class KernelError(Error, ValueError):
  """`implementation='kernel'`, and no kernel takes the operands here."""


def run(
  plain: Callable[..., Any],
  *operands: Any,
  implementation: Implementation = None,
  **choices: Callable[[], Callable[..., Any] | None],
) -> Any:
  """What `plain(*operands)` is, by a kernel where the program runs on a device
  that has one, and room for it; the gradient is that of `plain` everywhere.

  Args:
    plain: the definition, in plain JAX.
    *operands: arrays, or trees of them.
    implementation: 'plain' is without kernels, 'kernel' never without.
    **choices: by platform ('cpu', 'cuda', 'tpu') a function that answers with
      the kernel that takes these operands, or None.

  Raises:
    KernelError: `implementation` is 'kernel', and there is none.
  """
  if implementation not in (None, 'plain', 'kernel'):
    raise ValueError(
      f"implementation must be 'plain', 'kernel' or None, it is "
      f'{implementation!r}.'
    )
  kernels = {}
  if implementation != 'plain' and not _switched_off:
    for platform in {'cpu', _platform()} & set(choices):
      kernel = choices[platform]()
      if kernel is not None and not (platform == 'cuda' and _has_small_gpu()):
        kernels[platform] = kernel
  if implementation == 'kernel' and _platform() not in kernels:
    raise KernelError(
      f'No kernel for {_platform()} takes these operands: '
      f'{jax.tree.map(jax.typeof, operands)}. Leave implementation as None.'
    )
  if not kernels:
    return plain(*operands)

  @jax.custom_vjp
  def anywhere(*operands):
    return jax.lax.platform_dependent(*operands, **kernels, default=plain)

  anywhere.defvjp(
    lambda *operands: jax.vjp(plain, *operands), lambda pullback, d: pullback(d)
  )
  return anywhere(*operands)


def _platform() -> str:
  """Where programs that are traced here run, as `platform_dependent` names it;
  besides, any may run on a CPU."""
  backend = jax.default_backend()
  return _target or {'gpu': 'cuda'}.get(backend, backend)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """What is traced here is for 'cpu', 'cuda' or 'tpu', and not for the devices
  of this process. Traces that JAX keeps are forgotten before and after, if that
  is another platform."""
  global _target
  before, is_other = _target, platform != _platform()
  if is_other:
    jax.clear_caches()
  _target = platform
  try:
    yield
  finally:
    _target = before
    if is_other:
      jax.clear_caches()


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
