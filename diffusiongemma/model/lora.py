"""Low-rank adapters: of W + (alpha / rank) A B, only A and B are trained.

  attach(params, adapters)   for training: W, A and B are separate
  merge(params, adapters)    for sampling: one matrix, the same logits

Adapters are a separate tree with the paths of the matrices that they adapt, and
are saved separately. Both roles of the network share them, as they share W. B
starts at zero, so that training starts from the network itself. W may be
quantised; it is then not merged, which would round it once more.

Source: Hu et al., https://arxiv.org/abs/2106.09685; with a quantised W:
Dettmers et al., https://arxiv.org/abs/2305.14314.
"""

from collections.abc import Callable
import fnmatch
import math
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from diffusiongemma import config as configs
from diffusiongemma import ops
from diffusiongemma.config import LoraConfig
from diffusiongemma.model import parameters
from diffusiongemma.ops.weights import Params


def init_adapters(config: LoraConfig, params: Params, key: jax.Array) -> Params:
  """Adapters for the targets, float32.

  Args:
    config: rank and targets.
    params: of the network to adapt; only shapes are used.
    key: for the random A.

  Raises:
    ConfigError: a target matches no matrix, or none that can be adapted.
  """
  adapters = {}
  flat, rank = traverse_util.flatten_dict(params), config.rank
  for index, path in enumerate(find_targets(config, params)):
    shape, row = flat[path].shape, parameters.row_of(path)
    inputs, outputs = row.sizes(shape)
    if row.experts:
      E = shape[0]
      shape_a, shape_b = (E, rank, *inputs), (E, *outputs, rank)
    else:
      shape_a, shape_b = (*inputs, rank), (rank, *outputs)
    fan_in = math.prod(inputs)
    own_key = jax.random.fold_in(key, index)
    a = jax.random.normal(own_key, shape_a, jnp.float32)
    adapters[(*path, 'a')] = a * fan_in**-0.5
    adapters[(*path, 'b')] = jnp.zeros(shape_b, jnp.float32)
  return traverse_util.unflatten_dict(adapters)


def abstract_adapters(config: LoraConfig, params: Params) -> Params:
  """Shapes and types of the adapters of a network, from its shapes. Raises
  `ConfigError` as `init_adapters`."""
  key = jax.random.key(0)
  return jax.eval_shape(lambda: init_adapters(config, params, key))


def find_targets(config: LoraConfig, params: Params) -> list[tuple[str, ...]]:
  """Paths of the matrices that are adapted. Raises `ConfigError`."""
  paths = {'/'.join(p): p for p in traverse_util.flatten_dict(params)}
  able = {
    name: path
    for name, path in paths.items()
    if parameters.row_of(path).is_adaptable
  }
  targets = set()
  for pattern in config.targets:
    named = fnmatch.filter(able, pattern)
    if not named:
      reason = 'names no matrix'
      if fnmatch.filter(paths, pattern):
        reason = 'names nothing that can be adapted'
      kinds = sorted({f'*/{p[-2]}/{p[-1]}' for p in able.values()})
      raise configs.ConfigError(
        f'config.lora.targets: {pattern!r} {reason}; there are '
        f'{", ".join(kinds)}.'
      )
    targets.update(named)
  return [able[name] for name in sorted(targets)]


def attach(config: LoraConfig, params: Params, adapters: Params) -> Params:
  """`params` with a `weights.LowRank` in place of each adapted matrix."""
  return _with_adapters(
    params, adapters, lambda w, a, b: low_rank(config, w, a, b)
  )


def merge(config: LoraConfig, params: Params, adapters: Params) -> Params:
  """`params` with the adapters added to the matrices, in their types."""
  return _with_adapters(
    params,
    adapters,
    lambda w, a, b: low_rank(config, w, a, b).astype(w.dtype),
  )


def merge_array(
  config: LoraConfig,
  path: tuple[str, ...],
  w: jax.Array,
  adapters: Params,
) -> jax.Array:
  """The parameter at `path` of the result of `merge`."""
  a_and_b = adapters
  for part in path:
    a_and_b = a_and_b.get(part, {})
  if not a_and_b:
    return w
  return low_rank(config, w, a_and_b['a'], a_and_b['b']).astype(w.dtype)


def low_rank(
  config: LoraConfig, w: jax.Array, a: jax.Array, b: jax.Array
) -> ops.weights.LowRank:
  """A matrix with its adapter: A is [..., rank], B is [rank, ...]."""
  return ops.weights.LowRank(w, a, b, config.alpha / config.rank)


def _with_adapters(
  params: Params, adapters: Params, combine: Callable[..., Any]
) -> Params:
  flat = traverse_util.flatten_dict(params)
  of_path = traverse_util.flatten_dict(adapters)
  for *path, last in of_path:
    if last == 'a':
      path = tuple(path)
      flat[path] = combine(
        flat[path], of_path[(*path, 'a')], of_path[(*path, 'b')]
      )
  return traverse_util.unflatten_dict(flat)


def matrix_axes(path: tuple[str, ...], ndim: int) -> tuple[Any, ...] | None:
  """(input axes, output axes) of the A or B at a path of adapters; None for any
  other path."""
  *owner, name = path
  row = parameters.find(tuple(owner))
  if row is None or name not in ('a', 'b'):
    return None
  if row.experts:
    return (2,), (1,)
  split = len(row.inputs) if name == 'a' else 1
  return tuple(range(split)), tuple(range(split, ndim))
