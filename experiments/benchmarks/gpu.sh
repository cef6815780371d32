#!/bin/sh
# The 26B-A4B on one GPU: speed in bf16, 8 and 4 bits, random weights, where the
# time of a step goes, and each kernel beside its floor.
#
#   sh experiments/benchmarks/gpu.sh FOLDER
#
# writes FOLDER/{int4,canvas,int8,kernels,bf16,int4_grid}.json, one by one. Needs
# `pip install '.[cuda13]'`; bf16 takes 52 GB, the others 28 and 18 GB. PYTHON
# says which Python. On an H200 the first three took 256, 54 and 158 s, most of
# it compilation, of which much is gone since (NOTES.md), as far as it can be
# measured without a GPU; it has not been run to its end.
set -eu
folder=${1:?say where to write: sh experiments/benchmarks/gpu.sh FOLDER}
python=${PYTHON:-python}
mkdir -p "$folder"
measure() {
  name=$1 grid=$2
  shift 2
  "$python" -m diffusiongemma.main --mode=benchmark \
    --config=configs/26b_a4b.py --grid="$grid" --nopeer --format=json "$@" \
    > "$folder/$name.tmp"
  mv "$folder/$name.tmp" "$folder/$name.json"
}
# What one of them has compiled is there for the next: compile_seconds counts what
# is new, and is whole for the first alone.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$folder/compiled}"
measure int4 1x1024 --config.quantization.experts=int4
"$python" -m experiments.benchmarks.canvas --out="$folder/canvas.json" \
  --config.quantization.experts=int4
measure int8 1x1024 --config.quantization.experts=int8
"$python" -m experiments.benchmarks.kernels --out="$folder/kernels.json"
measure bf16 1x1024
measure int4_grid 8x1024,1x8192,1x32768 --config.quantization.experts=int4
