"""Where kernels are in a program, and where not."""

import types

import jax
import jax.numpy as jnp
import pytest

from diffusiongemma.kernels import dispatch
from diffusiongemma.kernels import grouped_matmul_gpu


def has_kernel() -> bool:
  """Whether a function's program for GPUs has it."""
  jax.clear_caches()
  return 'sin' in str(
    jax.make_jaxpr(lambda x: dispatch.run(jnp.cos, x, cuda=jnp.sin))(1.0)
  )


@pytest.mark.parametrize(
  'memory, expected', [(99 * 1024, False), (163 * 1024, True), (None, True)]
)
def test_a_small_gpu_has_no_kernels(monkeypatch, memory, expected):
  """Their blocks would not fit. Other devices say nothing of such memory."""
  device = types.SimpleNamespace()
  if memory:
    device.shared_memory_per_block_optin = memory
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  assert has_kernel() == expected


def test_kernels_can_be_switched_off():
  assert has_kernel()
  with dispatch.switched_off():
    assert not has_kernel()


@pytest.mark.parametrize(
  'capabilities, is_hopper, has_float8',
  [
    ([], True, True),
    (['9.0'], True, True),
    (['8.0'], False, False),
    (['8.9'], False, True),
    (['9.0', '10.0'], False, True),
    (['9.0', '8.6'], False, False),
    (['gfx942'], False, False),
  ],
)
def test_a_gpu_of_another_kind(
  monkeypatch, capabilities, is_hopper, has_float8
):
  gpus = [
    types.SimpleNamespace(platform='gpu', compute_capability=capability)
    for capability in capabilities
  ]
  here = [*jax.devices('cpu'), *gpus]
  monkeypatch.setattr(jax, 'local_devices', lambda: here)
  assert dispatch.has_hopper() is is_hopper
  assert dispatch.has_float8() is has_float8
  for dtype in ('int8', 'int4', 'float8_e4m3fn'):
    suits = grouped_matmul_gpu.suits_one(
      jax.ShapeDtypeStruct((64, 128), 'bfloat16'),
      jax.ShapeDtypeStruct((128, 64), dtype),
      1,
    )
    assert suits is (has_float8 or dtype != 'float8_e4m3fn')
