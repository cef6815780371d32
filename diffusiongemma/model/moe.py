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

from diffusiongemma.config import ModelConfig
from diffusiongemma.kernels import experts_cpu as cpu
from diffusiongemma.kernels import grouped_matmul as grouped
from diffusiongemma.kernels import routing_gpu as gpu
from diffusiongemma.model import layers
from diffusiongemma.model import matrices
from diffusiongemma.model import parallel


@flax.struct.dataclass
class Routing:
  """What the router decided for each token.

  Attributes:
    weights_BLk: float32, the share of each chosen expert.
    experts_BLk: int32, the chosen experts.
    probabilities_BLE: float32, before the choice (for the statistics).
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
    ones, dtype = nn.initializers.ones, jnp.dtype(cfg.param_dtype)
    self.scale = self.param('scale', ones, (D,), jnp.float32)
    # The factor D^-0.5 is part of the formula, so that rows of variance one
    # give logits of variance one.
    init = nn.initializers.normal(1.0)
    self.proj = self.param('proj', init, (D, E), dtype)
    self.per_expert_scale = self.param(
      'per_expert_scale', ones, (E,), jnp.float32
    )

  def __call__(self, h_BLD: jax.Array) -> Routing:
    """`h_BLD` is float32, normed, times `scale`."""
    cfg = self.config
    logits_BLE = h_BLD * cfg.embed_dim**-0.5 @ self.proj.astype(jnp.float32)
    probabilities_BLE = jax.nn.softmax(logits_BLE, axis=-1)
    chosen = choose(logits_BLE, self.per_expert_scale, cfg.experts_per_token)
    return Routing(*chosen, probabilities_BLE)


def choose(
  logits_BLE: jax.Array, scale_E: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
  """(weights, experts) [B, L, k] of the k largest logits, the first of equal
  ones; weights are their probabilities, which add up to 1, times `scale_E`."""
  B, L, E = logits_BLE.shape

  def plain(logits_TE, scale_E):
    p_TE = jax.nn.softmax(logits_TE, axis=-1)
    weights_Tk, experts_Tk = jax.lax.top_k(p_TE, k)
    weights_Tk = weights_Tk / jnp.sum(weights_Tk, axis=-1, keepdims=True)
    return weights_Tk * scale_E.astype(jnp.float32)[experts_Tk], experts_Tk

  given = (logits_BLE.reshape(-1, E), scale_E)
  kernel = functools.partial(gpu.choose, k=k) if gpu.suits(given[0]) else None
  chosen = parallel.run(plain, *given, cuda=kernel)
  return tuple(x_Tk.reshape(B, L, k) for x_Tk in chosen)


class Experts(nn.Module):
  """E GeGLU experts; `gate_up` [E, 2F, D] has the gate first."""

  config: ModelConfig

  def setup(self):
    cfg = self.config
    D, F, E = cfg.embed_dim, cfg.expert_dim, cfg.num_experts
    self.gate_up = self._matrices('gate_up', (E, 2 * F, D))
    self.down = self._matrices('down', (E, D, F))

  def _matrices(self, name: str, shape: tuple[int, ...]) -> matrices.Matrix:
    """The parameter; Flax would compare the shape of one that is turned."""
    given = self.variables.get('params', {}).get(name)
    if isinstance(given, cpu.Turned):
      return given
    dtype = jnp.dtype(self.config.param_dtype)
    return self.param(name, layers.linear_init(2, 1, (0,)), shape, dtype)

  def __call__(self, x_BLD: jax.Array, routing: Routing) -> jax.Array:
    """[B, L, D]; each token meets only the experts it was routed to."""
    weights = (self.gate_up, self.down)
    chosen = (routing.weights_BLk, routing.experts_BLk)
    if not parallel.is_active():
      return _apply_experts(x_BLD, *chosen, *weights)
    # Else one pass keeps what it gathered for the next, of all layers at once.
    x_BLD, weights = jax.lax.optimization_barrier((x_BLD, weights))
    tokens = parallel.spec('batch', 'length', None)
    specs = (
      matrices.expert_specs(self.gate_up, ('experts', None, 'embed')),
      matrices.expert_specs(self.down, ('experts', 'embed', None)),
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
  gate_up_EFD: matrices.Matrix,
  down_EDF: matrices.Matrix,
  tokens: jax.sharding.PartitionSpec | None = None,
) -> jax.Array:
  """The mixture of each token, [B, L, D].

  With `tokens`, what lies along which axes of the mesh, this is one device's
  part: it gathers the tokens of those that have other experts, applies the
  experts that it has, and adds up what all of them say.
  """
  (B, L, D), k = x_BLD.shape, experts_BLk.shape[-1]
  x_MD = x_BLD.reshape(B * L, D)
  weights_Mk = weights_BLk.reshape(B * L, k).astype(x_BLD.dtype)
  experts_Mk = experts_BLk.reshape(B * L, k)
  if tokens is not None:
    shared_by = parallel.mesh_axes('experts')
    spread = [a for a in parallel.names_in(tokens) if a in shared_by]
    gather = functools.partial(parallel.gather, names=spread, axis=0)
    x_MD, weights_Mk = gather(x_MD), gather(weights_Mk)
    gate_up_EFD = matrices.gather_experts(gate_up_EFD, 2, x_MD.dtype)
    down_EDF = matrices.gather_experts(down_EDF, 1, x_MD.dtype)
    E = len(down_EDF)
    first = jax.lax.axis_index(shared_by) * E
    experts_Mk = gather(experts_Mk) - first
    experts_Mk = jnp.where((experts_Mk >= 0) & (experts_Mk < E), experts_Mk, E)
  num_experts = len(down_EDF) * parallel.parts('experts')
  y_MD = mix(x_MD, weights_Mk, experts_Mk, gate_up_EFD, down_EDF, num_experts)
  if tokens is not None:
    y_MD = parallel.sum_and_scatter(y_MD, shared_by, spread)
  return y_MD.reshape(B, L, D)


def mix(
  x_MD: jax.Array,
  weights_Mk: jax.Array,
  experts_Mk: jax.Array,
  gate_up_EFD: matrices.Matrix,
  down_EDF: matrices.Matrix,
  num_experts: int,
) -> jax.Array:
  """[M, D]: the experts that are here, E of `num_experts`, on the tokens that
  chose them; of those that are not, the number is E."""
  E, k = len(down_EDF), experts_Mk.shape[1]
  experts_R = experts_Mk.reshape(-1)
  tile = grouped.default_tile(len(experts_R), num_experts, gate_up_EFD)
  window = grouped.default_window(len(experts_R), num_experts)
  groups = grouped.make_groups(experts_R, E, tile, window)
  plain, on_cpu = (functools.partial(f, k=k) for f in (_in_tiles, cpu.apply))
  y_RD = parallel.run(
    *(plain, x_MD, gate_up_EFD, down_EDF, groups),
    cpu=on_cpu if cpu.suits(gate_up_EFD, down_EDF) else None,
  )
  y_MkD = y_RD.reshape(*experts_Mk.shape, -1)
  return jnp.einsum('mkd,mk->md', y_MkD, weights_Mk)


def _in_tiles(x_MD, gate_up_EFD, down_EDF, groups, k):
  """[R, D]: the routed rows after their experts, product after product."""
  hidden_TF = matrices.expert_gated(x_MD, gate_up_EFD, groups, k)
  y_TD = matrices.expert_linear(hidden_TF, down_EDF, groups)
  return grouped.gather_from_tiles(y_TD, groups)


def routing_statistics(
  routings: tuple[Routing, ...], length_B: jax.Array
) -> dict[str, jax.Array]:
  """How evenly the first `length_B` tokens of each row, which are no padding,
  are spread; the mean over layers.

  `router_entropy` is in nats (log E when the router has no preference);
  `expert_load_max` is the busiest expert's share of the choices times E (1
  when all are equally busy, E when one gets everything).
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
