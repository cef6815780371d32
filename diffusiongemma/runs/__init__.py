"""Runs, adapters and Hugging Face folders: opened, converted, written."""

from diffusiongemma.errors import Error


class WorkdirError(Error, ValueError):
  """A working directory that can't be used for this; the message says why."""
