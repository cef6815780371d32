"""The processes of a job: start, synchronisation, exchange of values.

JAX's distributed runtime does the work. Every function except `is_first` and
`leave` is a collective: all processes must call it, at the same points. In a
job of one process they return at once.
"""

import json
import os
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from diffusiongemma import config as configs

# After so many seconds without a heartbeat, a process counts as dead, and the
# job fails.
HEARTBEAT_SECONDS = 60


def start(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
) -> None:
  """Joins the job; to be called before JAX's devices are used.

  Args:
    coordinator: address and port of process 0; 'auto' asks the cluster (TPU
      pods, SLURM, Open MPI, Kubernetes); None is a job of one process.
    num_processes: number of processes of the job.
    process_id: index of this process.

  Raises:
    ConfigError: an argument is missing, or the processes do not connect.
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
      f'The processes of the job do not connect: {reason}'
    ) from error
  # Synchronised here, since collectives time out if they are set up more than
  # half a minute apart.
  wait('started')


def is_first() -> bool:
  """Whether this is the process that writes files and output."""
  return jax.process_index() == 0


def wait(name: str) -> None:
  """Waits until all processes have called this."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def all_agree(good: bool) -> bool:
  """Whether `good` is true in all processes."""
  if jax.process_count() == 1:
    return good
  return bool(np.all(multihost_utils.process_allgather(np.array(good))))


def gather_json(value: Any) -> list[Any]:
  """The JSON values of all processes, by process index."""
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
  """Whether all processes must stop now because one got SIGTERM. To be called
  often; `count` is 1 in the first call, 2 in the second and so on."""
  return multihost_utils.reached_preemption_sync_point(count)


def leave(code: int) -> None:
  """Exits this process of a failed job at once, without waiting for the others,
  which notice its end and exit too."""
  if jax.process_count() > 1:
    os._exit(code)
