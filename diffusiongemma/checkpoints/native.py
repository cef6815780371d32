"""Checkpoints of a run, with Orbax; every array is verified when restored.

  WORKDIR/checkpoints/<step>/{params, opt_state, data, config, digests}

Items are apart, so that sampling restores `params` alone. Orbax writes a step
beside its place and renames it when complete, and notices neither a flipped
bit nor a missing chunk: `digests` has a BLAKE2 of every array, and restoring
goes back to the newest step whose arrays all agree.
"""

import hashlib
import os
import re
import shutil
import tempfile
from typing import Any
from typing import NamedTuple

from absl import logging
import jax
import numpy as np
from orbax import checkpoint as ocp

from diffusiongemma import config as configs


class CheckpointError(RuntimeError):
  """A checkpoint that can't be written or read; the message says which."""


class Restored(NamedTuple):
  """One step read back.

  Attributes:
    step: training steps done.
    params: nested dict of arrays.
    opt_state: the optimiser's, or None where it was not asked for.
    data: state of the data iterator, or None.
  """

  step: int
  params: Any
  opt_state: Any = None
  data: dict | None = None


def open_checkpoints(
  directory: str, keep: int | None = None
) -> ocp.CheckpointManager:
  """The checkpoints in `directory`, an absolute path.

  With `keep`, to write: the newest `keep` steps stay, and what an unfinished
  save has left is removed. Without, to read, also beside a run that writes.
  """
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep,
    create=keep is not None,
    cleanup_tmp_directories=keep is not None,
    enable_async_checkpointing=False,
  )
  return ocp.CheckpointManager(directory, options=options)


def digest(array: Any) -> str:
  """BLAKE2 of an array's type, shape and bytes."""
  array = np.ascontiguousarray(array)
  head = f'{array.dtype} {array.shape}'.encode()
  hasher = hashlib.blake2b(head, digest_size=16)
  hasher.update(array.view(np.uint8).reshape(-1))
  return hasher.hexdigest()


def digests(tree: Any) -> dict[str, str]:
  """`{path of array: digest}`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): digest(leaf) for path, leaf in leaves}


def save(
  manager: ocp.CheckpointManager,
  step: int,
  params: Any,
  opt_state: Any,
  data: dict,
  config: configs.Config,
) -> None:
  """Writes a step; older ones stay until it is complete.

  Raises:
    CheckpointError: the disk is full, read-only or gone. What was saved
      before is as it was.
  """
  if step in manager.all_steps():
    return
  num_bytes = sum(x.nbytes for x in jax.tree.leaves((params, opt_state)))
  try:
    _check_room(str(manager.directory), num_bytes)
    manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(params),
        opt_state=ocp.args.StandardSave(opt_state),
        data=ocp.args.JsonSave(data),
        config=ocp.args.JsonSave(configs.to_dict(config)),
        digests=ocp.args.JsonSave(
          {'params': digests(params), 'opt_state': digests(opt_state)}
        ),
      ),
    )
    manager.wait_until_finished()
  except Exception as error:  # Orbax and TensorStore raise many kinds.
    _remove_unfinished(manager, step)
    raise CheckpointError(
      f'Step {step} could not be saved in {manager.directory}: '
      f'{_reason(error)}.'
    ) from error


def _reason(error: Exception) -> str:
  """One line of what went wrong."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  from_system = re.search(r'OS error \d+: ([^\]]+)', str(error))
  if from_system:
    return from_system[1].split(' (')[0]
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0].rstrip('.')


def _remove_unfinished(manager: ocp.CheckpointManager, step: int) -> None:
  """Frees the room that a failed save has taken."""
  for folder in manager.directory.glob(f'{step}.orbax-checkpoint-tmp*'):
    shutil.rmtree(folder, ignore_errors=True)


def _check_room(directory: str, num_bytes: int) -> None:
  """Raises `OSError` where `num_bytes` can't be written, and leaves nothing.

  Asked before saving because TensorStore, once under way, answers a full disk
  with a page of stack traces from its threads.
  """
  if not hasattr(os, 'posix_fallocate') or not os.path.isdir(directory):
    return  # Not Linux, or not a local folder.
  descriptor, path = tempfile.mkstemp(prefix='room-', dir=directory)
  try:
    os.posix_fallocate(descriptor, 0, max(1, num_bytes))
  finally:
    os.close(descriptor)
    os.remove(path)


def restore_newest(
  manager: ocp.CheckpointManager, params: Any, opt_state: Any = None
) -> Restored | None:
  """The newest step that is whole, or None where there is no step at all.

  Args:
    manager: where to look.
    params: arrays or `jax.ShapeDtypeStruct` of the shapes to expect.
    opt_state: the same; None restores the parameters alone.

  Raises:
    CheckpointError: there are steps, but none of them is whole.
  """
  manager.reload()
  steps = sorted(manager.all_steps(), reverse=True)
  problems = []
  for step in steps:
    try:
      restored = restore_step(manager, step, params, opt_state)
    except CheckpointError as error:
      logging.warning('%s Going back to the step before.', error)
      problems.append(str(error))
      continue
    return restored
  if problems:
    raise CheckpointError(
      f'No checkpoint in {manager.directory} is whole; move that folder away '
      'to start afresh.\n' + '\n'.join(problems)
    )
  return None


def restore_step(
  manager: ocp.CheckpointManager, step: int, params: Any, opt_state: Any = None
) -> Restored:
  """One step, verified array by array. Raises `CheckpointError`."""
  wanted = {'params': params}
  if opt_state is not None:
    wanted['opt_state'] = opt_state
  wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
  arguments = {name: ocp.args.StandardRestore(v) for name, v in wanted.items()}
  arguments['digests'] = ocp.args.JsonRestore()
  if opt_state is not None:
    arguments['data'] = ocp.args.JsonRestore()
  try:
    items = manager.restore(step, args=ocp.args.Composite(**arguments))
  except Exception as error:  # Orbax and TensorStore raise many kinds.
    raise CheckpointError(
      f'Checkpoint {step} cannot be read: {_reason(error)}.'
    ) from error
  for name in wanted:
    expected, found = items.digests[name], digests(items[name])
    wrong = sorted(k for k in found if expected.get(k) != found[k])
    if wrong:
      raise CheckpointError(
        f'Checkpoint {step} is damaged: {name} {", ".join(wrong[:4])} '
        f'{"and more " if len(wrong) > 4 else ""}differ from what was saved.'
      )
  return Restored(step, items.params, items.get('opt_state'), items.get('data'))


def set_aside_after(manager: ocp.CheckpointManager, step: int) -> None:
  """Renames newer steps to `damaged-<step>`: their numbers are needed again,
  and what is in them may still be of use to somebody."""
  for newer in manager.all_steps():
    if newer > step:
      aside = manager.directory / f'damaged-{newer}'
      shutil.rmtree(aside, ignore_errors=True)
      (manager.directory / str(newer)).rename(aside)
  manager.reload()
