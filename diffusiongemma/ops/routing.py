"""Routes tokens to experts, and lays out the routed rows in tiles by expert.

  w = top_k(r) / sum(top_k(r)) * scale,  r = softmax(logits)        `choose`

Routed rows are laid out group by group, every group padded to whole tiles of
`tile` rows, so that a tile needs one matrix; M rows of E groups fill at most
ceil(M / tile) + E tiles, whatever the routing. No row is dropped.
"""

from collections.abc import Callable
import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp

from diffusiongemma import powers
from diffusiongemma.ops import dispatch
from diffusiongemma.ops import parallel
from diffusiongemma.ops.weights import FewBits
from diffusiongemma.ops.weights import Weight


def choose(
  logits_BLE: jax.Array,
  scale_E: jax.Array,
  k: int,
  implementation: dispatch.Implementation = None,
) -> tuple[jax.Array, jax.Array]:
  """(weights, experts) [B, L, k] of the k largest logits, ties by index;
  weights are their probabilities, normalised to sum 1, times `scale_E`."""
  B, L, E = logits_BLE.shape
  logits_TE = logits_BLE.reshape(-1, E)

  def plain(logits_TE, scale_E):
    p_TE = jax.nn.softmax(logits_TE, axis=-1)
    weights_Tk, experts_Tk = jax.lax.top_k(p_TE, k)
    weights_Tk = weights_Tk / jnp.sum(weights_Tk, axis=-1, keepdims=True)
    return weights_Tk * scale_E.astype(jnp.float32)[experts_Tk], experts_Tk

  def choose_cuda():
    from diffusiongemma.ops.gpu import routing as gpu

    return (
      functools.partial(gpu.choose, k=k) if gpu.supports(logits_TE) else None
    )

  chosen = parallel.run(
    *(plain, logits_TE, scale_E),
    implementation=implementation,
    cuda=choose_cuda,
  )
  return tuple(x_Tk.reshape(B, L, k) for x_Tk in chosen)


class Groups(flax.struct.PyTreeNode):
  """The layout of R = M*k (token, choice) rows in a tiled buffer of T rows.

  Attributes:
    slot_R: int32, buffer row of each routed row; T if it has none.
    row_T: int32, routed row in each buffer row; R for padding.
    expert_of_tile: int32 [T / tile], the expert of each tile.
    end_E: int32, end of each expert's tiles (a cumulative sum).
    tile: rows in a tile.
    window: number of first rows of each expert that plain JAX multiplies as one
      batched product.
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
    """int32, number of used tiles, which come first."""
    return self.end_E[-1]


def default_tile(
  num_rows: int, num_experts: int, w: Weight | None = None
) -> int:
  """Rows of a tile: a power of two up to the mean group, from 16 to 128, so
  that there is less padding than work, and tiles are not too small. At least 32
  with quantised weights, which are dequantised for each tile."""
  group = max(1, num_rows // num_experts)
  smallest = 32 if isinstance(w, FewBits) else 16
  return min(128, max(smallest, powers.largest_power_of_two(group)))


def default_window(num_rows: int, num_experts: int) -> int:
  """Rows of a window: the mean plus 1.5 standard deviations of evenly routed
  groups, in multiples of 8. An extra tile for the few larger groups costs a CPU
  less than more rows for all. 0 for groups of fewer than 8, many of which may
  be empty: there a loop over the other ones is faster."""
  group = num_rows // num_experts
  if group < 8:
    return 0
  return -(-int(group + 1.5 * group**0.5) // 8) * 8


def make_groups(
  expert_R: jax.Array,
  num_experts: int,
  tile: int,
  window: int = 0,
  implementation: dispatch.Implementation = None,
) -> Groups:
  """Lays out R routed rows by expert (a stable counting sort).

  Args:
    expert_R: int32, the expert of each routed row; rows with E or more are left
      out.
    num_experts: E.
    tile: rows in a tile.
    window: rows of each expert that may be multiplied at once.
    implementation: see `ops`.
  """
  sizes = {'num_experts': num_experts, 'tile': tile}

  def choose_cuda():
    from diffusiongemma.ops.gpu import routing as gpu

    if not gpu.supports_layout(len(expert_R), num_experts):
      return None
    return functools.partial(gpu.lay_out, **sizes)

  slot_R, row_T, expert_of_tile, end_E = dispatch.run(
    *(functools.partial(_lay_out, **sizes), expert_R),
    implementation=implementation,
    cuda=choose_cuda,
  )
  return Groups(slot_R, row_T, expert_of_tile, end_E, tile, window)


def _lay_out(expert_R, num_experts, tile):
  """(slot_R, row_T, expert_of_tile, end_E) of `Groups`."""
  num_rows = expert_R.shape[0]
  num_tiles = -(-num_rows // tile) + num_experts
  # Sums of int32 are int64 with JAX_ENABLE_X64.
  add = functools.partial(jnp.sum, dtype=jnp.int32)
  add_up = functools.partial(jnp.cumsum, dtype=jnp.int32)
  one_hot_RE = jax.nn.one_hot(expert_R, num_experts, dtype=jnp.int32)
  rank_RE = add_up(one_hot_RE, axis=0) - one_hot_RE
  rank_R = add(rank_RE * one_hot_RE, axis=1)
  tiles_E = -(-add(one_hot_RE, axis=0) // tile)
  end_E = add_up(tiles_E)
  start_R = add((end_E - tiles_E)[None, :] * one_hot_RE, axis=1) * tile
  # Rows of experts elsewhere get no slot.
  here_R = expert_R < num_experts
  slot_R = jnp.where(here_R, start_R + rank_R, num_tiles * tile)
  row_T = jnp.full((num_tiles * tile,), num_rows, jnp.int32)
  row_T = row_T.at[slot_R].set(
    jnp.arange(num_rows, dtype=jnp.int32), mode='drop'
  )
  # Tiles past the last group are padding, with an arbitrary expert.
  tile_index = jnp.arange(num_tiles)
  expert_of_tile = jnp.sum(tile_index[:, None] >= end_E[None, :], axis=1)
  expert_of_tile = jnp.minimum(expert_of_tile, num_experts - 1)
  return slot_R, row_T, expert_of_tile.astype(jnp.int32), end_E


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scatter_to_tiles(x_MD: jax.Array, groups: Groups, k: int) -> jax.Array:
  """Copies each token's row to the k tile rows of its choices: [T, D].

  Padding rows are zero. The transpose is `gather_from_tiles` summed over k; the
  explicit gradient is a gather, where XLA would emit a scatter-add.
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
  """The routed rows in their original order, [R, D]; zero where left out."""
  y_RD = jnp.take(y_TD, groups.slot_R, axis=0, mode='clip')
  return jnp.where(groups.slot_R[:, None] < len(y_TD), y_RD, 0)


