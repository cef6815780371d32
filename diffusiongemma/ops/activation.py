"""The activation of all MLPs, for arrays and inside of kernels."""

import jax


def geglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """gelu_tanh(gate) * up."""
  return jax.nn.gelu(gate, approximate=True) * up
