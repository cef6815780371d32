#!/bin/bash
# jax 0.10.2: pallas.cdiv of a traced int32 and a Python number raises a
# TypeError ("lax.div requires arguments to have the same dtypes, got int32,
# int64") when jax_enable_x64 is set, and only then: elsewhere in JAX a Python
# number takes the type of the array, and `-(-a // b)` works here too.
#
# Why it matters to us: kernels are traced for every platform a program may be
# compiled for, so that with JAX_ENABLE_X64=1 a kernel for GPUs that had it ended
# a program on a CPU. Our attention kernel divides by `//`.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

print('jax', jax.__version__)
seen = {}
for x64 in (False, True):
  jax.config.update('jax_enable_x64', x64)
  for name, divide in (('pl.cdiv', pl.cdiv), ('//', lambda a, b: -(-a // b))):
    try:
      result = int(jax.jit(lambda a, f=divide: f(a, 2))(jnp.int32(5)))
    except TypeError as error:
      result = f'TypeError: {str(error).split(".")[1][:70]}'
    seen[x64, name] = result
    print(f'jax_enable_x64={x64}, {name}: {result}')
is_so = str(seen.pop((True, 'pl.cdiv'))).startswith('TypeError')
is_so &= set(seen.values()) == {3}
print('as described' if is_so else 'CHANGED: the behaviour is another now')
sys.exit(not is_so)
PYTHON
