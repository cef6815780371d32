"""Hugging Face folders of safetensors, read tensor by tensor.

  file = uint64 n | n bytes of JSON | data
  JSON = {name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}

The offsets count from the start of the data, which they cover exactly; an
index names the file of each tensor where there are several. Files come from
strangers: nothing in them is believed before it is checked. The library of
this name maps whole files.
"""

from collections.abc import Mapping
import dataclasses
import fnmatch
import itertools
import math
import os
from typing import Any

import ml_dtypes
import numpy as np

from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
PICKLES = ('pytorch_model*.bin', 'pytorch_model.bin.index.json')
PICKLES += ('*.pt', '*.pth', '*.ckpt', '*.pkl')

# All that the released model and its fine-tuned children are stored in.
DTYPES = {
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F16': np.dtype('<f2'),
  'F32': np.dtype('<f4'),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_DIMENSIONS = 32  # More, NumPy before 2.0 and XLA can't hold.
MAX_BYTES = 2**63 - 1  # Of an array, empty dimensions aside: NumPy's limit.


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies.

  Attributes:
    name: as in the file, `model.decoder.embed_tokens.weight`.
    dtype: bfloat16, float16 or float32.
    shape: sizes, outermost first; `()` for a scalar.
    path: the file.
    offset: of its first byte, from the start of the file.
    nbytes: its length there, the product of the shape times the item size.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  path: str
  offset: int
  nbytes: int


def list_tensors(folder: str) -> dict[str, Tensor]:
  """Every tensor of a folder, from headers alone: no data is read.

  Args:
    folder: holds `model.safetensors`, or `model.safetensors.index.json` and
      the files it names. Links must stay inside, or be those of the Hugging
      Face cache.

  Returns:
    `{name: Tensor}`, in the order in which they lie in the files.

  Raises:
    CheckpointError: there are no such files, or they are damaged,
      contradict each other or hold what this package can't read.
  """
  if not os.path.isdir(folder):
    raise CheckpointError(
      f'{folder!r} is not a folder; give one that holds {SINGLE} or {INDEX}.'
    )
  # With both there, transformers takes the single file: so the weights are
  # the same here. A dangling link counts as there: it tells of a lost file.
  if os.path.lexists(os.path.join(folder, SINGLE)):
    return _list_file(files.checked_path(folder, SINGLE))
  if os.path.lexists(os.path.join(folder, INDEX)):
    return _list_indexed(folder)
  with files.system_errors(f'{folder!r} cannot be read'):
    names = os.listdir(folder)
  pickles = [x for x in names if any(fnmatch.fnmatch(x, p) for p in PICKLES)]
  if pickles:
    raise CheckpointError(
      f'{folder!r} holds pickles ({files.listed(pickles)}), which can run any '
      'code when opened and are not read here. Where you trust them, convert '
      "them to safetensors with transformers' `save_pretrained` first."
    )
  others = [x for x in names if x.endswith('.safetensors')]
  raise CheckpointError(
    f'{folder!r} holds neither {SINGLE} nor {INDEX}'
    + (f', only {files.listed(others)}.' if others else '.')
  )


def read_tensor(tensor: Tensor) -> np.ndarray:
  """The tensor in a fresh, writable, C-contiguous array.

  Raises:
    CheckpointError: the file can't be read, has shrunk since it was listed,
      or there is no memory.
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
        f'{what} needs {tensor.nbytes} bytes of memory, which are not there.'
      ) from error
    files.read_into(bytes_of(array), descriptor, tensor.offset, what)
  return array


def bytes_of(array: np.ndarray) -> memoryview:
  """The bytes of a C-contiguous array, not copied."""
  return memoryview(array.reshape(-1).view(np.uint8))


def is_text(value: Any) -> bool:
  """Whether this is a string without halves of surrogate pairs."""
  if not isinstance(value, str):
    return False
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True


def _is_text_map(value: Any) -> bool:
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
    # Before it is read: a few bytes must not cost more memory than they are.
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
  """One entry of the header, where its data begins at `start`."""

  def refuse(reason: str) -> CheckpointError:
    return CheckpointError(f'Tensor {files.quote(name)} in {path!r} {reason}.')

  if not is_text(name):
    raise refuse('has a name that is not text')
  fields = {'dtype', 'shape', 'data_offsets'}
  if not isinstance(entry, dict) or entry.keys() != fields:
    raise refuse('has not exactly the fields dtype, shape and data_offsets')
  dtype, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
  if not isinstance(dtype, str) or dtype not in DTYPES:
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
  itemsize = DTYPES[dtype].itemsize
  # Also where another dimension is 0, in which NumPy looks no different.
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
  return Tensor(name, DTYPES[dtype], tuple(shape), path, start + begin, nbytes)


def _are_sizes(value: Any) -> bool:
  # A bool is an int to isinstance.
  return isinstance(value, list) and all(
    type(x) is int and x >= 0 for x in value
  )


def _check_cover(
  tensors: list[Tensor], path: str, start: int, size: int
) -> None:
  """Raises unless sorted tensors lie end to end from `start` to `size`.

  The format demands it: bytes read twice or never are damage, or hide
  something.
  """
  place, before = start, 'the header'
  for tensor in tensors:
    what = f'Tensor {files.quote(tensor.name)} in {path!r}'
    if tensor.offset < place:
      raise CheckpointError(
        f'{what} begins {place - tensor.offset} bytes before the end of '
        f'{before}: they overlap.'
      )
    if tensor.offset > place:
      raise CheckpointError(
        f'{what} begins {tensor.offset - place} bytes after the end of '
        f'{before}: a hole that belongs to no tensor.'
      )
    place, before = tensor.offset + tensor.nbytes, files.quote(tensor.name)
  if place != size:
    raise CheckpointError(
      f'{path!r} has {size - place} bytes after the end of {before}, its last: '
      'they belong to no tensor.'
    )


def _list_indexed(folder: str) -> dict[str, Tensor]:
  """The tensors of all files that the index names."""
  path = files.checked_path(folder, INDEX)
  with files.opened(path) as (descriptor, size):
    if size > files.MAX_JSON_BYTES:
      raise CheckpointError(
        f'{path!r} is {size} bytes long, and {files.MAX_JSON_BYTES} are the '
        'limit.'
      )
    data = files.read_bytes(descriptor, 0, size, path)
  index = files.parse_json(data, repr(path))
  weight_map = index.get('weight_map')
  if not _is_text_map(weight_map):
    raise CheckpointError(
      f'{path!r} has no weight_map from names of tensors to names of files.'
    )
  names: dict[str, set[str]] = {}
  for name, shard in weight_map.items():
    names.setdefault(shard, set()).add(name)
  for shard in names:
    _check_shard_name(shard, path)
  # Before any is opened: most often a download was not finished.
  paths = {shard: files.checked_path(folder, shard) for shard in sorted(names)}
  tensors: dict[str, Tensor] = {}
  for shard in paths:
    found = _list_file(paths[shard])
    _check_shard(found, weight_map, names[shard], shard, path)
    tensors.update(found)
  _check_total(index.get('metadata', {}), tensors, path)
  return tensors


def _check_shard_name(shard: str, path: str) -> None:
  plain = '/' not in shard and '\0' not in shard and len(shard) <= 255
  if not plain or not shard.endswith('.safetensors'):
    raise CheckpointError(
      f'{path!r} names the file {files.quote(shard)}, which is not the plain '
      'name of a .safetensors file beside it.'
    )


def _check_shard(
  found: Mapping[str, Tensor],
  weight_map: Mapping[str, str],
  wanted: set[str],
  shard: str,
  path: str,
) -> None:
  """Raises unless a file holds what the index says, and nothing else."""
  lost = [x for x in wanted if x not in found]
  if lost:
    raise CheckpointError(
      f'{path!r} places {files.listed(lost)} in {files.quote(shard)}, which '
      'has no such tensor: the files are of different checkpoints.'
    )
  extra = [x for x in found if x not in wanted]
  if extra:
    places = {weight_map[x] for x in extra if x in weight_map}
    where = f'in {files.listed(places)}' if places else 'nowhere'
    raise CheckpointError(
      f'{files.quote(shard)} holds {files.listed(extra)}, which {path!r} '
      f'places {where}: duplicates, or files of different checkpoints.'
    )


def _check_total(
  metadata: Any, tensors: Mapping[str, Tensor], path: str
) -> None:
  total = sum(tensor.nbytes for tensor in tensors.values())
  if not isinstance(metadata, dict):
    raise CheckpointError(f'metadata of {path!r} is not an object.')
  # Some versions of transformers wrote a float; as a number it is the same.
  if metadata.get('total_size', total) != total:
    raise CheckpointError(
      f'total_size of {path!r} is not {total}, the bytes of its tensors: the '
      'files are of different checkpoints.'
    )
