#!/bin/bash
# jax 0.10.2 with jax-cuda13-plugin 0.10.2 and nvidia-cuda-cupti 13.5.25, on a
# machine without an NVIDIA driver: the plugin asks cuPTI for its version, which
# needs a driver, and refuses to initialise with "Unable to load cuPTI. Is it
# installed?", although it is. JAX logs that, goes on with the CPU, and then no
# program can be compiled for a GPU that is not there: "topology not
# implemented for cuda". With JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 the plugin
# initialises; nothing else is needed to compile ahead of time. Another cuPTI
# (13.0.85) gives its version, and the plugin fails at cuInit instead.
#
# Why it matters to us: `--mode=plan --topology=h100` compiles on machines
# without a GPU; it sets the variable before the plugin is looked for.
set -eu
if ldconfig -p | grep -q libcuda.so.1; then
  echo 'This machine has an NVIDIA driver: there is nothing to show here.'
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
  'jax[cuda13]==0.10.2' nvidia-cuda-cupti==13.5.25
cat > "$folder/try.py" <<'PROGRAM'
from importlib import metadata

import jax_plugins.xla_cuda13

for name in 'jax', 'jax-cuda13-plugin', 'nvidia-cuda-cupti':
  print(name, metadata.version(name), end='  ')
try:
  jax_plugins.xla_cuda13.initialize()
  print('initialised')
except RuntimeError as error:
  print(error)
PROGRAM
plain=$("$folder/venv/bin/python" "$folder/try.py")
skipping=$(JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 \
  "$folder/venv/bin/python" "$folder/try.py")
echo "without a driver:  $plain"
echo "checks left out:   $skipping"
case "$plain" in
  *'Unable to load cuPTI. Is it installed?'*) ;;
  *) echo 'It says something else now.'; exit 1 ;;
esac
case "$skipping" in
  *initialised) ;;
  *) echo 'It does not initialise now.'; exit 1 ;;
esac
