"""The training run: data and steps in a loop that can stop anywhere.

Everything random is a function of the seed and the step, and everything that
changes is in the checkpoint (parameters, optimiser state, place in the data),
so a run that was killed and started again ends bit-equal to one that was not.
With `config.lora`, what is learnt are adapters, and `base` what they adapt.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import itertools
import signal

import grain
import jax
import orbax.checkpoint as ocp

from diffusiongemma import config as configs
from diffusiongemma import paths
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import LeftAloneError
from diffusiongemma.checkpoints import digest as digest_lib
from diffusiongemma.checkpoints import native
from diffusiongemma.config import Config
from diffusiongemma.devices import processes
from diffusiongemma.devices import sharding
from diffusiongemma.generation import generate
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.model import denoiser
from diffusiongemma.runs import companions
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.runs import history
from diffusiongemma.runs import lock
from diffusiongemma.text.tokenizer import Tokenizer
from diffusiongemma.text.tokenizer import TokenizerError
from diffusiongemma.training import corpus as corpora
from diffusiongemma.training import data
from diffusiongemma.training import evaluate
from diffusiongemma.training import metrics as metrics_lib
from diffusiongemma.training import optimizer as optimizers
from diffusiongemma.training import step as steps
from diffusiongemma.training import train_state

EVALUATION_NOISE = 0.3


class TrainingError(RuntimeError):
  """A run that can't go on; the message says what is left of it."""


@dataclasses.dataclass(frozen=True)
class Job:
  """What a run has beside its state.

  Attributes:
    config, tokenizer, corpus: what is learnt, and from what.
    text: describes the corpus.
    train_step: (state, batch, base) -> (state, metrics).
    base: the parameters that adapters adapt, None without.
    iterator: of batches, `share` of each.
    manager: of the checkpoints.
    writer, progress, watch: where its numbers go, and its time.
    received: the signals to stop, as they come.
    questions: counts how often `must_stop` was asked.
  """

  config: Config
  tokenizer: Tokenizer
  corpus: corpora.Corpus
  text: dict[str, data.Description]
  train_step: Callable
  base: dict | None
  iterator: grain.DatasetIterator
  share: sharding.Share
  manager: ocp.CheckpointManager
  writer: metrics_lib.MetricsWriter
  progress: metrics_lib.Progress
  watch: metrics_lib.Stopwatch
  received: list[int]
  questions: Iterator[int]


class _StoppedError(Exception):
  """A signal has come while a network was evaluated."""


@contextlib.contextmanager
def stop_signals():
  """Yields a list that receives SIGINT or SIGTERM; a second one kills.

  Of several processes, one alone may get SIGTERM, and all are to stop at the
  same step: there it is left to `processes.is_preempted`, SIGINT too.
  """
  received, alone = [], jax.process_count() == 1

  def receive(number, frame):
    del frame
    signal.signal(number, signal.SIG_DFL)
    if alone:
      received.append(number)
    else:
      signal.raise_signal(signal.SIGTERM)

  numbers = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
  before = {number: signal.signal(number, receive) for number in numbers}
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def train(
  config: Config,
  workdir: str,
  load_base: Callable[[native.ShardingOf], dict] | None = None,
) -> int:
  """Trains up to `config.train.steps`, from the newest whole checkpoint on,
  on the mesh that the config describes. All processes of a job call this.

  Args:
    config: of the run.
    workdir: its folder, the same for all processes.
    load_base: gives the parameters in `config.train.init_from`, where they are
      to lie.

  Returns:
    The exit code: 0 when done, 1 when the last save failed, 128 + n when
    signal n stopped the run after a save.

  Raises:
    ConfigError, DataError, WorkdirError: nothing was written. One of them is
      that the run can't go on with another value, or with other examples.
    CheckpointError: there are checkpoints, and all of them are damaged, or
      what the run starts from is.
    TrainingError: too many bad steps in a row; the last good state is saved.
    LeftAloneError: this process could not save, and the others wait for it.
  """
  workdir = paths.local(workdir)
  mesh = sharding.make_mesh(config.mesh)
  sharding.validate(config, tuple(mesh.shape.values()))
  share = sharding.share_of_batch(mesh)
  with jax.set_mesh(mesh), contextlib.ExitStack() as until_done:
    return _train_on(mesh, share, config, workdir, load_base, until_done)


