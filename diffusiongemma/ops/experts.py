"""The mixture of experts: each row times the matrices of its own expert.

  out[m] = rows[m] @ weights[expert[m]]^T,  weights [E, out, in]

In plain JAX, rows are in the tiled layout of `routing`. If groups have enough
rows on average, the first rows of every group, its window, are one batched
product, and a loop covers the other used tiles. Without windows, nothing is
computed for experts that no row chose. `jax.lax.ragged_dot` is not used because
it is dense on CPU and GPU.
"""

import functools

import jax
import jax.numpy as jnp

from diffusiongemma.ops import activation
from diffusiongemma.ops import dispatch
from diffusiongemma.ops import parallel
from diffusiongemma.ops import routing
from diffusiongemma.ops.routing import Groups
from diffusiongemma.ops.weights import FewBits
from diffusiongemma.ops.weights import LowRank
from diffusiongemma.ops.weights import Weight
from diffusiongemma.ops.weights import as_operand


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
  x_TD: jax.Array,
  weights_EFD: jax.Array | FewBits,
  groups: Groups,
  implementation: dispatch.Implementation = None,
) -> jax.Array:
  """Product of each tile with the matrix of its expert: [T, F].

  Args:
    x_TD: rows in the tiled layout of `groups`.
    weights_EFD: one matrix [F, D] per expert, as Hugging Face stores them; a
      `weights.FewBits` is dequantised tile by tile, and its gradient is zero.
    groups: the layout. Rows of unused tiles are arbitrary; padding within used
      tiles is zero if it is zero in x.
    implementation: see `ops`; for the gradient it is None.
  """
  return _multiply_tiles(
    x_TD, weights_EFD, groups, implementation=implementation
  )


def _matmul_forward(x_TD, weights_EFD, groups, implementation):
  y_TF = grouped_matmul(x_TD, weights_EFD, groups, implementation)
  return y_TF, (x_TD, weights_EFD, groups)


def _matmul_backward(_, saved, d_TF):
  x_TD, weights_EFD, groups = saved
  d_x_TD = _multiply_tiles(d_TF, weights_EFD, groups, transposed=True)
  if isinstance(weights_EFD, FewBits):
    return d_x_TD, None, None
  return d_x_TD, _add_tiles(d_TF, x_TD, weights_EFD, groups), None


grouped_matmul.defvjp(_matmul_forward, _matmul_backward)


def gated_matmul(
  x_MD: jax.Array,
  gate_up_EFD: Weight,
  groups: Groups,
  k: int,
  implementation: dispatch.Implementation = None,
) -> jax.Array:
  """The hidden layer of the experts, tile by tile: GeGLU, [T, F].

  Args:
    x_MD: tokens.
    gate_up_EFD: matrices [2F, D], the gate first; see `grouped_matmul`.
    groups: the layout of M*k rows, the k choices of each token.
    k: number of experts of a token.
    implementation: see `ops`.
  """

  def plain(x_MD, gate_up_EFD, groups):
    x_TD = routing.scatter_to_tiles(x_MD, groups, k)
    # A kernel for only a part of it does not count as one.
    rest = None if implementation == 'kernel' else implementation
    gate_up_TF = grouped_matmul(x_TD, gate_up_EFD, groups, rest)
    return activation.geglu(*jnp.split(gate_up_TF, 2, axis=-1))

  def choose_cuda():
    kernels = _gpu_kernels(x_MD, gate_up_EFD, groups, parts=2)
    return kernels and functools.partial(kernels.gate_tiles, k=k)

  def choose_tpu():
    from diffusiongemma.ops.tpu import matmul as tpu

    def gate_tiles(x_MD, gate_up_EFD, groups):
      x_TD = routing.scatter_to_tiles(x_MD, groups, k)
      return tpu.gate_tiles(x_TD, gate_up_EFD, groups)

    supports = tpu.supports(gate_up_EFD, groups.tile, parts=2)
    return gate_tiles if supports else None

  return dispatch.run(
    *(plain, x_MD, gate_up_EFD, groups),
    implementation=implementation,
    cuda=choose_cuda,
    tpu=choose_tpu,
  )


