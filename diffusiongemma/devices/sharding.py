"""Meshes, and shardings of arrays over their axes.

  data     copies of the network, each with its shard of the batch
  fsdp     the batch and, between uses, the parameters
  tensor   heads, hidden features, experts and the vocabulary
  expert   the batch and, in the mixtures, the experts

`RULES` maps logical axes to axes of the mesh; `activate` adds rules that depend
on sizes. The logical axes of parameters are in `model.parameters`; arrays
inside the network name theirs, and the mesh around a call,
`jax.set_mesh(mesh)`, determines their shardings:

  mesh = make_mesh(MeshConfig(tensor=8))
  run = diffusiongemma.load(folder, sharding=parameter_sharding(mesh))
  with jax.set_mesh(mesh):
    diffusiongemma.generate(run, ...)

The batch is sharded along three axes, so that none of them is idle outside of
the experts. The table of the vocabulary is never gathered: look-ups and
products are sums over its shards.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from diffusiongemma import config as configs
from diffusiongemma.config import MeshConfig
from diffusiongemma.config import ModelConfig
from diffusiongemma.model import parameters
from diffusiongemma.ops import blocks
from diffusiongemma.ops import parallel

AXES = ('data', 'fsdp', 'tensor', 'expert')
# Where shapes alone are asked for, devices need not exist.
AnyMesh = Mesh | AbstractMesh

RULES = {
  'batch': ('data', 'fsdp', 'expert'),
  'embed': ('fsdp',),
  'q_heads': ('tensor',),
  'kv_heads': ('tensor',),
  'mlp': ('tensor',),
  'experts': ('expert', 'tensor'),
  'vocab': ('tensor', 'fsdp'),
  # Rows in products with the vocabulary, whose table uses the other axes.
  'rows': ('data', 'expert'),
}


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
  """The mesh of a config over `devices`, by default all.

  Several TPU slices divide the axis `data`, so that only its communication uses
  the data-centre network.

  Raises:
    ConfigError: the product of its axes is not the number of devices, or `data`
      is not a multiple of the number of slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = mesh_shape(config, len(devices))
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if sizes[0] % slices:
    raise configs.ConfigError(
      f'config.mesh.data = {sizes[0]} must be a multiple of the {slices} '
      'slices.'
    )
  # `jax.make_mesh` would refuse axes that split a physical axis of a torus.
  if slices == 1:
    device_array = mesh_utils.create_device_mesh(
      sizes, devices, allow_split_physical_axes=True
    )
  else:
    device_array = mesh_utils.create_hybrid_device_mesh(
      (sizes[0] // slices, *sizes[1:]),
      (slices, 1, 1, 1),
      devices,
      allow_split_physical_axes=True,
    )
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)
  return Mesh(device_array, AXES, axis_types=auto)


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
  """The sizes of `AXES`, with -1 resolved. Raises `ConfigError`."""
  sizes = [getattr(config, axis) for axis in AXES]
  fixed = math.prod(size for size in sizes if size > 0)
  if -1 in sizes and num_devices % fixed == 0:
    sizes[sizes.index(-1)] = num_devices // fixed
  if math.prod(sizes) != num_devices:
    shape = ', '.join(f'{a} = {s}' for a, s in zip(AXES, sizes, strict=True))
    raise configs.ConfigError(
      f'config.mesh ({shape}) is for '
      f'{"a multiple of " if -1 in sizes else ""}{fixed} devices; there are '
      f'{num_devices}.'
    )
  return tuple(sizes)


