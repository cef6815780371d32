"""The training objective: denoising plus autoregressive cross entropy.

  t ~ U(1e-4, 1 - 1e-4),  z ~ q(z_t | x_sel),  sel ~ U(valid canvases), or all
  s = 0, or with probability p the soft embedding of a first pass (no grad)
  loss = mean_i CE(f(z, s | prompt, canvases < sel), x_sel_i)
         + ar_weight * mean_j CE(prefill(x)_j, x_j+1)

The mean is over all C positions of a canvas, kept ones too, with no 1/t
weight. This is a loss: neither a likelihood nor a bound of one. `loo_ce`
teaches f to tell x_i from all of z but z_i (leave-one-out), by handing it the
evidence of z_i:  CE(f + log(1 + V alpha / (1 - alpha)) onehot(z), x).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusiongemma.diffusion import noise

T_MARGIN = 1e-4

# Logits held at once by a chunk, in numbers (128 MB in float32).
CHUNK_LOGITS = 2**25


class Network(NamedTuple):
  """What the loss asks of a network; parameters are already bound.

  Attributes:
    prefill: (tokens_BS, length_B) -> (h_BSD, cache, auxiliary).
    denoise: (tokens_BL, sc_BLD, cache, start_BK) -> h_BLD.
    logits: h [..., D] -> float32 [..., V].
    soft_embedding: probabilities [..., V] -> [..., D].
  """

  prefill: Callable
  denoise: Callable
  logits: Callable
  soft_embedding: Callable


class Noise(NamedTuple):
  """Every random choice of one batch, for K canvases of each row; L = K * C.

  Attributes:
    start_BK: int32, position of each canvas.
    valid_BK: bool, canvases that the row has; others are not learnt.
    t_BK: float32, the time of each.
    canvas_BL: int32, the noisy canvases.
    corrupted_BL: bool, the positions drawn anew.
    self_condition_B: bool, rows that see the first pass.
  """

  start_BK: jax.Array
  valid_BK: jax.Array
  t_BK: jax.Array
  canvas_BL: jax.Array
  corrupted_BL: jax.Array
  self_condition_B: jax.Array


BATCH_KEYS = ('tokens_BS', 'length_B', 'prompt_length_B', 'target_mask_BS')


def check_batch(batch: dict, canvas_length: int) -> None:
  """Raises `ValueError` unless the batch is exactly what the loss reads.

  Batch:
    tokens_BS: int32, prompt and response, padded on the right.
    length_B: int32, real tokens of each row.
    prompt_length_B: int32, where the first canvas starts; at least 1.
    target_mask_BS: bool, tokens that the AR loss predicts.
  """
  if set(batch) != set(BATCH_KEYS):
    raise ValueError(
      f'A batch has the keys {sorted(BATCH_KEYS)}; this one has '
      f'{sorted(batch)}.'
    )
  if batch['tokens_BS'].shape[1] <= canvas_length:
    raise ValueError(
      f'Rows of {batch["tokens_BS"].shape[1]} tokens have no room for a '
      f'prompt and a canvas of {canvas_length}.'
    )


def draw_noise(
  key: jax.Array,
  batch: dict,
  canvas_length: int,
  vocab_size: int,
  self_conditioning_probability: float,
  canvases: str = 'one',
) -> Noise:
  """Draws canvas, time, corruption and self-conditioning for each row.

  `canvases` is 'one', drawn from those of the row, or 'all' of them.
  """
  select_key, time_key, corrupt_key, sc_key = jax.random.split(key, 4)
  (B, S), C = batch['tokens_BS'].shape, canvas_length
  prompt_B1 = batch['prompt_length_B'][:, None]
  count_B1 = (batch['length_B'][:, None] - prompt_B1) // C
  if canvases == 'one':
    index_BK = jax.random.randint(
      select_key, (B, 1), 0, jnp.maximum(count_B1, 1)
    )
  else:
    index_BK = jnp.tile(jnp.arange((S - 1) // C), (B, 1))
  valid_BK = index_BK < count_B1
  # Those that a row does not have still lie somewhere in it.
  start_BK = jnp.where(valid_BK, prompt_B1 + index_BK * C, 0)
  t_BK = jax.random.uniform(
    time_key, start_BK.shape, minval=T_MARGIN, maxval=1 - T_MARGIN
  )
  clean_BL = slice_canvases(batch['tokens_BS'], start_BK, C)
  canvas_BL, corrupted_BL = noise.corrupt(
    corrupt_key, clean_BL, jnp.repeat(t_BK, C, axis=1), vocab_size
  )
  self_condition_B = jax.random.bernoulli(
    sc_key, self_conditioning_probability, (B,)
  )
  return Noise(
    start_BK, valid_BK, t_BK, canvas_BL, corrupted_BL, self_condition_B
  )


def diffusion_loss(
  network: Network,
  batch: dict,
  drawn: Noise,
  ar_loss_weight: float,
  *,
  objective: str = 'ce',
  num_targets: jax.Array | None = None,
) -> tuple[jax.Array, dict]:
  """The joint loss of one batch.

  Args:
    network: the functions of a network.
    batch: see `check_batch`.
    drawn: see `draw_noise`.
    ar_loss_weight: weight of the autoregressive term.
    objective: 'ce' or 'loo_ce', see the top of the file.
    num_targets: what the sum of the AR losses is divided by, instead of by
      their number: for a part of a larger batch.

  Returns:
    (loss in nats a token, metrics): `loss_denoise`, `loss_ar`, both in nats a
    token; `accuracy`, the share of corrupted positions whose argmax is right;
    and whatever `network.prefill` returns third, under `auxiliary`. Every row
    counts the same, and every canvas of a row.
  """
  K = drawn.start_BK.shape[1]
  C = drawn.canvas_BL.shape[1] // K
  check_batch(batch, C)
  h_BSD, cache, auxiliary = network.prefill(
    batch['tokens_BS'], batch['length_B']
  )
  # Right padding and the last column have no next token to predict.
  targets_BS = jnp.roll(batch['tokens_BS'], -1, axis=1)
  mask_BS = jnp.roll(batch['target_mask_BS'], -1, axis=1).at[:, -1].set(False)
  ar_BS, _ = cross_entropy(network.logits, h_BSD, targets_BS)
  if num_targets is None:
    num_targets = count_targets(batch)
  loss_ar = jnp.sum(jnp.where(mask_BS, ar_BS, 0.0)) / num_targets

  sc_off_BLD = jnp.zeros((*drawn.canvas_BL.shape, h_BSD.shape[-1]), h_BSD.dtype)
  h_BLD = denoise_twice(network, cache, drawn, sc_off_BLD)
  clean_BL = slice_canvases(batch['tokens_BS'], drawn.start_BK, C)
  evidence = None
  if objective == 'loo_ce':
    t_BL = jnp.repeat(drawn.t_BK, C, axis=1)
    evidence = (drawn.canvas_BL, t_BL)
  denoise_BL, right_BL = cross_entropy(
    network.logits, h_BLD, clean_BL, evidence
  )
  valid_BL = jnp.repeat(drawn.valid_BK, C, axis=1)
  share_BL = valid_BL / jnp.maximum(valid_BL.sum(1, keepdims=True), 1)
  loss_denoise = jnp.sum(share_BL * denoise_BL) / share_BL.shape[0]
  loss = loss_denoise + ar_loss_weight * loss_ar
  metrics = {
    'loss': loss,
    'loss_denoise': loss_denoise,
    'loss_ar': loss_ar,
    'accuracy': masked_mean(right_BL, drawn.corrupted_BL & valid_BL),
    'auxiliary': auxiliary,
  }
  return loss, metrics


def count_targets(batch: dict) -> jax.Array:
  """How many tokens the AR loss predicts; at least 1."""
  return jnp.maximum(jnp.sum(batch['target_mask_BS'][:, 1:]), 1)


def denoise_twice(
  network: Network, cache, drawn: Noise, sc_off_BLD: jax.Array
) -> jax.Array:
  """Both passes over the canvases; only the second has gradients.

  A canvas sees the clean text before it and nothing else, though the cache
  holds the answer too.
  """
  first_BLD = network.denoise(
    drawn.canvas_BL, sc_off_BLD, jax.lax.stop_gradient(cache), drawn.start_BK
  )
  sc_BLD = soft_embedding(network, jax.lax.stop_gradient(first_BLD))
  use_B11 = drawn.self_condition_B[:, None, None]
  sc_BLD = jnp.where(use_B11, sc_BLD, sc_off_BLD)
  return network.denoise(
    drawn.canvas_BL, jax.lax.stop_gradient(sc_BLD), cache, drawn.start_BK
  )


def cross_entropy(
  logits_fn: Callable,
  h_BLD: jax.Array,
  targets_BL: jax.Array,
  evidence: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Cross entropy in nats and argmax hits, [B, L] each, float32.

  Logits exist for one chunk of positions at a time, in the backward pass too.
  With `evidence` (z_BL, t_BL), they are those of a leave-one-out predictor,
  and what z tells of its own position is added.
  """

  def chunk(h_MD, targets_M, *evidence_M):
    logits_MV = logits_fn(h_MD)
    if evidence_M:
      logits_MV = add_evidence(logits_MV, *evidence_M)
    log_normalizer_M = jax.nn.logsumexp(logits_MV, axis=-1)
    picked_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1)
    right_M = jnp.argmax(logits_MV, axis=-1) == targets_M
    return log_normalizer_M - picked_M[:, 0], right_M.astype(jnp.float32)

  return _in_chunks(logits_fn, chunk, h_BLD, targets_BL, *(evidence or ()))


