"""Local paths as users write them: `~/runs/tiny`."""

import os
import re

from diffusiongemma.fields import ConfigError

# One slash: `pathlib` turns `gs://bucket` into `gs:/bucket`.
_SCHEME = re.compile(r'[A-Za-z][A-Za-z0-9+.-]+:/')


def local(path: str | os.PathLike[str], name: str = '') -> str:
  """The path with `~` expanded to the home folder.

  Args:
    path: a file, a folder or a glob.
    name: the flag or field with this path, for the message.

  Raises:
    ConfigError: the path is in a bucket or on the web, or has no home folder.
  """
  path = os.fspath(path)
  if _SCHEME.match(path):
    raise ConfigError(
      f'{f"{name}: " if name else ""}{path!r} is no local path, and no others '
      'are supported: copy what is there to a disk, or mount it.'
    )
  expanded = os.path.expanduser(path)
  if expanded.startswith('~') and os.sep in expanded:
    raise ConfigError(
      f'{f"{name}: " if name else ""}there is no home folder for {path!r}.'
    )
  return expanded