def _train_on(mesh, share, config, workdir, load_base, until_done) -> int:
  """`train` on a mesh, with this process's share of each batch; what is in the
  way of others is given back when `until_done` is closed."""
  start = config.train.init_from
  if start and load_base is None:
    raise ValueError('load_base must give the parameters in init_from.')
  # As the first process sees it, before it claims the folder.
  is_new, *_ = processes.gather_json(not workdirs.is_claimed(workdir))
  if start and not is_new:
    start = workdir  # What came with the weights is there since.
  tokenizer = companions.load_tokenizer(config, start)
  corpus = corpora.load_corpus(
    config.data,
    tokenizer,
    config.diffusion.canvas_length,
    companions.find_chat_template(start) if start else None,
  )
  _check_sample_prompt(config, tokenizer)

  def claim():
    workdirs.claim(workdir, config, tokenizer)
    until_done.enter_context(lock.held(workdir))
    workdirs.claim(workdir, config, tokenizer)  # Another may have been faster.

  if processes.is_first() and not is_new:
    claim()
  watch = metrics_lib.Stopwatch()
  with watch.spent_on('start'):  # Before anything is written or allocated.
    abstract = steps.abstract_state(config, mesh)
    train_step = steps.compile_step(config, abstract, mesh)
  if processes.is_first() and is_new:
    claim()
  processes.wait('claimed')
  if load_base is None:
    load_base = functools.partial(train_state.fresh_params_at, config)
  load_base = functools.partial(load_base, sharding.parameter_sharding(mesh))
  manager = native.open_checkpoints(
    workdirs.checkpoint_dir(workdir), config.train.keep_checkpoints
  )
  with contextlib.closing(manager), stop_signals() as received:
    base = None
    with watch.spent_on('start'):
      if config.lora.rank:
        base = load_base()
        is_fresh = manager.latest_step() is None
        digests = digest_lib.digests(base)
        workdirs.check_base(workdir, digests, note=is_fresh)
        base = denoiser.with_configured_types(config.model, base)
        load_base = lambda: base
      text = {
        'train': data.describe(corpus.train),
        'heldout': data.describe(corpus.heldout),
      }
      state, iterator, text_before = start_or_resume(
        config, manager, corpus, text, tokenizer, abstract, share, load_base
      )
      step = int(state.step)
      before = config
      if processes.is_first():
        before = history.go_on(workdir, config, step)
    with (
      contextlib.closing(
        metrics_lib.MetricsWriter(workdir, step, processes.is_first())
      ) as writer,
      metrics_lib.Progress(
        config.train.steps, step, not processes.is_first()
      ) as progress,
    ):
      if step:
        progress.print(f'Going on from step {step}.')
      for line in (
        *told_of_changes(before, config, step),
        *told_of_text(before, config, text_before, text),
        *told_at_start(config),
        *corpus.notes,
      ):
        progress.print(line)
      job = Job(
        config=config,
        tokenizer=tokenizer,
        corpus=corpus,
        text=text,
        train_step=train_step,
        base=base,
        iterator=iterator,
        share=share,
        manager=manager,
        writer=writer,
        progress=progress,
        watch=watch,
        received=received,
        questions=itertools.count(1),
      )
      saved = run_steps(job, state)
  if received:
    return 128 + received[0] if saved else 1
  return 0 if saved else 1


def _sample_prompt(config: Config, tokenizer: Tokenizer) -> list[int]:
  return [tokenizer.bos_id, *tokenizer.encode(config.train.sample_prompt)]


