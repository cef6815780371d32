"""Training objectives: one file each, found by `config.train.objective`.

A new one is a file here, and its name in `config.TrainConfig`. It has

  DENOISES         whether evaluation measures how well it denoises
  LEAVES_ONE_OUT   whether a logit leaves out what its own token tells, and a
                   bound of the likelihood can be measured
  draw(key, batch, config) -> diffusion.loss.Noise
  loss(network, batch, drawn, counts, config) -> (nats a token, metrics)

where `counts` are what sums over the batch are divided by, `metrics` are
scalars, and under `auxiliary` what `network.prefill` returns third.
"""

import importlib
import types


def find(name: str) -> types.ModuleType:
  """The objective of this name, one of those that `TrainConfig` lists."""
  return importlib.import_module(f'{__name__}.{name}')
