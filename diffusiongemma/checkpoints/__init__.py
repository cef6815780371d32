"""Weights on disk: Orbax checkpoints of a run, Hugging Face's safetensors."""

from diffusiongemma.errors import Error


class CheckpointError(Error, RuntimeError):
  """A checkpoint that can't be written or read; the message says which."""


class LeftAloneError(CheckpointError):
  """A save failed in one of several processes and the others wait for it: the
  job can't continue."""
