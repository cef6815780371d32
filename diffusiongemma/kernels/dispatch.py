"""Kernels where there is a GPU for them, and plain JAX everywhere else."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
from typing import Any

import jax

_switched_off = False


def on_gpu(kernel: Callable, plain: Callable, *given: Any) -> Any:
  """`kernel(*given)` where the program runs on a GPU, else `plain(*given)`,
  which is the same; the gradient is that of `plain` in both cases."""
  if _switched_off:
    return plain(*given)

  @jax.custom_vjp
  def anywhere(*given):
    return jax.lax.platform_dependent(*given, cuda=kernel, default=plain)

  anywhere.defvjp(
    lambda *given: jax.vjp(plain, *given), lambda pullback, d: pullback(d)
  )
  return anywhere(*given)


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
