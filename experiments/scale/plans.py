"""Plans of the shipped configs for devices that are not here.

  python -m experiments.scale.plans --out=experiments/scale/results.json h100-2b

Each plan is a process of its own, `python -m diffusiongemma.main --mode=plan`;
without names, all that are not in the file yet. TPU plans need libtpu
(`pip install '.[tpu]'`), GPU plans the CUDA plugin (`[cuda13]`).
"""

import argparse
import json
import os

from experiments import machine

BIG = '--config=configs/26b_a4b.py'
# Master weights in float32, the batch in tokens.
TRAIN = (
  BIG,
  '--config.model.param_dtype=float32',
  '--config.train.remat=full',
  '--config.data.sequence_length=4096',
)
# Adapters in the weights' bfloat16, 4 rows of 1,024 tokens.
LORA = (
  BIG,
  '--config.lora.rank=16',
  '--config.train.remat=full',
  '--config.data.sequence_length=1024',
  '--config.data.batch_size=4',
  '--config.optimizer.weight_decay=0',
)
INT4_EXPERTS = ('--config.quantization.experts=int4',)
FEW_BITS = (*INT4_EXPERTS, '--config.quantization.linears=int8')
PLANS = {
  'h100-2b': ('--config=configs/2b.py', '--topology=h100'),
  'h100-26b-sample': (BIG, '--topology=h100', '--program=sample'),
  'h100-26b-sample-int4': (
    BIG,
    '--topology=h100',
    '--program=sample',
    *FEW_BITS,
  ),
  'h200-26b-sample-int4': (
    BIG,
    '--topology=h200',
    '--program=sample',
    *FEW_BITS,
  ),
  'h200-26b-sample-int4-experts': (
    BIG,
    '--topology=h200',
    '--program=sample',
    *INT4_EXPERTS,
  ),
  'h100-26b-lora': (*LORA, '--topology=h100'),
  'h200-26b-sample': (BIG, '--topology=h200', '--program=sample'),
  'v5p-26b-finetune': (
    *TRAIN,
    '--topology=v5p:4x4x4',
    '--config.mesh.fsdp=8',
    '--config.mesh.tensor=2',
    '--config.mesh.expert=4',
    '--config.data.batch_size=32',
  ),
  'v5e-26b-finetune': (
    *TRAIN,
    '--topology=v5e:16x16',
    '--config.mesh.fsdp=16',
    '--config.mesh.tensor=4',
    '--config.mesh.expert=4',
    '--config.data.batch_size=64',
  ),
  'v5p-26b-pretrain': (
    *TRAIN,
    '--topology=v5p:8x8x8',
    '--config.mesh.data=4',
    '--config.mesh.fsdp=32',
    '--config.mesh.expert=4',
    '--config.data.batch_size=1024',
  ),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', required=True, help='JSON file to add to')
  parser.add_argument('names', nargs='*', metavar='NAME')
  given = parser.parse_args()
  results = {}
  if os.path.exists(given.out):
    with open(given.out) as stream:
      results = json.load(stream)
  for name in given.names or [n for n in PLANS if n not in results]:
    made = machine.run_main('--mode=plan', *PLANS[name])
    results[name] = made
    print(
      f'{name}: peak {made["peak_bytes"] / 1e9:.1f} GB, fits: {made["fits"]}, '
      f'compiled in {made["compile_seconds"]} s',
      flush=True,
    )
    machine.write(results, given.out)


if __name__ == '__main__':
  main()
