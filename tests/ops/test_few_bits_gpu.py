"""The instructions for a GPU, carried out one by one on the CPU, and what is
run in their place when kernels are interpreted."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from diffusiongemma.ops.gpu import few_bits


def run(text: str, *inputs: np.ndarray) -> list[np.ndarray]:
  """PTX on 32-bit registers, of which outputs come first: the outputs."""
  outputs = text.count('=') or len(set(re.findall(r'\$\d', text))) - len(inputs)
  names = [f'${i}' for i in range(outputs + len(inputs))]
  state = dict(zip(names[outputs:], inputs, strict=True))
  for line in re.findall(r'(\w[\w.]*) ([^;{}]+);', text.replace('.reg', '#')):
    name, arguments = line[0], [a.strip() for a in line[1].split(',')]
    if name not in STEPS:
      continue
    values = [
      state[a] if a in state else np.uint32(int(a, 0)) for a in arguments[1:]
    ]
    state[arguments[0]] = STEPS[name](*values)
  return [state[name] for name in names[:outputs]]


def permute_bytes(a, b, which):
  a, b = np.broadcast_arrays(a, b)
  all_bytes = np.stack([a, b], -1).astype('<u4').view(np.uint8)
  picked = [all_bytes[..., int(which) >> 4 * i & 7] for i in range(4)]
  return np.stack(picked, -1).copy().view('<u4')[..., 0]


def multiply_and_add(*operands):
  a, b, c = (
    np.ascontiguousarray(x, '<u4')[..., None]
    .view(ml_dtypes.bfloat16)
    .astype(np.float32)
    for x in np.broadcast_arrays(*operands)
  )
  return (a * b + c).astype(ml_dtypes.bfloat16).view('<u4')[..., 0]


STEPS = {
  'mov.b32': lambda a: a,
  'and.b32': lambda a, b: a & b,
  'xor.b32': lambda a, b: a ^ b,
  'shr.u32': lambda a, b: a >> b,
  'prmt.b32': permute_bytes,
  'fma.rn.bf16x2': multiply_and_add,
}


def as_values(registers: list[np.ndarray]) -> np.ndarray:
  stacked = np.stack(registers, -1)
  return stacked.view(ml_dtypes.bfloat16).astype(np.float32)


# Every byte in each of the four places of a register.
BYTES = (np.arange(256)[:, None] + np.arange(4) * 37).astype(np.uint8)


def test_every_byte_of_int8():
  found = as_values(run(few_bits.FROM_INT8, BYTES.view('<u4')[:, 0]))
  np.testing.assert_array_equal(found, BYTES.view(np.int8))


def test_every_pair_of_int4():
  pairs = jnp.asarray(BYTES)
  interpreted = few_bits.weights(pairs, jnp.bfloat16, interpret=True)
  for text, shift, there in zip(
    few_bits.FROM_INT4, (4, 0), interpreted, strict=True
  ):
    found = as_values(run(text, BYTES.view('<u4')[:, 0]))
    expected = (BYTES << shift).astype(np.uint8).view(np.int8) >> 4
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.asarray(there, np.float32), expected)


def test_pairs_of_rows_come_apart():
  x = jax.random.normal(jax.random.key(0), (3, 8), jnp.bfloat16)
  wide = few_bits.in_pairs(x)
  assert wide.dtype == jnp.uint32 and wide.shape == (3, 4)
  halves = few_bits.rows(wide, interpret=True)
  registers = np.asarray(wide)
  for index, (text, half) in enumerate(
    zip(few_bits.FROM_PAIRS, halves, strict=True)
  ):
    np.testing.assert_array_equal(half, x[:, index::2])
    found = as_values(run(text, registers[:, ::2], registers[:, 1::2]))
    expected = np.asarray(x[:, index::2], np.float32).reshape(3, 2, 2)
    np.testing.assert_array_equal(found, expected)


def test_neighbours_of_int4_share_a_byte():
  """As the kernels expect them, the first in the low bits."""
  w = jnp.array([[-8, 7, 0, -1]], jnp.int4)
  assert few_bits.in_pairs(w).tolist() == [[0x78, 0xF0]]


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_others_are_converted(dtype):
  block = jnp.array([[1.5, -3.0]], jnp.float8_e4m3fn)
  (found,) = few_bits.weights(block, dtype, interpret=True)
  assert found.dtype == dtype
  np.testing.assert_array_equal(np.asarray(found, np.float32), [[1.5, -3.0]])
