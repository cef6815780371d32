"""The kernels for Hopper GPUs, interpreted, against the loops they stand for.

What turns int4 into bfloat16 runs on such a GPU alone, where
`experiments/benchmarks/kernels.py` compares; here it is done in plain JAX, in
the same order.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import ops
from diffusiongemma.ops.gpu import hopper

E, D, F, M, TILE = 3, 256, 256, 40, 32
interpreted = pytest.mark.skipif(
  jax.__version_info__ < (0, 12),
  reason='JAX interprets such kernels from 0.12 on: use Python 3.12',
)


def make(outputs, inputs, kind, group_size=None):
  shape = (E, outputs, inputs)
  w = jax.random.normal(jax.random.key(3), shape, jnp.float32) * D**-0.5
  return ops.weights.quantize(w, kind, -1, group_size, scales_transposed=True)


def lay_out(k):
  """Two experts, one of which has more rows than a tile."""
  expert_R = jnp.where(jnp.arange(M * k) < 37, 2, 0)
  groups = ops.routing.make_groups(expert_R, E, TILE)
  assert groups.used == 2 + -(-(M * k - 37) // TILE)
  return groups, np.asarray(groups.row_T) < M * k


def close(found, expected):
  np.testing.assert_allclose(
    found.astype(jnp.float32), expected, rtol=2.0**-8, atol=2e-3
  )


@interpreted
@pytest.mark.parametrize('inputs', [128, 640])  # Less than the room, and more.
@pytest.mark.parametrize('kind, group_size', [('int8', None), ('int4', 64)])
def test_products_are_those_of_the_loop(kind, group_size, inputs):
  groups, here = lay_out(1)
  w_EFD = make(F, inputs, kind, group_size)
  x_MD = jax.random.normal(jax.random.key(1), (M, inputs)).astype(jnp.bfloat16)
  x_TD = ops.routing.scatter_to_tiles(x_MD, groups, 1)
  assert hopper.supports(w_EFD, TILE, x_TD.dtype)
  found = hopper.multiply_tiles(x_TD, w_EFD, groups, interpret=True)
  exact = ops.experts.grouped_matmul(x_TD.astype(jnp.float32), w_EFD, groups)
  close(found[here], exact[here])


@interpreted
@pytest.mark.parametrize(
  'kind, group_size, D',
  [
    ('int8', None, 768),
    ('int8', 64, D),
    ('int4', 128, 1280),
    ('int4', None, 384),
  ],
)
def test_hidden_layer_of_the_experts(kind, group_size, D):
  k = 2
  groups, here = lay_out(k)
  w_EFD = make(2 * 64, D, kind, group_size)
  x_MD = jax.random.normal(jax.random.key(1), (M, D)).astype(jnp.bfloat16)
  assert hopper.supports(w_EFD, TILE, x_MD.dtype, parts=2)
  found = hopper.gate_tiles(x_MD, w_EFD, groups, k, interpret=True)
  exact = ops.experts.gated_matmul(x_MD.astype(jnp.float32), w_EFD, groups, k)
  assert found.shape == exact.shape
  close(found[here], exact[here])


@interpreted
def test_no_rows():
  groups = ops.routing.make_groups(jnp.full((M,), E), E, TILE)
  x_TD = jnp.ones((len(groups.row_T), 128), jnp.bfloat16)
  found = hopper.multiply_tiles(
    x_TD, make(F, 128, 'int8'), groups, interpret=True
  )
  assert found.shape == (len(x_TD), F)


def bursts(jaxpr):
  """What a worker does with products and barriers, in order, a list for each
  loop and one for what is left: ('wgmma_wait', how many may be under way)."""
  here = []

  def visit(jaxpr):
    for eqn in jaxpr.eqns:
      name = eqn.primitive.name
      if name in ('wgmma_ref', 'wgmma_wait', 'barrier_wait', 'barrier_arrive'):
        others = eqn.params.get('n')  # From JAX 0.12 on, before an operand.
        if others is None and name == 'wgmma_wait':
          others = eqn.invars[0].val
        here.append((name, others))
      elif name == 'run_scoped':  # An accumulator's.
        visit(eqn.params['jaxpr'])
      elif name == 'scan':
        yielded.extend(bursts(eqn.params['jaxpr'].jaxpr))
      else:
        for inner in jax.tree.leaves(
          list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'jaxpr')
        ):
          inner = getattr(inner, 'jaxpr', inner)
          if hasattr(inner, 'eqns'):
            yielded.extend(bursts(inner))

  yielded = []
  visit(jaxpr)
  with_products = any(name == 'wgmma_ref' for name, _ in here)
  return yielded + ([here] if with_products else [])


@pytest.mark.parametrize(
  'kind, group_size, is_gated, inputs, number',
  [
    ('int8', None, False, 640, [4, 2]),
    ('int4', 64, False, 640, [4, 2]),
    ('int8', None, True, 768, [4, 2]),
    ('int4', None, True, 384, [2, 1]),
    ('int4', 64, True, 1280, [2]),
  ],
)
def test_a_block_is_given_back_after_its_product(
  kind, group_size, is_gated, inputs, number
):
  """And multiplied after it was loaded, while the one before still may be."""
  groups, _ = lay_out(1)
  w_EFD = make(F, inputs, kind, group_size)
  x_TD = jnp.ones((len(groups.row_T), inputs), jnp.bfloat16)
  jaxpr = jax.make_jaxpr(
    lambda x, w: hopper._call(x, w, groups, is_gated, False, 'kernel')
  )(x_TD, w_EFD)
  depth = hopper._plan(w_EFD.values.dtype, inputs, is_gated).depth
  found = bursts(jaxpr.jaxpr)
  started_of_each = []
  for burst in found:
    started = ended = loaded = given_back = 0
    under_way = []
    for name, value in burst:
      if name == 'barrier_wait':
        loaded += depth
      elif name == 'wgmma_ref':
        started += 1
      elif name == 'wgmma_wait':
        ended = max(ended, started - int(value))
        under_way.append(started - ended)
      else:
        given_back += depth
      assert given_back <= ended <= started <= loaded
    assert given_back == ended == started == loaded
    assert under_way == [1] * (started - 1) + [0]
    started_of_each.append(started)
  assert started_of_each == number


def test_order_of_int4():
  """Each register, eight neighbours, gives four pairs: of its first and its
  fifth, its second and its sixth, ... A lane has the pairs of the same number
  in four blocks of eight inputs."""
  lanes = jnp.arange(32).reshape(4, 8)
  expected = [
    lanes[lane, pair + 4 * half]
    for pair in range(4)
    for lane in range(4)
    for half in range(2)
  ]
  found = hopper.in_order_of_int4(jnp.arange(64))
  np.testing.assert_array_equal(found[:32], jnp.stack(expected))
  np.testing.assert_array_equal(found[32:], found[:32] + 32)


def test_what_does_not_suit():
  bfloat16 = jnp.dtype('bfloat16')
  fits = make(F, D, 'int4', 64)
  assert hopper.supports(fits, TILE, bfloat16, parts=2)
  assert not hopper.supports(fits, TILE, jnp.dtype('float32'), parts=2)
  assert not hopper.supports(fits, 16, bfloat16, parts=2)
  assert not hopper.supports(make(F, D, 'int4', 32), TILE, bfloat16, parts=2)
  assert not hopper.supports(make(F, D, 'fp8'), TILE, bfloat16, parts=2)
  assert not hopper.supports(jnp.zeros((E, F, D)), TILE, bfloat16, parts=2)
  assert not hopper.supports(make(96, D, 'int4', 64), TILE, bfloat16, parts=2)
  assert not hopper.supports(make(128, D, 'int4', 64), TILE, bfloat16)
