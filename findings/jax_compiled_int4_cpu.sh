#!/bin/bash
# jax 0.10.2 on a CPU: a program that was compiled ahead of time refuses every
# int4 array that is committed to a device, also one that `jax.device_put` or
# `jax.jit` made with the very sharding it was lowered for. The array's layout
# says "sub_byte_element_size_in_bits=0", the program asks for 4. The jitted
# function takes the same array, and so does jax 0.12.0.1 in both ways.
#
# Why it matters to us: a training step with adapters of int4 weights was called
# as a compiled program. It is compiled ahead of time, so that a step that does
# not fit is refused before anything is written, and then called as the jitted
# function, which finds the compilation in its cache.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2
cat > "$folder/try.py" <<'PROGRAM'
import jax
import jax.numpy as jnp
import numpy as np

device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
shape = jax.ShapeDtypeStruct((8, 8), jnp.int4, sharding=device)
function = jax.jit(lambda x: x.astype(jnp.float32))
compiled = function.lower(shape).compile()
free = jnp.ones((8, 8), jnp.int4)
committed = jax.device_put(np.ones((8, 8), jnp.int4), device)


def attempt(name, call, x):
  try:
    call(x)
    print(f'{name}: taken')
  except ValueError as error:
    assert 'sub_byte_element_size_in_bits' in str(error), error
    print(f'{name}: refused')


print('jax', jax.__version__)
attempt('compiled, not committed', compiled, free)
attempt('compiled, committed', compiled, committed)
attempt('jitted, committed', function, committed)
PROGRAM
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/try.py")
echo "$found"
expected='jax 0.10.2
compiled, not committed: taken
compiled, committed: refused
jitted, committed: taken'
if [ "$found" != "$expected" ]; then
  echo 'It behaves otherwise now.'
  exit 1
fi
