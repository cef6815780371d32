"""The experts on CPUs, without a gradient: both products at once.

  y_r = GeGLU(x_r gate_up_e^T) down_e^T   for each routed row r, e its expert

The windows of `routing` are fetched once, go through both products and are
written once; the plain version writes the rows of all tiles in between. Rows
outside of the windows are processed tile by tile.
"""

import jax
import jax.numpy as jnp

from diffusiongemma.ops import activation
from diffusiongemma.ops import routing
from diffusiongemma.ops.weights import Transposed


def supports(*weights: object) -> bool:
  """Whether `apply` supports these weights."""
  return all(isinstance(w, jax.Array | Transposed) for w in weights)


def apply(
  x_MD: jax.Array,
  gate_up_EFD: jax.Array | Transposed,
  down_EDF: jax.Array | Transposed,
  groups: routing.Groups,
  k: int,
) -> jax.Array:
  """Each of the M*k routed rows (k choices per token) after its expert: [R, D];
  zero for rows that were left out.

  Args:
    x_MD: tokens.
    gate_up_EFD: matrices [2F, D], the gate first.
    down_EDF: matrices [D, F].
    groups: the layout of the rows.
    k: number of experts of a token.
  """
  R, T, D = len(groups.slot_R), len(groups.row_T), x_MD.shape[1]
  window, rank_T = groups.window, groups.rank_T

  def mlp(row, gate_up, down):
    """The MLP of these routed rows; arbitrary for rows of R or more."""
    x = jnp.take(x_MD, row // k, axis=0, mode='clip')
    gate, up = jnp.split(_multiply(x, gate_up), 2, axis=-1)
    return _multiply(activation.geglu(gate, up), down)

  if window:
    row_Ew = jnp.take(groups.row_T, routing.window_slots(groups), mode='clip')
    y_EwD = mlp(row_Ew, gate_up_EFD, down_EDF)
    slot_R = jnp.minimum(groups.slot_R, T - 1)
    expert_R = groups.expert_of_tile[slot_R // groups.tile]
    is_in_R = (groups.slot_R < T) & (rank_T[slot_R] < window)
    row_in_windows_R = jnp.where(is_in_R, expert_R * window + rank_T[slot_R], 0)
    y_RD = jnp.where(
      is_in_R[:, None], y_EwD.reshape(-1, D)[row_in_windows_R], 0
    )
  else:
    y_RD = jnp.zeros((R, D), x_MD.dtype)

  def tile(index, y_RD):
    row_m, rank_m = (
      routing.rows(x_T, index, groups) for x_T in (groups.row_T, rank_T)
    )
    row_m = jnp.where(rank_m < window, R, row_m)
    expert = groups.expert_of_tile[index]
    y_mD = mlp(row_m, gate_up_EFD[expert], down_EDF[expert])
    return y_RD.at[row_m].set(y_mD, mode='drop')

  return routing.for_each_tile(tile, groups, y_RD)


def _multiply(x: jax.Array, w: jax.Array | Transposed) -> jax.Array:
  """Rows [..., m, in] times matrices, [..., m, out]."""
  if isinstance(w, Transposed):
    return jnp.einsum('...md,...df->...mf', x, w.values.astype(x.dtype))
  return jnp.einsum('...md,...fd->...mf', x, w.astype(x.dtype))
