"""Shardings of the network's arrays, in logical axes.

Flax's logical rules, which are active around a call, translate them to axes of
the mesh. Without rules, on one device, these functions do nothing. Where the
compiler alone would choose badly, code is written per device: the experts
(`moe`) and the look-up in a sharded table.
"""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from diffusiongemma.ops import dispatch


def is_active() -> bool:
  """Whether arrays are sharded over a mesh."""
  return bool(nn.get_logical_axis_rules())


def run(
  plain: Callable[..., Any],
  *operands: Any,
  implementation: dispatch.Implementation = None,
  **choices: Callable[[], Callable[..., Any] | None],
) -> Any:
  """`dispatch.run`; on a mesh always `plain`, because the compiler can't
  partition a kernel."""
  if is_active():
    choices = {}
  return dispatch.run(
    plain, *operands, implementation=implementation, **choices
  )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """`x` with the sharding of these logical axes; None is a replicated axis."""
  return nn.with_logical_constraint(x, axes)


def spec(*axes: str | None) -> PartitionSpec:
  """The sharding of an array with these logical axes."""
  return nn.logical_to_mesh_axes(axes) or PartitionSpec()


def mesh_axes(logical: str) -> tuple[str, ...]:
  """Axes of the mesh along which a logical axis is sharded."""
  return names_in(spec(logical))


def parts(logical: str) -> int:
  """Number of shards of a logical axis; 1 without a mesh."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape[name] for name in mesh_axes(logical))


def names_in(where: PartitionSpec) -> tuple[str, ...]:
  """All axes of the mesh that a spec names."""
  entries = [
    p if isinstance(p, tuple) else (p,) for p in where if p is not None
  ]
  return tuple(name for entry in entries for name in entry)


def gather(x: jax.Array, names: Sequence[str], axis: int) -> jax.Array:
  """Per device: `x` gathered along these axes of the mesh."""
  for name in reversed(names):
    x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
  return x


def sum_and_scatter(
  x: jax.Array, names: Sequence[str], spread: Sequence[str]
) -> jax.Array:
  """Per device: the sum of `x` over the mesh axes `names`; along those in
  `spread`, each device keeps its shard of the first axis, as before
  `gather`."""
  for name in spread:
    x = jax.lax.psum_scatter(x, name, tiled=True)
  rest = tuple(name for name in names if name not in spread)
  return jax.lax.psum(x, rest) if rest else x


def look_up(
  table_VD: jax.Array, tokens_BL: jax.Array, dtype: jnp.dtype
) -> jax.Array:
  """Rows [B, L, D], in `dtype`, of a table that may be sharded and is not
  gathered: each device looks up its own rows, and the results are summed."""
  if not is_active():
    return table_VD[tokens_BL].astype(dtype)
  batch, owners = mesh_axes('batch'), mesh_axes('vocab')
  spread = [name for name in batch if name in owners]

  def on_one_device(table_VD, tokens_BL):
    tokens_BL = gather(tokens_BL, spread, 0)
    row_BL = tokens_BL - jax.lax.axis_index(owners) * len(table_VD)
    here_BL = (row_BL >= 0) & (row_BL < len(table_VD))
    x_BLD = table_VD[jnp.where(here_BL, row_BL, 0)].astype(dtype)
    x_BLD = jnp.where(here_BL[..., None], x_BLD, 0)
    return sum_and_scatter(x_BLD, owners, spread)

  return jax.shard_map(
    on_one_device,
    in_specs=(spec('vocab', None), spec('batch', None)),
    out_specs=spec('batch', None, None),
    check_vma=False,
  )(table_VD, tokens_BL)
