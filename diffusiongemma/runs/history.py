"""The history of a run: fields that changed when it was resumed.

WORKDIR/history.jsonl  {"step": 20, "time": ..., "field": ..., "old", "new"}
"""

import datetime
import json
import os
import pathlib

from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import folder as folders
from diffusiongemma.config import Config
from diffusiongemma.runs import WorkdirError
from diffusiongemma.runs import companions
from diffusiongemma.runs import folder as workdirs


def go_on(workdir: str, config: Config, step: int) -> Config:
  """Writes changed fields to the history of a run, then to its config. The
  folder is claimed and locked by the caller.

  Returns:
    The config before.

  Raises:
    WorkdirError: they can't be written; the config is unchanged.
  """
  before = workdirs.read_config(workdir)
  changes = workdirs.differences(before, config)
  if not changes:
    return before
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  lines = [
    json.dumps(
      {'step': step, 'time': now, 'field': name, 'old': old, 'new': new}
    )
    for name, old, new in changes
  ]
  history = b''
  if os.path.lexists(os.path.join(workdir, workdirs.HISTORY)):
    history = files.read_file(
      workdir, workdirs.HISTORY, companions.MAX_TEXT_BYTES
    )
  added = ''.join(line + '\n' for line in lines).encode()
  folder = pathlib.Path(workdir)
  try:
    folders.replace_file(folder / workdirs.HISTORY, history + added)
    folders.replace_file(
      folder / workdirs.CONFIG, workdirs.encode_config(config)
    )
  except OSError as error:
    raise WorkdirError(
      f'{workdir} cannot be written, to record the settings that have changed: '
      f'{error.strerror}.'
    ) from error
  return before
