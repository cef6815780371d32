"""Exports a run to a Hugging Face folder."""

from diffusiongemma.commands import shared


def run(overrides: dict[str, str]) -> int:
  """Exports; returns the exit code."""
  from diffusiongemma.runs import convert

  hf_dir, workdir = shared.both_folders('export', overrides)
  convert.export(workdir, hf_dir)
  print(
    f'{hf_dir} is for transformers:\n'
    '  DiffusionGemmaForBlockDiffusion.from_pretrained(...)'
  )
  return 0
