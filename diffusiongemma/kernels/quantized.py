"""Arrays of few bits: integers, or small floats, with a scale for each group.

  w ~ values * scale,   scale = max |w| / largest value, over a group

A group is a run along one axis, the one that a product sums over: all of it
(8 bits, "per channel") or 32 or 64 neighbours (4 bits). Scales are bfloat16;
values are rounded after the scale was, so that its rounding costs nothing.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp

# kind -> (type, the largest value that is used)
KINDS = {
  'int8': (jnp.int8, 127.0),
  'int4': (jnp.int4, 7.0),
  'fp8': (jnp.float8_e4m3fn, 448.0),
}


@flax.struct.dataclass
class Quantized:
  """An array of few bits. It stands in the place of the array it is made from:
  `w[index]` (of leading axes) and `w.astype(dtype)` are what they would be of
  it, and Flax compares the shape of the first field with what it expects.

  Attributes:
    values: int8, int4 or float8_e4m3fn.
    scales: bfloat16, as `values` but for the number of groups along `axis`.
    axis: the axis with the groups, counted from the end.
    scales_transposed: whether the last two axes of `scales` have changed
      places: those of [E, F, D] are then [E, groups, F], not [E, F, groups].
  """

  values: jax.Array
  scales: jax.Array
  axis: int = flax.struct.field(pytree_node=False)
  scales_transposed: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  @property
  def ndim(self) -> int:
    return self.values.ndim

  @property
  def num_groups(self) -> int:
    axis = -3 - self.axis if self.scales_transposed else self.axis
    return self.scales.shape[axis]

  def __len__(self) -> int:
    return len(self.values)

  def __getitem__(self, index) -> 'Quantized':
    return self.replace(values=self.values[index], scales=self.scales[index])

  def astype(self, dtype: jnp.dtype) -> jax.Array:
    """The array it stands for, computed in float32."""
    axis, groups = self.ndim + self.axis, self.num_groups
    split = list(self.shape)
    split[axis : axis + 1] = [groups, self.shape[axis] // groups]
    values = self.values.astype(jnp.float32).reshape(split)
    scales = self.scales.astype(jnp.float32)
    if self.scales_transposed:
      scales = jnp.swapaxes(scales, -1, -2)
    scales = jnp.expand_dims(scales, axis + 1)
    return (values * scales).reshape(self.shape).astype(dtype)


def quantize(
  w: jax.Array,
  kind: str,
  axis: int,
  group_size: int | None = None,
  scales_transposed: bool = False,
) -> Quantized:
  """`w` in few bits.

  Args:
    w: a floating array.
    kind: 'int8', 'int4' or 'fp8' (e4m3).
    axis: the axis that products sum over, counted from the end.
    group_size: how many neighbours share a scale; None is all of the axis.
    scales_transposed: how the scales are kept, see `Quantized`.

  Raises:
    ValueError: the axis has no whole number of groups.
  """
  dtype, largest = KINDS[kind]
  size = w.shape[axis]
  group_size = group_size or size
  if size % group_size:
    raise ValueError(f'{size} is no multiple of {group_size}')
  place = w.ndim + axis
  split = list(w.shape)
  split[place : place + 1] = [size // group_size, group_size]
  grouped = w.astype(jnp.float32).reshape(split)
  most = jnp.max(jnp.abs(grouped), axis=place + 1, keepdims=True)
  scales = (most / largest).astype(jnp.bfloat16)
  # A group of zeros, or one that bfloat16 has no scale for, is zero.
  by = scales.astype(jnp.float32)
  values = jnp.where(by > 0, grouped / jnp.where(by > 0, by, 1.0), 0.0)
  values = jnp.clip(values, -largest, largest)
  if jnp.issubdtype(dtype, jnp.integer):
    values = jnp.round(values)
  values, scales = values.reshape(w.shape), scales.squeeze(place + 1)
  if scales_transposed:
    scales = jnp.swapaxes(scales, -1, -2)
  return Quantized(values.astype(dtype), scales, axis, scales_transposed)


def rows(table: Any, start: jax.Array, size: int) -> Any:
  """`table[start : start + size]` of an array, quantised or not."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=0), table
  )


def parts(w: Any) -> tuple[jax.Array, jax.Array | None]:
  """(values, scales) of an array; None where it is not quantised."""
  return (w.values, w.scales) if isinstance(w, Quantized) else (w, None)
