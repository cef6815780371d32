"""Checkpoints of a run, with Orbax; every array is verified when restored.

  WORKDIR/checkpoints/<step>/{params, opt_state, data, config, digests}

Items are separate, so that sampling restores only `params`. Orbax writes a step
to a temporary folder and renames it when complete, but notices neither a
flipped bit nor a missing chunk: `digests` has a checksum of every array, and
the newest step whose arrays all match is restored. Manager and items are Orbax'
v0 interface; saving piece by piece is its v1. Saving and restoring are
collectives.
"""

from collections.abc import Callable
from collections.abc import Iterable
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any
from typing import NamedTuple

from absl import logging
import jax
import numpy as np
from orbax import checkpoint as ocp
from orbax.checkpoint.experimental.v1 import partial as ocp_partial
import tensorstore

from diffusiongemma import config as configs
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import LeftAloneError
from diffusiongemma.checkpoints import digest as digest_lib
from diffusiongemma.checkpoints import files
from diffusiongemma.devices import processes

# Sharding of an array: (path in the parameters, shape) -> sharding.
ShardingOf = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding]


class Restored(NamedTuple):
  """A restored checkpoint.

  Attributes:
    step: training steps done.
    params: nested dict of arrays.
    opt_state: state of the optimiser, None if it was not requested.
    data: state of the data iterator, or None.
  """

  step: int
  params: Any
  opt_state: Any = None
  data: dict[str, Any] | None = None


def open_checkpoints(
  directory: str, keep: int | None = None
) -> ocp.CheckpointManager:
  """The checkpoints in `directory`, an absolute path.

  With `keep`, for writing: the newest `keep` steps are kept, and leftovers of
  an unfinished save are removed. Without, for reading, also while a run writes.
  """
  if keep is not None and processes.is_first():
    _remove_claimed_room(directory)
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep,
    create=keep is not None,
    cleanup_tmp_directories=keep is not None,
    enable_async_checkpointing=False,
  )
  return ocp.CheckpointManager(directory, options=options)


def save(
  manager: ocp.CheckpointManager,
  step: int,
  params: Any,
  opt_state: Any,
  data: dict[str, Any],
  config: configs.Config,
) -> None:
  """Saves a step; older ones are kept until it is complete.

  Raises:
    CheckpointError: the disk is full, read-only or gone. Older steps are
      unchanged.
    LeftAloneError: the same, in this process while others were writing.
  """
  if step in manager.all_steps():
    return
  num_bytes = sum(x.nbytes for x in jax.tree.leaves((params, opt_state)))
  sums = {
    'params': digest_lib.digests(params),
    'opt_state': digest_lib.digests(opt_state),
    'data': _json_digest(data),
  }
  problem, failed = None, f'Step {step} could not be saved'
  try:
    if processes.is_first():
      _check_room(str(manager.directory), num_bytes)
  except OSError as error:
    problem = error
  if not processes.all_agree(problem is None):
    problem = problem or OSError('the first process could not write')
    raise CheckpointError(
      f'{failed} in {manager.directory}: {_reason(problem)}.'
    ) from problem
  try:
    manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(params),
        opt_state=ocp.args.StandardSave(opt_state),
        data=ocp.args.JsonSave(data),
        config=ocp.args.JsonSave(dataclasses.asdict(config)),
        digests=ocp.args.JsonSave(sums),
      ),
    )
    manager.wait_until_finished()
  except Exception as error:  # Orbax and TensorStore raise many kinds.
    if jax.process_count() > 1:
      raise LeftAloneError(
        f'{failed} by this process in {manager.directory}: {_reason(error)}. '
        'The others wait for it. Fix this, and the same commands resume from '
        'the newest checkpoint.'
      ) from error
    _remove_unfinished(manager, step)
    raise CheckpointError(
      f'{failed} in {manager.directory}: {_reason(error)}.'
    ) from error


# Arrays are given to TensorStore in pieces of about this many bytes.
_PIECE_BYTES = 2**28


