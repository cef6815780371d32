"""Components of training objectives: noise, and two cross entropies.

  t ~ U(1e-4, 1 - 1e-4),  z ~ q(z_t | x_sel),  sel ~ U(valid canvases), or all
  s = 0, or with probability p the soft embedding of earlier passes (no grad)
  denoising_loss = mean_i CE(f(z, s | prompt, canvases < sel), x_sel_i)
  read_text      = mean_j CE(prefill(x)_j, x_j+1)

The mean is over all C positions of a canvas, kept ones too, with no 1/t
weight. With `leave_one_out`, f learns to predict x_i from all of z but z_i,
because the evidence of z_i is added to it:  CE(f + log(1 + V alpha /
(1 - alpha)) onehot(z), x).
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp

from diffusiongemma.diffusion import cross_entropy
from diffusiongemma.diffusion import noise

T_MARGIN = 1e-4
# Most rows that share one guess (a pass without gradient for
# self-conditioning); more would save little.
_LARGEST_GROUP = 8


class Network(NamedTuple):
  """The functions of a network that the loss needs, with parameters bound.

  Attributes:
    prefill: (tokens_BS, length_B, first_BP=) -> (h_BSD, cache, auxiliary);
      no token sees positions before its `first`.
    denoise: (tokens_BL, sc_BLD, cache, start_BK, first_BK) -> h_BLD; `sc_BLD`
      is None without self-conditioning.
    logits: h [..., D] -> float32 [..., V].
    soft_embedding: h_BLD -> [B, L, D], the mean embedding under the predicted
      probabilities: the self-conditioning signal.
    frozen: the same network without gradients to its parameters.
  """

  prefill: Callable[..., Any]
  denoise: Callable[..., Any]
  logits: Callable[..., Any]
  soft_embedding: Callable[..., Any]
  frozen: 'Network | None' = None


class Counts(NamedTuple):
  """Denominators of means over a batch; at least 1 each.

  Attributes:
    targets: tokens that the AR loss predicts.
    rows: rows with a canvas.
    corrupted: redrawn positions of canvases.
  """

  targets: jax.Array
  rows: jax.Array
  corrupted: jax.Array


class Noise(flax.struct.PyTreeNode):
  """Every random choice of one batch, for K canvases of each row; L = K * C.

  Attributes:
    start_BK: int32, start of each canvas.
    first_BK: int32, position where its document begins.
    valid_BK: bool, canvases that the row has; others are not learnt.
    t_BK: float32, time of each canvas.
    canvas_BL: int32, the noisy canvases.
    corrupted_BL: bool, the redrawn positions.
    guesses_B: int32, number of passes (guesses) that a row is self-conditioned
      on: without gradient, each self-conditioned on the one before. 0 for a row
      without self-conditioning; None if it is off.
    group_size: of so many consecutive rows at most one is self-conditioned, so
      that the others need no such passes.
    most_guesses: upper bound of `guesses_B`.
  """

  start_BK: jax.Array
  first_BK: jax.Array
  valid_BK: jax.Array
  t_BK: jax.Array
  canvas_BL: jax.Array
  corrupted_BL: jax.Array
  guesses_B: jax.Array | None
  group_size: int = flax.struct.field(pytree_node=False, default=1)
  most_guesses: int = flax.struct.field(pytree_node=False, default=1)


BATCH_KEYS = (
  'tokens_BS',
  'length_B',
  'first_BS',
  'canvas_start_BK',
  'target_mask_BS',
)


def check_batch(batch: dict[str, Any], canvas_length: int) -> None:
  """Raises `ValueError` unless the batch has exactly the keys of the loss.

  Batch:
    tokens_BS: int32, one or more documents per row, padded on the right.
    length_B: int32, tokens of each row without padding.
    first_BS: int32, position where the document of each token begins.
    canvas_start_BK: int32, positions where a canvas may start, then -1. They
      don't overlap, and each has a token before it.
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
  batch: dict[str, Any],
  canvas_length: int,
  vocab_size: int,
  self_conditioning_probability: float,
  canvases: str = 'one',
  self_conditioning_passes: int = 1,
) -> Noise:
  """Draws canvas, time, corruption and self-conditioning for each row.

  `canvases` is 'one', drawn from those of the row, or 'all' of them. A
  self-conditioned row is self-conditioned on 1 to `self_conditioning_passes`
  passes. Every row is with the same probability p, but rows are not
  independent: at most one row of a group of consecutive rows is, which saves
  passes. The size of a group is the largest divisor of the batch size up to
  1 / p and 8. The expected loss is the same.
  """
  select_key, time_key, corrupt_key, sc_key = jax.random.split(key, 4)
  C, start_BK = canvas_length, batch['canvas_start_BK']
  B = start_BK.shape[0]
  if canvases == 'one':
    count_B1 = jnp.sum(start_BK >= 0, axis=1, keepdims=True)
    index_B1 = jax.random.randint(
      select_key, (B, 1), 0, jnp.maximum(count_B1, 1), jnp.int32
    )
    start_BK = jnp.take_along_axis(start_BK, index_B1, axis=1)
  valid_BK = start_BK >= 0
  # Invalid canvases get a position in the row, too.
  start_BK = jnp.maximum(start_BK, 0)
  first_BK = jnp.take_along_axis(batch['first_BS'], start_BK, axis=1)
  t_BK = jax.random.uniform(
    time_key, start_BK.shape, jnp.float32, T_MARGIN, 1 - T_MARGIN
  )
  clean_BL = slice_canvases(batch['tokens_BS'], start_BK, C)
  canvas_BL, corrupted_BL = noise.corrupt(
    corrupt_key, clean_BL, jnp.repeat(t_BK, C, axis=1), vocab_size
  )
  guesses_B, group_size = None, 1
  if self_conditioning_probability:
    most = int(min(_LARGEST_GROUP, 1 / self_conditioning_probability))
    group_size = max(n for n in range(1, most + 1) if B % n == 0)
    uniform_G1 = jax.random.uniform(sc_key, (B // group_size, 1), jnp.float32)
    which_G1 = jnp.floor(uniform_G1 / self_conditioning_probability)
    is_conditioned_B = (which_G1 == jnp.arange(group_size)[None, :]).reshape(B)
    passes_key, most = jax.random.fold_in(sc_key, 1), self_conditioning_passes
    passes_B = jax.random.randint(passes_key, (B,), 1, most + 1, jnp.int32)
    guesses_B = jnp.where(is_conditioned_B, passes_B, 0)
  return Noise(
    start_BK,
    first_BK,
    valid_BK,
    t_BK,
    canvas_BL,
    corrupted_BL,
    guesses_B,
    group_size,
    self_conditioning_passes,
  )


def read_text(
  network: Network,
  batch: dict[str, Any],
  canvas_length: int,
  counts: Counts,
  is_learnt: bool = True,
) -> tuple[jax.Array, Any, Any]:
  """Prefills the cache for denoising; computes the autoregressive loss.

  Args:
    network: the functions of a network.
    batch: see `check_batch`.
    canvas_length: C.
    counts: denominators.
    is_learnt: if False, the loss is 0, and the text of the last canvas is not
      read.

  Returns:
    (autoregressive loss in nats per token, cache, third value of
    `network.prefill`).
  """
  if is_learnt:
    h_BSD, cache, auxiliary = network.prefill(
      batch['tokens_BS'], batch['length_B'], first_BP=batch['first_BS']
    )
    # Right padding and the last column have no next token to predict.
    targets_BS = jnp.roll(batch['tokens_BS'], -1, axis=1)
    mask_BS = jnp.roll(batch['target_mask_BS'], -1, axis=1).at[:, -1].set(False)
    nats, _ = cross_entropy.weighted(
      network.logits, h_BSD, targets_BS, mask_BS / counts.targets
    )
    return nats, cache, auxiliary
  # No canvas sees beyond the last possible start of a canvas.
  P = batch['tokens_BS'].shape[1] - canvas_length
  _, cache, auxiliary = network.prefill(
    batch['tokens_BS'][:, :P],
    jnp.minimum(batch['length_B'], P),
    first_BP=batch['first_BS'][:, :P],
  )
  return jnp.zeros((), jnp.float32), cache, auxiliary


def denoising_loss(
  network: Network,
  cache: Any,
  batch: dict[str, Any],
  drawn: Noise,
  counts: Counts,
  leave_one_out: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """The loss of the canvases, each after the text before it.

  Args:
    network: the functions of a network.
    cache: of the batch's text, see `read_text`.
    batch: see `check_batch`.
    drawn: see `draw_noise`.
    counts: denominators.
    leave_one_out: whether to add the evidence of each token to its logits, so
      that they are learnt from the other tokens; see the module docstring.

  Returns:
    (nats per token, share of corrupted positions whose argmax is right). All
    rows with a canvas have the same weight, and so have all canvases of a row.
  """
  C = drawn.canvas_BL.shape[1] // drawn.start_BK.shape[1]
  h_BLD = denoise_canvases(network, cache, drawn)
  clean_BL = slice_canvases(batch['tokens_BS'], drawn.start_BK, C)
  evidence = None
  if leave_one_out:
    evidence = (drawn.canvas_BL, jnp.repeat(drawn.t_BK, C, axis=1))
  valid_BL = jnp.repeat(drawn.valid_BK, C, axis=1)
  share_BL = valid_BL / jnp.maximum(valid_BL.sum(1, keepdims=True), 1)
  nats, right_BL = cross_entropy.weighted(
    network.logits, h_BLD, clean_BL, share_BL / counts.rows, evidence
  )
  judged_BL = drawn.corrupted_BL & valid_BL
  accuracy = jnp.sum(jnp.where(judged_BL, right_BL, 0)) / counts.corrupted
  return nats, accuracy


def count(batch: dict[str, Any], drawn: Noise) -> Counts:
  """The denominators of a batch."""
  rows = jnp.any(batch['canvas_start_BK'] >= 0, axis=1)
  corrupted_BKC = drawn.corrupted_BL.reshape(*drawn.valid_BK.shape, -1)
  counted = (
    batch['target_mask_BS'][:, 1:],
    rows,
    corrupted_BKC & drawn.valid_BK[:, :, None],
  )
  return Counts(*(jnp.maximum(jnp.sum(x), 1) for x in counted))


def denoise_canvases(network: Network, cache, drawn: Noise) -> jax.Array:
  """Hidden states of the pass over the canvases with gradients, after passes
  without gradients for self-conditioning.

  A canvas sees only the clean text before it, although the cache also holds the
  answer.
  """
  positions = (drawn.start_BK, drawn.first_BK)
  if drawn.guesses_B is None:
    return network.denoise(drawn.canvas_BL, None, cache, *positions)
  guesses_GN = drawn.guesses_B.reshape(-1, drawn.group_size)
  which_G = jnp.argmax(guesses_GN, axis=1)
  canvas_GL, guesses_G, frozen_cache, *guess_positions = jax.tree.map(
    lambda x: _one_of_each_group(x, which_G, drawn.group_size),
    jax.lax.stop_gradient(
      (drawn.canvas_BL, drawn.guesses_B, cache, *positions)
    ),
  )

  def guess(sc_GLD):
    h_GLD = network.frozen.denoise(
      canvas_GL, sc_GLD, frozen_cache, *guess_positions
    )
    return network.frozen.soft_embedding(h_GLD)

  def again(i, sc_GLD):
    wanted_G11 = i < guesses_G[:, None, None]
    return jnp.where(wanted_G11, guess(sc_GLD), sc_GLD)

  sc_GLD = guess(None)
  if drawn.most_guesses > 1:
    sc_GLD = jax.lax.fori_loop(1, drawn.most_guesses, again, sc_GLD)
  sc_GNLD = jnp.where(guesses_GN[:, :, None, None] > 0, sc_GLD[:, None], 0.0)
  sc_BLD = sc_GNLD.reshape(-1, *sc_GLD.shape[1:])
  return network.denoise(drawn.canvas_BL, sc_BLD, cache, *positions)


def _one_of_each_group(
  x_B: jax.Array, which_G: jax.Array, size: int
) -> jax.Array:
  """One row of each group of consecutive rows: [B, ...] -> [B / size, ...]."""
  x_GN = x_B.reshape(-1, size, *x_B.shape[1:])
  which = which_G.reshape(-1, *(1,) * (x_B.ndim - 1))
  which = jnp.broadcast_to(which, x_GN[:, 0].shape)
  return jax.lax.select_n(which, *(x_GN[:, i] for i in range(size)))


def slice_canvases(
  tokens_BS: jax.Array, start_BK: jax.Array, canvas_length: int
) -> jax.Array:
  """The canvases of each row that start at `start_BK`, [B, K * C]."""
  position_BKC = start_BK[:, :, None] + jnp.arange(canvas_length)[None, None, :]
  position_BL = position_BKC.reshape(len(start_BK), -1)
  return jnp.take_along_axis(tokens_BS, position_BL, axis=1, mode='clip')
