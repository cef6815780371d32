"""Binds parameters to a network for the loss and for likelihoods.

The result are functions of a `denoiser.Denoiser` that run on the mesh around a
call.
"""

import jax

from diffusiongemma import ops
from diffusiongemma import powers
from diffusiongemma.config import Config
from diffusiongemma.devices import sharding
from diffusiongemma.diffusion import chunks
from diffusiongemma.diffusion import loss
from diffusiongemma.model import denoiser
from diffusiongemma.ops.weights import Params


def bind(config: Config, params: Params, remat: str = 'none') -> loss.Network:
  """The functions of a network that the loss needs, with parameters bound."""
  model = denoiser.Denoiser(config.model, remat, lower_once=True)

  def bound(params, method):
    def call(rows, *args, **kwargs):
      with sharding.activate(config.model, rows.shape[0]):
        return model.apply(
          {'params': params}, rows, *args, method=method, **kwargs
        )

    return call

  def network(params, frozen=None):
    prefill, denoise, logits, mean_embedding = (
      bound(params, method)
      for method in ('prefill', 'denoise', 'logits', 'mean_embedding')
    )

    def soft_embedding(h_BLD):
      B, L, _ = h_BLD.shape
      with sharding.activate(config.model, B):
        if (
          ops.parallel.is_active()
        ):  # Every device computes its shard of the logits.
          size = chunks.chunk_size(logits, h_BLD)
        else:  # A power of two, as kernels require.
          most = max(1, chunks.PASS_ROWS // B)
          size = powers.largest_power_of_two(most)
      return chunks.in_chunks(mean_embedding, min(size, L), h_BLD)

    return loss.Network(prefill, denoise, logits, soft_embedding, frozen)

  return network(params, network(jax.lax.stop_gradient(params)))
