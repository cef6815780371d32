"""bitsandbytes and torchao, through transformers; read as bfloat16.

  weight I8, SCB F32 [out]                              w = q SCB / 127
  weight U8 [n / 2, 1], weight.absmax, weight.quant_map, ...   w = map[q] absmax
  _weight_qdata I8, _weight_scale                       w = q s
                    (_weight_zero_point must be zero)

transformers quantises only modules whose weights are not tied, which of this
network are the small ones, so they are not kept in few bits. Two values of 4
bits are in a byte, the first in its *high* bits.
"""

from collections.abc import Callable
from collections.abc import Mapping
import math
from typing import Any

import ml_dtypes
import numpy as np

from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import formats
from diffusiongemma.checkpoints.formats import Array
from diffusiongemma.checkpoints.formats import Parts

_STATE = 'weight.quant_state.bitsandbytes__nf4'
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_NESTED_BLOCK = 256  # Scales that share a scale.


def find(arrays: Mapping[str, Array], shape: tuple[int, ...]) -> Parts | None:
  """See `formats`."""
  names = arrays.keys()
  if len(shape) != 2:
    return None
  if {'weight', 'SCB'} <= names <= {'weight', 'SCB', 'weight_format'}:
    scales = arrays['SCB']
    formats.check_shape(scales, shape[:1])
    formats.check_groups(scales._replace(shape=(*shape[:1], 1)), shape)
    scale = lambda: scales.read()[:, None] / np.float32(127)
    return _product(arrays['weight'], scale, shape)
  torchao = {'_weight_qdata', '_weight_scale'}
  if torchao <= names <= torchao | {'_weight_zero_point'}:
    scales, zeros = arrays['_weight_scale'], arrays.get('_weight_zero_point')
    formats.check_shape(scales, (shape[0], 1), shape[:1])
    formats.check_groups(scales._replace(shape=(*shape[:1], 1)), shape)

    def read_scales():
      if zeros is not None and zeros.read().any():
        raise zeros.error('is not zero, which is not read')
      return scales.read().reshape(-1, 1)

    return _product(arrays['_weight_qdata'], read_scales, shape)
  if {'weight', 'weight.absmax', 'weight.quant_map', _STATE} <= names:
    return _four_bits(arrays, shape)
  return None


def _product(
  values: Array, scale: Callable[[], np.ndarray], shape: tuple[int, ...]
) -> Parts:
  formats.check_shape(values, shape)
  if values.dtype != np.int8:
    raise values.error(f'has the type {values.dtype}, not int8')
  return {
    '': values.to(
      lambda q: (q.astype(np.float32) * scale()).astype(_BFLOAT16),
      dtype=_BFLOAT16,
    )
  }


def _four_bits(arrays: Mapping[str, Array], shape: tuple[int, ...]) -> Parts:
  size = math.prod(shape)
  values, most = arrays['weight'], arrays['weight.absmax']
  levels = arrays['weight.quant_map']
  count = most.shape[0] if len(most.shape) == 1 else 0
  if not count or size % count:
    raise most.error(f'are no scales of {size} values')
  _check(values, (size // 2, 1), np.uint8)
  _check(levels, (16,), np.float32)
  nested = arrays.get('weight.nested_absmax')
  if nested is None:
    _check(most, (count,), np.float32)
    largest = most.read
  else:
    codes = arrays.get('weight.nested_quant_map')
    if codes is None:
      raise nested.error('has no weight.nested_quant_map beside it')
    _check(most, (count,), np.uint8)
    _check(codes, (256,), np.float32)
    _check(nested, (-(-count // _NESTED_BLOCK),), np.float32)

    def largest():
      outer = np.repeat(nested.read(), _NESTED_BLOCK)[:count]
      return codes.read()[most.read()] * outer + _offset(arrays[_STATE])

  def dequantise(data):
    fields = np.stack([data >> 4, data & 15], axis=-1).reshape(count, -1)
    w = levels.read()[fields] * largest()[:, None]
    return w.reshape(shape).astype(_BFLOAT16)

  return {'': values.to(dequantise, shape, _BFLOAT16)}


def _check(array: Array, shape: tuple[int, ...], dtype: Any) -> None:
  formats.check_shape(array, shape)
  if array.dtype != dtype:
    raise array.error(f'has the type {array.dtype}, not {np.dtype(dtype)}')


def _offset(state: Array) -> np.float32:
  """What was subtracted from the scales before they were quantised."""
  if state.dtype != np.uint8:
    raise state.error(f'has the type {state.dtype}, not uint8')
  values = files.parse_json(state.read().tobytes(), state.name)
  offset = values.get('nested_offset')
  if not isinstance(offset, float):
    raise state.error('has no nested_offset')
  return np.float32(offset)
