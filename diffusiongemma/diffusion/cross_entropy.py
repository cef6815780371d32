"""Cross entropy with one chunk of logits in memory at a time.

  CE(f, x) = log sum_v e^f_v - f_x,      d CE / d f = softmax(f) - onehot(x)

The gradients of a weighted sum are computed in the forward pass, while the
logits exist: the weights are known, and the backward pass only scales them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusiongemma.diffusion import chunks
from diffusiongemma.diffusion import noise


def weighted(
  logits_fn: Callable[..., Any],
  h_BLD: jax.Array,
  targets_BL: jax.Array,
  weights_BL: jax.Array,
  evidence: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """(sum of weights * cross entropy in nats, hits [B, L]), float32; a hit is 1
  where no token is more probable than the target.

  Logits exist for one chunk of positions at a time and are computed once: a
  gradient is computed in the forward pass. Positions of weight 0 may hold
  anything, and their hits are 0; they are sorted to the end, so that whole
  chunks of them are skipped. Weights are constants, with gradient 0. For the
  other arguments see `per_position`.
  """
  size, L = chunks.chunk_size(logits_fn, h_BLD), h_BLD.shape[1]
  operands = (h_BLD, targets_BL, weights_BL, *(evidence or ()))
  logits_fn, held = _hoist(logits_fn, h_BLD[:, :size])

  def part(held, h_BLD, targets_BL, weights_BL, *evidence_BL):
    counts_BL = weights_BL != 0
    h_BLD = jnp.where(counts_BL[..., None], h_BLD, 0)
    loss_BL, right_BL = _cross_entropy(
      logits_fn(held, h_BLD), targets_BL, *evidence_BL
    )
    loss_BL = weights_BL * loss_BL
    return jnp.sum(loss_BL), (loss_BL, counts_BL * right_BL)

  def scan(step, carry, operands):
    """`chunks.scan` that skips chunks of weight 0; their results are zero."""

    def step_or_skip(carry, operands):
      shapes = jax.eval_shape(step, carry, operands)[1]
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
      counts = jnp.any(operands[2] != 0)
      skip = lambda carry, operands: (carry, zeros)
      return jax.lax.cond(counts, step, skip, carry, operands)

    if size == L:
      return step(carry, operands)
    order_BL = jnp.argsort(operands[2] == 0, axis=1, stable=True)
    # The last chunk is padded with arbitrary positions of weight 0.
    filled_BL = jnp.pad(order_BL, ((0, 0), (0, -L % size)))
    h_BLD, targets_BL, weights_BL, *evidence = _reorder(operands, filled_BL)
    weights_BL = jnp.where(jnp.arange(filled_BL.shape[1]) < L, weights_BL, 0)
    operands = (h_BLD, targets_BL, weights_BL, *evidence)
    carry, results = chunks.scan(step_or_skip, carry, operands, size)
    return carry, _reorder(results, jnp.argsort(order_BL, axis=1))

  @jax.custom_vjp
  def total(held, *operands):
    step = lambda _, operands: (None, part(held, *operands)[1])
    _, (loss_BL, right_BL) = scan(step, None, operands)
    return jnp.sum(loss_BL), right_BL

  def forward(held, *operands):
    def step(d_held, operands):
      gradient_fn = jax.grad(part, argnums=(0, 1), has_aux=True)
      (d_here, d_BLD), losses = gradient_fn(held, *operands)
      return jax.tree.map(jnp.add, d_held, d_here), (*losses, d_BLD)

    zeros = jax.tree.map(jnp.zeros_like, held)
    d_held, (loss_BL, right_BL, d_BLD) = scan(step, zeros, operands)
    return (jnp.sum(loss_BL), right_BL), (d_held, d_BLD)

  def backward(gradients, d):
    scale = lambda x: (d[0] * x).astype(x.dtype)
    constants = [None] * (len(operands) - 1)
    return *jax.tree.map(scale, gradients), *constants

  total.defvjp(forward, backward)
  return total(held, *operands)


def _hoist(
  function: Callable[..., Any], example: jax.Array
) -> tuple[Callable[..., Any], list[Any]]:
  """(`function` with the arrays of its closure, its parameters, as first
  argument; these arrays). `jax.closure_convert` would keep them in a cache."""
  closed = jax.make_jaxpr(function)(example)
  has_gradient = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)

  def hoisted(held, x):
    values = iter(held)
    consts = [next(values) if has_gradient(c) else c for c in closed.consts]
    (result,) = jax.core.eval_jaxpr(closed.jaxpr, consts, x)
    return result

  return hoisted, list(filter(has_gradient, closed.consts))


def _reorder(arrays: Any, order_BL: jax.Array) -> Any:
  """Arrays [B, L, ...] permuted along their positions."""

  def reorder(x):
    index = order_BL.reshape(order_BL.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)

  return jax.tree.map(reorder, arrays)


def per_position(
  logits_fn: Callable[..., Any],
  h_BLD: jax.Array,
  targets_BL: jax.Array,
  evidence: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """(cross entropy in nats, hits), [B, L] each, float32; for gradients use
  `weighted`.

  Logits exist for one chunk of positions at a time. With `evidence` (z_BL,
  t_BL), they are those of a leave-one-out predictor, to which the evidence of z
  about its own position is added.
  """

  def chunk(h_BLD, *targets):
    return _cross_entropy(logits_fn(h_BLD), *targets)

  size = chunks.chunk_size(logits_fn, h_BLD)
  return chunks.in_chunks(chunk, size, h_BLD, targets_BL, *(evidence or ()))


def _cross_entropy(logits_BLV, targets_BL, *evidence_BL):
  if evidence_BL:
    logits_BLV = add_evidence(logits_BLV, *evidence_BL)
  loss_BL = negative_log_likelihood(logits_BLV, targets_BL)
  # From values that the loss computes anyway, unlike an argmax.
  right_BL = _pick(logits_BLV, targets_BL) == jnp.max(logits_BLV, axis=-1)
  return loss_BL, right_BL.astype(jnp.float32)


@jax.custom_vjp
def negative_log_likelihood(
  logits_BLV: jax.Array, targets_BL: jax.Array
) -> jax.Array:
  """-log softmax(logits) of the targets in nats, [B, L]. Its gradient is
  softmax - one_hot; the logits are the only residual of their size."""
  return _nll_forward(logits_BLV, targets_BL)[0]


def _nll_forward(logits_BLV, targets_BL):
  max_BL = jnp.max(logits_BLV, axis=-1)
  sum_BL = jnp.sum(jnp.exp(logits_BLV - max_BL[..., None]), axis=-1)
  picked_BL = _pick(logits_BLV, targets_BL)
  residuals = (logits_BLV, targets_BL, max_BL, sum_BL)
  return jnp.log(sum_BL) + (max_BL - picked_BL), residuals


def _nll_backward(residuals, d_BL):
  logits_BLV, targets_BL, max_BL, sum_BL = residuals
  # Not from log sum: its rounding error would dominate where p = 1.
  p_BLV = jnp.exp(logits_BLV - max_BL[..., None]) / sum_BL[..., None]
  d_BLV = p_BLV - _is_target(logits_BLV, targets_BL)
  return d_BL[..., None] * d_BLV, None


def _pick(logits_BLV, targets_BL):
  """The logit of each target."""
  # As a sum, so that a sharded vocabulary is not gathered.
  is_target_BLV = _is_target(logits_BLV, targets_BL)
  return jnp.sum(jnp.where(is_target_BLV, logits_BLV, 0.0), axis=-1)


def _is_target(logits_BLV, targets_BL):
  token_V = jnp.arange(logits_BLV.shape[-1])
  return token_V[None, None, :] == targets_BL[..., None]


negative_log_likelihood.defvjp(_nll_forward, _nll_backward)


def add_evidence(
  logits_BLV: jax.Array, z_BL: jax.Array, t_BL: jax.Array
) -> jax.Array:
  """log p(x_i | z) up to a constant, from log p(x_i | z without z_i): Bayes'
  rule with  q(z | x) ~ 1 + V alpha / (1 - alpha)  where x = z, 1 elsewhere."""
  V, alpha_BL = logits_BLV.shape[-1], noise.noise_schedule(t_BL)
  bonus_BL = jnp.log1p(V * alpha_BL / (1 - alpha_BL))
  return logits_BLV + bonus_BL[..., None] * jax.nn.one_hot(z_BL, V)
