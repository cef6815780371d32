"""Recognises weights in formats that are not supported, for error messages.

Adapters and pickles are not read; the message names the format and the remedy.
"""

import fnmatch
import os

from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files

ADAPTER_CONFIG = 'adapter_config.json'
PICKLES = (
  *('pytorch_model*.bin', 'pytorch_model.bin.index.json'),
  *('*.pt', '*.pth', '*.ckpt', '*.pkl'),
)
_WEIGHTS = (ADAPTER_CONFIG, '*.safetensors', '*.gguf', *PICKLES)


def has_weights(folder: str) -> bool:
  """Whether a folder holds files of weights, of any kind."""
  return bool(_matching(folder, _WEIGHTS))


def describe_folder(folder: str) -> str | None:
  """Sentences on the format and the remedy for a folder without a Hugging Face
  checkpoint; None for an unknown format."""
  if os.path.lexists(os.path.join(folder, ADAPTER_CONFIG)):
    return (
      f'{folder!r} is a PEFT adapter{_base_of(folder)}, and adapters are not '
      'read: give the folder of a whole model. Merging adds what the adapter '
      'has for encoder and for decoder to their one weight: where it has both, '
      'another network results.'
    )
  if pickles := _matching(folder, PICKLES):
    return (
      f'{folder!r} holds pickles ({files.listed(pickles)}), which can run any '
      'code when opened and are not read here. Where you trust them, convert '
      "them to safetensors with transformers' `save_pretrained` first."
    )
  return None


def _matching(folder: str, patterns: tuple[str, ...]) -> list[str]:
  with files.system_errors(f'{folder!r} cannot be read'):
    names = os.listdir(folder)
  return [x for x in names if any(fnmatch.fnmatch(x, p) for p in patterns)]


def _base_of(folder: str) -> str:
  try:
    config = files.read_json(folder, ADAPTER_CONFIG)
  except CheckpointError:
    return ''
  base = config.get('base_model_name_or_path')
  return f' of {files.quote(base)}' if base and isinstance(base, str) else ''


# Fragments of tensor names by which the tool that wrote them is recognised.
_TOOLS = (
  (('lora_A', 'lora_B', 'lora_magnitude'), 'an adapter of PEFT'),
  (('weight_packed', 'weight_scale', 'input_scale'), 'quantised weights'),
  (('.qweight', '.qzeros', '.g_idx'), 'quantised weights (GPTQ or AWQ)'),
  (('.absmax', '.quant_map', '.SCB'), 'quantised weights (bitsandbytes)'),
  (('_weight_qdata',), 'quantised weights (torchao)'),
  (('.scales', '.biases'), 'quantised weights (MLX)'),
  (('experts.gate_up_proj.weight', 'switch_glu.'), 'a model of MLX'),
  (('.experts.0.',), 'experts that are stored one by one'),
)


def describe_names(names: list[str]) -> str:
  """' (these are names of ...)' for tensor names of a known tool, else ''."""
  for fragments, what in _TOOLS:
    if any(fragment in name for name in names for fragment in fragments):
      return f' (these are names of {what})'
  return ''
