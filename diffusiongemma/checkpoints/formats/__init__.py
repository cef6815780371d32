"""How the tools of the field store a quantised matrix: a file per tool.

Each has a function `find(arrays, shape)`. Of the arrays of one matrix, by the
ends of their names ('weight', 'weight_scale'), it makes those of
`ops.blocks.Blocks`; if the names are not its own, it returns None. What the
config claims is not asked. `SCHEMES` lists the functions; a new tool is a file
and a row.

Matrices are [out, in] here, possibly with an axis of experts in front, numbers
per group [out, groups]. Sources of the layouts: files that the tools wrote, and
their own dequantised matrices.
"""

from collections.abc import Callable
from collections.abc import Mapping
import math
from typing import Any
from typing import NamedTuple

import ml_dtypes
import numpy as np

from diffusiongemma.checkpoints import CheckpointError

FLOAT4 = np.dtype(ml_dtypes.float4_e2m1fn)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
POWER = np.dtype(ml_dtypes.float8_e8m0fnu)  # 2^(byte - 127)
INT4 = np.dtype(ml_dtypes.int4)
# Types of numbers per group; uint8 stands for floats of 8 bits.
_SCALES = (
  *(np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)),
  *(FLOAT8, POWER, np.dtype(np.uint8)),
)


class Array(NamedTuple):
  """An array in a file, not yet read.

  Attributes:
    name: in the file, or of the matrix that it belongs to.
    path: of the file.
    dtype: type of its elements.
    shape: its sizes.
    read: () -> the array. Raises `CheckpointError`.
    has_bits: (array) -> whether it has the type, the shape and the bits of this
      one; None where there are no copies to be compared.
  """

  name: str
  path: str
  dtype: np.dtype
  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]
  has_bits: Callable[[np.ndarray], bool] | None = None

  def to(
    self,
    change: Callable[[np.ndarray], np.ndarray],
    shape: tuple[int, ...] | None = None,
    dtype: Any = None,
  ) -> 'Array':
    """The array after a change that is made when it is read."""
    read, dtype = self.read, np.dtype(dtype or self.dtype)
    shape = self.shape if shape is None else shape

    def changed():
      return np.ascontiguousarray(change(read())).reshape(shape).view(dtype)

    return self._replace(shape=tuple(shape), dtype=dtype, read=changed)

  def error(self, problem: str) -> CheckpointError:
    """An error of this array."""
    return CheckpointError(f'{self.name} in {self.path} {problem}.')


# The arrays of `Blocks` by name; '' is an array that is not quantised.
Parts = dict[str, Array]
Find = Callable[[Mapping[str, Array], tuple[int, ...]], Parts | None]


def check_shape(array: Array, *shapes: tuple[int, ...]) -> None:
  """Raises `CheckpointError` unless an array has one of these shapes."""
  if array.shape not in shapes:
    wanted = ' or '.join(str(list(shape)) for shape in shapes)
    raise array.error(
      f'has the shape {list(array.shape)}; by the config it is {wanted}'
    )


def check_groups(array: Array, shape: tuple[int, ...]) -> int:
  """The number of groups of an array [.., out, groups] for a matrix of this
  shape. Raises `CheckpointError` if they do not divide the inputs."""
  if array.dtype not in _SCALES:
    raise array.error(f'has the type {array.dtype}, which is none of scales')
  *rows, groups = array.shape or (0,)
  if tuple(rows) != shape[:-1] or not groups or shape[-1] % groups:
    raise array.error(
      f'has the shape {list(array.shape)}, which are no groups of a matrix '
      f'{list(shape)}'
    )
  return groups


def packed_bits(array: Array, shape: tuple[int, ...], axis: int = -1) -> int:
  """The bits of the fields that are packed into words along an axis of a
  matrix. Raises `CheckpointError` if no width from 2 to 8 gives this shape."""
  if array.dtype not in (np.int32, np.uint32):
    raise array.error(f'has the type {array.dtype}, not int32 or uint32')
  for bits in (2, 3, 4, 5, 6, 8):
    packed, word = list(shape), 8 * array.dtype.itemsize
    if shape[axis] * bits % word == 0:
      packed[axis] = shape[axis] * bits // word
      if tuple(packed) == array.shape:
        return bits
  raise array.error(
    f'has the shape {list(array.shape)}, which is no packed matrix '
    f'{list(shape)}'
  )


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
  """The unsigned fields of packed words along the last axis, uint8, the lowest
  bits of a word first; a field may cross the boundary of two words."""
  data = np.ascontiguousarray(words).view(np.uint8)
  if bits == 8:
    return data
  num_bytes = math.lcm(bits, 8) // 8
  count = 8 * num_bytes // bits
  fields = np.empty((*data.shape[:-1], data.shape[-1] * 8 // bits), np.uint8)
  mask = 2**bits - 1
  for index in range(count):
    first, shift = divmod(index * bits, 8)
    field = data[..., first::num_bytes] >> shift
    if shift + bits > 8:
      field |= data[..., first + 1 :: num_bytes] << (8 - shift)
    fields[..., index::count] = field & mask
  return fields


def signed(fields: np.ndarray, bits: int) -> np.ndarray:
  """Unsigned fields minus half of their range: int4, of up to 4 bits, or
  int8."""
  values = (fields ^ (128 if bits == 8 else 0)).view(np.int8)
  if bits < 8:
    values = values - np.int8(2 ** (bits - 1))
  return values.view(INT4) if bits <= 4 else values


def signed_type(bits: int) -> np.dtype:
  """The type of `signed`."""
  return INT4 if bits <= 4 else np.dtype(np.int8)


def constant(like: Array, value: int, shape: tuple[int, ...]) -> Array:
  """An array [.., out, 1] of one int8 value, for a matrix of this shape."""
  shape = (*shape[:-1], 1)
  read = lambda: np.full(shape, value, np.int8)
  return like._replace(dtype=np.dtype(np.int8), shape=shape, read=read)


def per_row(array: Array, shape: tuple[int, ...], divides=False) -> Array:
  """A number of a whole matrix as one per row, [.., out, 1], float32; with
  `divides`, its reciprocal."""
  if math.prod(array.shape) != 1:
    raise array.error('is no single number')
  shape = (*shape[:-1], 1)

  def spread(number):
    number = number.astype(np.float32).reshape(())
    if not 0 < number < np.inf:
      raise array.error(f'is {number}, which is no scale')
    return np.full(shape, 1 / number if divides else number)

  return array.to(spread, shape, np.float32)
