"""Networks on the Hugging Face Hub: `org/name`, or `org/name@revision`.

`huggingface_hub` downloads them to its cache, with its token and its offline
mode; only the files that are read. A download that was interrupted goes on
after the last file that was finished; version 2.4 begins a file again.
"""

import os
import re
import shutil
import sys
from typing import Any

from diffusiongemma.runs import WorkdirError
from diffusiongemma.runs import companions

FILES = ('*.safetensors', '*.safetensors.index.json', *companions.COMPANIONS)
_PART = r'[A-Za-z0-9][A-Za-z0-9._-]*'
_NAME = re.compile(rf'(?P<repository>{_PART}/{_PART})(@(?P<revision>.+))?')


def is_name(path: str) -> bool:
  """Whether this is the name of a repository and no path: its first part is
  nothing here, and not `runs`, where our own runs are by default."""
  organisation = path.partition('/')[0]
  is_here = organisation == 'runs' or os.path.lexists(organisation)
  is_file = path.endswith('.gguf')
  return bool(_NAME.fullmatch(path)) and not is_here and not is_file


def download(name: str) -> str:
  """The folder in the cache with the newest files of a repository, or those of
  a revision; prints the size and the place before it downloads.

  Raises:
    WorkdirError: there is no such repository, it may not be read, the disk is
      too small, or it is not in the cache and can't be downloaded.
  """
  import huggingface_hub  # Which is slow.
  from huggingface_hub import constants
  from huggingface_hub import errors

  match = _NAME.fullmatch(name)
  assert match is not None
  which: dict[str, Any] = {
    'repo_id': match['repository'],
    'revision': match['revision'],
    'allow_patterns': list(FILES),
  }
  at = f'{constants.ENDPOINT}/{match["repository"]}'
  try:
    try:
      files = huggingface_hub.snapshot_download(**which, dry_run=True)
    except errors.DryRunError:  # The hub is not asked, or can't be reached.
      files = []
    _tell(name, files, constants.HF_HUB_CACHE)
    return huggingface_hub.snapshot_download(**which)
  except errors.GatedRepoError as error:
    raise WorkdirError(
      f'{name}: accept its terms at {at}, then log in: hf auth login.'
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise WorkdirError(
      f'There is no folder {name!r} here and no repository {at}. One that is '
      'private needs a token: hf auth login.'
    ) from error
  except errors.RevisionNotFoundError as error:
    raise WorkdirError(
      f'{at} has no revision {match["revision"]!r}.'
    ) from error
  except errors.LocalEntryNotFoundError as error:
    offline = ' (HF_HUB_OFFLINE is set)' if constants.HF_HUB_OFFLINE else ''
    raise WorkdirError(
      f'There is no folder {name!r} here, {constants.HF_HUB_CACHE} does not '
      f'have it, and {at} cannot be reached{offline}.'
    ) from error
  except (errors.HfHubHTTPError, OSError) as error:
    raise WorkdirError(f'{at} could not be downloaded: {error}') from error


def _tell(name: str, files: Any, cache: str) -> None:
  """Prints what is downloaded, if anything is. Raises `WorkdirError` if the
  disk has no room for it."""
  missing = [file for file in files if file.will_download]
  if not missing:
    return
  size = sum(file.file_size for file in missing)
  place = cache
  while not os.path.exists(place):
    place = os.path.dirname(place)
  free = shutil.disk_usage(place).free
  if size > free:
    raise WorkdirError(
      f'{name} needs {size / 1e9:.1f} GB, and {cache} has room for '
      f'{free / 1e9:.1f} GB. HF_HOME names another place.'
    )
  what = f'{len(missing)} files, {size / 1e9:.1f} GB'
  print(f'{name}: downloading {what}, to {cache}', file=sys.stderr)
