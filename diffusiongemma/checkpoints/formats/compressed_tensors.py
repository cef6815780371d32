"""compressed-tensors (llmcompressor), and modelopt, which has the same arrays.

  weight F8_E4M3 | I8, weight_scale                         w = q s
  weight_packed I32, weight_scale, weight_shape, and
    if asymmetric weight_zero_point                         w = (q - z) s
  weight_packed U8, weight_scale F8_E4M3, weight_global_scale   w = q s / global
  weight U8, weight_scale F8_E4M3, weight_scale_2 (modelopt)    w = q s global
  weight_packed U8, weight_scale U8                         w = q 2^(s - 127)

Scales are per matrix, per row, per group or per block of 128 x 128. Two values
of 4 bits are in a byte, the first in its low bits.
"""

from collections.abc import Mapping
import math

import numpy as np

from diffusiongemma.checkpoints import formats
from diffusiongemma.checkpoints.formats import Array
from diffusiongemma.checkpoints.formats import Parts

# Scales of activations and of the KV cache, which are not read.
IGNORED = (
  *('input_scale', 'input_global_scale', 'input_zero_point'),
  *('output_scale', 'k_scale', 'v_scale'),
)
_BLOCK = 128


def find(arrays: Mapping[str, Array], shape: tuple[int, ...]) -> Parts | None:
  """See `formats`."""
  names = arrays.keys()
  if names == {'weight', 'weight_scale'}:
    return _scaled(arrays['weight'], arrays['weight_scale'], shape)
  if names == {'weight_packed', 'weight_scale'}:
    return _powers(arrays['weight_packed'], arrays['weight_scale'], shape)
  if names == {'weight_packed', 'weight_scale', 'weight_global_scale'}:
    outer = formats.per_row(arrays['weight_global_scale'], shape, divides=True)
    values, scales = arrays['weight_packed'], arrays['weight_scale']
    return _blocks_of_16(values, scales, outer, shape)
  if names == {'weight', 'weight_scale', 'weight_scale_2'}:
    outer = formats.per_row(arrays['weight_scale_2'], shape)
    return _blocks_of_16(arrays['weight'], arrays['weight_scale'], outer, shape)
  if len(shape) != 2:
    return None
  packed = {'weight_packed', 'weight_scale', 'weight_shape'}
  if packed <= names <= packed | {'weight_zero_point'}:
    return _packed(arrays, shape)
  return None


def _scaled(values: Array, scales: Array, shape: tuple[int, ...]) -> Parts:
  formats.check_shape(values, shape)
  if values.dtype not in (formats.FLOAT8, np.int8):
    raise values.error(
      f'has the type {values.dtype}, not float8_e4m3fn or int8'
    )
  *experts, outputs, inputs = shape
  blocks = tuple(-(-size // _BLOCK) for size in shape)
  if math.prod(scales.shape) == 1 and outputs > 1:
    scales = formats.per_row(scales, shape)
  elif not experts and scales.shape == blocks and blocks[0] != outputs:
    # The last block may be a part of one.
    group = math.gcd(_BLOCK, inputs)
    row = np.arange(outputs) // _BLOCK
    column = np.arange(inputs // group) * group // _BLOCK
    scales = scales.to(
      lambda s: s[row[:, None], column], (outputs, len(column))
    )
  elif scales.shape == (outputs,):
    scales = scales.to(lambda s: s, (outputs, 1))
  formats.check_groups(scales, shape)
  return {'values': values, 'scales': scales}


def _packed(arrays: Mapping[str, Array], shape: tuple[int, ...]) -> Parts:
  words, scales = arrays['weight_packed'], arrays['weight_scale']
  bits = formats.packed_bits(words, shape)
  groups = formats.check_groups(scales, shape)

  def to_values(w):
    claimed = arrays['weight_shape']
    if tuple(claimed.read()) != shape:
      raise claimed.error(
        f'is {list(claimed.read())}; by the config it is {list(shape)}'
      )
    return formats.signed(formats.unpack(w, bits), bits)

  values = words.to(to_values, shape, formats.signed_type(bits))
  parts = {'values': values, 'scales': scales}
  if zeros := arrays.get('weight_zero_point'):
    # Packed along the outputs.
    formats.packed_bits(zeros, (shape[0], groups), axis=0)
    parts['zeros'] = zeros.to(
      lambda w: formats.signed(formats.unpack(w.T, bits), bits).T.astype('i1'),
      (shape[0], groups),
      np.int8,
    )
  return parts


def unpack_pairs(values: Array, shape: tuple[int, ...]) -> Array:
  """E2M1 values of which two are in a byte."""
  formats.check_shape(values, (*shape[:-1], shape[-1] // 2))
  if values.dtype != np.uint8:
    raise values.error(f'has the type {values.dtype}, not uint8')
  return values.to(lambda b: formats.unpack(b, 4), shape, formats.FLOAT4)


def _blocks_of_16(
  values: Array, scales: Array, outer: Array, shape: tuple[int, ...]
) -> Parts:
  """NVFP4."""
  formats.check_shape(scales, (*shape[:-1], shape[-1] // 16))
  formats.check_groups(scales, shape)
  if scales.dtype != formats.FLOAT8:
    raise scales.error(f'has the type {scales.dtype}, not float8_e4m3fn')
  return {
    'values': unpack_pairs(values, shape),
    'scales': scales,
    'outer': outer,
  }


def _powers(values: Array, scales: Array, shape: tuple[int, ...]) -> Parts:
  """MXFP4."""
  formats.check_groups(scales, shape)
  if scales.dtype not in (np.uint8, formats.POWER):
    raise scales.error(f'has the type {scales.dtype}, not uint8')
  scales = scales.to(lambda s: s, dtype=formats.POWER)
  return {'values': unpack_pairs(values, shape), 'scales': scales}
