"""Chooses a kernel, or another implementation, by platform; else plain JAX."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import functools
import re
from typing import Any
from typing import Literal
from typing import TypeVar

import jax

from diffusiongemma.errors import Error

# Most bytes of shared memory of a program of a kernel, except those for Hopper.
# A100, H100 and newer data-centre GPUs have as many.
SHARED_MEMORY = 160 * 1024
Implementation = Literal['plain', 'kernel'] | None
T = TypeVar('T')

_switched_off = False
_target: str | None = None


class KernelError(Error, ValueError):
  """`implementation='kernel'`, but no kernel supports the operands here."""


def run(
  plain: Callable[..., Any],
  *operands: Any,
  implementation: Implementation = None,
  **choices: Callable[[], Callable[..., Any] | None],
) -> Any:
  """Computes `plain(*operands)`, with a kernel if the device of the program has
  one that supports the operands; the gradient is always that of `plain`.

  Args:
    plain: the definition, in plain JAX.
    *operands: arrays, or trees of them.
    implementation: 'plain' never uses a kernel, 'kernel' always does.
    **choices: by platform ('cpu', 'cuda', 'tpu'), a function that returns the
      kernel that supports these operands, or None.

  Raises:
    KernelError: `implementation` is 'kernel', and there is no kernel.
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


def in_32_bits(kernel: Callable[..., T]) -> Callable[..., T]:
  """The kernel as it is traced where JAX has no 64-bit types: kernels count in
  int32, also with JAX_ENABLE_X64."""

  @functools.wraps(kernel)
  def traced(*operands, **options):
    with jax.enable_x64(False):
      return kernel(*operands, **options)

  return traced


def _platform() -> str:
  """Platform of programs that are traced now, as `platform_dependent` names it;
  any program may also run on a CPU."""
  backend = jax.default_backend()
  return _target or {'gpu': 'cuda'}.get(backend, backend)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """Traces in the block are for 'cpu', 'cuda' or 'tpu' instead of the devices
  of this process. If that is another platform, JAX's caches of traces are
  cleared before and after."""
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
  """Whether a GPU here has too little shared memory for the kernels."""
  return any(
    getattr(device, 'shared_memory_per_block_optin', SHARED_MEMORY)
    < SHARED_MEMORY
    for device in jax.local_devices()
  )


def has_hopper() -> bool:
  """Whether all GPUs here are Hopper; true without GPUs, where programs for
  GPUs are compiled for an H100 or H200 (`plan`)."""
  return all(capability == (9, 0) for capability in _compute_capabilities())


def has_float8() -> bool:
  """Whether all GPUs here support float8 (Ada, Hopper and newer); for others
  the compiler of kernels kills the process. Without GPUs, see `has_hopper`."""
  return all(capability >= (8, 9) for capability in _compute_capabilities())


def _compute_capabilities() -> list[tuple[int, ...]]:
  """Compute capability of each GPU here; () for one that is not NVIDIA's."""
  gpus = [d for d in jax.local_devices() if d.platform == 'gpu']
  texts = [getattr(gpu, 'compute_capability', '') for gpu in gpus]
  return [
    tuple(map(int, text.split('.'))) if re.fullmatch(r'\d+\.\d+', text) else ()
    for text in texts
  ]


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
  """Traces in the block have no kernels, for comparisons. JAX's caches of
  traces are cleared before and after."""
  global _switched_off
  jax.clear_caches()
  _switched_off = True
  try:
    yield
  finally:
    _switched_off = False
    jax.clear_caches()
