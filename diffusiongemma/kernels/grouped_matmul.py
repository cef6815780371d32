"""Grouped matrix product: each row times the matrix of its own expert.

  out[m] = rows[m] @ weights[expert[m]]^T,  weights [E, out, in]

The portable twin: rows are laid out group by group, every group padded to
whole tiles of `tile` rows, so that a tile meets one matrix; M rows of E
groups fill at most ceil(M / tile) + E tiles, whatever the routing is. No row
is dropped. Where groups have enough rows on average, the first ones of every
group, its window, are one batched product; a loop goes over the tiles that are
used and in no window. Without windows nothing is computed for experts that no
row chose. `jax.lax.ragged_dot` is dense on CPU and GPU, which is why it is not
used.
"""

from collections.abc import Callable
import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp

from diffusiongemma import powers
from diffusiongemma.kernels import activation
from diffusiongemma.kernels import dispatch
from diffusiongemma.kernels import grouped_matmul_gpu as gpu
from diffusiongemma.kernels import grouped_matmul_hopper as hopper
from diffusiongemma.kernels import grouped_matmul_tpu as tpu
from diffusiongemma.kernels import quantized
from diffusiongemma.kernels import routing_gpu


@flax.struct.dataclass
class Groups:
  """Where the R = M*k (token, choice) rows lie in the tiled buffer of T rows.

  Attributes:
    slot_R: int32, row of the tiled buffer that holds each routed row; T where
      it has none.
    row_T: int32, routed row held by each buffer row; R where it is padding.
    expert_of_tile: int32 [T / tile], the expert of each tile.
    end_E: int32, how many tiles belong to each expert or one before it.
    tile: rows in a tile.
    window: how many rows, the first ones of each expert, are multiplied at
      once where plain JAX multiplies.
  """

  slot_R: jax.Array
  row_T: jax.Array
  expert_of_tile: jax.Array
  end_E: jax.Array
  tile: int = flax.struct.field(pytree_node=False)
  window: int = flax.struct.field(pytree_node=False)

  @property
  def begin_E(self) -> jax.Array:
    """int32, the first tile of each expert."""
    return jnp.pad(self.end_E[:-1], (1, 0))

  @property
  def rank_T(self) -> jax.Array:
    """int32, the index of each buffer row among those of its expert."""
    begin_t = self.begin_E[self.expert_of_tile] * self.tile
    row_T = jnp.arange(len(self.row_T), dtype=jnp.int32)
    return row_T - jnp.repeat(begin_t, self.tile)

  @property
  def used(self) -> jax.Array:
    """int32, how many tiles, the first ones, have rows."""
    return self.end_E[-1]


