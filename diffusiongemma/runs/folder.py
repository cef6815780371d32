"""The folder of a run: its config, its tokenizer, its checkpoints.

  WORKDIR/config.json  tokenizer.model  checkpoints/  metrics.jsonl  events...
  WORKDIR/config.json  huggingface/     checkpoints/           when converted
  WORKDIR/history.jsonl  what the run has gone on with other values of
  WORKDIR/lock         held by the process that trains there

`huggingface` has what came with a converted checkpoint: configs, tokenizer,
chat template; what is trained from one takes it along. A folder belongs to one
run, which may go on with other values of fields that are `free` alone: others
are refused, field by field. What is in it is enough to sample from it anywhere;
of adapters, together with the weights they are for.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import pathlib
from typing import Any
from typing import NamedTuple

from absl import logging
from orbax import checkpoint as ocp

from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import digest as digest_lib
from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import folder as folders
from diffusiongemma.checkpoints import huggingface_config
from diffusiongemma.checkpoints import native
from diffusiongemma.config import Config
from diffusiongemma.devices import processes
from diffusiongemma.devices import sharding as shardings
from diffusiongemma.errors import Error
from diffusiongemma.model import parameters
from diffusiongemma.text import tokenizer as tokenizers
from diffusiongemma.training import metrics
from diffusiongemma.training import train_state

CONFIG, LOCK, HISTORY = 'config.json', 'lock', 'history.jsonl'
BASE = 'base.txt'  # The digest of the weights that adapters are for.
COMPANIONS_DIR = 'huggingface'
# What lies beside the weights of Hugging Face and goes with them.
COMPANIONS = (
  'config.json',
  'generation_config.json',
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
  'chat_template.json',
  'processor_config.json',
  'preprocessor_config.json',
  'README.md',
  'LICENSE',
)
TOKENIZERS = ('tokenizer.json', 'tokenizer.model')
CHAT_TEMPLATES = (
  'chat_template.jinja',
  'chat_template.json',
  'tokenizer_config.json',
)
# What is replaced while a run is made or goes on; see `folder.replace_file`.
REPLACED = (
  *(CONFIG, HISTORY, BASE, *metrics.FILES, *TOKENIZERS, *CHAT_TEMPLATES),
  *(os.path.join(COMPANIONS_DIR, name) for name in COMPANIONS),
)
MAX_TEXT_BYTES = 100_000_000  # Of a file beside the weights.


class WorkdirError(Error, ValueError):
  """A working directory that can't be used for this; the message says why."""


def is_claimed(workdir: str) -> bool:
  """Whether the folder holds a run. Raises `WorkdirError` for a file."""
  if os.path.isfile(workdir):
    raise WorkdirError(f'{workdir} is a file, and a run has a folder.')
  return os.path.isfile(os.path.join(workdir, CONFIG))


def claim(
  workdir: str, config: Config, tokenizer: tokenizers.Tokenizer
) -> None:
  """Makes `workdir` this run's, or checks that it already is.

  What a run starts from is copied once: tokenizer, template and so on. The run
  goes on with its own. Other values of `free` fields are left to `go_on`.

  Args:
    workdir: the folder.
    config: of the run.
    tokenizer: of the run.

  Raises:
    WorkdirError: it can't be written, or holds the run of another config.
  """
  folder = pathlib.Path(workdir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not is_claimed(workdir):
      for name, content in files_beside(config.train.init_from, tokenizer):
        (folder / name).parent.mkdir(exist_ok=True)
        folders.replace_file(folder / name, content)
      folders.replace_file(folder / CONFIG, encode_config(config))
      return
    there = read_config(workdir)
    if (folder / COMPANIONS_DIR).exists() and not there.train.init_from:
      raise WorkdirError(
        f'{workdir} holds a converted checkpoint. To train from it, give '
        f'another --workdir and --config.train.init_from={workdir}.'
      )
    of_run = find_tokenizer(there, workdir)
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
      + '\nGive the same values to go on with that run, or another --workdir; '
      f'there, --config.train.init_from={workdir} starts from its weights.'
    )


def differences(there: Config, here: Config) -> list[tuple[str, Any, Any]]:
  """(dotted name, value there, value here) of the fields that differ."""
  there, here = fields.flatten(there), fields.flatten(here)
  return [
    (name, there.get(name), here.get(name))
    for name in {**here, **there}
    if there.get(name) != here.get(name)
  ]


def go_on(workdir: str, config: Config, step: int) -> Config:
  """Writes what a run goes on with other values of into its history, and then
  into its config. It is claimed, and held.

  Returns:
    The config before.

  Raises:
    WorkdirError: they can't be written; the config is as before.
  """
  before = read_config(workdir)
  changes = differences(before, config)
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
  if os.path.lexists(os.path.join(workdir, HISTORY)):
    history = files.read_file(workdir, HISTORY, MAX_TEXT_BYTES)
  added = ''.join(line + '\n' for line in lines).encode()
  folder = pathlib.Path(workdir)
  try:
    folders.replace_file(folder / HISTORY, bytes(history) + added)
    folders.replace_file(folder / CONFIG, encode_config(config))
  except OSError as error:
    raise WorkdirError(
      f'{workdir} cannot be written, where the settings that have changed '
      f'would be noted: {error.strerror}.'
    ) from error
  return before


