"""Matrices that other tools quantised, in the bits that they came in.

  w = (values - zeros) * scales * outer + biases - minima * outer_minima

All but values and scales are optional, and each is per group of adjacent inputs
of its own size: NVFP4 has scales of 16 inputs and one outer scale, GGUF's Q4_K
scales and minima of 32 inputs and outer ones of 256. No kernel multiplies by
them yet: the product is one with the dequantised matrix. What needs only values
and scales is a `weights.Quantized`.
"""

from collections.abc import Mapping
import dataclasses

import flax
import jax
import jax.numpy as jnp

from diffusiongemma.ops import weights


class Blocks(weights.FewBits, kw_only=True):
  """A quantised array. The formula is that of the module, computed in float32;
  a product to which biases are added is first rounded to their type, as MLX
  does.

  Attributes:
    values: integers or floats of 4 or 8 bits.
    scales, zeros, outer, biases, minima, outer_minima: shaped like `values`
      except for the number of groups along `axis`; where several of them have
      groups, the largest number is a multiple of the others.
    axis, scales_transposed: see `weights.Quantized`.
  """

  values: jax.Array
  scales: jax.Array
  zeros: jax.Array | None = None
  outer: jax.Array | None = None
  biases: jax.Array | None = None
  minima: jax.Array | None = None
  outer_minima: jax.Array | None = None
  axis: int = flax.struct.field(pytree_node=False)
  scales_transposed: bool = flax.struct.field(pytree_node=False, default=False)

  def astype(self, dtype: jnp.dtype) -> jax.Array:
    """The dequantised array, computed in float32."""
    scales = self.per_group(self.scales)
    w = self.in_groups(self.values)
    if self.zeros is not None:
      w -= self.per_group(self.zeros)
    if self.outer is not None:
      scales = scales * self.per_group(self.outer)
    w = w * scales
    if self.biases is not None:
      w = _rounded(w, self.biases.dtype) + self.per_group(self.biases)
      w = _rounded(w, self.biases.dtype)
    if self.minima is not None and self.outer_minima is not None:
      outer = self.per_group(self.outer_minima)
      w -= self.per_group(self.minima) * outer
    return w.reshape(self.shape).astype(dtype)


def _rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """`x` rounded to `dtype`, where a cast and its inverse might be removed."""
  bits = jnp.finfo(dtype)
  return jax.lax.reduce_precision(x, bits.nexp, bits.nmant)


# Names of the arrays of a quantised parameter on disk.
ARRAYS = frozenset(
  field.name
  for field in dataclasses.fields(Blocks)
  if field.metadata.get('pytree_node', True)
)


def of_arrays(
  arrays: Mapping[str, jax.Array],
  axis: int = -1,
  scales_transposed: bool = False,
) -> weights.FewBits:
  """The quantised array of these arrays, named as in `Blocks`, in the simplest
  form."""
  is_plain = arrays.keys() == {'values', 'scales'}
  kind = weights.Quantized if is_plain else Blocks
  return kind(**arrays, axis=axis, scales_transposed=scales_transposed)
