"""Opens, converts and writes runs, adapters and Hugging Face folders."""

from diffusiongemma.errors import Error


class WorkdirError(Error, ValueError):
  """A working directory that can't be used; the message says why."""
