#!/bin/bash
# transformers 5.24.0 (torch 2.13.0, CPU): a DiffusionGemma folder that lacks the
# encoder's layer_scalars, as some exports do, loads with uninitialised memory
# in their place; the decoder's, when they are missing, become ones. The report
# only lists them as missing. The network then reads the prompt with numbers
# that differ from run to run.
#
# Why it matters to us: the released scalars of both roles are equal, so where
# one role's are missing we take those of the other, and say so.
#
# PIP_TORCH chooses where torch comes from, as in BUILD.md.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# shellcheck disable=SC2086
"$folder/venv/bin/pip" install --quiet ${PIP_TORCH:-} torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 numpy
cd "$folder"
cat > try.py <<'PROGRAM'
import sys

from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
import transformers
from transformers import DiffusionGemmaConfig
from transformers import DiffusionGemmaForBlockDiffusion

text = dict(
  vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
  num_attention_heads=2, num_key_value_heads=1, head_dim=8, global_head_dim=8,
  num_experts=2, top_k_experts=1, moe_intermediate_size=8,
)  # fmt: skip
vision = dict(
  hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=4,
  num_attention_heads=2, num_key_value_heads=2, position_embedding_size=8,
)  # fmt: skip
config = DiffusionGemmaConfig(text_config=text, vision_config=vision)
DiffusionGemmaForBlockDiffusion(config).save_pretrained('model')
whole = load_file('model/model.safetensors')
# torch fills memory that nobody writes with NaN, so that it shows.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
print('transformers', transformers.__version__, 'torch', torch.__version__)
seen = {}
for role in 'encoder', 'decoder':
  kept = {
    name: tensor
    for name, tensor in whole.items()
    if not (name.startswith(f'model.{role}') and 'layer_scalar' in name)
  }
  save_file(kept, 'model/model.safetensors', metadata={'format': 'pt'})
  model, report = DiffusionGemmaForBlockDiffusion.from_pretrained(
    'model', output_loading_info=True
  )
  seen[role] = [
    tensor.item()
    for name, tensor in model.state_dict().items()
    if name.startswith(f'model.{role}') and 'layer_scalar' in name
  ]
  print(f'{role} scalars missing: {sorted(report["missing_keys"])}')
  print(f'  loaded as {seen[role]}; NaN is memory that was never written')
is_so = all(x != x for x in seen['encoder']) and seen['decoder'] == [1.0, 1.0]
print('as described' if is_so else 'CHANGED: the behaviour is another now')
sys.exit(not is_so)
PROGRAM
"$folder/venv/bin/python" try.py
