"""Weights on disk: Orbax checkpoints of a run, Hugging Face's safetensors."""

from diffusiongemma.errors import Error


class CheckpointError(Error, RuntimeError):
  """A checkpoint that can't be written or read; the message says which."""


class LeftAloneError(CheckpointError):
  """A save that failed in one process of several, for which the others now
  wait: the job can't go on."""
