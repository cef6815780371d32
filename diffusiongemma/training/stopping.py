"""Signals that stop a run after a save.

With several processes, one of them may get SIGTERM alone, but all must stop at
the same step: `processes.is_preempted` handles SIGTERM and SIGINT there.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import itertools
import signal

import jax

from diffusiongemma.devices import processes


@contextlib.contextmanager
def stop_signals() -> Iterator[tuple[list[int], Callable[[], bool]]]:
  """Receives SIGINT and SIGTERM; a second one kills.

  Yields:
    (received, must_stop): numbers of the signals received so far, and a
    function that returns whether any process has received one. It is a
    collective: all processes call it at the same points.
  """
  received, alone = [], jax.process_count() == 1
  questions = itertools.count(1)

  def receive(number, frame):
    del frame
    signal.signal(number, signal.SIG_DFL)
    if alone:
      received.append(number)
    else:
      signal.raise_signal(signal.SIGTERM)

  def must_stop():
    if processes.is_preempted(next(questions)):
      received.append(signal.SIGTERM)
    return bool(received)

  numbers = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
  before = {number: signal.signal(number, receive) for number in numbers}
  try:
    yield received, must_stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
