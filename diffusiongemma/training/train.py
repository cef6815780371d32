"""The training run: data, loss and optimiser in a loop that can stop anywhere.

  state, metrics = train_step(state, batch)       jitted, the state donated

Everything random is a function of the seed and the step, and everything that
changes is in the checkpoint (parameters, optimiser state, place in the data),
so a run that was killed and started again ends bit-equal to one that was not.
"""

import contextlib
import functools
import signal
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusiongemma.checkpoints import native
from diffusiongemma.config import Config
from diffusiongemma.diffusion import loss
from diffusiongemma.model import denoiser
from diffusiongemma.model import moe
from diffusiongemma.text import generate
from diffusiongemma.text.tokenizer import Tokenizer
from diffusiongemma.training import data
from diffusiongemma.training import evaluate
from diffusiongemma.training import metrics as metrics_lib
from diffusiongemma.training import optimizer as optimizers
from diffusiongemma.training import train_state
from diffusiongemma.training import workdir as workdirs

EVALUATION_NOISE = 0.3


class TrainingError(RuntimeError):
  """A run that can't go on; the message says what is left of it."""


def make_train_step(config: Config):
  """The jitted (state, batch) -> (state, metrics) of a run.

  The state is donated: use the one that is returned.
  """
  optimizer = optimizers.make_optimizer(config.optimizer, config.train.steps)
  train, seed = config.train, jax.random.key(config.train.seed)

  def loss_fn(params, batch, key):
    drawn = loss.draw_noise(
      key,
      batch,
      config.diffusion.canvas_length,
      config.model.vocab_size,
      train.self_conditioning_probability,
    )
    network = evaluate.bind_network(config, params)
    value, metrics = loss.diffusion_loss(
      network, batch, drawn, train.ar_loss_weight
    )
    metrics.update(moe.routing_statistics(metrics.pop('auxiliary')))
    return value, metrics

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state, batch):
    key = jax.random.fold_in(seed, state.step)
    gradients, metrics = jax.grad(loss_fn, has_aux=True)(
      state.params, batch, key
    )
    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    metrics['gradient_norm'] = optax.global_norm(gradients)
    new_state = state.replace(
      params=params, opt_state=opt_state, step=state.step + 1
    )
    return new_state, metrics

  return train_step


@contextlib.contextmanager
def stop_signals():
  """Yields a list that receives SIGINT or SIGTERM; a second one kills."""
  received = []

  def receive(number, frame):
    del frame
    received.append(number)
    signal.signal(number, signal.SIG_DFL)

  numbers = (signal.SIGINT, signal.SIGTERM)
  before = {number: signal.signal(number, receive) for number in numbers}
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def train(config: Config, workdir: str) -> int:
  """Trains up to `config.train.steps`, from the newest whole checkpoint on.

  Returns:
    The exit code: 0 when done, 1 when the last save failed, 128 + n when
    signal n stopped the run after a save.

  Raises:
    ConfigError, DataError, WorkdirError: nothing was written.
    CheckpointError: there are checkpoints, and all of them are damaged.
    TrainingError: loss or gradient is not finite; the last checkpoint is.
  """
  tokenizer = workdirs.load_tokenizer(config)
  corpus = data.load_corpus(
    config.data, tokenizer, config.diffusion.canvas_length
  )
  workdirs.claim(workdir, config, tokenizer)
  manager = native.open_checkpoints(
    workdirs.checkpoint_dir(workdir), config.train.keep_checkpoints
  )
  with contextlib.closing(manager), stop_signals() as received:
    state, iterator = start_or_resume(config, manager, corpus, tokenizer)
    step = int(state.step)
    with (
      contextlib.closing(metrics_lib.MetricsWriter(workdir, step)) as writer,
      metrics_lib.Progress(config.train.steps, step) as progress,
    ):
      if step:
        progress.print(f'Going on from step {step}.')
      report = functools.partial(
        report_quality, config, corpus, tokenizer, writer, progress
      )
      saved = run_steps(
        config, state, iterator, manager, writer, progress, report, received
      )
  if received:
    return 128 + received[0] if saved else 1
  return 0 if saved else 1


def start_or_resume(
  config: Config,
  manager,
  corpus: data.Corpus,
  tokenizer: Tokenizer,
) -> tuple[train_state.TrainState, grain.DatasetIterator]:
  """A fresh state and iterator, or those of the newest whole checkpoint."""
  dataset = data.make_dataset(
    corpus.train,
    config.data,
    config.diffusion.canvas_length,
    tokenizer,
    jax.process_index(),
    jax.process_count(),
  )
  iterator = iter(dataset)
  abstract = workdirs.abstract_state(config)
  restored = native.restore_newest(manager, abstract.params, abstract.opt_state)
  if restored is None:
    model = denoiser.Denoiser(config.model)
    optimizer = optimizers.make_optimizer(config.optimizer, config.train.steps)
    state = train_state.init_train_state(model, optimizer, config.train.seed)
    return state, iterator
  native.set_aside_after(manager, restored.step)
  iterator.set_state(restored.data)
  state = train_state.TrainState(
    restored.params, restored.opt_state, jnp.asarray(restored.step, jnp.int32)
  )
  return state, iterator


