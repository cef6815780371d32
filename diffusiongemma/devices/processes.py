"""The processes of a job: how they start, and what they exchange.

JAX's distributed runtime does the work. Every function but `is_first` and
`leave` is collective: all processes must call it, at the same places. In a job
of one process they return at once.
"""

import json
import os
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from diffusiongemma import config as configs

# A process that says nothing for so many seconds is given up, and with it the
# job.
HEARTBEAT_SECONDS = 60


def start(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
) -> None:
  """Joins the job, before anything else asks JAX for devices.

  Args:
    coordinator: address and port of process 0; 'auto' asks the cluster (TPU
      pods, SLURM, Open MPI, Kubernetes); None is a job of one process.
    num_processes: how many there are.
    process_id: which one this is.

  Raises:
    ConfigError: something is missing, or the job does not come together.
  """
  if coordinator is None:
    if num_processes is not None or process_id is not None:
      raise configs.ConfigError(
        '--num_processes and --process_id need --coordinator=HOST:PORT.'
      )
    return
  address = None if coordinator == 'auto' else coordinator
  if address is not None:
    if num_processes is None or process_id is None:
      raise configs.ConfigError(
        '--coordinator=HOST:PORT needs --num_processes and --process_id.'
      )
  try:
    jax.distributed.initialize(
      *(address, num_processes, process_id),
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise configs.ConfigError(
      f'The processes of the job do not come together: {reason}'
    ) from error
  # All meet at once: collectives that are set up later than half a minute
  # after each other's would give up.
  wait('started')


def is_first() -> bool:
  """Whether this process writes what only one may write."""
  return jax.process_index() == 0


def wait(name: str) -> None:
  """Until all are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def all_agree(good: bool) -> bool:
  """Whether it is good everywhere."""
  if jax.process_count() == 1:
    return good
  return bool(np.all(multihost_utils.process_allgather(np.array(good))))


def gather_json(value: Any) -> list[Any]:
  """The value of every process, in their order."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array(len(text)))
  padded = np.zeros(int(lengths.max()), np.uint8)
  padded[: len(text)] = text
  texts = multihost_utils.process_allgather(padded)
  pairs = zip(texts, lengths, strict=True)
  return [json.loads(bytes(text[:length])) for text, length in pairs]


def is_preempted(count: int) -> bool:
  """Whether all are to stop here, because one got SIGTERM. To be asked often,
  and by all at the same places: `count` is 1 for the first question, 2 for the
  second and so on."""
  return multihost_utils.reached_preemption_sync_point(count)


def leave(code: int) -> None:
  """Ends this process of a failed job at once.

  The others are not waited for: they notice that it is gone, and end too.
  """
  if jax.process_count() > 1:
    os._exit(code)