def _check_sample_prompt(config: Config, tokenizer: Tokenizer) -> None:
  """Raises `ConfigError` for one that would end the run when it is due."""
  if not config.train.sample_prompt:
    return
  try:
    prompt = _sample_prompt(config, tokenizer)
    prompt_lib.check(config, prompt, config.diffusion.canvas_length)
  except (prompt_lib.PromptError, TokenizerError) as error:
    raise configs.ConfigError(f'config.train.sample_prompt: {error}') from error


def told_at_start(config: Config) -> list[str]:
  """What a config leaves open, and what stands there instead."""
  lines = []
  if not config.data.path:
    lines.append(
      'No config.data.path is given: training on the shipped Shakespeare.'
    )
  if config.lora.rank and not config.train.init_from:
    lines.append(
      'No config.train.init_from is given: the adapters are those of random '
      'weights, useful only as a test.'
    )
  if config.optimizer.freeze and not config.train.init_from:
    lines.append(
      'No config.train.init_from is given: the weights that '
      'config.optimizer.freeze names stay random.'
    )
  return lines


def told_of_changes(before: Config, config: Config, step: int) -> list[str]:
  """What a run goes on with other values of, and what follows from them."""
  lines = [
    f'{name}: {old!r} before, {new!r} from here on.'
    for name, old, new in workdirs.differences(before, config)
  ]
  was, now = (
    float(optimizers.make_schedule(c.optimizer, c.train.steps)(step))
    for c in (before, config)
  )
  if was != now:
    lines.append(
      f'The learning rate goes on at {now:.3g}, where it would have been '
      f'{was:.3g}.'
    )
  return lines


def told_of_text(
  before: Config,
  config: Config,
  text_before: dict[str, data.Description] | None,
  text: dict[str, data.Description],
) -> list[str]:
  """What is to be known of the text that a run goes on with, if its last
  checkpoint describes (or might describe) another one."""
  changed = [name for name, *_ in workdirs.differences(before, config)]
  if text_before is None:
    if any(name.startswith('config.data.') for name in changed):
      return [
        'The checkpoints do not say what examples they have learnt from: see '
        'to it that these are the same, in the same order.'
      ]
    return []
  was, now = text_before['heldout'], text['heldout']
  if was == now:
    return []
  return [
    f'The held-out text is another one: {was} before, {now} now. Losses on it '
    'do not compare with those before.'
  ]


def start_or_resume(
  config: Config,
  manager: ocp.CheckpointManager,
  corpus: corpora.Corpus,
  text: dict[str, data.Description],
  tokenizer: Tokenizer,
  abstract: train_state.TrainState,
  share: sharding.Share,
  load_base: Callable[[], dict],
) -> tuple[
  train_state.TrainState,
  grain.DatasetIterator,
  dict[str, data.Description] | None,
]:
  """The first state and iterator, or those of the newest whole checkpoint, and
  the text that it describes, if it does.

  Raises:
    DataError: the run has learnt from other examples than there are now.
    ConfigError: it has done more steps than it is to do.
  """
  dataset = data.make_dataset(
    corpus.train,
    config.data,
    config.diffusion.canvas_length,
    tokenizer,
    share,
  )
  iterator = iter(dataset)
  restored = native.restore_newest(manager, *train_state.to_items(abstract))
  if restored is None:
    params = denoiser.with_configured_types(config.model, load_base())
    init = jax.jit(
      functools.partial(train_state.init_train_state, config),
      out_shardings=jax.tree.map(lambda x: x.sharding, abstract),
      # A base is needed later on.
      donate_argnums=() if config.lora.rank else 0,
    )
    return init(params), iterator, None
  text_before = _check_goes_on(config, restored, text)
  iterator.set_state(_own_place(config, restored, share))
  native.set_aside_after(manager, restored.step)
  state = train_state.from_items(
    restored.step, restored.params, restored.opt_state
  )
  where = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.device_put(state, where), iterator, text_before


