"""Converts quantised values to bfloat16 in the registers of a GPU.

The compiler's own conversion takes about six instructions per weight, more than
everything else in a product of few rows; this one takes one and a half. A byte
in the mantissa bits of 0x4300 is the value 128 + byte: bfloat16 has seven bits
there, and the last of them counts one. The excess is subtracted, exactly.

Four bytes in a register become four values in two registers. A byte of int4 has
two adjacent values, the first in its low bits, so rows are read in pairs of
adjacent values, too.
"""

import jax
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from diffusiongemma.ops import dispatch

# Seven bits and the sign separately: 128 + bits, and -128 or -256. (0x3F80 is
# one: GPUs before the H100 can add pairs only with a product.)
FROM_INT8 = """{
.reg .b32 bits, sign, one, more0, more1, less0, less1;
mov.b32 one, 0x3F803F80;
and.b32 bits, $2, 0x7F7F7F7F;
and.b32 sign, $2, 0x80808080;
prmt.b32 more0, bits, 0x43434343, 0x4140;
prmt.b32 more1, bits, 0x43434343, 0x4342;
prmt.b32 less0, sign, 0xC3C3C3C3, 0x4140;
prmt.b32 less1, sign, 0xC3C3C3C3, 0x4342;
fma.rn.bf16x2 $0, more0, one, less0;
fma.rn.bf16x2 $1, more1, one, less1;
}"""
# With its sign bit flipped, a 4-bit value is 8 more: 128 + 8 + value, and -136.
_FROM_INT4 = """{
.reg .b32 bits, one, more0, more1, less;
mov.b32 one, 0x3F803F80;
mov.b32 less, 0xC308C308;
shr.u32 bits, $2, SHIFT;
and.b32 bits, bits, 0x0F0F0F0F;
xor.b32 bits, bits, 0x08080808;
prmt.b32 more0, bits, 0x43434343, 0x4140;
prmt.b32 more1, bits, 0x43434343, 0x4342;
fma.rn.bf16x2 $0, more0, one, less;
fma.rn.bf16x2 $1, more1, one, less;
}"""
FROM_INT4 = tuple(_FROM_INT4.replace('SHIFT', shift) for shift in '04')
# The first values, and the second values, of two pairs of 16 bits.
FROM_PAIRS = tuple(
  f'prmt.b32 $0, $1, $2, {which};' for which in ('0x5410', '0x7632')
)


def supports(dtype: jnp.dtype) -> bool:
  """Whether kernels on the GPUs here can dequantise values of this type."""
  if dtype == jnp.float8_e4m3fn:
    return dispatch.has_float8()
  return dtype in (jnp.int8, jnp.int4)


def in_pairs(x: jax.Array) -> jax.Array:
  """[..., D] bitcast to [..., D / 2] of twice the bits: int4 to uint8, bfloat16
  to uint32. The first of a pair has the low bits."""
  wide = {'int4': jnp.uint8, 'bfloat16': jnp.uint32}[x.dtype.name]
  pairs = x.reshape(*x.shape[:-1], -1, 2)
  return jax.lax.bitcast_convert_type(pairs, wide)


def rows(block: jax.Array, interpret: bool) -> list[jax.Array]:
  """A block of rows; for pairs, two blocks, of the first and second values."""
  if block.dtype != jnp.uint32:
    return [block]
  if interpret:
    halves = (block.astype(jnp.uint16), (block >> 16).astype(jnp.uint16))
    return [jax.lax.bitcast_convert_type(x, jnp.bfloat16) for x in halves]
  return [_run(text, block, '=r,r,r', pack=2) for text in FROM_PAIRS]


def weights(
  block: jax.Array, dtype: jnp.dtype, interpret: bool
) -> list[jax.Array]:
  """A block of weights in `dtype`, without scales; for pairs, two blocks in
  bfloat16, of the first and second values."""
  if block.dtype == jnp.uint8:
    if interpret:
      signed = jax.lax.bitcast_convert_type(block, jnp.int8)
      return [(signed << 4 >> 4).astype(dtype), (signed >> 4).astype(dtype)]
    return [_run(text, block, '=r,=r,r', pack=4) for text in FROM_INT4]
  if block.dtype == jnp.int8 and dtype == jnp.bfloat16 and not interpret:
    return [_run(FROM_INT8, block, '=r,=r,r', pack=4)]
  return [block.astype(dtype)]


def _run(text: str, block: jax.Array, constraints: str, pack: int):
  """Runs instructions on `pack` values at a time; the result is bfloat16."""
  (result,) = plgpu.elementwise_inline_asm(
    text,
    args=[block],
    constraints=constraints,
    pack=pack,
    result_shape_dtypes=[jax.ShapeDtypeStruct(block.shape, jnp.bfloat16)],
  )
  return result


def add_product(
  total: jax.Array, product: jax.Array, factor: jax.Array, interpret: bool
) -> jax.Array:
  """total + product * factor, in float32, rounded once; the compiler would not
  fuse the two."""
  factor = jnp.broadcast_to(factor, product.shape)
  if interpret:
    return total + product * factor
  (result,) = plgpu.elementwise_inline_asm(
    'fma.rn.f32 $0, $1, $2, $3;',
    args=[product, factor, total],
    constraints='=f,f,f,f',
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(total.shape, jnp.float32)],
  )
  return result