def _gpu_kernels(x, weights_EFD, groups, parts=1):
  """The module of the fastest kernels that support these operands, or None."""
  from diffusiongemma.ops.gpu import matmul as gpu

  if dispatch.has_hopper():
    from diffusiongemma.ops.gpu import hopper

    if hopper.supports(weights_EFD, groups.tile, x.dtype, parts):
      return hopper
  return gpu if gpu.supports(weights_EFD, groups.tile, parts) else None


# Names of the products in a traced program, for counting FLOPs.
MULTIPLY, ADD = '_multiply_tiles', '_add_tiles'


@functools.partial(jax.jit, static_argnames=('transposed', 'implementation'))
def _multiply_tiles(
  x_TD, weights_EFD, groups, transposed=False, implementation=None
):
  """Each tile times the matrix [F, D] of its expert, transposed: [T, F]. With
  `transposed`, the matrix is not transposed, and F and D are exchanged."""
  one, all_at_once = ('md,fd->mf', 'ewd,efd->ewf')
  if transposed:
    one, all_at_once = ('mf,fd->md', 'ewf,efd->ewd')

  def plain(x_TD, weights_EFD, groups):
    def tile(index, y_TF):
      x_mD = routing.rows(x_TD, index, groups)
      weights_FD = weights_EFD[groups.expert_of_tile[index]]
      y_mF = jnp.einsum(one, x_mD, weights_FD.astype(x_TD.dtype))
      return jax.lax.dynamic_update_slice_in_dim(
        y_TF, y_mF, index * groups.tile, 0
      )

    if isinstance(weights_EFD, FewBits):
      groups = groups.replace(window=0)  # Dequantised at once: too large.
    if groups.window:
      x_EwD = routing.windows(x_TD, groups)
      y_EwF = jnp.einsum(all_at_once, x_EwD, weights_EFD.astype(x_TD.dtype))
      y_TF = routing.from_windows(y_EwF, groups)
    else:
      outputs = weights_EFD.shape[2 if transposed else 1]
      y_TF = jnp.zeros((x_TD.shape[0], outputs), x_TD.dtype)
    return routing.for_each_tile(tile, groups, y_TF)

  def choose_cuda():
    if not transposed:
      kernels = _gpu_kernels(x_TD, weights_EFD, groups)
      return kernels and kernels.multiply_tiles
    if isinstance(weights_EFD, FewBits):
      return None  # The transposed product sums over the axis of the scales.
    from diffusiongemma.ops.gpu import matmul as gpu

    supports = gpu.supports(weights_EFD, groups.tile)
    return (
      functools.partial(gpu.multiply_tiles, transposed=True)
      if supports
      else None
    )

  def choose_tpu():
    from diffusiongemma.ops.tpu import matmul as tpu

    supports = tpu.supports(weights_EFD, groups.tile, transposed=transposed)
    kernel = functools.partial(tpu.multiply_tiles, transposed=transposed)
    return kernel if supports else None

  return dispatch.run(
    *(plain, x_TD, weights_EFD, groups),
    implementation=implementation,
    cuda=choose_cuda,
    tpu=choose_tpu,
  )


@jax.jit
def _add_tiles(d_TF, x_TD, weights_EFD, groups):
  """Gradient of the matrices: sums of products of tiles, [E, F, D]."""

  def plain(d_TF, x_TD, groups):
    multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def tile(index, total_EFD):
      d_mF, x_mD = (
        routing.rows(d_TF, index, groups),
        routing.rows(x_TD, index, groups),
      )
      if groups.window:
        rank_m = routing.rows(groups.rank_T, index, groups)
        d_mF = jnp.where(rank_m[:, None] < groups.window, 0, d_mF)
      product_FD = multiply('mf,md->fd', d_mF, x_mD)
      return total_EFD.at[groups.expert_of_tile[index]].add(product_FD)

    if groups.window:
      d_EwF, x_EwD = (
        routing.windows(d_TF, groups),
        routing.windows(x_TD, groups),
      )
      total_EFD = multiply('ewf,ewd->efd', d_EwF, x_EwD)
    else:
      total_EFD = jnp.zeros(weights_EFD.shape, jnp.float32)
    return routing.for_each_tile(tile, groups, total_EFD)

  def choose_cuda():
    from diffusiongemma.ops.gpu import matmul as gpu

    return gpu.add_tiles if gpu.supports(weights_EFD, groups.tile) else None

  def choose_tpu():
    from diffusiongemma.ops.tpu import matmul as tpu

    return tpu.add_tiles if tpu.supports(weights_EFD, groups.tile) else None

  total_EFD = dispatch.run(
    *(plain, d_TF, x_TD, groups), cuda=choose_cuda, tpu=choose_tpu
  )
  return total_EFD.astype(weights_EFD.dtype)


