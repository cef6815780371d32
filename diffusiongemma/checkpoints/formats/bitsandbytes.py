"""bitsandbytes and torchao, through transformers; read as bfloat16.

  weight I8, SCB F32 [out]                              w = q SCB / 127
  weight U8 [n / 2, 1], weight.absmax, weight.quant_map, ...   w = map[q] absmax
  _weight_qdata I8, _weight_scale                       w = q s

transformers quantises only modules whose weights are not tied, which of this
network are the small ones, so they are not kept in few bits. Two values of 4
bits are in a byte, the first in its *high* bits.
"""

from collections.abc import Mapping
import json

import ml_dtypes
import numpy as np

from diffusiongemma.checkpoints import formats
from diffusiongemma.checkpoints.formats import Array
from diffusiongemma.checkpoints.formats import Parts

_STATE = 'weight.quant_state.bitsandbytes__nf4'
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def find(arrays: Mapping[str, Array], shape: tuple[int, ...]) -> Parts | None:
  """See `formats`."""
  names = arrays.keys()
  if {'weight', 'SCB'} <= names <= {'weight', 'SCB', 'weight_format'}:
    scales = arrays['SCB']
    formats.check_shape(scales, shape[:1])
    scale = lambda: scales.read()[:, None] / np.float32(127)
    return _product(arrays['weight'], scale, shape)
  if (
    {'_weight_qdata', '_weight_scale'}
    <= names
    <= {
      '_weight_qdata',
      '_weight_scale',
      '_weight_zero_point',
    }
  ):
    scales = arrays['_weight_scale']
    formats.check_shape(scales, (shape[0], 1), shape[:1])
    scale = lambda: scales.read().reshape(-1, 1)
    return _product(arrays['_weight_qdata'], scale, shape)
  if {'weight', 'weight.absmax', 'weight.quant_map', _STATE} <= names:
    return _four_bits(arrays, shape)
  return None


def _product(values: Array, scale, shape: tuple[int, ...]) -> Parts:
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
  values, most = arrays['weight'], arrays['weight.absmax']
  size = int(np.prod(shape))
  formats.check_shape(values, (size // 2, 1))
  if len(most.shape) != 1 or not most.shape[0] or size % most.shape[0]:
    raise most.error(f'are no scales of {size} values')

  def largest():
    x = most.read()
    if 'weight.nested_absmax' in arrays:
      state = json.loads(arrays[_STATE].read().tobytes())
      codes = arrays['weight.nested_quant_map'].read()[x]
      outer = arrays['weight.nested_absmax'].read()
      outer = np.repeat(outer, -(-len(codes) // len(outer)))[: len(codes)]
      x = codes * outer + np.float32(state['nested_offset'])
    return x[:, None]

  def dequantise(data):
    fields = np.stack([data >> 4, data & 15], axis=-1).reshape(-1)
    w = arrays['weight.quant_map'].read()[fields]
    w = w.reshape(len(largest()), -1) * largest()
    return w.reshape(shape).astype(_BFLOAT16)

  return {'': values.to(dequantise, shape, _BFLOAT16)}
