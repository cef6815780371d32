"""Restores the parameters in the newest intact checkpoint of a run."""

import contextlib

from flax import traverse_util
from orbax import checkpoint as ocp

from diffusiongemma import config as configs
from diffusiongemma.checkpoints import native
from diffusiongemma.config import Config
from diffusiongemma.config import QuantizationConfig
from diffusiongemma.devices import sharding as shardings
from diffusiongemma.model import denoiser
from diffusiongemma.model import lora
from diffusiongemma.model import parameters
from diffusiongemma.ops.weights import Params
from diffusiongemma.runs import WorkdirError
from diffusiongemma.runs import folder as workdirs


def restore(
  workdir: str,
  config: Config | None = None,
  sharding: native.ShardingOf | None = None,
  verify: bool = True,
) -> native.Restored:
  """Restores the parameters of a run, or with `config.lora` only the adapters.
  No optimiser is built or read.

  Args:
    workdir: the folder of the run.
    config: settings to use instead of the run's own.
    sharding: sharding of each array; None is the first device.
    verify: whether to compare the digest of every array.

  Raises:
    WorkdirError: there is no run, or it has no finished checkpoint.
    CheckpointError: all of its checkpoints are damaged.
    ConfigError: `config.quantization` is not that of the stored parameters.
  """
  own = workdirs.read_config(workdir)
  config = config or own
  if config.quantization != own.quantization:
    remedy = 'leave config.quantization as it is'
    if own.quantization == QuantizationConfig():
      remedy = f'--mode=quantize --source={workdir} --workdir=NEW'
    raise configs.ConfigError(
      f'The parameters in {workdir} are already stored as its config says: '
      f'{remedy}.'
    )
  with contextlib.closing(workdirs.open_checkpoints(workdir)) as manager:
    learnt = _abstract(config, manager)
    if sharding is not None:
      learnt = shardings.placed(learnt, sharding)
    restored = native.restore_newest(manager, learnt, verify=verify)
  if restored is None:
    raise WorkdirError(f'{workdir} has no checkpoint yet.')
  params = parameters.from_stored(restored.params)
  return restored._replace(params=params)


def _abstract(config: Config, manager: ocp.CheckpointManager) -> Params:
  """Shapes of the arrays of a checkpoint. Those of weights that another tool
  quantised are taken from the disk."""
  learnt = denoiser.abstract_params(config.model)
  if config.lora.rank:
    return lora.abstract_adapters(config.lora, learnt)
  step = manager.latest_step()
  if parameters.has_stored(config.quantization) and step is not None:
    return traverse_util.unflatten_dict(native.stored_types(manager, step))
  learnt = parameters.abstract_quantized(config.quantization, learnt)
  return parameters.to_stored(learnt)
