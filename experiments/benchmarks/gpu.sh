#!/bin/sh
# The 26B-A4B on one GPU: speed in bf16, 8 and 4 bits, random weights.
#
#   sh experiments/benchmarks/gpu.sh FOLDER      writes FOLDER/{bf16,int8,int4}.json
#
# Needs `pip install '.[cuda13]'`. bf16 takes 52 GB, the others 28 and 16 GB.
# Not run yet: no GPU was at hand.
set -eu
folder=${1:?say where to write: sh experiments/benchmarks/gpu.sh FOLDER}
mkdir -p "$folder"
measure() {
  name=$1
  shift
  python -m diffusiongemma.main --mode=benchmark --config=configs/26b_a4b.py \
    --grid=1x1024,8x1024 --nopeer --format=json "$@" > "$folder/$name.tmp"
  mv "$folder/$name.tmp" "$folder/$name.json"
}
measure int4 --config.quantization.experts=int4 --config.quantization.linears=int8
measure int8 --config.quantization.experts=int8 --config.quantization.linears=int8
measure bf16
