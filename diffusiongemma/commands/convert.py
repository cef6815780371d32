"""Converts a Hugging Face folder to a run."""

from diffusiongemma.commands import shared


def run(overrides: dict[str, str]) -> int:
  """Converts; returns the exit code."""
  from diffusiongemma.runs import convert

  hf_dir, workdir = shared.both_folders('convert', overrides)
  config = convert.convert(hf_dir, workdir)
  layers = len(config.model.attention_pattern)
  print(
    f'{workdir} holds the {layers} layers of {hf_dir}. Sample from it:\n'
    f'  python -m diffusiongemma.main --mode=sample --workdir={workdir} '
    f'--prompt="..."'
  )
  return 0
