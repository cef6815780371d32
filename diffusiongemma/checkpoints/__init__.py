"""Weights on disk: Orbax checkpoints of a run, Hugging Face's safetensors."""


class CheckpointError(RuntimeError):
  """A checkpoint that can't be written or read; the message says which."""
