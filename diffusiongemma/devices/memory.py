"""The device memory that a compiled program needs, before it runs.

  peak = arguments + results in new buffers + temporaries

as reported by XLA for the compiled program; arguments by group. The memory of a
device is that reported by the runtime, on a CPU the machine's free memory.
"""

from collections.abc import Mapping
import math
import resource
import sys
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusiongemma import config as configs


class Need(NamedTuple):
  """Bytes on each device.

  Attributes:
    arrays: arguments of the program, by group.
    temporaries: activations and results in new buffers.
    peak: peak of all.
  """

  arrays: dict[str, int]
  temporaries: int
  peak: int


def bytes_on_a_device(tree: Any) -> int:
  """Bytes of a tree of arrays or shapes; with shardings, of one shard each."""

  def count(x):
    sharding = getattr(x, 'sharding', None)
    shape = sharding.shard_shape(x.shape) if sharding else x.shape
    if jnp.issubdtype(x.dtype, jnp.integer):
      return jnp.iinfo(x.dtype).bits * math.prod(shape) // 8
    return x.dtype.itemsize * math.prod(shape)

  return sum(map(count, jax.tree.leaves(tree)))


def need_of(compiled: jax.stages.Compiled, parts: Mapping[str, Any]) -> Need:
  """The need of a compiled program with arguments in these groups."""
  arrays = {name: bytes_on_a_device(tree) for name, tree in parts.items()}
  analysis: Any = compiled.memory_analysis()
  temporaries = (
    analysis.temp_size_in_bytes
    + analysis.output_size_in_bytes
    - analysis.alias_size_in_bytes
  )
  peak = max(
    analysis.argument_size_in_bytes + temporaries,
    getattr(analysis, 'peak_memory_in_bytes', 0) or 0,
  )
  return Need(arrays, temporaries, peak)


def available(device: jax.Device) -> int | None:
  """Bytes that a program may use on a device of this process; None if
  unknown."""
  if device.platform == 'cpu':
    try:
      with open('/proc/meminfo') as stream:
        lines = dict(line.split(':', 1) for line in stream)
      free_bytes = int(lines['MemAvailable'].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
      return None
    return free_bytes // jax.local_device_count()
  stats = device.memory_stats() or {}
  return stats.get('bytes_limit')


def peak_in_use() -> int:
  """The most bytes that were in use so far, of the fullest device of this
  process; on a CPU, of the process."""
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  peak = max(s.get('peak_bytes_in_use', 0) for s in stats)
  # Linux counts in units of 1,024 bytes, macOS in bytes.
  unit = 1 if sys.platform == 'darwin' else 1024
  return peak or unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def table(need: Need, limit: int | None) -> str:
  """The need as lines of a table."""
  rows = [*need.arrays.items()]
  if need.temporaries:
    rows.append(('activations and temporaries', need.temporaries))
  rows.append(('total', need.peak))
  if limit is not None:
    rows.append(('available', limit))
  width = max(len(name) for name, _ in rows)
  return '\n'.join(
    f'  {name:<{width}}  {size / 1e9:8.2f} GB' for name, size in rows
  )


def check(need: Need, limit: int | None) -> None:
  """Raises `ConfigError`, with the table, if the need exceeds the limit."""
  if limit is None or need.peak <= limit:
    return
  raise configs.ConfigError(
    'This does not fit into the memory of a device:\n'
    f'{table(need, limit)}\n'
    'Try configs/tiny.py, or use --mode=plan to find what fits where: '
    'config.train.remat, a smaller config.data.batch_size, more '
    'config.train.accumulate_steps or more devices along config.mesh.fsdp.'
  )