def validate(
  config: configs.Config, shape: tuple[int, ...], batch: bool = True
) -> None:
  """Raises `ConfigError` if the mesh does not divide the network or, with
  `batch`, the batch; the message names sizes that would work."""
  sizes = dict(zip(AXES, shape, strict=True))
  model, data = config.model, config.data
  for axis, field, size in (
    ('batch', 'data.batch_size', data.batch_size),
    ('embed', 'model.embed_dim', model.embed_dim),
    ('q_heads', 'model.num_heads', model.num_heads),
    ('mlp', 'model.mlp_dim', model.mlp_dim),
    ('experts', 'model.num_experts', model.num_experts),
    ('vocab', 'model.vocab_size', model.vocab_size),
  ):
    if axis == 'batch' and not batch:
      continue
    names = [name for name in RULES[axis] if sizes[name] > 1]
    shards = math.prod(sizes[name] for name in names)
    if size % shards:
      raise configs.ConfigError(
        f'config.{field} = {size} cannot be divided among the {shards} devices '
        f'along {" x ".join(f"{name} = {sizes[name]}" for name in names)} of '
        f'config.mesh: take a multiple of {shards}, or a mesh where '
        f'{" x ".join(names)} divides {size}'
        f' ({", ".join(map(str, _divisors(size)))}).'
      )
  shards = math.prod(sizes[name] for name in RULES['batch'])
  shards *= config.train.accumulate_steps
  if batch and data.batch_size % shards:
    raise configs.ConfigError(
      f'config.data.batch_size = {data.batch_size} must be a multiple of '
      f'{shards}: config.train.accumulate_steps times the devices of the batch.'
    )


def validate_here(config: configs.Config) -> None:
  """`validate` of the network for the mesh around the call, if there is one."""
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  if set(sizes) == set(AXES):
    validate(config, tuple(sizes[axis] for axis in AXES), batch=False)


def _divisors(number: int) -> list[int]:
  return [d for d in range(1, min(number, 512) + 1) if number % d == 0]


