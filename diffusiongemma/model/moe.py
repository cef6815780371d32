"""The router and the mixture of experts.

  r = softmax(bare_RMSNorm(h) * scale * D^-0.5 @ Wr)          float32
  w = top_k(r) / sum(top_k(r)) * per_expert_scale
  moe(x) = sum over the k chosen e of  w_e * GeGLU_e(x)

The router reads the raw residual h, the experts its normed copy x.
"""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusiongemma.config import ModelConfig
from diffusiongemma.kernels import grouped_matmul as grouped
from diffusiongemma.model import layers


@flax.struct.dataclass
class Routing:
  """What the router decided for M tokens.

  Attributes:
    weights_Mk: float32, the share of each chosen expert.
    experts_Mk: int32, the chosen experts.
    probabilities_ME: float32, before the choice (for the statistics).
  """

  weights_Mk: jax.Array
  experts_Mk: jax.Array
  probabilities_ME: jax.Array


class Router(nn.Module):
  """Chooses `experts_per_token` experts for every token, in float32."""

  config: ModelConfig

  def setup(self):
    cfg = self.config
    D, E = cfg.embed_dim, cfg.num_experts
    ones, dtype = nn.initializers.ones, jnp.dtype(cfg.param_dtype)
    self.scale = self.param('scale', ones, (D,), jnp.float32)
    # The factor D^-0.5 is part of the formula, so that rows of variance one
    # give logits of variance one.
    init = nn.initializers.normal(1.0)
    self.proj = self.param('proj', init, (D, E), dtype)
    self.per_expert_scale = self.param(
      'per_expert_scale', ones, (E,), jnp.float32
    )

  def __call__(self, h_MD: jax.Array) -> Routing:
    cfg = self.config
    h_MD = layers.rms_norm(h_MD.astype(jnp.float32), cfg.norm_epsilon)
    h_MD = h_MD * self.scale.astype(jnp.float32) * cfg.embed_dim**-0.5
    logits_ME = h_MD @ self.proj.astype(jnp.float32)
    probabilities_ME = jax.nn.softmax(logits_ME, axis=-1)
    weights, experts = jax.lax.top_k(probabilities_ME, cfg.experts_per_token)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights * self.per_expert_scale.astype(jnp.float32)[experts]
    return Routing(weights, experts, probabilities_ME)


class Experts(nn.Module):
  """E GeGLU experts; `gate_up` [E, 2F, D] has the gate first."""

  config: ModelConfig

  def setup(self):
    cfg = self.config
    D, F, E = cfg.embed_dim, cfg.expert_dim, cfg.num_experts
    init, dtype = layers.linear_init(2, 1, (0,)), jnp.dtype(cfg.param_dtype)
    self.gate_up = self.param('gate_up', init, (E, 2 * F, D), dtype)
    self.down = self.param('down', init, (E, D, F), dtype)

  def __call__(self, x_MD: jax.Array, routing: Routing) -> jax.Array:
    """[M, D]; each token meets only the experts it was routed to."""
    k = self.config.experts_per_token
    num_experts = self.config.num_experts
    experts_R = routing.experts_Mk.reshape(-1)
    tile = grouped.default_tile(experts_R.shape[0], num_experts)
    groups = grouped.make_groups(experts_R, num_experts, tile)
    x_TD = grouped.scatter_to_tiles(x_MD, groups, k)
    gate_up_TF = _expert_linear(x_TD, self.gate_up, groups)
    gate_TF, up_TF = jnp.split(gate_up_TF, 2, axis=-1)
    hidden_TF = nn.gelu(gate_TF, approximate=True) * up_TF
    y_TD = _expert_linear(hidden_TF, self.down, groups)
    y_MkD = grouped.gather_from_tiles(y_TD, groups).reshape(
      *routing.experts_Mk.shape, -1
    )
    weights_Mk = routing.weights_Mk.astype(x_MD.dtype)
    return jnp.einsum('mkd,mk->md', y_MkD, weights_Mk)


def _expert_linear(
  x_TD: jax.Array, w_EFD: jax.Array | layers.LowRank, groups: grouped.Groups
) -> jax.Array:
  """Each tile times the matrix of its expert, which may have an adapter with
  `a` [E, rank, D] and `b` [E, F, rank]."""
  if not isinstance(w_EFD, layers.LowRank):
    return grouped.grouped_matmul(x_TD, w_EFD.astype(x_TD.dtype), groups)
  thin_TR = _expert_linear(x_TD, w_EFD.a, groups)
  update_TF = _expert_linear(thin_TR, w_EFD.b, groups)
  return _expert_linear(x_TD, w_EFD.weight, groups) + w_EFD.scale * update_TF


def routing_statistics(routings: tuple[Routing, ...]) -> dict[str, jax.Array]:
  """How evenly tokens are spread, the mean over layers.

  `router_entropy` is in nats (log E when the router has no preference);
  `expert_load_max` is the busiest expert's share of the choices times E (1
  when all are equally busy, E when one gets everything).
  """
  entropies, loads = [], []
  for routing in routings:
    p_ME = routing.probabilities_ME
    num_experts = p_ME.shape[-1]
    entropy_M = -jnp.sum(p_ME * jnp.log(p_ME + 1e-30), axis=-1)
    entropies.append(jnp.mean(entropy_M))
    chosen = jax.nn.one_hot(routing.experts_Mk, num_experts)
    loads.append(jnp.max(jnp.mean(chosen, axis=(0, 1))) * num_experts)
  return {
    'router_entropy': jnp.mean(jnp.stack(entropies)),
    'expert_load_max': jnp.mean(jnp.stack(loads)),
  }