def _check_goes_on(
  config: Config, restored: native.Restored, text: dict[str, data.Description]
) -> dict[str, data.Description] | None:
  """The text that a checkpoint describes, if it does. Raises as
  `start_or_resume`."""
  step, steps = restored.step, config.train.steps
  if step > steps:
    raise configs.ConfigError(
      f'config.train.steps = {steps}, but the run has done {step} steps '
      'already. Give more to go on.'
    )
  if 'text' not in restored.data:
    return None
  described = restored.data['text']
  before = {name: data.Description(*x) for name, x in described.items()}
  was, now = before['train'], text['train']
  if was != now:
    others = '' if str(was) != str(now) else ', not the same ones'
    raise corpora.DataError(
      f'Up to step {step} the run has learnt from {was}; config.data now has '
      f'{now}{others}. Its place in the order of the data means nothing here. '
      'Give it the text that it had, or learn from this one in another '
      '--workdir, where config.train.init_from names this run.'
    )
  return before


def _own_place(
  config: Config, restored: native.Restored, share: sharding.Share
) -> dict:
  """The place in the data of this share of the batch.

  Raises:
    CheckpointError: each share packs its own rows, and there is another number
      of them now.
  """
  places = restored.data['shares']
  if not config.data.packing:
    return places[0]  # That of every share, however many there are.
  if len(places) == share.count:
    return places[share.index]
  raise CheckpointError(
    f'Step {restored.step} was saved by a job whose batches were packed in '
    f'{len(places)} shares, each with its own place in the data; now there are '
    f'{share.count}. Go on with as many processes, or with a config.mesh that '
    'divides the batch among as many.'
  )


def run_steps(job: Job, state: train_state.TrainState) -> bool:
  """The loop itself; True when its last state is saved.

  The metrics of a step are fetched after the next one has been started, so
  that the device never waits for the host.
  """
  config, schedule, progress = job.config, job.config.train, job.progress
  by_row = sharding.batch_sharding(state.step.sharding.mesh)
  tokens_per_step = config.data.batch_size * config.data.sequence_length
  step = int(state.step)
  pending, collected, bad_in_row = None, [], 0

  def record(entry):
    """Fetches the metrics of a finished step and shows every n-th mean."""
    nonlocal bad_in_row
    done, metrics = entry
    metrics = jax.device_get(metrics)
    bad_in_row = int(metrics.pop('bad_in_row'))
    if bad_in_row:
      first = (done - 1) * config.data.batch_size
      job.writer.write_bad_step(
        {
          'step': done,
          'loss': float(metrics['loss']),
          'gradient_norm': float(metrics['gradient_norm']),
          # Places in the global order of rows, which follows from the seed.
          'first_row': first,
          'last_row': first + config.data.batch_size - 1,
        }
      )
      progress.print(
        f'Step {done} is left out: its loss is {metrics["loss"]:.4g}, its '
        f'gradient norm {metrics["gradient_norm"]:.4g}.'
      )
    else:
      collected.append(metrics)
    progress.advance(done)
    if done % schedule.log_every and done != schedule.steps:
      return
    if not collected:  # All of them were bad.
      return
    numbers = metrics_lib.average(collected)
    numbers['bad_steps'] = collected[-1]['bad_steps']
    seconds = job.watch.lap() / len(collected)
    numbers['tokens_per_second'] = tokens_per_step / seconds
    job.writer.write(done, numbers)
    progress.show(done, numbers, (schedule.steps - done) * seconds)
    collected.clear()

  def gives_up():
    return bad_in_row >= schedule.max_bad_steps

  saved = job.manager.latest_step() == step
  failed = unsaved = started = False
  while step < schedule.steps and not (job.received or failed or unsaved):
    with job.watch.spent_on('data'):
      batch = jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(by_row, x),
        next(job.iterator),
      )
    started = True
    state, metrics = job.train_step(state, batch, job.base)
    step += 1
    saved = False
    must_stop(job)
    if pending is not None:
      record(pending)
    pending = (step, metrics)
    failed = gives_up()
    if step % schedule.checkpoint_every == 0:
      record(pending)
      pending = None
      with job.watch.spent_on('checkpoints'):
        saved = save(job, state, step)
      unsaved = schedule.stops_when_unsaved and not saved
    if job.received:
      break  # There may be little time left to save.
    learnt = state.params if state.ema is None else state.ema
    with job.watch.spent_on('evaluation'):
      params = train_state.network_params(config, learnt, job.base)
      report_quality(job, step, params)
  if pending is not None:
    record(pending)
  if not (saved or unsaved):
    with job.watch.spent_on('checkpoints'):
      saved = save(job, state, step)
  if started:
    progress.print(job.watch.summary())
  if failed or gives_up():
    raise TrainingError(
      f'{schedule.max_bad_steps} steps in a row were left out, by step {step}: '
      f'{metrics_lib.BAD_STEPS} beside the checkpoints names them. '
      f'{"The last good state is saved" if saved else "It is not saved"}; '
      'lower config.optimizer.peak_learning_rate, or look at that data.'
    )
  return saved


