"""The router and the mixture of experts.

  r = softmax(bare_RMSNorm(h) * scale * D^-0.5 @ Wr)          float32
  w = top_k(r) / sum(top_k(r)) * per_expert_scale
  moe(x) = sum over the k chosen e of  w_e * GeGLU_e(x)

The router reads the raw residual h, the experts its normed copy x.
"""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusiongemma import ops
from diffusiongemma.config import ModelConfig
from diffusiongemma.model import parameters


class Routing(flax.struct.PyTreeNode):
  """The router's choice for each token.

  Attributes:
    weights_BLk: float32, weights of the chosen experts.
    experts_BLk: int32, the chosen experts.
    probabilities_BLE: float32, of all experts (for statistics).
  """

  weights_BLk: jax.Array
  experts_BLk: jax.Array
  probabilities_BLE: jax.Array


class Router(nn.Module):
  """Chooses `experts_per_token` experts for every token, in float32."""

  config: ModelConfig

  def setup(self):
    cfg = self.config
    D, E = cfg.embed_dim, cfg.num_experts
    self.scale, self.proj, self.per_expert_scale = (
      parameters.declare(self, f'router/{name}', shape, cfg.param_dtype)
      for name, shape in (
        ('scale', (D,)),
        ('proj', (D, E)),
        ('per_expert_scale', (E,)),
      )
    )

  def __call__(self, h_BLD: jax.Array) -> Routing:
    """`h_BLD` is float32, normed, times `scale`."""
    cfg = self.config
    logits_BLE = h_BLD * cfg.embed_dim**-0.5 @ self.proj.astype(jnp.float32)
    probabilities_BLE = jax.nn.softmax(logits_BLE, axis=-1)
    chosen = ops.routing.choose(
      logits_BLE, self.per_expert_scale, cfg.experts_per_token
    )
    return Routing(*chosen, probabilities_BLE)


class Experts(nn.Module):
  """E GeGLU experts; `gate_up` [E, 2F, D] has the gate first."""

  config: ModelConfig

  def setup(self):
    cfg = self.config
    D, F, E = cfg.embed_dim, cfg.expert_dim, cfg.num_experts
    self.gate_up = self._matrices('gate_up', (E, 2 * F, D))
    self.down = self._matrices('down', (E, D, F))

  def _matrices(self, name: str, shape: tuple[int, ...]) -> ops.weights.Weight:
    existing = self.variables.get('params', {}).get(name)
    shape = ops.weights.shape_in_memory(existing, shape)
    return parameters.declare(
      self, f'experts/{name}', shape, self.config.param_dtype
    )

  def __call__(self, x_BLD: jax.Array, routing: Routing) -> jax.Array:
    """[B, L, D]; each token uses only the experts it was routed to."""
    weights = (self.gate_up, self.down)
    chosen = (routing.weights_BLk, routing.experts_BLk)
    if not ops.parallel.is_active():
      return _apply_experts(x_BLD, *chosen, *weights)
    # Without the barrier, XLA would keep the gathered weights of all layers
    # from one pass to the next.
    x_BLD, weights = jax.lax.optimization_barrier((x_BLD, weights))
    tokens = ops.parallel.spec('batch', 'length', None)
    specs = (
      ops.weights.expert_specs(self.gate_up, ('experts', None, 'embed')),
      ops.weights.expert_specs(self.down, ('experts', 'embed', None)),
    )
    return jax.shard_map(
      functools.partial(_apply_experts, tokens=tokens),
      in_specs=(tokens, tokens, tokens, *specs),
      out_specs=tokens,
      check_vma=False,
    )(x_BLD, *chosen, *weights)


def _apply_experts(
  x_BLD: jax.Array,
  weights_BLk: jax.Array,
  experts_BLk: jax.Array,
  gate_up_EFD: ops.weights.Weight,
  down_EDF: ops.weights.Weight,
  tokens: jax.sharding.PartitionSpec | None = None,
) -> jax.Array:
  """The mixture of each token, [B, L, D].

  With `tokens`, their sharding, this is the part of one device: it gathers the
  tokens of the devices with other experts, applies its own experts, and sums
  the results of all devices.
  """
  (B, L, D), k = x_BLD.shape, experts_BLk.shape[-1]
  x_MD = x_BLD.reshape(B * L, D)
  weights_Mk = weights_BLk.reshape(B * L, k).astype(x_BLD.dtype)
  experts_Mk = experts_BLk.reshape(B * L, k)
  if tokens is not None:
    shared_by = ops.parallel.mesh_axes('experts')
    spread = [a for a in ops.parallel.names_in(tokens) if a in shared_by]
    gather = functools.partial(ops.parallel.gather, names=spread, axis=0)
    x_MD, weights_Mk = gather(x_MD), gather(weights_Mk)
    gate_up_EFD = ops.weights.gather_experts(gate_up_EFD, 2, x_MD.dtype)
    down_EDF = ops.weights.gather_experts(down_EDF, 1, x_MD.dtype)
    E = len(down_EDF)
    first = jax.lax.axis_index(shared_by) * E
    experts_Mk = gather(experts_Mk) - first
    experts_Mk = jnp.where((experts_Mk >= 0) & (experts_Mk < E), experts_Mk, E)
  num_experts = len(down_EDF) * ops.parallel.parts('experts')
  y_MD = ops.experts.mix(
    x_MD, weights_Mk, experts_Mk, gate_up_EFD, down_EDF, num_experts
  )
  if tokens is not None:
    y_MD = ops.parallel.sum_and_scatter(y_MD, shared_by, spread)
  return y_MD.reshape(B, L, D)


def routing_statistics(
  routings: tuple[Routing, ...], length_B: jax.Array
) -> dict[str, jax.Array]:
  """Load balance of the first `length_B` tokens of each row (without padding),
  averaged over layers.

  `router_entropy` is in nats (log E if the router has no preference);
  `expert_load_max` is the busiest expert's share of the choices times E (1 if
  all are equally busy, E / k if every token chooses it).
  """
  entropies, loads = [], []
  for routing in routings:
    p_BLE = routing.probabilities_BLE
    _, L, num_experts = p_BLE.shape
    is_token_BL = jnp.arange(L)[None, :] < length_B[:, None]
    share_BL = is_token_BL / jnp.maximum(jnp.sum(is_token_BL), 1)
    entropy_BL = -jnp.sum(p_BLE * jnp.log(p_BLE + 1e-30), axis=-1)
    entropies.append(jnp.sum(entropy_BL * share_BL))
    chosen_BLkE = jax.nn.one_hot(routing.experts_BLk, num_experts)
    load_E = jnp.einsum('blke,bl->e', chosen_BLkE, share_BL)
    k = routing.experts_BLk.shape[-1]
    loads.append(jnp.max(load_E) * num_experts / k)
  return {
    'router_entropy': jnp.mean(jnp.stack(entropies)),
    'expert_load_max': jnp.mean(jnp.stack(loads)),
  }