def save_arrays(
  directory: str,
  step: int,
  arrays: Iterable[tuple[tuple[str, ...], np.ndarray]],
  num_bytes: int,
  config: configs.Config,
) -> None:
  """Saves a step of parameters that arrive one by one and never all exist.

  Args:
    directory: a new folder for the checkpoints; the caller renames it after
      this function has returned.
    step: its number.
    arrays: (path in the parameters, array).
    num_bytes: of all arrays together.
    config: stored with them.

  Raises:
    CheckpointError: the disk is full, read-only or gone.
  """
  arriving = os.path.join(directory, 'arriving')
  sums: dict[str, Any] = {}
  piece: dict[str, Any] = {}
  size = 0

  def flush():
    nonlocal piece, size
    ocp_partial.save(arriving, piece)
    piece, size = {}, 0

  try:
    os.makedirs(directory)
    _check_room(directory, num_bytes)
    for path, array in arrays:
      sums[digest_lib.name_of(path)] = digest_lib.digest(array)
      node = piece
      for part in path[:-1]:
        node = node.setdefault(part, {})
      node[path[-1]] = array
      size += array.nbytes
      if size >= _PIECE_BYTES:
        flush()
    if piece:
      flush()
    ocp_partial.finalize(arriving)
    with contextlib.closing(open_checkpoints(directory, keep=1)) as manager:
      manager.save(
        step,
        args=ocp.args.Composite(
          config=ocp.args.JsonSave(dataclasses.asdict(config)),
          digests=ocp.args.JsonSave({'params': sums}),
        ),
      )
    params = os.path.join(directory, str(step), 'params')
    os.rename(os.path.join(arriving, 'state'), params)
    shutil.rmtree(arriving)
  except CheckpointError:
    raise  # From the source of the arrays.
  except Exception as error:  # Orbax and TensorStore raise many kinds.
    raise CheckpointError(
      f'The parameters could not be saved in {directory}: {_reason(error)}.'
    ) from error


