"""Runs, adapters and Hugging Face folders: opened, converted, written."""


class WorkdirError(ValueError):
  """A working directory that can't be used for this; the message says why."""
