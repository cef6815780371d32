"""The folder of a run: its config, its tokenizer, its checkpoints.

  WORKDIR/config.json  tokenizer.model  checkpoints/  metrics.jsonl  events...
  WORKDIR/config.json  huggingface/     checkpoints/           when converted
  WORKDIR/history.jsonl  fields that changed when the run was resumed
  WORKDIR/lock         held by the process that trains there

`huggingface` has the files that came with a converted checkpoint: configs,
tokenizer, chat template; runs that start from one get copies. A folder belongs
to one run, which can be resumed with other values only of fields that are
`free`; the error names all others. The folder suffices to sample from the run
anywhere; for adapters, together with their base weights.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

from orbax import checkpoint as ocp

from diffusiongemma import fields
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import folder as folders
from diffusiongemma.checkpoints import huggingface_config
from diffusiongemma.checkpoints import native
from diffusiongemma.config import Config
from diffusiongemma.devices import processes
from diffusiongemma.runs import WorkdirError
from diffusiongemma.runs import companions
from diffusiongemma.runs import shipped
from diffusiongemma.text import tokenizer as tokenizers

CONFIG, HISTORY = 'config.json', 'history.jsonl'
BASE = 'base.txt'  # The digest of the base weights of adapters.
METRICS = 'metrics.jsonl'
BAD_STEPS = 'bad_steps.jsonl'  # Skipped steps, and their data.
FILES = (CONFIG, HISTORY, BASE, METRICS, BAD_STEPS)


def is_claimed(workdir: str) -> bool:
  """Whether the folder holds a run. Raises `WorkdirError` for a file."""
  if os.path.isfile(workdir):
    raise WorkdirError(f'{workdir} is a file, and a run has a folder.')
  return os.path.isfile(os.path.join(workdir, CONFIG))


def claim(
  workdir: str, config: Config, tokenizer: tokenizers.Tokenizer
) -> None:
  """Claims `workdir` for this run, or checks that it is this run's already.

  Tokenizer, template and so on are copied once from the folder that the run
  starts from; later the run uses its copies. Changed `free` fields are left to
  `history`.

  Args:
    workdir: the folder.
    config: of the run.
    tokenizer: of the run.

  Raises:
    WorkdirError: the folder can't be written, or holds a run of another config.
  """
  folder = pathlib.Path(workdir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not is_claimed(workdir):
      companion_files = [(tokenizer.file_name, tokenizer.model)]
      if start := config.train.init_from:
        companion_files = list(companions.files_beside(start))
      for name, content in companion_files:
        (folder / name).parent.mkdir(exist_ok=True)
        folders.replace_file(folder / name, content)
      folders.replace_file(folder / CONFIG, encode_config(config))
      return
    there = read_config(workdir)
    if (
      folder / companions.COMPANIONS_DIR
    ).exists() and not there.train.init_from:
      raise WorkdirError(
        f'{workdir} holds a converted checkpoint. To train from it, give '
        f'another --workdir and --config.train.init_from={workdir}.'
      )
    of_run = companions.find_tokenizer(there, workdir)
  except OSError as error:
    raise WorkdirError(
      f'{workdir} cannot be used: {error.strerror}. Give another --workdir.'
    ) from error
  refused = []
  for name, old, new in differences(there, config):
    if reason := fields.why_fixed(Config, name):
      refused.append(f'  {name}: {old!r} there, {new!r} here ({reason})')
  if of_run is None or of_run.model != tokenizer.model:
    refused.append('  the contents of the tokenizer file')
  if refused:
    raise WorkdirError(
      f'{workdir} holds a run of another config:\n'
      + '\n'.join(refused)
      + '\nGive the same values to resume that run, or another --workdir; '
      f'there, --config.train.init_from={workdir} starts from its weights.'
    )


def differences(there: Config, here: Config) -> list[tuple[str, Any, Any]]:
  """(dotted name, value there, value here) of the fields that differ."""
  old, new = fields.flatten(there), fields.flatten(here)
  return [
    (name, old.get(name), new.get(name))
    for name in {**new, **old}
    if old.get(name) != new.get(name)
  ]


def read_config(workdir: str) -> Config:
  """The config of the run in `workdir`. Raises `WorkdirError`."""
  if not is_claimed(workdir):
    raise WorkdirError(
      f'{workdir} holds no run (there is no config.json). Train one first: '
      f'python -m diffusiongemma.main --config=configs/tiny.py '
      f'--workdir={workdir}. Networks that come with the package: '
      f'{", ".join(shipped.names())}.'
    )
  path = pathlib.Path(workdir) / CONFIG
  try:
    values = files.read_json(workdir, CONFIG)
    if not huggingface_config.is_theirs(values):
      return fields.from_dict(values, Config)
  except (CheckpointError, ValueError, TypeError, AttributeError) as error:
    raise WorkdirError(f'{path} cannot be read: {error}') from error
  raise WorkdirError(
    f'{workdir} is a Hugging Face folder: give it as --hf_dir, or make it a '
    'run with --mode=convert.'
  )


def encode_config(config: Config) -> bytes:
  """The content of a run's config.json."""
  return json.dumps(dataclasses.asdict(config), indent=2).encode()


def check_base(
  workdir: str, digests: dict[str, str], note: bool = False
) -> None:
  """Checks that the base weights of adapters are those they were trained on.

  Args:
    workdir: the folder of the run.
    digests: of the base weights, see `digest.digests`.
    note: whether to record these digests, because nothing was saved yet.

  Raises:
    WorkdirError: the weights are others, or no digest was recorded.
  """
  names = json.dumps(digests, sort_keys=True)
  digest = hashlib.blake2b(names.encode(), digest_size=16).hexdigest()
  path = pathlib.Path(workdir) / BASE
  try:
    if note and processes.is_first():
      folders.replace_file(path, digest.encode())
    processes.wait('base noted')
    noted = path.read_text()
  except OSError as error:
    raise WorkdirError(
      f'{path}, which identifies the base weights of the adapters: '
      f'{error.strerror}.'
    ) from error
  if noted != digest:
    raise WorkdirError(
      f'The adapters in {workdir} were trained on other weights than those '
      'that they start from now.'
    )


def open_checkpoints(workdir: str) -> ocp.CheckpointManager:
  """The checkpoints of a run, for reading. Raises `WorkdirError` if there are
  none."""
  directory = checkpoint_dir(workdir)
  if os.path.isdir(directory):
    manager = native.open_checkpoints(directory)
    if manager.all_steps():
      return manager
    manager.close()
  raise WorkdirError(f'{workdir} has no finished checkpoint yet.')


def checkpoint_dir(workdir: str) -> str:
  """Where a run's checkpoints are; Orbax wants an absolute path."""
  return os.path.join(os.path.abspath(workdir), 'checkpoints')
