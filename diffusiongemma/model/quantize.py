"""Parameters of few bits: which, along which axis, and how they are stored.

`quantized.Quantized` arrays stand in the places of the matrices of attention
and MLPs ("linears"), of the experts and of the embedding, as a
`QuantizationConfig` says; routers, norms, scalars and the image encoder stay
as they are. On disk each is two arrays, PATH/values and PATH/scales.
"""

from collections.abc import Iterator
import fnmatch
import functools
from typing import Any
from typing import NamedTuple

from flax import traverse_util
import jax

from diffusiongemma import config as configs
from diffusiongemma.config import QuantizationConfig
from diffusiongemma.kernels import quantized


class _Rule(NamedTuple):
  """The field of the config, the axis that products sum over, and whether the
  scales are transposed."""

  field: str
  axis: int
  scales_transposed: bool = False


_RULES = {
  'layer_*/attention/[qkv]_proj': _Rule('linears', -3),
  'layer_*/attention/o_proj': _Rule('linears', -2),
  'layer_*/shared_mlp/*': _Rule('linears', -2),
  'self_conditioning/mlp/*': _Rule('linears', -2),
  'layer_*/experts/*': _Rule('experts', -1, scales_transposed=True),
  'embedding': _Rule('embedding', -1),
}


def by_part(params: dict) -> dict[str, dict]:
  """The parameters in the parts that a `QuantizationConfig` knows."""
  parts = {'experts': {}, 'linears': {}, 'embedding': {}, 'other': {}}
  for path, w in traverse_util.flatten_dict(params).items():
    rule = _rule_at(path)
    parts[rule.field if rule else 'other']['/'.join(path)] = w
  return {f'parameters: {part}': tree for part, tree in parts.items() if tree}


def _rule_at(path: tuple[str, ...]) -> _Rule | None:
  for pattern, rule in _RULES.items():
    if fnmatch.fnmatchcase('/'.join(path), pattern):
      return rule
  return None


def rule_of(
  config: QuantizationConfig, path: tuple[str, ...]
) -> tuple[str, int, bool] | None:
  """(kind, axis, scales_transposed) of the parameter at `path`, see
  `quantized.Quantized`; None if it stays as it is."""
  rule = _rule_at(path)
  kind = getattr(config, rule.field) if rule else 'none'
  return None if kind == 'none' else (kind, rule.axis, rule.scales_transposed)


def quantize_array(
  config: QuantizationConfig, path: tuple[str, ...], w: jax.Array
) -> Any:
  """One parameter as the config says.

  Raises:
    ConfigError: groups of 4 bits do not divide it.
  """
  rule = rule_of(config, path)
  if rule is None:
    return w
  kind, axis, scales_transposed = rule
  group_size = config.group_size if kind == 'int4' else None
  if group_size and w.shape[axis] % group_size:
    raise configs.ConfigError(
      f'config.quantization.group_size = {group_size} does not divide the '
      f'{w.shape[axis]} inputs of {"/".join(path)}.'
    )
  return _quantize(w, kind, axis, group_size, scales_transposed)


_quantize = jax.jit(quantized.quantize, static_argnums=(1, 2, 3, 4))


def quantize_params(config: QuantizationConfig, params: dict) -> dict:
  """All parameters as the config says; also of shapes, in `jax.eval_shape`."""
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict(
    {path: quantize_array(config, path, w) for path, w in flat.items()}
  )


def arrays_of(
  path: tuple[str, ...], w: Any
) -> Iterator[tuple[tuple[str, ...], jax.Array]]:
  """(path, array) of what a parameter is on disk."""
  if isinstance(w, quantized.Quantized):
    yield (*path, 'values'), w.values
    yield (*path, 'scales'), w.scales
  else:
    yield path, w


def to_stored(params: dict) -> dict:
  """Parameters as nested dicts of nothing but arrays."""
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict(
    {p: x for path, w in flat.items() for p, x in arrays_of(path, w)}
  )


def from_stored(config: QuantizationConfig, stored: dict) -> dict:
  """The inverse of `to_stored`."""
  flat, found = traverse_util.flatten_dict(stored), {}
  for path, x in flat.items():
    rule = rule_of(config, path[:-1])
    if rule is None or path[-1] not in ('values', 'scales'):
      found[path] = x
    else:
      parts = (flat[(*path[:-1], name)] for name in ('values', 'scales'))
      found[path[:-1]] = quantized.Quantized(*parts, *rule[1:])
  return traverse_util.unflatten_dict(found)


def abstract_params(config: QuantizationConfig, params: dict) -> dict:
  """Shapes of the quantised parameters from those of the others."""
  return jax.eval_shape(functools.partial(quantize_params, config), params)