def _reason(error: Exception) -> str:
  """The reason of an error in one line."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  from_system = re.search(r'OS error \d+: ([^\]]+)', str(error))
  if from_system:
    return from_system[1].split(' (')[0]
  message = str(error).partition(' [tensorstore_spec')[0].strip()
  lines = message.splitlines() or [type(error).__name__]
  return lines[0].rstrip('.')


def _remove_unfinished(manager: ocp.CheckpointManager, step: int) -> None:
  """Removes the temporary folder of a failed save."""
  for folder in manager.directory.glob(f'{step}.orbax-checkpoint-tmp*'):
    shutil.rmtree(folder, ignore_errors=True)


def _check_room(directory: str, num_bytes: int) -> None:
  """Raises `OSError` if `num_bytes` can't be written; leaves no file.

  Called before saving because TensorStore reports a full disk with a page of
  stack traces from its threads.
  """
  if not os.path.isdir(directory):
    return  # Not a local folder.
  # Without a name, it is gone with the process, however that ends.
  with tempfile.TemporaryFile(dir=directory) as file:
    files.claim_room(file.fileno(), num_bytes)


def _remove_claimed_room(directory: str) -> None:
  """Removes files by which killed processes of older versions claimed room,
  each as large as a checkpoint."""
  for path in pathlib.Path(directory).glob('room-*'):
    made_here = re.fullmatch('room-[a-z0-9_]{8}', path.name)
    if made_here and path.is_file() and not path.is_symlink():
      with contextlib.suppress(OSError):
        path.unlink()


def restore_newest(
  manager: ocp.CheckpointManager,
  params: Any,
  opt_state: Any = None,
  verify: bool = True,
) -> Restored | None:
  """Restores the newest intact step; None if there is no step at all.

  Args:
    manager: of the checkpoints.
    params: arrays or `jax.ShapeDtypeStruct` with the expected shapes, and
      shardings if any; types are as stored.
    opt_state: the same, with the expected types; None restores only parameters.
    verify: whether to compare digests; else a flipped bit goes unnoticed.

  Raises:
    CheckpointError: there are steps, but none of them is intact.
  """
  manager.reload()
  steps = sorted(manager.all_steps(), reverse=True)
  problems = []
  for step in steps:
    try:
      restored = restore_step(manager, step, params, opt_state, verify)
    except CheckpointError as error:
      problems.append(str(error))
      continue
    for problem in problems:
      logging.warning('%s Trying the step before.', problem)
    return restored
  if problems:
    raise CheckpointError(
      f'No checkpoint in {manager.directory} is intact; move that folder away '
      'to start afresh.\n' + '\n'.join(problems)
    )
  return None


def restore_step(
  manager: ocp.CheckpointManager,
  step: int,
  params: Any,
  opt_state: Any = None,
  verify: bool = True,
) -> Restored:
  """Restores one step, verified array by array. Raises `CheckpointError`."""
  problem = None
  try:
    items = _read_step(manager, step, params, opt_state)
  except CheckpointError as error:
    problem = error
  if not processes.all_agree(problem is None):
    raise problem or CheckpointError(
      f'Checkpoint {step} cannot be read by another process.'
    )
  for name in ('params', 'opt_state') if verify else ():
    if name not in items:
      continue
    expected = _digests_in(items.digests, name, step)
    actual = digest_lib.digests(items[name])
    wrong = sorted(k for k in actual if expected.get(k) != actual[k])
    if wrong:
      raise CheckpointError(
        f'Checkpoint {step} is damaged, or of an older version: {name} '
        f'{", ".join(wrong[:4])} {"and more " if len(wrong) > 4 else ""}differ '
        'from what was saved.'
      )
  if verify and 'data' in items:
    if items.digests.get('data') != _json_digest(items.data):
      raise CheckpointError(
        f'Checkpoint {step} is damaged, or of an older version: its position '
        'in the data differs from what was saved.'
      )
  return Restored(step, items.params, items.get('opt_state'), items.get('data'))


def _json_digest(value: Any) -> str:
  text = json.dumps(value, sort_keys=True)
  return digest_lib.digest(np.frombuffer(text.encode(), np.uint8))


def _digests_in(digests: Any, name: str, step: int) -> dict[str, str]:
  """The digests of an item. Raises `CheckpointError` if they are damaged."""
  of_item = digests.get(name) if isinstance(digests, dict) else None
  if not isinstance(of_item, dict):
    raise CheckpointError(
      f'Checkpoint {step} is damaged: its digests of {name} cannot be read.'
    )
  return of_item


def _read_step(
  manager: ocp.CheckpointManager, step: int, params: Any, opt_state: Any
) -> Any:
  """The items of a step as Orbax returns them. Raises `CheckpointError`."""
  _check_index(manager, step)
  wanted = {'params': _with_stored_types(manager, step, params)}
  if opt_state is not None:
    wanted['opt_state'] = opt_state
  wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
  arguments = {name: ocp.args.StandardRestore(v) for name, v in wanted.items()}
  arguments['digests'] = ocp.args.JsonRestore()
  if opt_state is not None:
    arguments['data'] = ocp.args.JsonRestore()
  try:
    return manager.restore(step, args=ocp.args.Composite(**arguments))
  except Exception as error:  # Orbax and TensorStore raise many kinds.
    message = f'Checkpoint {step} cannot be read: {_reason(error)}.'
    raise CheckpointError(_unreadable(manager, step) or message) from error


def _with_stored_types(
  manager: ocp.CheckpointManager, step: int, params: Any
) -> Any:
  """`params` with the types on disk, so that restoring casts nothing."""
  stored = _metadata(manager, step)
  try:
    # Without a sharding, Orbax would require the devices that saved.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
      lambda wanted, on_disk: jax.ShapeDtypeStruct(
        wanted.shape,
        on_disk.dtype,
        sharding=getattr(wanted, 'sharding', None) or here,
      ),
      params,
      stored,
    )
  except ValueError as error:  # Another tree.
    raise CheckpointError(
      f'Checkpoint {step} cannot be read: {_reason(error)}.'
    ) from error


def _check_index(manager: ocp.CheckpointManager, step: int) -> None:
  """Reads the index of the arrays. Orbax, which reads a hundred arrays at once,
  reports a damaged index with a hundred stack traces."""
  directory = manager.directory / str(step) / 'params'
  spec = {'driver': 'ocdbt', 'base': f'file://{directory}/'}
  try:
    tensorstore.KvStore.open(spec).result().list().result()
  except Exception as error:  # TensorStore raises ValueError and more.
    raise CheckpointError(
      f'Checkpoint {step}: the index of its arrays cannot be read: '
      f'{_reason(error)}.'
    ) from error


def _unreadable(manager: ocp.CheckpointManager, step: int) -> str:
  """The error of the first array that can't be read, '' without one; Orbax,
  which reads all at once, does not name it."""
  try:
    read = array_reader(manager, step)
    for path in stored_types(manager, step):
      read(path)
  except CheckpointError as error:
    return str(error)
  return ''


def stored_types(
  manager: ocp.CheckpointManager, step: int
) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
  """`{path: shape and type}` of the parameters on disk. Raises
  `CheckpointError`."""
  leaves = jax.tree_util.tree_leaves_with_path(_metadata(manager, step))
  return {
    tuple(key.key for key in keys): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    for keys, leaf in leaves
  }


def _metadata(manager: ocp.CheckpointManager, step: int) -> Any:
  """Orbax' metadata of the parameters of a step."""
  directory = manager.directory / str(step) / 'params'
  try:
    return ocp.PyTreeCheckpointHandler().metadata(directory).tree
  except Exception as error:  # Orbax and TensorStore raise many kinds.
    raise CheckpointError(
      f'Checkpoint {step} cannot be read: {_reason(error)}.'
    ) from error


