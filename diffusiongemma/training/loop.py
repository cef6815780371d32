"""The loop over steps: learn, record, save, report.

The metrics of a step are fetched after the next one has been started, so that
the device never waits for the host.
"""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax

from diffusiongemma.config import Config
from diffusiongemma.devices import memory
from diffusiongemma.errors import Error
from diffusiongemma.ops.weights import Params
from diffusiongemma.training import metrics as metrics_lib
from diffusiongemma.training import optimizer as optimizers
from diffusiongemma.training import train_state


class TrainingError(Error, RuntimeError):
  """A run that can't continue; the message says what is saved."""


def run_steps(
  config: Config,
  state: train_state.TrainState,
  base: Params | None,
  train_step: Callable[..., tuple[train_state.TrainState, dict[str, Any]]],
  batches: Iterator[dict[str, jax.Array]],
  *,
  is_saved: bool,
  received: list[int],
  must_stop: Callable[[], bool],
  record: Callable[[int, dict[str, Any]], int],
  save: Callable[[train_state.TrainState, int], bool],
  report: Callable[[int, dict[str, Any]], None],
  watch: metrics_lib.Stopwatch,
  progress: metrics_lib.Progress,
) -> bool:
  """Trains until `config.train.steps`, or until a signal arrives.

  Args:
    config: of the run.
    state: after the steps done so far; donated.
    base: the parameters that adapters adapt, None without adapters.
    train_step: (state, batch, base) -> (state, metrics).
    batches: iterator of batches, on the mesh.
    is_saved: whether `state` is already in a checkpoint.
    received, must_stop: see `stopping.stop_signals`.
    record: (step, its metrics) -> consecutive skipped steps; see `recorder`.
    save: (state, step) -> whether the save succeeded.
    report: (step, parameters of the network), called after every step.
    watch: measures where the time goes.
    progress: shows what the run does.

  Returns:
    Whether the last state is saved.

  Raises:
    TrainingError: too many bad steps in a row; the last good state is saved.
  """
  train, step = config.train, int(state.step)
  pending, bad_in_row = None, 0
  failed = unsaved = started = False
  while step < train.steps and not (received or failed or unsaved):
    with watch.spent_on('data'):
      batch = next(batches)
    started = True
    state, metrics = train_step(state, batch, base)
    step += 1
    is_saved = False
    must_stop()
    if pending is not None:
      bad_in_row = record(*pending)
    pending = (step, metrics)
    failed = bad_in_row >= train.max_bad_steps
    if step % train.checkpoint_every == 0:
      bad_in_row = record(*pending)
      pending = None
      with watch.spent_on('checkpoints'), progress.doing('saving'):
        is_saved = save(state, step)
      unsaved = train.stops_when_unsaved and not is_saved
    if received:
      break  # Save at once: there may be little time.
    learnt = state.params if state.ema is None else state.ema
    with watch.spent_on('evaluation'):
      report(step, train_state.network_params(config, learnt, base))
  if pending is not None:
    bad_in_row = record(*pending)
  if not (is_saved or unsaved):
    with watch.spent_on('checkpoints'), progress.doing('saving'):
      is_saved = save(state, step)
  if started:
    progress.print(watch.summary())
  if failed or bad_in_row >= train.max_bad_steps:
    raise TrainingError(
      f'{train.max_bad_steps} steps in a row were skipped, by step {step}: '
      f'{metrics_lib.BAD_STEPS} beside the checkpoints names them. '
      f'{"The last good state is saved" if is_saved else "It is not saved"}; '
      'lower config.optimizer.peak_learning_rate, or look at that data.'
    )
  return is_saved


def recorder(
  config: Config,
  writer: metrics_lib.MetricsWriter,
  progress: metrics_lib.Progress,
  watch: metrics_lib.Stopwatch,
) -> Callable[[int, dict[str, Any]], int]:
  """A function (step, its metrics) -> consecutive skipped steps; it fetches the
  metrics and writes their mean every `config.train.log_every` steps."""
  train, batch_size = config.train, config.data.batch_size
  tokens_per_step = batch_size * config.data.sequence_length
  learning_rate = optimizers.make_schedule(config.optimizer, train.steps)
  collected = []

  def record(step, metrics):
    metrics = jax.device_get(metrics)
    bad_in_row = int(metrics.pop('bad_in_row'))
    if bad_in_row:
      first = (step - 1) * batch_size
      writer.write_bad_step(
        {
          'step': step,
          'loss': float(metrics['loss']),
          'gradient_norm': float(metrics['gradient_norm']),
          # Positions in the global order of rows, which follows from the seed.
          'first_row': first,
          'last_row': first + batch_size - 1,
        }
      )
      progress.print(
        f'Step {step} is skipped: its loss is {metrics["loss"]:.4g}, its '
        f'gradient norm {metrics["gradient_norm"]:.4g}.'
      )
    else:
      collected.append(metrics)
    progress.advance(step)
    is_due = step % train.log_every == 0 or step == train.steps
    if is_due and collected:  # Unless all of them were bad.
      numbers = metrics_lib.average(collected)
      numbers['bad_steps'] = collected[-1]['bad_steps']
      seconds = watch.lap() / len(collected)
      numbers['tokens_per_second'] = tokens_per_step / seconds
      numbers['learning_rate'] = float(learning_rate(step - 1))
      numbers['peak_memory_bytes'] = memory.peak_in_use()
      writer.write(step, numbers)
      progress.show(step, numbers, (train.steps - step) * seconds)
      collected.clear()
    return bad_in_row

  return record