def parameter_sharding(
  mesh: AnyMesh,
) -> Callable[[tuple[str, ...], tuple[int, ...]], NamedSharding]:
  """(path, shape) of a parameter -> its sharding; for `diffusiongemma.load`.

  Also for arrays whose path ends in that of a parameter, such as moments of the
  optimiser; if their shape differs, they are replicated.
  """
  rules = _static_rules()

  def spec_at(path, shape) -> PartitionSpec | None:
    """The spec from the row for this path, if there is one."""
    row = parameters.find(path)
    if row is None or len(row.axes) != len(shape):
      return None
    axes = row.axes
    few = len(shape) == 3 and shape[1] % mesh.shape['tensor']
    if few and axes[1] == 'kv_heads':
      axes = (axes[0], None, None)  # A head is never split.
    return nn.logical_to_mesh_axes(axes, rules)

  def place(path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    spec = spec_at(path, shape)
    if path[-1] in blocks.ARRAYS:
      row = parameters.find(path[:-1])
      if row and row.scales_transposed and path[-1] != 'values':
        experts, outputs, _ = row.axes
        spec = nn.logical_to_mesh_axes((experts, None, outputs), rules)
      spec = spec or spec_at(path[:-1], shape) or PartitionSpec()
      # There may be too few groups to divide.
      divisible = [
        None if shape[i] % _parts(mesh, names) else names
        for i, names in enumerate(spec)
      ]
      spec = PartitionSpec(*divisible)
    return NamedSharding(mesh, spec or PartitionSpec())

  return place


def _parts(mesh: AnyMesh, names: str | tuple[str, ...] | None) -> int:
  """Number of shards along these axes of the mesh."""
  names = names if isinstance(names, tuple) else (names,) if names else ()
  return math.prod(mesh.shape[name] for name in names)


@dataclasses.dataclass(frozen=True)
class Share:
  """The share of every batch that a process reads: its index, of `count`."""

  index: int
  count: int


WHOLE_BATCH = Share(0, 1)


def share_of_batch(mesh: Mesh) -> Share:
  """The share of this process. Processes whose devices hold the same rows have
  the same share, and each of them reads it.

  Raises:
    ConfigError: two processes share some of their rows, but not all.
  """
  num_shards = math.prod(mesh.shape[axis] for axis in RULES['batch'])
  rows_of_device: dict[Any, Any] = dict(
    batch_sharding(mesh).devices_indices_map((num_shards,))
  )
  of_process: dict[int, set[int]] = {}
  for device, (rows,) in rows_of_device.items():
    starts = of_process.setdefault(device.process_index, set())
    starts.add(rows.indices(num_shards)[0])
  shares = sorted({tuple(sorted(rows)) for rows in of_process.values()})
  if len(set(map(len, shares))) > 1 or sum(map(len, shares)) != num_shards:
    raise configs.ConfigError(
      f'With this config.mesh, some of the {len(of_process)} processes share '
      'some of their rows, and not all, which is not supported: make '
      'config.mesh.tensor x config.mesh.expert divide the devices of a process.'
    )
  own = tuple(sorted(of_process[jax.process_index()]))
  return Share(shares.index(own), len(shares))


def with_sharding(abstract: Any, mesh: AnyMesh) -> Any:
  """Shapes of a tree of parameters, or of a training state, plus shardings."""
  return placed(abstract, parameter_sharding(mesh))


def placed(abstract: Any, where: Callable[..., Any]) -> Any:
  """Shapes with the shardings `where(path, shape)`."""

  def add(keys, leaf):
    path = tuple(str(getattr(k, 'key', getattr(k, 'name', k))) for k in keys)
    return leaf.update(sharding=where(path, leaf.shape))

  return jax.tree_util.tree_map_with_path(add, abstract)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch by rows."""
  return NamedSharding(mesh, PartitionSpec(RULES['batch']))


def cache_with_sharding(cache: Any, model: ModelConfig, mesh: AnyMesh) -> Any:
  """Shapes of a KV cache with shardings."""
  abstract = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
  with abstract, activate(model, len(cache.length_B)):
    rows = parallel.spec('batch')

    def place(x, kind):
      spec = parallel.spec('batch', None, f'{kind}_kv_heads', None)
      return x.update(sharding=NamedSharding(mesh, spec))

    return cache.replace(
      k=tuple(map(place, cache.k, model.attention_pattern)),
      v=tuple(map(place, cache.v, model.attention_pattern)),
      length_B=cache.length_B.update(sharding=NamedSharding(mesh, rows)),
    )


def on_every_device(x: jax.Array) -> jax.Array:
  """`x` replicated over the mesh around the call, so that each process can read
  it; unchanged without a mesh."""
  if jax.sharding.get_abstract_mesh().size <= 1:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec())


def activate(model: ModelConfig, batch_size: int, length: int = 1):
  """A context for tracing the network: its arrays are sharded by `RULES` over
  the mesh around the call; without a mesh, or with one device, it does nothing.

  Of the batch's axes, those that divide `batch_size` are used; the others
  shard the `length` of the text, if they divide it.
  """
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  if math.prod(sizes.values()) == 1 or set(sizes) != set(AXES):
    return nn.logical_axis_rules(())
  batch: list[str] = []
  left: list[str] = []
  for axis in RULES['batch']:
    shards = math.prod(sizes[name] for name in batch) * sizes[axis]
    (left if batch_size % shards else batch).append(axis)
  length_axes: list[str] = []
  for axis in left:
    shards = math.prod(sizes[name] for name in length_axes) * sizes[axis]
    if length % shards == 0:
      length_axes.append(axis)
  rules: dict[str, Sequence[str]] = {
    'batch': batch,
    'length': length_axes,
    'rows': [axis for axis in batch if axis in RULES['rows']],
  }
  # Heads are replicated if there are fewer than devices.
  for kind, heads in (
    ('local', model.num_kv_heads),
    ('global', model.num_global_kv_heads),
  ):
    divides = heads % sizes['tensor'] == 0
    rules[f'{kind}_kv_heads'] = RULES['kv_heads'] if divides else ()
  return nn.logical_axis_rules(
    _static_rules() + [(k, tuple(v) or None) for k, v in rules.items()]
  )


def _static_rules() -> list[Any]:
  """Flax's form of the rules that do not depend on a batch."""
  return [(k, v) for k, v in RULES.items() if k not in ('batch', 'rows')]
