"""Saves the checkpoints of a run, and resumes from them.

A checkpoint holds the whole state (parameters, optimiser, counts), the position
of each share of the batch in the data, and a description of the text: a run
continues bit-equal, or refuses to.
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
  """The initial state, or that of the newest intact checkpoint.

  Args:
    config: of the run.
    manager: of its checkpoints.
    iterator: of batches; set to its position in the checkpoint.
    text: describes the current examples.
    abstract: shapes, types and shardings of the state.
    share: of the batch, that this process reads.
    load_base: returns the parameters of the initial state.

  Returns:
    (state, description of the text in the checkpoint, None without one).

  Raises:
    DataError: the run has learnt from other examples than the current ones.
    ConfigError: the run has done more than `config.train.steps` already.
    CheckpointError: no checkpoint is intact, or it was saved with another
      number of shares.
  """
  restored = native.restore_newest(manager, *train_state.to_items(abstract))
  if restored is None:
    params = denoiser.with_configured_types(config.model, load_base())
    init = jax.jit(
      functools.partial(train_state.init_train_state, config),
      out_shardings=jax.tree.map(lambda x: x.sharding, abstract),
      # The base of adapters is still needed.
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
  """Description of the text in a checkpoint, None without one. Raises as
  `start_or_resume`."""
  step, steps = restored.step, config.train.steps
  if step > steps:
    raise configs.ConfigError(
      f'config.train.steps = {steps}, but the run has done {step} steps '
      'already. Give more to continue.'
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
      f'{now}{others}. Its position in the data means nothing here. Give it '
      'the text that it had, or learn from this one in another --workdir, '
      'where config.train.init_from names this run.'
    )
  return before


def _own_place(
  config: Config, restored: native.Restored, share: sharding.Share
) -> dict[str, Any]:
  """The position of this share of the batch in the data.

  Raises:
    CheckpointError: each share packs its own rows, and the number of shares has
      changed.
  """
  positions = (restored.data or {})['shares']
  if not config.data.packing:
    return positions[0]  # The same for every share, for any number of shares.
  if len(positions) == share.count:
    return positions[share.index]
  raise CheckpointError(
    f'Step {restored.step} was saved by a job whose batches were packed in '
    f'{len(positions)} shares, each with its own position in the data; now '
    f'there are {share.count}. Continue with as many processes, or with a '
    'config.mesh that divides the batch among as many.'
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
  """Saves the state after `step` steps; returns whether the save succeeded. A
  failure is reported with `tell` and is not fatal. A collective.

  Raises:
    LeftAloneError: this process could not save, and the others wait for it.
  """
  try:
    own = (share.index, iterator.get_state())
    positions = dict(processes.gather_json(own))
    data_state: dict[str, Any] = {
      'shares': [positions[i] for i in range(share.count)]
    }
    data_state['text'] = {name: list(x) for name, x in text.items()}
    native.save(manager, step, *train_state.to_items(state), data_state, config)
  except LeftAloneError:
    raise
  except CheckpointError as error:
    newest = manager.latest_step()
    last_saved = (
      'There is none yet' if newest is None else f'Step {newest} is kept'
    )
    tell(f'{error} {last_saved}. Fix this, and the next save may work.')
    return False
  return True
