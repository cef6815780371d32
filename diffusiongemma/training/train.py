"""The training run: opens what it needs, then trains until done or stopped.

Everything random is a function of the seed and the step, and everything that
changes is in the checkpoint (parameters, optimiser state, position in the
data), so a run that was killed and restarted ends bit-equal to one that was
not. With `config.lora`, adapters are trained; `base` are the weights they
adapt.
"""

from collections.abc import Callable
import contextlib
import functools
from typing import Any

import jax
from jax.sharding import Mesh

from diffusiongemma import paths
from diffusiongemma.checkpoints import digest as digest_lib
from diffusiongemma.checkpoints import native
from diffusiongemma.config import Config
from diffusiongemma.devices import processes
from diffusiongemma.devices import sharding
from diffusiongemma.model import denoiser
from diffusiongemma.model import parameters
from diffusiongemma.ops.weights import Params
from diffusiongemma.runs import companions
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.runs import history
from diffusiongemma.runs import lock
from diffusiongemma.training import corpus as corpora
from diffusiongemma.training import data
from diffusiongemma.training import loop
from diffusiongemma.training import metrics as metrics_lib
from diffusiongemma.training import new_tokenizer
from diffusiongemma.training import notices
from diffusiongemma.training import quality
from diffusiongemma.training import resume
from diffusiongemma.training import step as steps
from diffusiongemma.training import stopping
from diffusiongemma.training import train_state


def train(
  config: Config,
  workdir: str,
  load_base: Callable[[native.ShardingOf], dict[str, Any]] | None = None,
) -> int:
  """Trains until `config.train.steps`, from the newest intact checkpoint, on
  the mesh of the config. All processes of a job call this.

  Args:
    config: of the run.
    workdir: its folder, the same for all processes.
    load_base: (sharding) -> the parameters in `config.train.init_from`.

  Returns:
    The exit code: 0 when done, 1 when the last save failed, 128 + n when
    signal n stopped the run after a save.

  Raises:
    ConfigError, DataError, WorkdirError: nothing was written; among others, the
      run can't be resumed with another value of a field, or other examples.
    CheckpointError: all checkpoints of the run are damaged, or the weights in
      `config.train.init_from` are.
    TrainingError: too many bad steps in a row; the last good state is saved.
    LeftAloneError: this process could not save, and the others wait for it.
  """
  workdir = paths.local(workdir)
  mesh = sharding.make_mesh(config.mesh)
  sharding.validate(config, tuple(mesh.shape.values()))
  share = sharding.share_of_batch(mesh)
  with jax.set_mesh(mesh), contextlib.ExitStack() as until_done:
    return _train_on(mesh, share, config, workdir, load_base, until_done)


def _train_on(
  mesh: Mesh,
  share: sharding.Share,
  config: Config,
  workdir: str,
  load_base: Callable[[native.ShardingOf], dict[str, Any]] | None,
  until_done: contextlib.ExitStack,
) -> int:
  """`train` on a mesh, with this process's share of each batch; locks, signal
  handlers and files are released when `until_done` is closed."""
  start = config.train.init_from
  if start and load_base is None:
    raise ValueError('load_base must give the parameters in init_from.')
  # As the first process sees it, before it claims the folder.
  is_new, *_ = processes.gather_json(not workdirs.is_claimed(workdir))
  is_own = new_tokenizer.is_wanted(config.data)
  if (start or is_own) and not is_new:
    start = workdir  # It has a copy of tokenizer and template.
  if is_own and is_new:
    tokenizer = new_tokenizer.train(config.data)
    companions.check_tokenizer(config, tokenizer, config.data.tokenizer)
  else:
    tokenizer = companions.load_tokenizer(config, start)
  corpus = corpora.load_corpus(
    config.data,
    tokenizer,
    config.diffusion.canvas_length,
    companions.find_chat_template(start) if start else None,
  )
  prompt = quality.sample_prompt(config, corpus, tokenizer)

  def claim():
    workdirs.claim(workdir, config, tokenizer)
    until_done.enter_context(lock.held(workdir))
    workdirs.claim(workdir, config, tokenizer)  # Another run may be faster.

  if processes.is_first() and not is_new:
    claim()
  watch = metrics_lib.Stopwatch()
  with watch.spent_on('start'):  # Before anything is written or allocated.
    abstract = steps.abstract_state(config, mesh)
    train_step = steps.compile_step(config, abstract, mesh)
  if processes.is_first() and is_new:
    claim()
  processes.wait('claimed')
  manager = native.open_checkpoints(
    workdirs.checkpoint_dir(workdir), config.train.keep_checkpoints
  )
  until_done.enter_context(contextlib.closing(manager))
  received, must_stop = until_done.enter_context(stopping.stop_signals())
  text = {
    'train': data.describe(corpus.train),
    'heldout': data.describe(corpus.heldout),
  }
  with watch.spent_on('start'):
    load_first = functools.partial(
      load_base or functools.partial(train_state.fresh_params_at, config),
      sharding.parameter_sharding(mesh),
    )
    base = None
    if config.lora.rank:
      base = _load_adapted(config, workdir, manager, load_first)
    iterator = iter(
      data.make_dataset(
        corpus.train,
        config.data,
        config.diffusion.canvas_length,
        tokenizer,
        share,
      )
    )
    state, text_before = resume.start_or_resume(
      *(config, manager, iterator, text, abstract, share),
      load_first if base is None else lambda: base,
    )
    first_step, before = int(state.step), config
    if processes.is_first():
      before = history.go_on(workdir, config, first_step)
  writer = metrics_lib.MetricsWriter(workdir, first_step, processes.is_first())
  until_done.enter_context(contextlib.closing(writer))
  progress = until_done.enter_context(
    metrics_lib.Progress(
      config.train.steps, first_step, not processes.is_first()
    )
  )
  for line in (
    *([f'Going on from step {first_step}.'] if first_step else []),
    *notices.of_changes(before, config, first_step),
    *notices.of_text(before, config, text_before, text),
    *notices.at_start(config),
    *notices.of_tokenizer(config, corpus),
    *corpus.notes,
  ):
    progress.print(line)
  by_row = sharding.batch_sharding(mesh)
  to_mesh = lambda x: jax.make_array_from_process_local_data(by_row, x)
  saved = loop.run_steps(
    config,
    state,
    base,
    train_step,
    (jax.tree.map(to_mesh, batch) for batch in iterator),
    is_saved=manager.latest_step() == first_step,
    received=received,
    must_stop=must_stop,
    record=loop.recorder(config, writer, progress, watch),
    save=functools.partial(
      resume.save, config, manager, iterator, text, share, progress.print
    ),
    report=functools.partial(
      quality.report_quality,
      config,
      corpus,
      tokenizer,
      prompt,
      writer,
      progress,
      must_stop,
    ),
    watch=watch,
    progress=progress,
  )
  if received:
    return 128 + received[0] if saved else 1
  return 0 if saved else 1


def _load_adapted(config, workdir, manager, load) -> Params:
  """The parameters that adapters adapt; the first start records their digest,
  and later ones check it."""
  base = load()
  digests = digest_lib.digests(parameters.to_stored(base))
  is_fresh = manager.latest_step() is None
  workdirs.check_base(workdir, digests, note=is_fresh)
  return denoiser.with_configured_types(config.model, base)
