"""Table of all parameters of the network, with all facts about each in one row.

  'attention/q_proj'  [D, N, H]  sums over D, is sharded along embed and
                      q_heads, quantised with the linears, adaptable, for Muon

Modules declare their parameters from these rows; sharding, quantisation,
adapters, optimiser, benchmark and the tensor table of Hugging Face read them.
Quantised parameters (`ops.weights.Quantized`) replace the matrices; on disk
each is several arrays, PATH/values and PATH/scales.
"""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import fnmatch
import functools
import math
from typing import Any
from typing import Final
from typing import NamedTuple

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma import ops
from diffusiongemma.config import ConfigError
from diffusiongemma.config import QuantizationConfig
from diffusiongemma.ops import blocks
from diffusiongemma.ops.weights import Params

Path = tuple[str, ...]
# The kind of parameters that stay as another tool has quantised them.
STORED: Final = 'stored'


class Parameter(NamedTuple):
  """One row of the table.

  Attributes:
    axes: the logical axis of each of its axes, None if replicated; see
      `sharding.RULES`.
    start: (row, shape) -> the initializer.
    inputs: the axes that a product sums over; () if it is not a matrix.
    part: its field of `QuantizationConfig`, None if it is never quantised.
    is_adaptable: whether it may have a low-rank adapter.
    is_orthogonal: whether Muon orthogonalises its steps; else Adam is used.
  """

  axes: tuple[str | None, ...]
  start: Callable[['Parameter', tuple[int, ...]], Callable[..., Any]]
  inputs: tuple[int, ...] = ()
  part: str | None = None
  is_adaptable: bool = False
  is_orthogonal: bool = False

  @property
  def experts(self) -> tuple[int, ...]:
    """The axis of experts, if it has a matrix per expert."""
    return (0,) if self.axes[0] == 'experts' else ()

  @property
  def outputs(self) -> tuple[int, ...]:
    """The axes of the outputs of a product."""
    others = (*self.experts, *self.inputs)
    return tuple(axis for axis in range(len(self.axes)) if axis not in others)

  def sizes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """(sizes of the inputs, sizes of the outputs)."""
    return tuple(
      tuple(shape[axis] for axis in axes)
      for axes in (self.inputs, self.outputs)
    )

  @property
  def group_axis(self) -> int:
    """The axis with the groups of a quantised parameter, from the end."""
    return self.inputs[-1] - len(self.axes)

  @property
  def scales_transposed(self) -> bool:
    """See `ops.weights.Quantized`."""
    return bool(self.experts)


def _fan_in(row, shape):
  """Variance 1 / fan-in."""
  return nn.initializers.variance_scaling(
    1.0, 'fan_in', 'normal', row.inputs, row.outputs, row.experts
  )


def _unit(row, shape):
  """Variance 1. For the router, the factor D^-0.5 is part of its formula, so
  that rows of variance 1 give logits of variance 1."""
  return nn.initializers.normal(1.0)


def _half(row, shape):
  """Variance 1/2 for each axis of a picture: the scale of the pixels."""
  return nn.initializers.normal(0.5**0.5)


def _width(row, shape):
  """Standard deviation D^-0.5; embeddings are multiplied by D^0.5."""
  return nn.initializers.normal(shape[-1] ** -0.5)


def _head(row, shape):
  """H^-1/4: the scale of attention is 1.0 and normed heads have length sqrt(H),
  so that random networks have scores of variance 1 only with this."""
  return nn.initializers.constant(shape[-1] ** -0.25)


def _ones(row, shape):
  return nn.initializers.ones


def _zeros(row, shape):
  return nn.initializers.zeros


def _linear(*axes, inputs=(0,)):
  return Parameter(axes, _fan_in, inputs, 'linears', True, True)


def _experts(*axes):
  return Parameter(axes, _fan_in, (2,), 'experts', True, True)


