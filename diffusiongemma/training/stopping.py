"""Signals that stop a run, which saves first.

Of several processes, one alone may get SIGTERM, and all are to stop at the same
step: there it is left to `processes.is_preempted`, SIGINT too.
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
    (received, must_stop): the numbers of the signals that have come, and a
    function that asks whether one has. It is a collective: all processes call
    it at the same places.
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