def save(job: Job, state: train_state.TrainState, step: int) -> bool:
  """Saves the state after `step` steps; a failure is told, not fatal."""
  share, manager = job.share, job.manager
  try:
    own = (share.index, job.iterator.get_state())
    places = dict(processes.gather_json(own))
    place = {'shares': [places[i] for i in range(share.count)]}
    place['text'] = {name: list(x) for name, x in job.text.items()}
    items = train_state.to_items(state)
    native.save(manager, step, *items, place, job.config)
  except LeftAloneError:
    raise
  except CheckpointError as error:
    newest = manager.latest_step()
    kept = 'There is none yet' if newest is None else f'Step {newest} is kept'
    job.progress.print(f'{error} {kept}. Fix this, and the next save may work.')
    return False
  return True


def must_stop(job: Job) -> bool:
  """Whether a signal has come. All processes ask this at the same places."""
  if processes.is_preempted(next(job.questions)):
    job.received.append(signal.SIGTERM)
  return bool(job.received)


def report_quality(job: Job, step: int, params: dict) -> None:
  """Held-out losses and a sample, at the steps at which they are due; ends
  early when a signal has come."""

  def stop_if_asked(*unused):
    if must_stop(job):
      raise _StoppedError

  try:
    _report_quality(job, step, params, stop_if_asked)
  except _StoppedError:
    job.progress.print(
      f'Step {step} is not evaluated to its end; --mode=evaluate measures the '
      'run.'
    )


def _report_quality(job, step, params, stop_if_asked) -> None:
  """`report_quality`, which `stop_if_asked` may end."""
  config, train, progress = job.config, job.config.train, job.progress
  if step % train.evaluate_every == 0 or step == train.steps:
    numbers = evaluate.quick(
      config,
      params,
      job.corpus,
      train.evaluate_batches,
      EVALUATION_NOISE,
      stop_if_asked,
    )
    job.writer.write(step, numbers)
    line = f'held out: AR {numbers["heldout_loss_ar"]:.3f} nats a token'
    if 'heldout_loss_corrupted' in numbers:
      line += (
        f', denoising at t = {EVALUATION_NOISE} '
        f'{numbers["heldout_loss_corrupted"]:.3f} on corrupted positions'
      )
    progress.print(f'step {step}/{train.steps}  {line}')
  if train.sample_prompt and (
    step % train.sample_every == 0 or step == train.steps
  ):
    (written,), *_ = generate.generate(
      config,
      params,
      [_sample_prompt(config, job.tokenizer)],
      jax.random.key(train.seed),
      config.diffusion.canvas_length,
      # Several processes write the canvas, which is short, in one program.
      on_step=stop_if_asked if jax.process_count() == 1 else None,
    )
    text = train.sample_prompt + job.tokenizer.decode(written.tokens)
    job.writer.write_text(step, text)
    progress.print(f'step {step}/{train.steps}  sample:\n{text}\n')