def add_evidence(
  logits_MV: jax.Array, z_M: jax.Array, t_M: jax.Array
) -> jax.Array:
  """log p(x_i | z) up to a constant, from log p(x_i | z without z_i): Bayes'
  rule with  q(z | x) ~ 1 + V alpha / (1 - alpha)  where x = z, 1 elsewhere."""
  V, alpha_M = logits_MV.shape[-1], noise.noise_schedule(t_M)
  bonus_M = jnp.log1p(V * alpha_M / (1 - alpha_M))
  return logits_MV + bonus_M[:, None] * jax.nn.one_hot(z_M, V)


def soft_embedding(network: Network, h_BLD: jax.Array) -> jax.Array:
  """The self-conditioning signal softmax(logits) @ E sqrt(D): [B, L, D]."""

  def chunk(h_MD):
    probabilities_MV = jax.nn.softmax(network.logits(h_MD), axis=-1)
    return network.soft_embedding(probabilities_MV)

  return _in_chunks(network.logits, chunk, h_BLD)


def _in_chunks(logits_fn: Callable, chunk: Callable, h_BLD, *others_BL):
  """Maps `chunk` over groups of positions whose logits fit CHUNK_LOGITS."""
  B, L, D = h_BLD.shape
  row = jax.ShapeDtypeStruct((1, D), h_BLD.dtype)
  V = jax.eval_shape(logits_fn, row).shape[-1]
  arrays = [x.reshape(B * L, *x.shape[2:]) for x in (h_BLD, *others_BL)]
  size = max(1, CHUNK_LOGITS // V)
  if size >= B * L:
    out = chunk(*arrays)
  else:
    count = -(-B * L // size)
    padding = count * size - B * L

    def split(x):
      x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
      return x.reshape(count, size, *x.shape[1:])

    chunks = [split(x) for x in arrays]
    out = jax.lax.map(lambda c: jax.checkpoint(chunk)(*c), chunks)
    out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: B * L], out)
  return jax.tree.map(lambda x: x.reshape(B, L, *x.shape[1:]), out)


def slice_canvases(
  tokens_BS: jax.Array, start_BK: jax.Array, canvas_length: int
) -> jax.Array:
  """The canvases of each row that start there, [B, K * C]."""
  place_BKC = start_BK[:, :, None] + jnp.arange(canvas_length)
  place_BL = place_BKC.reshape(len(start_BK), -1)
  return jnp.take_along_axis(tokens_BS, place_BL, axis=1, mode='clip')


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean over the True places; zero when there are none."""
  total = jnp.sum(jnp.where(mask, values, 0.0))
  return total / jnp.maximum(jnp.sum(mask), 1)
