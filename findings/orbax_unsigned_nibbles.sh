#!/bin/bash
# orbax-checkpoint 0.12.8 with tensorstore 0.1.86 saves int4, int2 and float4_e2m1fn
# arrays and gives them back, but no uint4 or uint2, which jax 0.10.2 has as well:
# "Unsupported data type". Nothing is said before the save is under way.
#
# Why it matters to us: MLX, GPTQ and GGUF have unsigned values of 4 bits. They are
# kept as int4, 8 less, with zero points of -8 beside them, so that a converted
# network can be saved without a byte per value (`checkpoints/formats`).
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 orbax-checkpoint==0.12.8 \
  tensorstore==0.1.86 ml_dtypes==0.6.0
cat > "$folder/try.py" <<'PROGRAM'
import pathlib
import sys

import jax.numpy as jnp
from orbax import checkpoint as ocp

for name in ('int4', 'int2', 'float4_e2m1fn', 'uint4', 'uint2'):
  folder = pathlib.Path(sys.argv[1]) / name
  checkpointer = ocp.StandardCheckpointer()
  try:
    checkpointer.save(folder, {'w': jnp.arange(2).astype(name)})
    checkpointer.wait_until_finished()
    print(f'{name}: {checkpointer.restore(folder)["w"].dtype}')
  except ValueError as error:
    assert 'Unsupported data type' in str(error), error
    print(f'{name}: refused')
PROGRAM
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/try.py" "$folder" 2> "$folder/log")
echo "$found"
expected='int4: int4
int2: int2
float4_e2m1fn: float4_e2m1fn
uint4: refused
uint2: refused'
if [ "$found" != "$expected" ]; then
  echo 'It behaves otherwise now.'
  exit 1
fi
