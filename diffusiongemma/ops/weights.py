"""Representations of a matrix among the parameters.

  `jax.Array`
  `Quantized`    w ~ values * scale, with scale = max |w| / largest per group
  `LowRank`      W + s A B, with an adapter that is trained
  `Transposed`   experts in the layout that is fastest on CPUs

The groups of `Quantized` are along the axis that a product sums over: all of it
(8 bits, "per channel") or 32 or 64 adjacent inputs (4 bits). Scales are
bfloat16; values are rounded relative to the rounded scale, so that its rounding
adds no error. A custom format is a subclass of `Leaf`; where no kernel supports
it, it is multiplied as the result of `astype`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any
from typing import NamedTuple
import weakref

import flax
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.ops import parallel


class Kind(NamedTuple):
  """A format of `Quantized`.

  Attributes:
    dtype: of the values.
    largest: the largest value in use.
    has_groups: whether a scale is per `group_size` adjacent inputs, not per all
      inputs.
  """

  dtype: jnp.dtype
  largest: float
  has_groups: bool = False


KINDS = {
  'int8': Kind(jnp.int8, 127.0),
  'int4': Kind(jnp.int4, 7.0, has_groups=True),
  'fp8': Kind(jnp.float8_e4m3fn, 448.0),
}


class Leaf(flax.struct.PyTreeNode):
  """A weight that is not an array. `len(w)` and `w.astype(dtype)` are those of
  the matrix it represents, and so is `w[index]` (along leading axes) except for
  weights with adapters; Flax checks the shape of the first field."""

  def __len__(self) -> int:
    return len(jax.tree.leaves(self)[0])

  @property
  def dtype(self) -> jnp.dtype:
    return jax.tree.leaves(self)[0].dtype

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the matrix it represents."""
    return jax.eval_shape(lambda: self.astype(self.dtype)).shape

  def astype(self, dtype: jnp.dtype) -> jax.Array:
    """The matrix it represents."""
    raise NotImplementedError

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return np.asarray(self.astype(dtype or self.dtype))

  def as_operand(self, dtype: jnp.dtype) -> 'Weight':
    """The operand of a product in `dtype`."""
    return self.astype(dtype)

  def in_use(self, dtype: jnp.dtype, *axes: str | None) -> 'Leaf':
    """See `in_use`."""
    return self

  def expert_specs(self, axes: tuple[str | None, ...]) -> Any:
    """See `expert_specs`, which is called before `gather_experts`."""
    raise ValueError(
      f'{type(self).__name__} weights are for one device: for a mesh, load '
      'with sharding=parameter_sharding(mesh).'
    )

  def gather_experts(self, axis: int, dtype: jnp.dtype) -> 'Leaf':
    """See `gather_experts`."""
    raise NotImplementedError

  def stored(self) -> Mapping[str, jax.Array] | jax.Array:
    """The arrays on disk by name, or a single array."""
    return self.astype(self.dtype)


