"""The benchmark of kernels: every case is run and counted, without a GPU.

Speed needs one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import micro_config
import pytest

from diffusiongemma import ops
from diffusiongemma.tools import plan
from experiments.benchmarks import kernels

CASES = (
  'norms',
  'choice of experts',
  'layout of their rows',
  'experts, gate',
  'experts, down',
  'shared MLP, gate',
  'shared MLP, down',
  'local heads',
  'local heads, float32',
  'local attention, context 32',
  'global heads',
  'global heads, float32',
  'global attention, context 64',
  'vocabulary',
)


@pytest.fixture(scope='module')
def cases():
  """Of a small network for which all kernels suit."""
  model = dataclasses.replace(
    micro_config.get_config().model,
    embed_dim=64,
    head_dim=32,
    global_head_dim=64,
    mlp_dim=64,
    num_experts=16,
    experts_per_token=2,
    expert_dim=64,
    vocab_size=128,
    sliding_window=32,
  )
  return list(kernels.make_cases(model, 64, (64,)))


def test_every_kernel_has_a_case(cases):
  """Without a GPU there is but one way to run it, and it is in the program for
  a GPU."""
  assert tuple(case.name for case in cases) == CASES
  for case in cases:
    with ops.dispatch.compiling_for('cuda'):
      text = str(jax.make_jaxpr(case.function)(*case.arguments))
    assert 'pallas_call' in text, case.name
    with ops.dispatch.compiling_for('cuda'), ops.dispatch.switched_off():
      text = str(jax.make_jaxpr(case.function)(*case.arguments))
    assert 'pallas_call' not in text, case.name


def test_a_case_is_measured_and_compared(cases, monkeypatch):
  monkeypatch.setattr(kernels, 'RUNS', 2)
  monkeypatch.setattr(kernels, 'MEDIAN_OF', 1)
  case = dict(zip(CASES, cases, strict=True))['shared MLP, down']
  x_BLF, w = case.arguments
  numbers = kernels.compare(case, plan.Chip(1e9, 1e9, 1e9, 1e9))
  assert numbers['flops'] == 2 * 64 * 64 * 64
  assert numbers['bytes'] == (
    x_BLF.nbytes + w.values.nbytes + w.scales.nbytes + 64 * 64 * 4
  )
  assert numbers['floor_seconds'] == numbers['flops'] / 1e9
  assert numbers['differs'] == 0.0
  one_off = (jnp.ones(3), jnp.array([1.0, 4.5, -2.0]))
  assert kernels.difference(one_off, (jnp.ones(3), jnp.array([1, 4, -2]))) == (
    pytest.approx(0.125)
  )
