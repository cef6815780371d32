"""Where kernels are in a program, and where not."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import ops
from diffusiongemma.ops.gpu import hopper
from diffusiongemma.ops.gpu import matmul as matmul_gpu
from diffusiongemma.ops.gpu import vocabulary as vocabulary_gpu
from diffusiongemma.ops.tpu import matmul as matmul_tpu


def traced(**options) -> str:
  """A program with a kernel, the sine, in the place of the cosine."""

  def function(x):
    return ops.dispatch.run(jnp.cos, x, cuda=lambda: jnp.sin, **options)

  return str(jax.make_jaxpr(function)(1.0))


def has_kernel() -> bool:
  """Whether the program for GPUs has it."""
  with ops.dispatch.compiling_for('cuda'):
    return 'sin' in traced()


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
  with ops.dispatch.switched_off():
    assert not has_kernel()


def test_kernels_of_other_devices_are_not_asked_for():
  """Nor is their code imported."""
  assert jax.default_backend() == 'cpu'
  assert 'sin' not in traced()
  script = (
    'import sys, jax, jax.numpy as jnp\n'
    'from diffusiongemma import ops\n'
    'x = jnp.ones((1, 300, 4, 8))\n'
    'mask = jnp.ones((1, 300, 300), bool)\n'
    'ops.attention.attend(x, [(x, x)], mask)\n'
    'kinds = ("experimental.pallas", ".ops.gpu.", ".ops.tpu.")\n'
    'found = [m for m in sys.modules for kind in kinds if kind in m]\n'
    'assert not found, found'
  )
  subprocess.run([sys.executable, '-c', script], check=True)


def test_an_implementation_is_chosen_from_outside():
  with ops.dispatch.compiling_for('cuda'):
    assert 'sin' in traced(implementation='kernel')
    assert 'sin' not in traced(implementation='plain')
  with pytest.raises(ops.dispatch.KernelError, match='No kernel for cpu'):
    traced(implementation='kernel')
  with pytest.raises(ValueError, match="'fast'"):
    traced(implementation='fast')


@pytest.mark.parametrize('implementation', ['plain', 'kernel', None])
def test_experts_are_the_same_by_every_implementation(implementation):
  keys = jax.random.split(jax.random.key(0), 4)
  x_MD = jax.random.normal(keys[0], (16, 8))
  gate_up_EFD = jax.random.normal(keys[1], (4, 12, 8))
  down_EDF = jax.random.normal(keys[2], (4, 8, 6))
  experts_Mk = jax.random.randint(keys[3], (16, 2), 0, 4)
  weights_Mk = jnp.full((16, 2), 0.5)
  operands = (x_MD, weights_Mk, experts_Mk, gate_up_EFD, down_EDF, 4)
  found_MD = ops.experts.mix(*operands, implementation=implementation)
  hidden_MkF = jnp.einsum('md,mkfd->mkf', x_MD, gate_up_EFD[experts_Mk])
  hidden_MkF = ops.activation.geglu(*jnp.split(hidden_MkF, 2, axis=-1))
  wanted_MD = jnp.einsum('mkf,mkdf->md', hidden_MkF, down_EDF[experts_Mk]) / 2
  np.testing.assert_allclose(found_MD, wanted_MD, atol=1e-4)


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
  assert ops.dispatch.has_hopper() is is_hopper
  assert ops.dispatch.has_float8() is has_float8
  for dtype in ('int8', 'int4', 'float8_e4m3fn'):
    supports = matmul_gpu.supports_one(
      jax.ShapeDtypeStruct((64, 128), 'bfloat16'),
      jax.ShapeDtypeStruct((128, 64), dtype),
      1,
    )
    assert supports is (has_float8 or dtype != 'float8_e4m3fn')


@pytest.mark.parametrize('name', ['float8_e5m2', 'float4_e2m1fn', 'int8'])
def test_kernels_take_no_types_that_they_do_not_name(name):
  """A format that none of them knows is multiplied the plain way."""
  is_known = name == 'int8'
  x_TD = jnp.ones((64, 256), jnp.bfloat16)
  scales_1F = jnp.ones((1, 256), jnp.bfloat16)
  values_DF = jnp.ones((256, 256), name)
  w_DF = ops.weights.Quantized(values_DF, scales_1F, -2)
  w_EFD = ops.weights.Quantized(
    values_DF[None], scales_1F[None], -1, scales_transposed=True
  )
  table_VD = ops.weights.Quantized(values_DF, scales_1F.T, -1)
  for supports in (
    matmul_gpu.supports_one(x_TD, values_DF, 1),
    matmul_gpu.supports(w_EFD, 64),
    vocabulary_gpu.supports(x_TD, table_VD, 256, ops.vocabulary.BIN),
    matmul_tpu.supports_one(x_TD, values_DF),
    matmul_tpu.supports(w_EFD, 64),
  ):
    assert supports is is_known
  assert not hopper.supports(w_EFD, 64, jnp.float16)
  for platform in ('cuda', 'tpu'):
    with ops.dispatch.compiling_for(platform):
      text = str(jax.make_jaxpr(ops.linear.apply)(x_TD, w_DF))
    assert ('pallas_call' in text) is is_known