def _gather_forward(y_TD, groups):
  return gather_from_tiles(y_TD, groups), groups


def _gather_backward(groups, d_RD):
  d_padded = jnp.concatenate([d_RD, jnp.zeros_like(d_RD[:1])])
  return jnp.take(d_padded, groups.row_T, axis=0, mode='clip'), None


gather_from_tiles.defvjp(_gather_forward, _gather_backward)


def rows(x_TD: jax.Array, index: jax.Array, groups: Groups) -> jax.Array:
  """The rows of one tile."""
  return jax.lax.dynamic_slice_in_dim(
    x_TD, index * groups.tile, groups.tile, axis=0
  )


def windows(x_TD: jax.Array, groups: Groups) -> jax.Array:
  """The rows of each expert's window, [E, w, D]; zero where its tiles end."""
  slot_Ew = window_slots(groups)
  x_EwD = jnp.take(x_TD, slot_Ew, axis=0, mode='clip')
  is_own_Ew = slot_Ew < groups.end_E[:, None] * groups.tile
  return jnp.where(is_own_Ew[..., None], x_EwD, 0)


def window_slots(groups: Groups) -> jax.Array:
  """Buffer rows of each expert's window, int32 [E, w]. Those after its own
  tiles belong to other experts, or are past the end."""
  begin_E = groups.begin_E * groups.tile
  return begin_E[:, None] + jnp.arange(groups.window)[None, :]


def from_windows(y_EwF: jax.Array, groups: Groups) -> jax.Array:
  """The rows of windows in the tiled layout, [T, F]; other rows are zero."""
  first_T = jnp.repeat(groups.expert_of_tile, groups.tile) * groups.window
  rank_T = groups.rank_T
  y_WF = y_EwF.reshape(-1, y_EwF.shape[-1])
  y_TF = jnp.take(y_WF, first_T + rank_T, axis=0, mode='clip')
  return jnp.where(rank_T[:, None] < groups.window, y_TF, 0)


def for_each_tile(body: Callable[..., Any], groups: Groups, initial: jax.Array):
  """`fori_loop` over the tiles with rows outside of the windows."""
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