def default_tile(num_rows: int, num_experts: int, weights: Any = None) -> int:
  """A power of two up to the mean group, so that padding stays below the work
  and a tile is still a product worth starting: 16 to 128. No fewer than 32 with
  weights of few bits, which each tile makes anew."""
  group = max(1, num_rows // num_experts)
  smallest = 32 if isinstance(weights, quantized.Quantized) else 16
  return min(128, max(smallest, powers.largest_power_of_two(group)))


def default_window(num_rows: int, num_experts: int) -> int:
  """Rows that few groups exceed if the routing is even: the mean and 1.5
  standard deviations, in multiples of 8. A tile for each that does costs a CPU
  less than more rows of all. None for groups of fewer than 8, many of which may
  be empty: there a loop over those that are not is faster."""
  group = num_rows // num_experts
  if group < 8:
    return 0
  return -(-int(group + 1.5 * group**0.5) // 8) * 8


def make_groups(
  expert_R: jax.Array, num_experts: int, tile: int, window: int = 0
) -> Groups:
  """Lays R routed rows out by expert (a counting sort; stable).

  Args:
    expert_R: int32, the expert of each routed row; E or more is none of these
      experts, and the row is left out.
    num_experts: E.
    tile: rows in a tile.
    window: rows of each expert that may be multiplied at once.
  """
  lay_out = functools.partial(_lay_out, num_experts=num_experts, tile=tile)
  kernel = None
  if routing_gpu.suits_layout(len(expert_R), num_experts):
    kernel = functools.partial(
      routing_gpu.lay_out, num_experts=num_experts, tile=tile
    )
  return Groups(*dispatch.run(lay_out, expert_R, cuda=kernel), tile, window)


def _lay_out(expert_R, num_experts, tile):
  """(slot_R, row_T, expert_of_tile, end_E) of `Groups`."""
  num_rows = expert_R.shape[0]
  num_tiles = -(-num_rows // tile) + num_experts
  one_hot_RE = jax.nn.one_hot(expert_R, num_experts, dtype=jnp.int32)
  rank_RE = jnp.cumsum(one_hot_RE, axis=0) - one_hot_RE
  rank_R = jnp.sum(rank_RE * one_hot_RE, axis=1)
  tiles_E = -(-jnp.sum(one_hot_RE, axis=0) // tile)
  end_E = jnp.cumsum(tiles_E)
  start_R = jnp.sum((end_E - tiles_E)[None, :] * one_hot_RE, axis=1) * tile
  # The rows of no expert go nowhere.
  here_R = expert_R < num_experts
  slot_R = jnp.where(here_R, start_R + rank_R, num_tiles * tile)
  row_T = jnp.full((num_tiles * tile,), num_rows, jnp.int32)
  row_T = row_T.at[slot_R].set(
    jnp.arange(num_rows, dtype=jnp.int32), mode='drop'
  )
  # Tiles past the last group are padding; they may meet any expert.
  tile_index = jnp.arange(num_tiles)
  expert_of_tile = jnp.sum(tile_index[:, None] >= end_E[None, :], axis=1)
  expert_of_tile = jnp.minimum(expert_of_tile, num_experts - 1)
  return slot_R, row_T, expert_of_tile.astype(jnp.int32), end_E


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scatter_to_tiles(x_MD: jax.Array, groups: Groups, k: int) -> jax.Array:
  """Copies each token's row to the k tile rows of its choices: [T, D].

  Padding rows are zero. The transpose is `gather_from_tiles` summed over k;
  naming it keeps the gradient a gather, where XLA would emit a scatter-add.
  """
  x_padded = jnp.concatenate([x_MD, jnp.zeros_like(x_MD[:1])])
  return jnp.take(x_padded, groups.row_T // k, axis=0, mode='clip')


def _scatter_forward(x_MD, groups, k):
  return scatter_to_tiles(x_MD, groups, k), groups


def _scatter_backward(k, groups, d_TD):
  d_RD = gather_from_tiles(d_TD, groups)
  return d_RD.reshape(-1, k, d_TD.shape[-1]).sum(axis=1), None


scatter_to_tiles.defvjp(_scatter_forward, _scatter_backward)


@jax.custom_vjp
def gather_from_tiles(y_TD: jax.Array, groups: Groups) -> jax.Array:
  """The routed rows back in their order, [R, D]; zero where left out."""
  y_RD = jnp.take(y_TD, groups.slot_R, axis=0, mode='clip')
  return jnp.where(groups.slot_R[:, None] < len(y_TD), y_RD, 0)


def _gather_forward(y_TD, groups):
  return gather_from_tiles(y_TD, groups), groups


def _gather_backward(groups, d_RD):
  d_padded = jnp.concatenate([d_RD, jnp.zeros_like(d_RD[:1])])
  return jnp.take(d_padded, groups.row_T, axis=0, mode='clip'), None


gather_from_tiles.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def grouped_matmul(
  x_TD: jax.Array,
  weights_EFD: jax.Array | quantized.Quantized,
  groups: Groups,
) -> jax.Array:
  """Tile by tile product with the matrix of the tile's expert: [T, F].

  Args:
    x_TD: rows in the tiled layout of `groups`.
    weights_EFD: one matrix [F, D] per expert, as Hugging Face stores them; of
      a `quantized.Quantized` each tile's matrix is made when it is met, and
      its gradient is zero.
    groups: the layout. Rows of tiles that are not used may hold anything;
      padding within used ones is zero if it is zero in x.
  """
  return _multiply_tiles(x_TD, weights_EFD, groups)


def _matmul_forward(x_TD, weights_EFD, groups):
  return grouped_matmul(x_TD, weights_EFD, groups), (x_TD, weights_EFD, groups)


def _matmul_backward(saved, d_TF):
  x_TD, weights_EFD, groups = saved
  d_x_TD = _multiply_tiles(d_TF, weights_EFD, groups, transposed=True)
  if isinstance(weights_EFD, quantized.Quantized):
    return d_x_TD, None, None
  return d_x_TD, _add_tiles(d_TF, x_TD, weights_EFD, groups), None


grouped_matmul.defvjp(_matmul_forward, _matmul_backward)


def gated_matmul(
  x_MD: jax.Array,
  gate_up_EFD: jax.Array | quantized.Quantized,
  groups: Groups,
  k: int,
) -> jax.Array:
  """The hidden layer of the experts, tile by tile: GeGLU, [T, F].

  Args:
    x_MD: tokens.
    gate_up_EFD: matrices [2F, D], the gate first; see `grouped_matmul`.
    groups: the layout of M*k rows, the k choices of each token.
    k: how many experts a token has.
  """

  def on_tpu(x_MD, gate_up_EFD, groups):
    x_TD = scatter_to_tiles(x_MD, groups, k)
    return tpu.gate_tiles(x_TD, gate_up_EFD, groups)

  kernels = _gpu_kernels(x_MD, gate_up_EFD, groups, parts=2)
  return dispatch.run(
    functools.partial(_gate_tiles, k=k),
    *(x_MD, gate_up_EFD, groups),
    cuda=kernels and functools.partial(kernels.gate_tiles, k=k),
    tpu=on_tpu if tpu.suits(gate_up_EFD, groups.tile, parts=2) else None,
  )


def _gpu_kernels(x, weights_EFD, groups, parts=1):
  """The module with the fastest kernels that suit, None without."""
  if dispatch.has_hopper() and hopper.suits(
    weights_EFD, groups.tile, x.dtype, parts
  ):
    return hopper
  return gpu if gpu.suits(weights_EFD, groups.tile, parts) else None


def _gate_tiles(x_MD, gate_up_EFD, groups, k):
  x_TD = scatter_to_tiles(x_MD, groups, k)
  gate_up_TF = grouped_matmul(x_TD, gate_up_EFD, groups)
  return activation.geglu(*jnp.split(gate_up_TF, 2, axis=-1))


# How the products are called in a traced program, for those who count FLOPs.
MULTIPLY, ADD = '_multiply_tiles', '_add_tiles'


@functools.partial(jax.jit, static_argnames='transposed')
def _multiply_tiles(x_TD, weights_EFD, groups, transposed=False):
  """Each tile times the matrix [F, D] of its expert, transposed: [T, F]; with
  `transposed` it is taken as it is, and F and D are each other."""
  one, all_at_once = ('md,fd->mf', 'ewd,efd->ewf')
  if transposed:
    one, all_at_once = ('mf,fd->md', 'ewf,efd->ewd')

  def plain(x_TD, weights_EFD, groups):
    def tile(index, y_TF):
      x_mD = rows(x_TD, index, groups)
      weights_FD = weights_EFD[groups.expert_of_tile[index]]
      y_mF = jnp.einsum(one, x_mD, weights_FD.astype(x_TD.dtype))
      return jax.lax.dynamic_update_slice_in_dim(
        y_TF, y_mF, index * groups.tile, 0
      )

    if isinstance(weights_EFD, quantized.Quantized):
      groups = groups.replace(window=0)  # Whole, they would be too large.
    if groups.window:
      x_EwD = _windows(x_TD, groups)
      y_EwF = jnp.einsum(all_at_once, x_EwD, weights_EFD.astype(x_TD.dtype))
      y_TF = _from_windows(y_EwF, groups)
    else:
      outputs = weights_EFD.shape[2 if transposed else 1]
      y_TF = jnp.zeros((x_TD.shape[0], outputs), x_TD.dtype)
    return for_each_tile(tile, groups, y_TF)

  if not transposed:
    kernels = _gpu_kernels(x_TD, weights_EFD, groups)
    on_gpu = kernels and kernels.multiply_tiles
  elif isinstance(weights_EFD, quantized.Quantized):
    on_gpu = None  # Scales lie along what is summed over the other way round.
  elif gpu.suits(weights_EFD, groups.tile):
    on_gpu = functools.partial(gpu.multiply_tiles, transposed=True)
  else:
    on_gpu = None
  on_tpu = functools.partial(tpu.multiply_tiles, transposed=transposed)
  suits_tpu = tpu.suits(weights_EFD, groups.tile, transposed=transposed)
  return dispatch.run(
    *(plain, x_TD, weights_EFD, groups),
    cuda=on_gpu,
    tpu=on_tpu if suits_tpu else None,
  )


@jax.jit
def _add_tiles(d_TF, x_TD, weights_EFD, groups):
  """The gradient of the matrices: sums of products of tiles, [E, F, D]."""

  def plain(d_TF, x_TD, groups):
    multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def tile(index, total_EFD):
      d_mF, x_mD = rows(d_TF, index, groups), rows(x_TD, index, groups)
      if groups.window:
        rank_m = rows(groups.rank_T, index, groups)
        d_mF = jnp.where(rank_m[:, None] < groups.window, 0, d_mF)
      product_FD = multiply('mf,md->fd', d_mF, x_mD)
      return total_EFD.at[groups.expert_of_tile[index]].add(product_FD)

    if groups.window:
      d_EwF, x_EwD = _windows(d_TF, groups), _windows(x_TD, groups)
      total_EFD = multiply('ewf,ewd->efd', d_EwF, x_EwD)
    else:
      total_EFD = jnp.zeros(weights_EFD.shape, jnp.float32)
    return for_each_tile(tile, groups, total_EFD)

  total_EFD = dispatch.run(
    *(plain, d_TF, x_TD, groups),
    cuda=gpu.add_tiles if gpu.suits(weights_EFD, groups.tile) else None,
    tpu=tpu.add_tiles if tpu.suits(weights_EFD, groups.tile) else None,
  )
  return total_EFD.astype(weights_EFD.dtype)


def rows(x_TD: jax.Array, index: jax.Array, groups: Groups) -> jax.Array:
  """The rows of one tile."""
  return jax.lax.dynamic_slice_in_dim(
    x_TD, index * groups.tile, groups.tile, axis=0
  )


def _windows(x_TD: jax.Array, groups: Groups) -> jax.Array:
  """The rows of each expert's window, [E, w, D]; zero where its tiles end."""
  slot_Ew = window_slots(groups)
  x_EwD = jnp.take(x_TD, slot_Ew, axis=0, mode='clip')
  is_own_Ew = slot_Ew < groups.end_E[:, None] * groups.tile
  return jnp.where(is_own_Ew[..., None], x_EwD, 0)


def window_slots(groups: Groups) -> jax.Array:
  """Where in the buffer the rows of each expert's window are, int32 [E, w].
  Those after its own tiles are rows of others, or past the end."""
  begin_E = groups.begin_E * groups.tile
  return begin_E[:, None] + jnp.arange(groups.window)[None, :]


def _from_windows(y_EwF: jax.Array, groups: Groups) -> jax.Array:
  """The rows of windows where they lie in the layout, [T, F]; others are
  zero."""
  first_T = jnp.repeat(groups.expert_of_tile, groups.tile) * groups.window
  rank_T = groups.rank_T
  y_WF = y_EwF.reshape(-1, y_EwF.shape[-1])
  y_TF = jnp.take(y_WF, first_T + rank_T, axis=0, mode='clip')
  return jnp.where(rank_T[:, None] < groups.window, y_TF, 0)


def for_each_tile(body: Callable, groups: Groups, initial: jax.Array):
  """`fori_loop` over the tiles that have rows which are in no window."""
  if not groups.window:
    return jax.lax.fori_loop(0, groups.used, body, initial)
  is_left_T = (groups.row_T < len(groups.slot_R)) & (
    groups.rank_T >= groups.window
  )
  is_left_t = jnp.any(is_left_T.reshape(-1, groups.tile), axis=1)
  (left_t,) = jnp.nonzero(is_left_t, size=len(is_left_t))
  return jax.lax.fori_loop(
    0, jnp.sum(is_left_t), lambda i, carry: body(left_t[i], carry), initial
  )