_VECTOR = Parameter((None,), _ones)
# The first pattern that matches the end of the path. Shapes are in the modules.
ROWS = {
  'embedding': Parameter(('vocab', None), _width, (1,), 'embedding'),
  'attention/q_proj': _linear('embed', 'q_heads', None),
  'attention/k_proj': _linear('embed', 'kv_heads', None),
  'attention/v_proj': _linear('embed', 'kv_heads', None),
  'attention/o_proj': _linear('q_heads', None, 'embed', inputs=(0, 1)),
  'attention/[qk]_norm/scale': Parameter((None,), _head),
  '*mlp/gate': _linear('embed', 'mlp'),
  '*mlp/up': _linear('embed', 'mlp'),
  '*mlp/down': _linear('mlp', 'embed'),
  'experts/gate_up': _experts('experts', None, 'embed'),
  'experts/down': _experts('experts', 'embed', None),
  'router/proj': Parameter((None, None), _unit, (0,)),
  'router/per_expert_scale': _VECTOR,
  '*/scale': _VECTOR,
  '*_scalar': _VECTOR,
  'vision/input_proj': Parameter((None, None), _fan_in, (0,)),
  'vision/position_table': Parameter((None, None, None), _half),
  'vision/projection': Parameter((None, None), _fan_in, (0,)),
  'vision/std_bias': Parameter((None,), _zeros),
  'vision/std_scale': _VECTOR,
}


@functools.cache
def find(path: Path) -> Parameter | None:
  """The row that matches the end of `path`, None if there is none. The image
  encoder is replicated and neither quantised nor adapted, so its rows are
  reduced to the rest."""
  ends = ['/'.join(path[-length:]) for length in (1, 2, 3)]
  for pattern, row in ROWS.items():
    if any(fnmatch.fnmatchcase(end, pattern) for end in ends):
      if 'vision' in path:
        whole = (None,) * len(row.axes)
        row = row._replace(axes=whole, part=None, is_adaptable=False)
      return row
  return None


def row_of(path: Path) -> Parameter:
  """`find` for the path of a parameter. Raises `KeyError` for any other."""
  row = find(path)
  if row is None:
    raise KeyError(f'{"/".join(path)} is no parameter of this network.')
  return row


def declare(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  param_dtype: str = 'float32',
) -> Any:
  """Declares a parameter of a module, named by the last component of `name`.

  Vectors are float32, everything else is `param_dtype`.
  """
  *_, own = path = tuple(name.split('/'))
  row = row_of(path)
  dtype = jnp.dtype(param_dtype) if len(shape) > 1 else jnp.float32
  return module.param(own, row.start(row, shape), shape, dtype)


def random(key: jax.Array, path: Path, shape: tuple[int, ...], dtype: Any):
  """A random parameter of the scale of an initial network; vectors are ones."""
  row = row_of(path)
  if len(shape) == 1:
    return jnp.ones(shape, dtype)
  inputs, _ = row.sizes(shape)
  return _normal(key, shape, dtype, jnp.float32(math.prod(inputs) ** -0.5))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape, dtype, scale):
  return jax.random.normal(key, shape, dtype) * scale.astype(dtype)


def by_part(params: Params) -> dict[str, dict[str, Any]]:
  """The parameters, grouped by the fields of `QuantizationConfig`."""
  names = ('experts', 'linears', 'embedding', 'other')
  groups: dict[str, dict[str, Any]] = {name: {} for name in names}
  for path, w in traverse_util.flatten_dict(params).items():
    row = find(path)
    groups[row and row.part or 'other']['/'.join(path)] = w
  return {
    f'parameters: {group}': tree for group, tree in groups.items() if tree
  }


def kind_of(config: QuantizationConfig, path: Path) -> str | None:
  """The kind of the quantised parameter at `path`; None if it is not
  quantised."""
  row = find(path)
  kind = getattr(config, row.part) if row and row.part else 'none'
  return None if kind == 'none' else kind


def has_stored(config: QuantizationConfig) -> bool:
  """Whether parameters are as another tool has quantised them."""
  return STORED in (config.experts, config.linears, config.embedding)


def check_not_stored(config: QuantizationConfig) -> None:
  """Raises `ConfigError` where there are no files to be as they are."""
  if has_stored(config):
    raise ConfigError(
      "config.quantization: 'stored' is what another tool has quantised; here "
      'it is int8, int4, fp8 or none.'
    )


def with_stored(
  config: QuantizationConfig, parts: Collection[str | None]
) -> QuantizationConfig:
  """The config with these parts as another tool has quantised them."""
  return dataclasses.replace(
    config,
    experts=STORED if 'experts' in parts else config.experts,
    linears=STORED if 'linears' in parts else config.linears,
    embedding=STORED if 'embedding' in parts else config.embedding,
  )


