"""The checkpoints of a run as training sees them: resumed from, and saved.

A step holds the whole state (parameters, optimiser, counts), the place of each
share of the batch in the data, and a description of the text, so that a run
goes on bit-equal, or refuses to.
"""

from collections.abc import Callable
import functools
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from diffusiongemma import config as configs
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import LeftAloneError
from diffusiongemma.checkpoints import native
from diffusiongemma.config import Config
from diffusiongemma.devices import processes
from diffusiongemma.devices import sharding
from diffusiongemma.model import denoiser
from diffusiongemma.training import corpus as corpora
from diffusiongemma.training import data
from diffusiongemma.training import train_state

Text = dict[str, data.Description]


def start_or_resume(
  config: Config,
  manager: ocp.CheckpointManager,
  iterator: grain.DatasetIterator,
  text: Text,
  abstract: train_state.TrainState,
  share: sharding.Share,
  load_base: Callable[[], dict[str, Any]],
) -> tuple[train_state.TrainState, Text | None]:
  """The first state, or that of the newest whole checkpoint.

  Args:
    config: of the run.
    manager: of its checkpoints.
    iterator: of batches; set to the place where the checkpoint was saved.
    text: describes the examples there are now.
    abstract: shapes, types and shardings of the state.
    share: of the batch, that this process reads.
    load_base: gives the parameters of the first state.

  Returns:
    (state, the text that the checkpoint describes, if it does).

  Raises:
    DataError: the run has learnt from other examples than there are now.
    ConfigError: it has done more steps than it is to do.
    CheckpointError: no checkpoint is whole, or another number of shares has
      saved it.
  """
  restored = native.restore_newest(manager, *train_state.to_items(abstract))
  if restored is None:
    params = denoiser.with_configured_types(config.model, load_base())
    init = jax.jit(
      functools.partial(train_state.init_train_state, config),
      out_shardings=jax.tree.map(lambda x: x.sharding, abstract),
      # A base is needed later on.
      donate_argnums=() if config.lora.rank else 0,
    )
    return init(params), None
  text_before = _check_goes_on(config, restored, text)
  iterator.set_state(_own_place(config, restored, share))
  native.set_aside_after(manager, restored.step)
  state = train_state.from_items(
    restored.step, restored.params, restored.opt_state
  )
  where = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.device_put(state, where), text_before


def _check_goes_on(
  config: Config, restored: native.Restored, text: Text
) -> Text | None:
  """The text that a checkpoint describes, if it does. Raises as
  `start_or_resume`."""
  step, steps = restored.step, config.train.steps
  if step > steps:
    raise configs.ConfigError(
      f'config.train.steps = {steps}, but the run has done {step} steps '
      'already. Give more to go on.'
    )
  described = (restored.data or {}).get('text')
  if described is None:
    return None
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
) -> dict[str, Any]:
  """The place in the data of this share of the batch.

  Raises:
    CheckpointError: each share packs its own rows, and there is another number
      of them now.
  """
  places = (restored.data or {})['shares']
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


def save(
  config: Config,
  manager: ocp.CheckpointManager,
  iterator: grain.DatasetIterator,
  text: Text,
  share: sharding.Share,
  tell: Callable[[str], None],
  state: train_state.TrainState,
  step: int,
) -> bool:
  """Saves the state after `step` steps; whether that worked. A failure is told
  by `tell` and is not fatal. All processes call this.

  Raises:
    LeftAloneError: this process could not save, and the others wait for it.
  """
  try:
    own = (share.index, iterator.get_state())
    places = dict(processes.gather_json(own))
    place: dict[str, Any] = {'shares': [places[i] for i in range(share.count)]}
    place['text'] = {name: list(x) for name, x in text.items()}
    native.save(manager, step, *train_state.to_items(state), place, config)
  except LeftAloneError:
    raise
  except CheckpointError as error:
    newest = manager.latest_step()
    kept = 'There is none yet' if newest is None else f'Step {newest} is kept'
    tell(f'{error} {kept}. Fix this, and the next save may work.')
    return False
  return True
