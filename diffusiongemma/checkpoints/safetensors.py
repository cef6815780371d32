"""Reads Hugging Face folders of safetensors, tensor by tensor.

  file = uint64 n | n bytes of JSON | data
  JSON = {name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}

The offsets count from the start of the data and cover it exactly. An index
names the files if there are several; the headers say what they hold. Files are
untrusted: everything in them is checked before use. The library of this name
maps whole files.
"""

from collections.abc import Mapping
import dataclasses
import itertools
import math
import os
import posixpath
from typing import Any
from typing import TypeGuard

from absl import logging
import ml_dtypes
import numpy as np

from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import foreign

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'

# The types in which the released model and its fine-tuned versions are stored.
DTYPES = {
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F16': np.dtype('<f2'),
  'F32': np.dtype('<f4'),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Also types of other tensors, such as positions, and of quantised weights.
_ALL_DTYPES = DTYPES | {
  'F64': np.dtype('<f8'),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
  'BOOL': np.dtype(bool),
  **{f'I{8 * n}': np.dtype(f'<i{n}') for n in (1, 2, 4, 8)},
  **{f'U{8 * n}': np.dtype(f'<u{n}') for n in (1, 2, 4, 8)},
}

MAX_DIMENSIONS = 32  # The limit of NumPy before 2.0 and of XLA.
MAX_BYTES = 2**63 - 1  # Of an array, empty dimensions aside: NumPy's limit.


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Name, type and position of a tensor in a file.

  Attributes:
    name: as in the file, `model.decoder.embed_tokens.weight`.
    dtype: bfloat16, float16 or float32 for weights; other tensors have any.
    shape: sizes, outermost first; `()` for a scalar.
    path: the file.
    offset: of its first byte, from the start of the file.
    nbytes: its length, the product of the shape times the item size.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  path: str
  offset: int
  nbytes: int


def list_tensors(folder: str) -> dict[str, Tensor]:
  """Every tensor of a folder, from the headers; data is read only of tensors
  that are in several files.

  Args:
    folder: holds `model.safetensors`, or `model.safetensors.index.json` and
      the files it names, there or in subfolders. Links must stay inside, or be
      those of the Hugging Face cache.

  Returns:
    `{name: Tensor}`, in the order of their data in the files.

  Raises:
    CheckpointError: there are no such files, or they are damaged, contradict
      each other or hold unsupported types.
  """
  if not os.path.isdir(folder):
    raise CheckpointError(
      f'{folder!r} is not a folder; give one that holds {SINGLE} or {INDEX}.'
    )
  # A dangling link counts as present, so that the error names the lost file.
  has_single = os.path.lexists(os.path.join(folder, SINGLE))
  if os.path.lexists(os.path.join(folder, INDEX)):
    weight_map = _read_index(folder)
    # transformers prefers the single file, which is right if the index is a
    # leftover. AutoRound names the single file as one of several.
    if not has_single or SINGLE in weight_map.values():
      return _list_indexed(folder, weight_map)
  if has_single:
    return _list_file(files.checked_path(folder, SINGLE))
  message = foreign.describe_folder(folder)
  if message is None:
    others = [x for x in os.listdir(folder) if x.endswith('.safetensors')]
    message = f'{folder!r} holds neither {SINGLE} nor {INDEX}'
    message += f', only {files.listed(others)}.' if others else '.'
  raise CheckpointError(message)


def read_tensor(tensor: Tensor) -> np.ndarray:
  """The tensor in a new, writable, C-contiguous array.

  Raises:
    CheckpointError: the file can't be read, has shrunk since it was listed, or
      memory is insufficient.
  """
  what = f'Tensor {files.quote(tensor.name)} in {tensor.path!r}'
  end = tensor.offset + tensor.nbytes
  with files.opened(tensor.path) as (descriptor, size):
    if size < end:
      raise CheckpointError(
        f'{what} ends at byte {end}, and the file is now {size} bytes long: '
        'it has changed since its header was read.'
      )
    try:
      array = np.empty(tensor.shape, tensor.dtype)
    except MemoryError as error:
      raise CheckpointError(
        f'{what} needs {tensor.nbytes} bytes of memory, more than there is.'
      ) from error
    files.read_into(bytes_of(array), descriptor, tensor.offset, what)
  return array


def has_bits(tensor: Tensor, array: np.ndarray) -> bool:
  """Whether a tensor is bit-equal to an array; reads `files.CHUNK_BYTES` at a
  time."""
  if (tensor.dtype, tensor.shape) != (array.dtype, array.shape):
    return False
  view = bytes_of(array)
  with files.opened(tensor.path) as (descriptor, _):
    for start in range(0, len(view), files.CHUNK_BYTES):
      part = view[start : start + files.CHUNK_BYTES]
      offset = tensor.offset + start
      read = files.read_bytes(descriptor, offset, len(part), tensor.path)
      if read != part:
        return False
  return True


def bytes_of(array: np.ndarray) -> memoryview:
  """The bytes of a C-contiguous array, without a copy."""
  return array.reshape(-1).view(np.uint8).data


def is_text(value: Any) -> bool:
  """Whether this is a string without lone surrogates."""
  if not isinstance(value, str):
    return False
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True


def _is_text_map(value: Any) -> TypeGuard[dict[str, str]]:
  return isinstance(value, dict) and all(
    is_text(x) for x in itertools.chain(value, value.values())
  )


def _list_file(path: str) -> dict[str, Tensor]:
  """The tensors of one file, in the order of their data."""
  with files.opened(path) as (descriptor, size):
    if size < 8:
      raise CheckpointError(
        f'{path!r} is {size} bytes long, too short for safetensors: download '
        'it again.'
      )
    length = int.from_bytes(files.read_bytes(descriptor, 0, 8, path), 'little')
    # Checked before reading: a small file must not cost gigabytes of memory.
    if length > files.MAX_JSON_BYTES:
      raise CheckpointError(
        f'{path!r} declares a header of {length} bytes, and '
        f'{files.MAX_JSON_BYTES} are the limit: it is damaged, or not '
        'safetensors.'
      )
    if length > size - 8:
      raise CheckpointError(
        f'{path!r} is truncated: its header is {length} bytes long, the file '
        f'{size}; download it again.'
      )
    data = files.read_bytes(descriptor, 8, length, path)
  header = files.parse_json(data, f'The header of {path!r}')
  if not _is_text_map(header.pop('__metadata__', {})):
    raise CheckpointError(f'__metadata__ of {path!r} is not strings by name.')
  start = 8 + length
  tensors = [
    _checked_entry(name, entry, path, start, size)
    for name, entry in header.items()
  ]
  tensors.sort(key=lambda x: (x.offset, x.nbytes))
  _check_cover(tensors, path, start, size)
  return {tensor.name: tensor for tensor in tensors}


def _checked_entry(
  name: str, entry: Any, path: str, start: int, size: int
) -> Tensor:
  """The tensor of a header entry; the data begins at byte `start` of the
  file."""

  def refuse(reason: str) -> CheckpointError:
    return CheckpointError(f'Tensor {files.quote(name)} in {path!r} {reason}.')

  if not is_text(name):
    raise refuse('has a name that is not text')
  fields = {'dtype', 'shape', 'data_offsets'}
  if not isinstance(entry, dict) or entry.keys() != fields:
    raise refuse('has not exactly the fields dtype, shape and data_offsets')
  dtype, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
  if not isinstance(dtype, str) or dtype not in _ALL_DTYPES:
    kind = (
      files.quote(dtype) if isinstance(dtype, str) else 'that is not a string'
    )
    raise refuse(f'has a dtype {kind}; supported are {", ".join(DTYPES)}')
  if not _are_sizes(shape):
    raise refuse('has a shape that is not a list of whole numbers >= 0')
  if len(shape) > MAX_DIMENSIONS:
    raise refuse(
      f'has {len(shape)} dimensions, and {MAX_DIMENSIONS} are the limit'
    )
  itemsize = _ALL_DTYPES[dtype].itemsize
  # NumPy has this limit even if another dimension is 0.
  if math.prod(x or 1 for x in shape) * itemsize > MAX_BYTES:
    raise refuse(f'has a shape, {shape}, that no array can have')
  if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
    raise refuse('has data_offsets that are not [begin, end] with begin <= end')
  begin, end = offsets
  if end > size - start:
    raise refuse(
      f'ends at byte {end} of the data, of which there are {size - start}: the '
      'file is truncated; download it again'
    )
  nbytes = math.prod(shape) * itemsize
  if nbytes != end - begin:
    raise refuse(
      f'has {end - begin} bytes of data, and {dtype} of shape {shape} needs '
      f'{nbytes}'
    )
  return Tensor(
    name, _ALL_DTYPES[dtype], tuple(shape), path, start + begin, nbytes
  )


def _are_sizes(value: Any) -> bool:
  # A bool is an int to isinstance.
  return isinstance(value, list) and all(
    type(x) is int and x >= 0 for x in value
  )


def _check_cover(
  tensors: list[Tensor], path: str, start: int, size: int
) -> None:
  """Raises `CheckpointError` unless the sorted tensors cover `start` to `size`
  without gaps and overlaps.

  The format requires it: bytes of two tensors or of none are damage, or hide
  something.
  """
  position, before = start, 'the header'
  for tensor in tensors:
    what = f'Tensor {files.quote(tensor.name)} in {path!r}'
    if tensor.offset < position:
      raise CheckpointError(
        f'{what} begins {position - tensor.offset} bytes before the end of '
        f'{before}: they overlap.'
      )
    if tensor.offset > position:
      raise CheckpointError(
        f'{what} begins {tensor.offset - position} bytes after the end of '
        f'{before}: a hole that belongs to no tensor.'
      )
    position, before = tensor.offset + tensor.nbytes, files.quote(tensor.name)
  if position != size:
    raise CheckpointError(
      f'{path!r} has {size - position} bytes after the end of {before}, its '
      'last: they belong to no tensor.'
    )


def _read_index(folder: str) -> dict[str, str]:
  """`{name of a tensor: path of its file, relative to the folder}`."""
  path = files.checked_path(folder, INDEX)
  weight_map = files.read_json(folder, INDEX).get('weight_map')
  if not _is_text_map(weight_map):
    raise CheckpointError(
      f'{path!r} has no weight_map from names of tensors to names of files.'
    )
  return {
    name: _checked_shard(shard, path) for name, shard in weight_map.items()
  }


def _checked_shard(shard: str, path: str) -> str:
  """The normalised path of a file that an index names."""
  is_inside = '..' not in shard.split('/') and not shard.startswith('/')
  is_plain = '\0' not in shard and len(shard) <= 1000
  if not (is_inside and is_plain and shard.endswith('.safetensors')):
    raise CheckpointError(
      f'{path!r} names the file {files.quote(shard)}, which is not the path of '
      'a .safetensors file in its folder.'
    )
  return posixpath.normpath(shard)


def _list_indexed(
  folder: str, weight_map: Mapping[str, str]
) -> dict[str, Tensor]:
  """The tensors of all files that the index names; the headers of the files
  decide which tensors there are, and where."""
  # Before any file is opened: most often a download was not finished.
  shards = sorted(set(weight_map.values()))
  paths = [files.checked_path(folder, shard) for shard in shards]
  tensors: dict[str, Tensor] = {}
  for path in paths:
    for name, tensor in _list_file(path).items():
      first = tensors.setdefault(name, tensor)
      if first is not tensor and not has_bits(tensor, read_tensor(first)):
        raise CheckpointError(
          f'{files.quote(name)} in {path!r} is not the one in {first.path!r}: '
          'the files are of different checkpoints.'
        )
  for what, names in (
    ('names', weight_map.keys() - tensors.keys()),
    ('does not name', tensors.keys() - weight_map.keys()),
  ):
    if names:
      logging.warning(
        '%s %s %s; what its files hold is read.',
        *(os.path.join(folder, INDEX), what, files.listed(names)),
      )
  return tensors
