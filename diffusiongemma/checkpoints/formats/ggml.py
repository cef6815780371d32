"""The blocks of GGUF, [.., out, bytes of a row].

  Q8_0   34 bytes per 32    d, int8 q                      w = d q
  Q4_0   18 bytes per 32    d, nibbles                     w = d (q - 8)
  Q4_K  144 bytes per 256   d, dmin, 8 scales and minima   w = d sc q - dmin m
  Q5_K  176 bytes per 256     of 6 bits, nibbles, high bits
  Q6_K  210 bytes per 256   low 4 and high 2 bits of q,    w = d sc (q - 32)
                              16 int8 scales, d

d and dmin are float16. Of a row of nibbles the low ones come first. Checked
against the dequantisation of the `gguf` package.
"""

from collections.abc import Mapping

import numpy as np

from diffusiongemma.checkpoints import formats
from diffusiongemma.checkpoints.formats import Array
from diffusiongemma.checkpoints.formats import Parts

# Number of the type in a file: (name, values of a block, bytes of a block).
TYPES = {
  2: ('Q4_0', 32, 18),
  8: ('Q8_0', 32, 34),
  12: ('Q4_K', 256, 144),
  13: ('Q5_K', 256, 176),
  14: ('Q6_K', 256, 210),
}
# Arrays of blocks have this and the name of their type at the end.
SUFFIX = 'ggml.'


def find(arrays: Mapping[str, Array], shape: tuple[int, ...]) -> Parts | None:
  """See `formats`."""
  ((name, blocks), *more) = arrays.items()
  if more or not name.startswith(SUFFIX):
    return None
  kind = name.removeprefix(SUFFIX)
  kinds = {x: rest for x, *rest in TYPES.values()}
  if kind not in kinds or blocks.dtype != np.uint8:
    return None
  size, num_bytes = kinds[kind]
  if shape[-1] % size:
    raise blocks.error(f'has rows of {shape[-1]}, no multiple of {size}')
  formats.check_shape(blocks, (*shape[:-1], shape[-1] // size * num_bytes))

  def part(change, dtype, per_block=1):
    """An array with some values per block."""
    width = shape[-1] // size * per_block

    def split(data):
      data = data.reshape(*shape[:-1], -1, num_bytes)
      return np.ascontiguousarray(change(data)).view(dtype)

    return blocks.to(split, (*shape[:-1], width), dtype)

  half = lambda first: lambda data: data[..., first : first + 2]
  if kind == 'Q8_0':
    return {
      'values': part(lambda data: data[..., 2:], np.int8, size),
      'scales': part(half(0), np.float16),
    }
  if kind == 'Q4_0':
    values = lambda data: formats.signed(_nibbles(data[..., 2:], 16), 4)
    return {
      'values': part(values, formats.INT4, size),
      'scales': part(half(0), np.float16),
    }
  if kind == 'Q6_K':
    return {
      'values': part(_six_bits, np.int8, size),
      'scales': part(lambda data: data[..., 192:208], np.int8, 16),
      'outer': part(half(208), np.float16),
    }
  parts = {
    'scales': part(lambda data: _scales(data)[0], np.uint8, 8),
    'minima': part(lambda data: _scales(data)[1], np.uint8, 8),
    'outer': part(half(0), np.float16),
    'outer_minima': part(half(2), np.float16),
  }
  if kind == 'Q5_K':
    return {'values': part(_five_bits, np.int8, size), **parts}
  values = lambda data: formats.signed(_nibbles(data[..., 16:], 32), 4)
  zeros = formats.constant(blocks, -8, shape)
  return {'values': part(values, formats.INT4, size), 'zeros': zeros, **parts}


def _nibbles(data: np.ndarray, count: int) -> np.ndarray:
  """Of each `count` bytes the low halves, then the high ones."""
  data = data.reshape(*data.shape[:-1], -1, 1, count)
  fields = np.concatenate([data & 15, data >> 4], axis=-2)
  return fields.reshape(*data.shape[:-3], -1)


def _scales(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The 8 scales and the 8 minima of a block of Q4_K or Q5_K."""
  low, middle, high = (data[..., i : i + 4] for i in (4, 8, 12))
  scales = low & 63, (high & 15) | (low >> 6) << 4
  minima = middle & 63, (high >> 4) | (middle >> 6) << 4
  return np.concatenate(scales, axis=-1), np.concatenate(minima, axis=-1)


def _five_bits(data: np.ndarray) -> np.ndarray:
  low = _nibbles(data[..., 48:], 32)
  shift = np.arange(8, dtype=np.uint8)[:, None]
  high = (data[..., None, 16:48] >> shift & 1) << 4
  return low | high.reshape(low.shape)


def _six_bits(data: np.ndarray) -> np.ndarray:
  # Each half of a block has 64 low and 32 high bytes.
  low = data[..., :128].reshape(*data.shape[:-1], 2, 64)
  low = np.concatenate([low & 15, low >> 4], axis=-1)
  high = data[..., 128:192].reshape(*data.shape[:-1], 2, 1, 32)
  shift = np.array([0, 2, 4, 6], np.uint8)[:, None]
  high = (high >> shift & 3) << 4
  fields = low | high.reshape(low.shape)
  return (fields.astype(np.int8) - 32).reshape(*data.shape[:-1], 256)