def quantize_array(
  config: QuantizationConfig, path: Path, w: jax.Array
) -> ops.weights.Weight:
  """One parameter, quantised, or dequantised, if the config says so; with the
  kind 'stored' it remains as it is.

  Raises:
    ConfigError: `group_size` does not divide its inputs.
  """
  kind = kind_of(config, path)
  if kind == STORED:
    return w
  if isinstance(w, ops.weights.FewBits):
    w = w.astype(jnp.bfloat16 if kind is None else jnp.float32)
  if kind is None:
    return w
  row = row_of(path)
  has_groups = ops.weights.KINDS[kind].has_groups
  group_size = config.group_size if has_groups else None
  if group_size and w.shape[row.group_axis] % group_size:
    raise ConfigError(
      f'config.quantization.group_size = {group_size} does not divide the '
      f'{w.shape[row.group_axis]} inputs of {"/".join(path)}.'
    )
  return _quantize(w, kind, row.group_axis, group_size, row.scales_transposed)


_quantize = jax.jit(ops.weights.quantize, static_argnums=(1, 2, 3, 4))


def quantize(config: QuantizationConfig, params: Params) -> Params:
  """All parameters, quantised by the config; works in `jax.eval_shape`, too."""
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict(
    {path: quantize_array(config, path, w) for path, w in flat.items()}
  )


def abstract_quantized(config: QuantizationConfig, params: Params) -> Params:
  """Shapes of quantised parameters, from shapes before quantisation."""
  return jax.eval_shape(functools.partial(quantize, config), params)


def stored_arrays(
  path: Path, w: ops.weights.Weight
) -> Iterator[tuple[Path, jax.Array]]:
  """(path, array) of the arrays of a parameter on disk."""
  stored = ops.weights.stored(w)
  if isinstance(stored, Mapping):
    yield from (((*path, name), x) for name, x in stored.items())
  else:
    yield path, stored


def to_stored(params: Params) -> Params:
  """Parameters as nested dicts of arrays only."""
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict(
    {p: x for path, w in flat.items() for p, x in stored_arrays(path, w)}
  )


def from_stored(stored: dict[str, Any]) -> Params:
  """The inverse of `to_stored`: what a quantised parameter is follows from the
  names of its arrays."""
  params: dict[Path, Any] = {}
  arrays_of: dict[Path, dict[str, Any]] = {}
  for path, x in traverse_util.flatten_dict(stored).items():
    if owner(path) == path:
      params[path] = x
    else:
      arrays_of.setdefault(owner(path), {})[path[-1]] = x
  for path, arrays in arrays_of.items():
    params[path] = few_bits(path, arrays)
  return traverse_util.unflatten_dict(params)


def owner(path: Path) -> Path:
  """The path of the parameter to which a stored array belongs."""
  return path[:-1] if path[-1] in blocks.ARRAYS else path


def few_bits(path: Path, arrays: Mapping[str, Any]) -> ops.weights.FewBits:
  """A quantised parameter, from its arrays by name."""
  row = row_of(path)
  return blocks.of_arrays(arrays, row.group_axis, row.scales_transposed)


def stored_shape(
  path: Path, shape: tuple[int, ...], num_groups: int
) -> tuple[int, ...]:
  """The shape of an array with `num_groups` numbers per output of a parameter
  of this shape, all its inputs counted; groups that cross the boundary of a
  head are divided."""
  row = row_of(path)
  sizes, axis = list(shape), len(shape) + row.group_axis
  others = math.prod(shape[i] for i in row.inputs if i != axis)
  sizes[axis] = math.lcm(num_groups, others) // others
  if row.scales_transposed:
    sizes[-2:] = sizes[:-3:-1]
  return tuple(sizes)


def to_groups(path: Path, shape: tuple[int, ...], x: np.ndarray) -> np.ndarray:
  """Numbers per group [.., out, groups], as other tools store them, in the
  layout that `few_bits` takes, for a parameter of this shape."""
  wanted = stored_shape(path, shape, x.shape[-1])
  row = row_of(path)
  if row.scales_transposed:
    return np.ascontiguousarray(np.swapaxes(x, -1, -2)).reshape(wanted)
  if row.inputs[0] > 0:
    return x.reshape(wanted)  # The table of the vocabulary.
  groups = math.prod(wanted[i] for i in row.inputs)
  return np.repeat(x.T, groups // x.shape[-1], axis=0).reshape(wanted)
