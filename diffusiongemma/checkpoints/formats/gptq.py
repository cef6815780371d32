"""GPTQ and AWQ, as AutoRound and others write them.

  qweight I32, qzeros I32, scales F16 [groups, out]

  GPTQ  qweight [in bits / 32, out], and g_idx      w = (q - (z + 1)) s
  AWQ   qweight [in, out bits / 32]                 w = (q - z) s

All are transposed. The eight 4-bit fields of a word of AWQ are the outputs 0,
2, 4, 6, 1, 3, 5, 7.
"""

from collections.abc import Mapping

import numpy as np

from diffusiongemma.checkpoints import formats
from diffusiongemma.checkpoints.formats import Array
from diffusiongemma.checkpoints.formats import Parts

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def find(arrays: Mapping[str, Array], shape: tuple[int, ...]) -> Parts | None:
  """See `formats`."""
  names = {'qweight', 'qzeros', 'scales'}
  if len(shape) != 2 or not names <= arrays.keys() <= names | {'g_idx'}:
    return None
  words, zeros, scales = (arrays[x] for x in ('qweight', 'qzeros', 'scales'))
  outputs, inputs = shape
  groups, *_ = scales.shape or (0,)
  formats.check_shape(scales, (groups, outputs))
  scales = scales.to(lambda s: s.T, (outputs, groups))
  formats.check_groups(scales, shape)
  is_awq = words.shape == (inputs, outputs // 8)
  bits = 4 if is_awq else formats.packed_bits(words, (inputs, outputs), axis=0)
  formats.check_shape(zeros, (groups, outputs * bits // 32))

  def in_order(fields):
    """Fields along the last axis, the outputs, in their order."""
    if not is_awq:
      return fields
    octets = fields.reshape(*fields.shape[:-1], -1, 8)
    return octets[..., _AWQ_ORDER].reshape(fields.shape)

  def to_values(w):
    if is_awq:
      fields = in_order(formats.unpack(w, bits)).T
    else:
      fields = formats.unpack(w.T, bits)
    return formats.signed(fields, bits)

  def to_zeros(w):
    fields = in_order(formats.unpack(w, bits)).astype(np.int16).T
    return (fields + (0 if is_awq else 1) - 2 ** (bits - 1)).astype(np.int8)

  parts = {
    'values': words.to(to_values, shape, formats.signed_type(bits)),
    'scales': scales,
    'zeros': zeros.to(to_zeros, (outputs, groups), np.int8),
  }
  if index := arrays.get('g_idx'):
    formats.check_shape(index, (inputs,))
    parts['scales'] = scales._replace(read=_checked(scales, index, groups))
  return parts


def _checked(scales: Array, index: Array, groups: int):
  """Reads the scales if groups are adjacent inputs."""

  def read():
    group_of_input = index.read()
    size = len(group_of_input) // groups
    if not np.array_equal(group_of_input, np.arange(groups * size) // size):
      raise index.error(
        'permutes the inputs (act-order, desc_act), which is not read: groups '
        'must be adjacent inputs'
      )
    return scales.read()

  return read
