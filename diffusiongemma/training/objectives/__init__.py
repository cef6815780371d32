"""Training objectives: one file each, found by `config.train.objective`.

A new one is a file here, and its name in `config.TrainConfig`. It has

  DENOISES         whether evaluation measures denoising
  LEAVES_ONE_OUT   whether logits exclude the evidence of their own token, so
                   that a bound of the likelihood can be measured
  draw(key, batch, config) -> diffusion.loss.Noise
  loss(network, batch, drawn, counts, config) -> (nats per token, metrics)

where sums over the batch are divided by `counts`, and `metrics` are scalars,
but for `auxiliary`, the third value of `network.prefill`.
"""

import importlib
import types


def find(name: str) -> types.ModuleType:
  """The objective of this name, one of those that `TrainConfig` lists."""
  return importlib.import_module(f'{__name__}.{name}')