def array_reader(
  manager: ocp.CheckpointManager, step: int
) -> Callable[[tuple[str, ...]], np.ndarray]:
  """A function path -> array of the parameters of a step, verified.

  Raises, as does the function:
    CheckpointError: an array is missing or differs from what was saved.
  """
  _check_index(manager, step)
  directory = manager.directory / str(step) / 'params'
  handler = ocp.PyTreeCheckpointHandler()
  stored = _metadata(manager, step)
  try:
    only_digests = ocp.args.Composite(digests=ocp.args.JsonRestore())
    digests = manager.restore(step, args=only_digests).digests
  except Exception as error:
    raise CheckpointError(
      f'Checkpoint {step} cannot be read: {_reason(error)}.'
    ) from error
  expected = _digests_in(digests, 'params', step)

  def read(path):
    name = digest_lib.name_of(path)
    try:
      leaf = stored
      for part in path:
        leaf = leaf[part]
      wanted = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
      as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
      for part in reversed(path):
        wanted, as_numpy = {part: wanted}, {part: as_numpy}
      array = handler.restore(
        directory,
        args=ocp.args.PyTreeRestore(
          item=wanted, restore_args=as_numpy, partial_restore=True
        ),
      )
      for part in path:
        array = array[part]
    except Exception as error:
      raise CheckpointError(
        f'Checkpoint {step}: {name} cannot be read: {_reason(error)}.'
      ) from error
    if expected.get(name) != digest_lib.digest(array):
      raise CheckpointError(
        f'Checkpoint {step} is damaged: params {name} differs from what '
        'was saved.'
      )
    return array

  return read


def set_aside_after(manager: ocp.CheckpointManager, step: int) -> None:
  """Renames newer steps to `damaged-<step>`: the run will save these steps
  again, and their content may still be useful."""
  for newer in manager.all_steps() if processes.is_first() else ():
    if newer > step:
      aside = manager.directory / f'damaged-{newer}'
      shutil.rmtree(aside, ignore_errors=True)
      (manager.directory / str(newer)).rename(aside)
  processes.wait('set aside')
  manager.reload()
