"""The training objective: denoising plus autoregressive cross entropy.

  t ~ U(1e-4, 1 - 1e-4),  z ~ q(z_t | x_sel),  sel ~ U(valid canvases)
  s = 0, or with probability p the soft embedding of a first pass (no grad)
  loss = mean_i CE(f(z, s | prompt, canvases < sel), x_sel_i)
         + ar_weight * mean_j CE(prefill(x)_j, x_j+1)

The mean is over all C positions of the canvas, kept ones too, with no 1/t
weight. This is a loss: neither a likelihood nor a bound of one.
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
    denoise: (tokens_BL, sc_BLD, cache) -> h_BLD.
    logits: h [..., D] -> float32 [..., V].
    soft_embedding: probabilities [..., V] -> [..., D].
  """

  prefill: Callable
  denoise: Callable
  logits: Callable
  soft_embedding: Callable


class Noise(NamedTuple):
  """Every random choice of one batch.

  Attributes:
    start_B: int32, position of the selected canvas.
    t_B: float32, its time.
    canvas_BL: int32, the noisy canvas.
    corrupted_BL: bool, the positions drawn anew.
    self_condition_B: bool, rows that see the first pass.
  """

  start_B: jax.Array
  t_B: jax.Array
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
) -> Noise:
  """Draws canvas, time, corruption and self-conditioning for each row."""
  select_key, time_key, corrupt_key, sc_key = jax.random.split(key, 4)
  B = batch['tokens_BS'].shape[0]
  prompt_B = batch['prompt_length_B']
  count_B = (batch['length_B'] - prompt_B) // canvas_length
  selected_B = jax.random.randint(select_key, (B,), 0, jnp.maximum(count_B, 1))
  start_B = prompt_B + selected_B * canvas_length
  t_B = jax.random.uniform(time_key, (B,), minval=T_MARGIN, maxval=1 - T_MARGIN)
  clean_BL = slice_rows(batch['tokens_BS'], start_B, canvas_length)
  canvas_BL, corrupted_BL = noise.corrupt(
    corrupt_key, clean_BL, t_B, vocab_size
  )
  self_condition_B = jax.random.bernoulli(
    sc_key, self_conditioning_probability, (B,)
  )
  return Noise(start_B, t_B, canvas_BL, corrupted_BL, self_condition_B)


def diffusion_loss(
  network: Network, batch: dict, drawn: Noise, ar_loss_weight: float
) -> tuple[jax.Array, dict]:
  """The joint loss of one batch.

  Args:
    network: the functions of a network.
    batch: see `check_batch`.
    drawn: see `draw_noise`.
    ar_loss_weight: weight of the autoregressive term.

  Returns:
    (loss in nats a token, metrics): `loss_denoise`, `loss_ar`, both in nats a
    token; `accuracy`, the share of corrupted positions whose argmax is right;
    and whatever `network.prefill` returns third, under `auxiliary`.
  """
  C = drawn.canvas_BL.shape[1]
  check_batch(batch, C)
  h_BSD, cache, auxiliary = network.prefill(
    batch['tokens_BS'], batch['length_B']
  )
  # Right padding and the last column have no next token to predict.
  targets_BS = jnp.roll(batch['tokens_BS'], -1, axis=1)
  mask_BS = jnp.roll(batch['target_mask_BS'], -1, axis=1).at[:, -1].set(False)
  ar_BS, _ = cross_entropy(network.logits, h_BSD, targets_BS)
  loss_ar = masked_mean(ar_BS, mask_BS)

  sc_off_BLD = jnp.zeros((*drawn.canvas_BL.shape, h_BSD.shape[-1]), h_BSD.dtype)
  h_BLD = denoise_twice(network, cache, drawn, sc_off_BLD)
  clean_BL = slice_rows(batch['tokens_BS'], drawn.start_B, C)
  denoise_BL, right_BL = cross_entropy(network.logits, h_BLD, clean_BL)
  loss_denoise = jnp.mean(denoise_BL)
  loss = loss_denoise + ar_loss_weight * loss_ar
  metrics = {
    'loss': loss,
    'loss_denoise': loss_denoise,
    'loss_ar': loss_ar,
    'accuracy': masked_mean(right_BL, drawn.corrupted_BL),
    'auxiliary': auxiliary,
  }
  return loss, metrics


def denoise_twice(
  network: Network, cache, drawn: Noise, sc_off_BLD: jax.Array
) -> jax.Array:
  """Both passes over the selected canvas; only the second has gradients.

  The canvas sees the text before it and nothing else: the cache is cut to
  `start_B`, so the clean canvas itself is out of reach.
  """
  cache = cache.replace(length_B=drawn.start_B)
  first_BLD = network.denoise(
    drawn.canvas_BL, sc_off_BLD, jax.lax.stop_gradient(cache)
  )
  sc_BLD = soft_embedding(network, jax.lax.stop_gradient(first_BLD))
  use_B11 = drawn.self_condition_B[:, None, None]
  sc_BLD = jnp.where(use_B11, sc_BLD, sc_off_BLD)
  return network.denoise(drawn.canvas_BL, jax.lax.stop_gradient(sc_BLD), cache)


def cross_entropy(
  logits_fn: Callable, h_BLD: jax.Array, targets_BL: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cross entropy in nats and argmax hits, [B, L] each, float32.

  Logits exist for one chunk of positions at a time, in the backward pass too.
  """

  def chunk(h_MD, targets_M):
    logits_MV = logits_fn(h_MD)
    log_normalizer_M = jax.nn.logsumexp(logits_MV, axis=-1)
    picked_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1)
    right_M = jnp.argmax(logits_MV, axis=-1) == targets_M
    return log_normalizer_M - picked_M[:, 0], right_M.astype(jnp.float32)

  return _in_chunks(logits_fn, chunk, h_BLD, targets_BL)


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


def slice_rows(
  tokens_BS: jax.Array, start_B: jax.Array, length: int
) -> jax.Array:
  """`length` tokens of each row, from its own start."""
  return jax.vmap(
    lambda row, start: jax.lax.dynamic_slice(row, (start,), (length,))
  )(tokens_BS, start_B)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean over the True places; zero when there are none."""
  total = jnp.sum(jnp.where(mask, values, 0.0))
  return total / jnp.maximum(jnp.sum(mask), 1)