@contextlib.contextmanager
def held(workdir: str) -> Iterator[None]:
  """No other process trains in the folder meanwhile, on this host and on others
  where the file system knows of locks; where it does not, as if alone. What
  killed processes have left half-written is removed by who has the lock.

  Raises:
    WorkdirError: another one does.
  """
  path, flags = os.path.join(workdir, LOCK), os.O_NOFOLLOW | os.O_CLOEXEC
  with contextlib.ExitStack() as until_done:
    try:
      try:
        descriptor = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
      except PermissionError:  # Of another user; it can be locked all the same.
        descriptor = os.open(path, flags | os.O_RDONLY)
      until_done.callback(os.close, descriptor)
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      owner = os.pread(descriptor, 100, 0).decode(errors='replace')
      raise WorkdirError(
        f'Another run trains in {workdir} ({files.quote(owner)}). Wait for it, '
        'stop it, or give another --workdir.'
      ) from None
    except OSError as error:
      logging.warning('%s is not locked: %s.', workdir, error.strerror)
    else:
      # Else a child that was forked meanwhile would go on holding it.
      until_done.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
      with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f'process {os.getpid()}'.encode())
      for name in REPLACED:
        folders.remove_unfinished(os.path.join(workdir, name))
    yield


def read_config(workdir: str) -> Config:
  """The config of the run in `workdir`. Raises `WorkdirError`."""
  if not is_claimed(workdir):
    raise WorkdirError(
      f'{workdir} holds no run (there is no config.json). Train one first: '
      f'python -m diffusiongemma.main --config=configs/tiny.py '
      f'--workdir={workdir}'
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


def no_tokenizer(folder: str) -> WorkdirError:
  """What is raised for a folder without one."""
  return WorkdirError(
    f'{folder} has no tokenizer; put its tokenizer.json or tokenizer.model '
    'there.'
  )


def load_tokenizer(config: Config, start: str = '') -> tokenizers.Tokenizer:
  """The tokenizer that a run is trained with, checked: that in the folder
  `start`, or else the one that the config names.

  Raises:
    ConfigError: it is not that of the config.
    WorkdirError: the folder has none.
  """
  if start:
    tokenizer = find_tokenizer(config, start)
    if tokenizer is None:
      raise no_tokenizer(start)
    return tokenizer
  tokenizer = tokenizers.load_tokenizer(config.data.tokenizer)
  name = config.data.tokenizer or 'the shipped one'
  _check_tokenizer(config, tokenizer, name)
  return tokenizer


def encode_config(config: Config) -> bytes:
  """A config as it lies in a run's folder."""
  return json.dumps(dataclasses.asdict(config), indent=2).encode()


def files_beside(
  start: str, tokenizer: tokenizers.Tokenizer | None = None
) -> Iterator[tuple[str, bytes]]:
  """(name there, content) of what a run's folder has beside its checkpoints:
  what lies beside the weights in `start`, if it starts from any, else the
  tokenizer."""
  if not start:
    yield tokenizer.file_name, tokenizer.model
    return
  companions = os.path.join(start, COMPANIONS_DIR)
  if os.path.isdir(os.path.join(start, 'checkpoints')):
    for name in (*TOKENIZERS, *CHAT_TEMPLATES):
      if os.path.lexists(os.path.join(start, name)):
        yield name, files.read_file(start, name, MAX_TEXT_BYTES)
  else:
    companions = start
  for name, content in read_companions(companions):
    yield os.path.join(COMPANIONS_DIR, name), content


def read_companions(folder: str) -> Iterator[tuple[str, bytes]]:
  """(name, content) of what lies beside the weights."""
  for name in COMPANIONS:
    if os.path.lexists(os.path.join(folder, name)):
      yield name, files.read_file(folder, name, MAX_TEXT_BYTES)


def check_base(workdir: str, params: dict, note: bool = False) -> None:
  """Makes sure that a run's adapters meet the weights they were trained on.

  Args:
    workdir: the folder of the run.
    params: the weights.
    note: these are the ones, as nothing was saved yet.

  Raises:
    WorkdirError: these are others, or none were noted.
  """
  names = json.dumps(digest_lib.digests(params), sort_keys=True)
  digest = hashlib.blake2b(names.encode(), digest_size=16).hexdigest()
  path = pathlib.Path(workdir) / BASE
  try:
    if note and processes.is_first():
      folders.replace_file(path, digest.encode())
    processes.wait('base noted')
    noted = path.read_text()
  except OSError as error:
    raise WorkdirError(
      f'{path}, which names the weights that the adapters are for: '
      f'{error.strerror}.'
    ) from error
  if noted != digest:
    raise WorkdirError(
      f'The adapters in {workdir} were trained on other weights than those '
      'that they start from now.'
    )


def find_tokenizer(config: Config, folder: str) -> tokenizers.Tokenizer | None:
  """The tokenizer in a run's folder or a Hugging Face one, None without.

  Raises:
    ConfigError: it is not that of the config.
    CheckpointError: the file leads elsewhere, or is too large.
    TokenizerError: it is damaged.
  """
  for name in TOKENIZERS:
    for place in (folder, os.path.join(folder, COMPANIONS_DIR)):
      path = os.path.join(place, name)
      if os.path.lexists(path):
        content = bytes(files.read_file(place, name, MAX_TEXT_BYTES))
        tokenizer = tokenizers.make_tokenizer(content, path)
        _check_tokenizer(config, tokenizer, path)
        return tokenizer
  return None


def find_chat_template(folder: str) -> str | None:
  """The chat template in a run's folder or a Hugging Face one, None without.

  Raises:
    CheckpointError: the file that should have it can't be read.
  """
  for place in (folder, os.path.join(folder, COMPANIONS_DIR)):
    if os.path.lexists(os.path.join(place, 'chat_template.jinja')):
      content = files.read_file(place, 'chat_template.jinja', MAX_TEXT_BYTES)
      try:
        return content.decode()
      except UnicodeDecodeError as error:
        raise CheckpointError(
          f'{place}/chat_template.jinja is not UTF-8: byte {error.start}.'
        ) from error
    for name in ('chat_template.json', 'tokenizer_config.json'):
      if not os.path.lexists(os.path.join(place, name)):
        continue
      template = files.read_json(place, name).get('chat_template')
      if isinstance(template, list):  # Several, by name.
        named = [t for t in template if isinstance(t, dict)]
        of_name = {t.get('name'): t.get('template') for t in named}
        template = of_name.get('default')
      if isinstance(template, str):
        return template
  return None


def _check_tokenizer(
  config: Config, tokenizer: tokenizers.Tokenizer, name: str
) -> None:
  """The network may have more ids than the tokenizer has pieces: released
  vocabularies are rounded up."""
  diffusion = config.diffusion
  if tokenizer.vocab_size > config.model.vocab_size:
    raise configs.ConfigError(
      f'The tokenizer has {tokenizer.vocab_size} pieces ({name}), more than '
      f'config.model.vocab_size = {config.model.vocab_size}.'
    )
  for name, wanted, found in (
    ('diffusion.pad_token_id', diffusion.pad_token_id, tokenizer.pad_id),
    ('diffusion.bos_token_id', diffusion.bos_token_id, tokenizer.bos_id),
  ):
    if wanted != found:
      raise configs.ConfigError(
        f'config.{name} is {wanted}; that of the tokenizer is {found}.'
      )
  if tokenizer.eos_id not in diffusion.stop_token_ids:
    raise configs.ConfigError(
      f'config.diffusion.stop_token_ids lacks {tokenizer.eos_id}, which ends '
      "the tokenizer's documents."
    )


class Run(NamedTuple):
  """A network that can be used.

  Attributes:
    config: all of its settings.
    tokenizer: the one it was trained with; None where it came without.
    step: training steps done here.
    params: parameters of the network, a nested dict of arrays; of a run with
      `config.lora`, `load` here gives the adapters alone.
    chat_template: Jinja, where one came with it.
  """

  config: Config
  tokenizer: tokenizers.Tokenizer | None
  step: int
  params: dict
  chat_template: str | None = None


def load(
  workdir: str,
  config: Config | None = None,
  sharding: Callable | None = None,
  verify: bool = True,
) -> Run:
  """Reads the newest whole checkpoint of the run in `workdir`.

  Args:
    workdir: what training or conversion was given as `--workdir`.
    config: settings to use instead of the run's own, for another sampler.
    sharding: where each array goes, from (its path, its shape).
    verify: compares the digest of every array.

  Raises:
    WorkdirError: there is no run, or no finished checkpoint of it.
    CheckpointError: all of its checkpoints are damaged.
    ConfigError: `config` wants parameters of other bits than there are.
  """
  own = read_config(workdir)
  config = config or own
  if config.quantization != own.quantization:
    remedy = 'leave config.quantization as it is'
    if own.quantization == configs.QuantizationConfig():
      remedy = f'--mode=quantize --source={workdir} --workdir=NEW'
    raise configs.ConfigError(
      f'The parameters in {workdir} are already stored as its config says: '
      f'{remedy}.'
    )
  params = parameters.abstract_quantized(
    config.quantization, train_state.abstract_state(config).params
  )
  params = parameters.to_stored(params)
  if sharding is not None:
    params = shardings.placed(params, sharding)
  with contextlib.closing(open_checkpoints(workdir)) as manager:
    restored = native.restore_newest(manager, params, verify=verify)
  tokenizer = find_tokenizer(config, workdir)
  template = find_chat_template(workdir)
  params = parameters.from_stored(config.quantization, restored.params)
  return Run(config, tokenizer, restored.step, params, template)


def open_checkpoints(workdir: str) -> ocp.CheckpointManager:
  """The checkpoints of a run, to read. Raises `WorkdirError` without any."""
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
