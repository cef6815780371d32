"""Restores the parameters in the newest intact checkpoint of a run."""

import contextlib

from diffusiongemma import config as configs
from diffusiongemma.checkpoints import native
from diffusiongemma.config import Config
from diffusiongemma.config import QuantizationConfig
from diffusiongemma.devices import sharding as shardings
from diffusiongemma.model import denoiser
from diffusiongemma.model import lora
from diffusiongemma.model import parameters
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
  learnt = denoiser.abstract_params(config.model)
  if config.lora.rank:
    learnt = lora.abstract_adapters(config.lora, learnt)
  learnt = parameters.abstract_quantized(config.quantization, learnt)
  learnt = parameters.to_stored(learnt)
  if sharding is not None:
    learnt = shardings.placed(learnt, sharding)
  with contextlib.closing(workdirs.open_checkpoints(workdir)) as manager:
    restored = native.restore_newest(manager, learnt, verify=verify)
  if restored is None:
    raise WorkdirError(f'{workdir} has no checkpoint yet.')
  params = parameters.from_stored(config.quantization, restored.params)
  return restored._replace(params=params)
