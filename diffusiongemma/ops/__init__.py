"""The operations of the network: definitions in plain JAX, choice of kernels.

A file has the plain JAX of an operation and the functions that choose a kernel
for its operands; device code is in `gpu`, `tpu` and `cpu`, and is imported when
a program for such a device is first traced. `implementation` of each operation
is 'plain', 'kernel', or None for the fastest that supports the operands.
"""

from diffusiongemma.ops import activation
from diffusiongemma.ops import attention
from diffusiongemma.ops import dispatch
from diffusiongemma.ops import experts
from diffusiongemma.ops import heads
from diffusiongemma.ops import linear
from diffusiongemma.ops import norms
from diffusiongemma.ops import parallel
from diffusiongemma.ops import routing
from diffusiongemma.ops import vocabulary
from diffusiongemma.ops import weights

__all__ = [
  'activation',
  'attention',
  'dispatch',
  'experts',
  'heads',
  'linear',
  'norms',
  'parallel',
  'routing',
  'vocabulary',
  'weights',
]
