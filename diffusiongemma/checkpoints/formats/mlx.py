"""MLX.

  weight U32, scales, biases        w = q s + b, rounded after each step
  weight U32, scales U8             w = q s, where q is E2M1 or E4M3, and s is
                                    2^(s - 127) for groups of 32 (mxfp4, mxfp8),
                                    E4M3 for groups of 16 (nvfp4)

Bits and groups follow from the shapes.
"""

from collections.abc import Mapping

import numpy as np

from diffusiongemma.checkpoints import formats
from diffusiongemma.checkpoints.formats import Array
from diffusiongemma.checkpoints.formats import Parts

# By (bits, inputs per group).
_FLOATS = {
  (4, 32): (formats.FLOAT4, formats.POWER),
  (8, 32): (formats.FLOAT8, formats.POWER),
  (4, 16): (formats.FLOAT4, formats.FLOAT8),
}


def find(arrays: Mapping[str, Array], shape: tuple[int, ...]) -> Parts | None:
  """See `formats`."""
  if (
    not {'weight', 'scales'} <= arrays.keys() <= {'weight', 'scales', 'biases'}
  ):
    return None
  words, scales = arrays['weight'], arrays['scales']
  bits = formats.packed_bits(words, shape)
  groups = formats.check_groups(scales, shape)
  biases = arrays.get('biases')
  if biases is None:
    kind = bits, shape[-1] // groups
    if scales.dtype != np.uint8 or kind not in _FLOATS:
      raise scales.error(
        f'has the type {scales.dtype} for groups of {kind[1]} values of {bits} '
        'bits, without biases: neither mxfp4, mxfp8 nor nvfp4'
      )
    value_type, scale_type = _FLOATS[kind]
    return {
      'values': words.to(lambda w: formats.unpack(w, bits), shape, value_type),
      'scales': scales.to(lambda s: s, dtype=scale_type),
    }
  formats.check_shape(biases, scales.shape)
  formats.check_groups(biases, shape)
  if biases.dtype != scales.dtype or scales.dtype.itemsize < 2:
    raise biases.error(
      f'has the type {biases.dtype}, and the scales {scales.dtype}'
    )
  parts = {'scales': scales, 'biases': biases}
  if bits > 4:
    values = words.to(lambda w: formats.unpack(w, bits), shape, np.uint8)
    return {'values': values, **parts}
  values = words.to(
    lambda w: formats.signed(formats.unpack(w, bits), bits), shape, formats.INT4
  )
  zeros = formats.constant(words, -(2 ** (bits - 1)), shape)
  return {'values': values, 'zeros': zeros, **parts}