def mix(
  x_MD: jax.Array,
  weights_Mk: jax.Array,
  experts_Mk: jax.Array,
  gate_up_EFD: Weight,
  down_EDF: Weight,
  num_experts: int,
  implementation: dispatch.Implementation = None,
) -> jax.Array:
  """The mixture of each token, [M, D], over the experts of this device.

  Args:
    x_MD: tokens.
    weights_Mk: weights of their k choices.
    experts_Mk: int32, their choices; E or more is an expert of another device.
    gate_up_EFD: matrices [2F, D] of E experts, the gate first.
    down_EDF: matrices [D, F].
    num_experts: number of experts on all devices.
    implementation: see `ops`.
  """
  E, k = len(down_EDF), experts_Mk.shape[1]
  experts_R = experts_Mk.reshape(-1)
  tile = routing.default_tile(len(experts_R), num_experts, gate_up_EFD)
  window = routing.default_window(len(experts_R), num_experts)
  # CPUs have one implementation of all of it, other devices kernels for each of
  # two products.
  whole: dispatch.Implementation = implementation
  product: dispatch.Implementation = implementation
  if implementation == 'kernel':
    on_cpu = jax.default_backend() == 'cpu'
    whole, product = ('kernel', None) if on_cpu else (None, 'kernel')
  layout: dispatch.Implementation = None
  if implementation == 'plain':
    layout = 'plain'
  groups = routing.make_groups(experts_R, E, tile, window, layout)

  def plain(x_MD, gate_up_EFD, down_EDF, groups):
    """[R, D]: the routed rows after their experts, as separate products."""
    hidden_TF = _gated(x_MD, gate_up_EFD, groups, k, product)
    y_TD = _linear(hidden_TF, down_EDF, groups, product)
    return routing.gather_from_tiles(y_TD, groups)

  def choose_cpu():
    from diffusiongemma.ops.cpu import experts as cpu

    supports = cpu.supports(gate_up_EFD, down_EDF)
    return functools.partial(cpu.apply, k=k) if supports else None

  y_RD = parallel.run(
    *(plain, x_MD, gate_up_EFD, down_EDF, groups),
    implementation=whole,
    cpu=choose_cpu,
  )
  y_MkD = y_RD.reshape(*experts_Mk.shape, -1)
  return jnp.einsum('mkd,mk->md', y_MkD, weights_Mk)


def _linear(
  x_TD: jax.Array,
  w_EFD: Weight,
  groups: Groups,
  implementation: dispatch.Implementation,
) -> jax.Array:
  """Each tile times the matrix of its expert, [T, F]; see `grouped_matmul`."""
  if isinstance(w_EFD, LowRank):
    thin_TR = _linear(x_TD, w_EFD.a, groups, None)
    update_TF = _linear(thin_TR, w_EFD.b, groups, None)
    y_TF = _linear(x_TD, w_EFD.weight, groups, implementation)
    return y_TF + w_EFD.scale * update_TF
  w_EFD = as_operand(w_EFD, x_TD.dtype)
  return grouped_matmul(x_TD, w_EFD, groups, implementation)


def _gated(
  x_MD: jax.Array,
  w_EFD: Weight,
  groups: Groups,
  k: int,
  implementation: dispatch.Implementation,
) -> jax.Array:
  """The hidden layer of the experts, [T, F]; see `gated_matmul`."""
  if isinstance(w_EFD, LowRank):
    x_TD = routing.scatter_to_tiles(x_MD, groups, k)
    gate_up_TF = _linear(x_TD, w_EFD, groups, implementation)
    return activation.geglu(*jnp.split(gate_up_TF, 2, axis=-1))
  w_EFD = as_operand(w_EFD, x_MD.dtype)
  return gated_matmul(x_MD, w_EFD, groups, k, implementation)
