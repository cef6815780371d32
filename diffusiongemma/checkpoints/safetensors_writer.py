"""Writes Hugging Face folders of safetensors, tensor by tensor.

The library of this name needs all tensors in memory at once. Here disk space is
allocated before anything is read, each tensor is written at its offset when it
arrives, and a failure leaves no file.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import itertools
import json
import math
import os
from typing import Any

import numpy as np

from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import safetensors
from diffusiongemma.checkpoints.safetensors import Tensor

MAX_SHARD_BYTES = 5 * 10**9  # Of the tensors in a file.


def write_folder(
  folder: str,
  tensors: Mapping[str, tuple[Sequence[int], Any]],
  read: Callable[[str], np.ndarray],
  max_shard_bytes: int = MAX_SHARD_BYTES,
  on_bytes: Callable[[int], None] | None = None,
) -> None:
  """Writes `model.safetensors`, or an index and `model-00001-of-0000N...`.

  Disk space for all files is allocated before the first call of `read`, and one
  tensor is held at a time. A call that fails removes the files it created.

  Args:
    folder: exists, and holds no such files yet.
    tensors: `{name: (shape, dtype)}`. Files are filled in this order; within a
      file float32 comes before the 16-bit types, so that all are aligned.
    read: name -> tensor; called once each, in the order written.
    max_shard_bytes: most bytes of tensors in a file, unless a single tensor is
      larger.
    on_bytes: called with the bytes of each tensor written.

  Raises:
    CheckpointError: the disk is full, a file exists or can't be written, or
      `read` returned another shape or type than declared.
  """
  groups = _split(tensors, max_shard_bytes)
  paths = [os.path.join(folder, x) for x in _file_names(len(groups))]
  shards = list(map(_place, paths, groups))
  created: list[str] = []
  try:
    for path, (head, placed) in zip(paths, shards, strict=True):
      nbytes = len(head) + sum(x.nbytes for x in placed)
      _create(path, head, nbytes, created)
    for path, (_, placed) in zip(paths, shards, strict=True):
      _fill(path, placed, read, on_bytes)
    if len(shards) > 1:
      index = _index_json([x for _, placed in shards for x in placed])
      _create(
        os.path.join(folder, safetensors.INDEX), index, len(index), created
      )
  except BaseException:
    for path in created:
      with contextlib.suppress(OSError):
        os.remove(path)
    raise


def _split(
  tensors: Mapping[str, tuple[Sequence[int], Any]], max_shard_bytes: int
) -> list[list[Tensor]]:
  """The tensors of each file, still without path and offset."""
  groups: list[list[Tensor]] = [[]]
  room = max_shard_bytes
  for name, (shape, dtype) in tensors.items():
    dtype, shape = np.dtype(dtype), tuple(shape)
    if dtype not in safetensors.DTYPE_NAMES:
      raise CheckpointError(
        f'Tensor {files.quote(name)} is of {dtype}; safetensors are written in '
        f'{", ".join(safetensors.DTYPES)}.'
      )
    if name == '__metadata__' or not safetensors.is_text(name):
      raise CheckpointError(f'No tensor can have the name {files.quote(name)}.')
    nbytes = math.prod(shape) * dtype.itemsize
    if groups[-1] and nbytes > room:
      groups.append([])
      room = max_shard_bytes
    groups[-1].append(Tensor(name, dtype, shape, '', 0, nbytes))
    room -= nbytes
  return groups


def _file_names(count: int) -> list[str]:
  if count == 1:
    return [safetensors.SINGLE]
  numbers = range(1, count + 1)
  return [f'model-{i:05d}-of-{count:05d}.safetensors' for i in numbers]


def _place(path: str, tensors: list[Tensor]) -> tuple[bytes, list[Tensor]]:
  """(bytes of a file before its data, its tensors with path and offset)."""
  # Larger items first, so that each begins at a multiple of its item size.
  tensors = sorted(tensors, key=lambda x: -x.dtype.itemsize)
  bounds = itertools.accumulate((x.nbytes for x in tensors), initial=0)
  spans = list(itertools.pairwise(bounds))
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  for tensor, (begin, end) in zip(tensors, spans, strict=True):
    header[tensor.name] = {
      'dtype': safetensors.DTYPE_NAMES[tensor.dtype],
      'shape': tensor.shape,
      'data_offsets': [begin, end],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  if len(text) > files.MAX_JSON_BYTES:
    raise CheckpointError(
      f'{path!r} would have a header of {len(text)} bytes, and '
      f'{files.MAX_JSON_BYTES} are the limit: choose smaller files.'
    )
  head = len(text).to_bytes(8, 'little') + text
  placed = [
    dataclasses.replace(tensor, path=path, offset=len(head) + begin)
    for tensor, (begin, _) in zip(tensors, spans, strict=True)
  ]
  return head, placed


def _create(path: str, head: bytes, nbytes: int, created: list[str]) -> None:
  """Creates a file that begins with `head`, with `nbytes` allocated."""
  with (
    files.system_errors(f'{path!r} ({nbytes} bytes) cannot be written'),
    open(path, 'xb', buffering=0) as file,
  ):
    created.append(path)
    files.claim_room(file.fileno(), nbytes)
    _write(file.fileno(), memoryview(head))
    os.fsync(file.fileno())


def _fill(
  path: str,
  tensors: list[Tensor],
  read: Callable[[str], np.ndarray],
  on_bytes: Callable[[int], None] | None,
) -> None:
  """Writes the data of a created file."""
  # Not around `read`, whose errors are not about this file.
  errors = lambda: files.system_errors(f'{path!r} cannot be written')
  with errors():
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
  try:
    for tensor in tensors:
      view = _checked_bytes(tensor, read(tensor.name))
      with errors():
        os.lseek(descriptor, tensor.offset, os.SEEK_SET)
        _write(descriptor, view)
      del view  # Freed before the next is read.
      if on_bytes is not None:
        on_bytes(tensor.nbytes)
    with errors():
      os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _checked_bytes(tensor: Tensor, array: np.ndarray) -> memoryview:
  """The bytes of an array from `read`, copied only if it is not
  C-contiguous."""
  array = np.asarray(array)
  if array.dtype != tensor.dtype or array.shape != tensor.shape:
    raise CheckpointError(
      f'Tensor {files.quote(tensor.name)} for {tensor.path!r} is {array.dtype} '
      f'{array.shape}, and {tensor.dtype} {tensor.shape} was declared.'
    )
  return safetensors.bytes_of(np.ascontiguousarray(array))


def _write(descriptor: int, view: memoryview) -> None:
  done = 0
  while done < len(view):
    done += os.write(descriptor, view[done : done + files.CHUNK_BYTES])


def _index_json(tensors: list[Tensor]) -> bytes:
  """The index in the format of transformers."""
  index = {
    'metadata': {
      'total_parameters': sum(math.prod(x.shape) for x in tensors),
      'total_size': sum(x.nbytes for x in tensors),
    },
    'weight_map': {x.name: os.path.basename(x.path) for x in tensors},
  }
  return (json.dumps(index, indent=2, sort_keys=True) + '\n').encode()