def run_steps(
  config: Config,
  state: train_state.TrainState,
  iterator: grain.DatasetIterator,
  manager,
  writer: metrics_lib.MetricsWriter,
  progress: metrics_lib.Progress,
  report,
  received: list[int],
) -> bool:
  """The loop itself; True when its last state is saved.

  The metrics of a step are fetched after the next one has been started, so
  that the device never waits for the host.
  """
  schedule = config.train
  train_step = make_train_step(config)
  tokens_per_step = config.data.batch_size * config.data.sequence_length
  step = int(state.step)
  pending, collected, clock = None, [], _Clock()

  def record(entry):
    """Fetches the metrics of a finished step and shows every n-th mean."""
    done, metrics = entry
    metrics = jax.device_get(metrics)
    # A finite loss can have a gradient that is not, and ruin the parameters.
    for name in ('loss', 'gradient_norm'):
      if not np.isfinite(metrics[name]):
        raise TrainingError(
          f'The {name.replace("_", " ")} of step {done} is {metrics[name]}; '
          f'the newest checkpoint is that of step {manager.latest_step() or 0}.'
          ' Lower config.optimizer.peak_learning_rate.'
        )
    collected.append(metrics)
    progress.advance(done)
    if done % schedule.log_every and done != schedule.steps:
      return
    numbers = metrics_lib.average(collected)
    seconds = clock.lap() / len(collected)
    numbers['tokens_per_second'] = tokens_per_step / seconds
    writer.write(done, numbers)
    progress.show(done, numbers, (schedule.steps - done) * seconds)
    collected.clear()

  def save():
    """Saves the state after `step` steps; a failure is told, not fatal."""
    try:
      place = iterator.get_state()
      native.save(manager, step, state.params, state.opt_state, place, config)
    except native.CheckpointError as error:
      newest = manager.latest_step()
      kept = 'There is none yet' if newest is None else f'Step {newest} is kept'
      progress.print(f'{error} {kept}. Make room, and the next save may work.')
      return False
    return True

  saved = manager.latest_step() == step
  while step < schedule.steps and not received:
    state, metrics = train_step(state, next(iterator))
    step += 1
    saved = False
    if pending is not None:
      record(pending)
    pending = (step, metrics)
    if step % schedule.checkpoint_every == 0:
      record(pending)
      pending = None
      with clock.paused():
        saved = save()
    with clock.paused():
      report(step, state.params)
  if pending is not None:
    record(pending)
  if not saved:
    saved = save()
  return saved


def report_quality(
  config: Config,
  corpus: data.Corpus,
  tokenizer: Tokenizer,
  writer: metrics_lib.MetricsWriter,
  progress: metrics_lib.Progress,
  step: int,
  params: dict,
) -> None:
  """Held-out losses and a sample, at the steps at which they are due."""
  train = config.train
  if step % train.evaluate_every == 0 or step == train.steps:
    numbers = evaluate.quick(
      config, params, corpus, train.evaluate_batches, EVALUATION_NOISE
    )
    writer.write(step, numbers)
    progress.print(
      f'step {step}/{train.steps}  held out: '
      f'AR {numbers["heldout_loss_ar"]:.3f} nats a token, denoising at '
      f't = {EVALUATION_NOISE} {numbers["heldout_loss_corrupted"]:.3f} '
      'on corrupted positions'
    )
  if train.sample_prompt and (
    step % train.sample_every == 0 or step == train.steps
  ):
    prompt = [tokenizer.bos_id] + tokenizer.encode(train.sample_prompt)
    (written,), _ = generate.generate(
      config,
      params,
      [prompt],
      jax.random.key(train.seed),
      config.diffusion.canvas_length,
    )
    progress.print(
      f'step {step}/{train.steps}  sample:\n{train.sample_prompt}'
      f'{tokenizer.decode(written.tokens)}\n'
    )


class _Clock:
  """Wall-clock seconds of training, without the pauses."""

  def __init__(self):
    self._start = time.perf_counter()

  def lap(self) -> float:
    """Seconds since the last lap."""
    now = time.perf_counter()
    seconds, self._start = now - self._start, now
    return seconds

  @contextlib.contextmanager
  def paused(self):
    """Time inside does not count."""
    before = time.perf_counter()
    yield
    self._start += time.perf_counter() - before