class FewBits(Leaf):
  """A quantised array: values, and arrays of numbers per group of adjacent
  values along an axis, which are shaped like the values except for the number
  of groups along it. A product dequantises it, or has a kernel for it.

  Subclasses have the attributes of `Quantized`, and possibly more arrays.
  """

  values: jax.Array
  scales: jax.Array
  axis: int
  scales_transposed: bool

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  @property
  def ndim(self) -> int:
    return self.values.ndim

  @property
  def num_groups(self) -> int:
    """The number of groups of scales along the axis."""
    axis = -3 - self.axis if self.scales_transposed else self.axis
    return self.scales.shape[axis]

  def __getitem__(self, index) -> 'FewBits':
    return jax.tree.map(lambda x: x[index], self)

  def in_groups(self, x: jax.Array) -> jax.Array:
    """Values in float32 as [.., groups, values of a group, ..]."""
    axis, groups = self.ndim + self.axis, self.num_groups
    split = list(self.shape)
    split[axis : axis + 1] = [groups, self.shape[axis] // groups]
    return x.astype(jnp.float32).reshape(split)

  def per_group(self, x: jax.Array) -> jax.Array:
    """Numbers per group in float32, to be combined with `in_groups`; those of
    larger groups are repeated."""
    x = x.astype(jnp.float32)
    if self.scales_transposed:
      x = jnp.swapaxes(x, -1, -2)
    if x.shape[self.axis] not in (1, self.num_groups):
      x = jnp.repeat(x, self.num_groups // x.shape[self.axis], self.axis)
    return jnp.expand_dims(x, self.ndim + self.axis + 1)

  def as_operand(self, dtype: jnp.dtype) -> 'FewBits':
    return self

  def expert_specs(self, axes: tuple[str | None, ...]) -> Any:
    experts, outputs, _ = axes
    per_group = parallel.spec(experts, None, outputs)
    specs = jax.tree.map(lambda _: per_group, self)
    return specs.replace(values=parallel.spec(*axes))

  def gather_experts(self, axis: int, dtype: jnp.dtype) -> 'FewBits':
    arrays = self.stored()
    values = arrays.pop('values')
    if axis == 1:  # Numbers per group have outputs last.
      arrays = {name: _gather(x, axis=2) for name, x in arrays.items()}
    return self.replace(values=_gather(values, axis=axis), **arrays)

  def stored(self) -> dict[str, jax.Array]:
    fields = dataclasses.fields(self)
    names = (x.name for x in fields if x.metadata.get('pytree_node', True))
    arrays = ((name, getattr(self, name)) for name in names)
    return {name: x for name, x in arrays if x is not None}


class Quantized(FewBits):
  """A quantised array, values * scales.

  Attributes:
    values: int8, int4 or float8_e4m3fn; of other tools also float4_e2m1fn.
    scales: bfloat16 where quantised here; shaped like `values` except for the
      number of groups along `axis`.
    axis: the axis with the groups, counted from the end.
    scales_transposed: whether the last two axes of `scales` are swapped: for
      [E, F, D] they are [E, groups, F] instead of [E, F, groups].
  """

  values: jax.Array
  scales: jax.Array
  axis: int = flax.struct.field(pytree_node=False)
  scales_transposed: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def is_own(self) -> bool:
    """Whether kernels may know it: values and scales are of types that are
    written here."""
    kinds = {jnp.dtype(kind.dtype) for kind in KINDS.values()}
    return self.scales.dtype == jnp.bfloat16 and self.values.dtype in kinds

  def astype(self, dtype: jnp.dtype) -> jax.Array:
    """The dequantised array, computed in float32."""
    w = self.in_groups(self.values) * self.per_group(self.scales)
    return w.reshape(self.shape).astype(dtype)


def quantize(
  w: jax.Array,
  kind: str,
  axis: int,
  group_size: int | None = None,
  scales_transposed: bool = False,
) -> Quantized:
  """Quantises `w`.

  Args:
    w: a floating-point array.
    kind: 'int8', 'int4' or 'fp8' (e4m3).
    axis: the axis that products sum over, counted from the end.
    group_size: number of adjacent inputs that share a scale; None is all.
    scales_transposed: layout of the scales, see `Quantized`.

  Raises:
    ValueError: `group_size` does not divide the axis.
  """
  dtype, largest, _ = KINDS[kind]
  size = w.shape[axis]
  group_size = group_size or size
  if size % group_size:
    raise ValueError(f'{size} is no multiple of {group_size}')
  position = w.ndim + axis
  split = list(w.shape)
  split[position : position + 1] = [size // group_size, group_size]
  grouped = w.astype(jnp.float32).reshape(split)
  most = jnp.max(jnp.abs(grouped), axis=position + 1, keepdims=True)
  scales = (most / largest).astype(jnp.bfloat16)
  # A group of zeros, or of values too small for a bfloat16 scale, is zero.
  by = scales.astype(jnp.float32)
  values = jnp.where(by > 0, grouped / jnp.where(by > 0, by, 1.0), 0.0)
  values = jnp.clip(values, -largest, largest)
  if jnp.issubdtype(dtype, jnp.integer):
    values = jnp.round(values)
  values, scales = values.reshape(w.shape), scales.squeeze(position + 1)
  if scales_transposed:
    scales = jnp.swapaxes(scales, -1, -2)
  return Quantized(values.astype(dtype), scales, axis, scales_transposed)


def rows(table: Any, start: jax.Array, size: int) -> Any:
  """`table[start : start + size]` of an array, quantised or not."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=0), table
  )


def values_and_scales(
  w: jax.Array | Quantized,
) -> tuple[jax.Array, jax.Array | None]:
  """(values, scales); (w, None) if it is not quantised."""
  return (w.values, w.scales) if isinstance(w, Quantized) else (w, None)


class LowRank(Leaf):
  """A matrix and its adapter, W + scale A B. The inputs and the outputs of W
  may be several axes each.

  Attributes:
    weight: W, [in, out]; for experts [E, out, in]. May be `Quantized`.
    a: A, [in, rank]; for experts [E, rank, in].
    b: B, [rank, out]; for experts [E, out, rank].
    scale: a number.
  """

  weight: jax.Array
  a: jax.Array
  b: jax.Array
  scale: float = flax.struct.field(pytree_node=False)

  def astype(self, dtype: jnp.dtype) -> jax.Array:
    """W + scale A B as one matrix, added in float32."""
    if self.a.ndim == self.b.ndim == 3:  # Of experts.
      update = jnp.einsum('erd,efr->efd', self.a, self.b)
    else:
      update = jnp.tensordot(self.a, self.b, axes=1)
    total = self.weight.astype(jnp.float32) + self.scale * update
    return total.astype(dtype)

  def in_use(self, dtype: jnp.dtype, *axes: str | None) -> 'LowRank':
    return self.replace(weight=in_use(self.weight, dtype, *axes))

  def expert_specs(self, axes: tuple[str | None, ...]) -> Any:
    experts, outputs, inputs = axes
    return self.replace(
      weight=expert_specs(self.weight, axes),
      a=parallel.spec(experts, None, inputs),
      b=parallel.spec(experts, outputs, None),
    )

  def gather_experts(self, axis: int, dtype: jnp.dtype) -> 'LowRank':
    # A has this axis of W if it is the last, B if it is the second.
    name = {2: 'a', 1: 'b'}[axis]
    part = _gather(getattr(self, name), axis=axis)
    weight = gather_experts(self.weight, axis, dtype)
    return self.replace(weight=weight, **{name: part})


class Transposed(Leaf):
  """The matrix of each expert, [E, out, in], stored as [E, in, out]. CPUs
  multiply by it up to twice as fast as in the layout with outputs first.

  Attributes:
    values: [E, in, out].
  """

  values: jax.Array

  def __getitem__(self, index) -> 'Transposed':
    return Transposed(self.values[index])

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.values.shape[:-2], *self.values.shape[:-3:-1])

  @property
  def ndim(self) -> int:
    return self.values.ndim

  def astype(self, dtype: jnp.dtype) -> jax.Array:
    return jnp.swapaxes(self.values, -1, -2).astype(dtype)


Weight = jax.Array | Leaf
# A nested dict of weights by module names.
Params = dict[str, Any]


def arrange(params: Params, donate: bool = False) -> dict[str, Any]:
  """The parameters in the layout that is fastest for sampling on this device:
  on a CPU, matrices of experts that are plain arrays are transposed; on other
  devices and on a mesh, `params` are returned as they are.

  The result can be trained and saved, but not sharded over a mesh. The
  transposed matrix is cached for as long as its original exists. With `donate`,
  each original is deleted after its transposition, so that both are never in
  memory, and `params` can't be used any more.
  """
  is_on_mesh = not jax.sharding.get_abstract_mesh().empty
  if is_on_mesh or jax.default_backend() != 'cpu':
    return params
  flat = traverse_util.flatten_dict(params)
  for path, w in flat.items():
    if path[-2:-1] == ('experts',) and isinstance(w, jax.Array):
      flat[path] = _transposed(w, remember=not donate)
      if donate:
        w.delete()
  return traverse_util.unflatten_dict(flat)


# By the id of a matrix: (a weak reference to it, the transposed matrix). The
# entry is removed with the matrix.
_TRANSPOSED: dict[int, tuple[weakref.ref[jax.Array], Transposed]] = {}


def _transposed(w_EFD: jax.Array, remember: bool) -> Transposed:
  key = id(w_EFD)
  if key in _TRANSPOSED:
    return _TRANSPOSED[key][1]
  transposed = Transposed(_transpose(w_EFD).block_until_ready())
  if remember:
    forget = lambda _: _TRANSPOSED.pop(key, None)
    _TRANSPOSED[key] = (weakref.ref(w_EFD, forget), transposed)
  return transposed


_transpose = jax.jit(lambda w_EFD: jnp.swapaxes(w_EFD, 1, 2))


def shape_in_memory(
  w: Weight | None, shape: tuple[int, ...]
) -> tuple[int, ...]:
  """The shape of the first array of `w`, a weight that represents `shape`."""
  is_transposed = isinstance(w, Transposed)
  return (*shape[:-2], shape[-1], shape[-2]) if is_transposed else shape


def stored(w: Weight) -> Mapping[str, jax.Array] | jax.Array:
  """The arrays of a weight on disk by name, or a single array."""
  return w.stored() if isinstance(w, Leaf) else w


def with_types(params: Params, abstract: Params) -> Params:
  """The arrays cast to the types of `abstract`; other weights as they are."""
  is_leaf = lambda w: isinstance(w, Leaf)

  def cast(w, wanted):
    return w if is_leaf(w) else jnp.asarray(w, wanted.dtype)

  return jax.tree.map(cast, params, abstract, is_leaf=is_leaf)


def as_operand(w: Weight, dtype: jnp.dtype) -> Weight:
  """The operand of a product in `dtype`."""
  return w.as_operand(dtype) if isinstance(w, Leaf) else w.astype(dtype)


def in_use(w: Weight, dtype: jnp.dtype, *axes: str | None) -> Weight:
  """A matrix as operand of a product on a mesh, cast to `dtype`: with these
  logical axes, so gathered along axes along which it is only stored sharded."""
  if isinstance(w, Leaf):
    return w.in_use(dtype, *axes)
  if not parallel.is_active():
    return w
  return parallel.constrain(w.astype(dtype), *axes)


def expert_specs(w: Weight, axes: tuple[str | None, ...]) -> Any:
  """Shardings of matrices of experts with these logical axes (experts, out,
  in): specs in the structure of `w`."""
  return w.expert_specs(axes) if isinstance(w, Leaf) else parallel.spec(*axes)


def gather_experts(w: Weight, axis: int, dtype: jnp.dtype) -> Weight:
  """Per device: its experts, gathered from their shards along `axis`, 1
  (outputs) or 2 (inputs), cast to `dtype`."""
  if isinstance(w, Leaf):
    return w.gather_experts(axis, dtype)
  return _gather(w.astype(dtype), axis=axis)


def _gather(x: jax.Array, axis: int) -> jax.Array:
  return parallel.gather(x, parallel.mesh_axes('embed'), axis)
