"""What training objectives are made of: noise, and two cross entropies.

  t ~ U(1e-4, 1 - 1e-4),  z ~ q(z_t | x_sel),  sel ~ U(valid canvases), or all
  s = 0, or with probability p the soft embedding of passes before (no grad)
  denoising_loss = mean_i CE(f(z, s | prompt, canvases < sel), x_sel_i)
  read_text      = mean_j CE(prefill(x)_j, x_j+1)

The mean is over all C positions of a canvas, kept ones too, with no 1/t
weight. With `leave_one_out`, f learns to tell x_i from all of z but z_i, by
being handed the evidence of z_i:  CE(f + log(1 + V alpha / (1 - alpha))
onehot(z), x).
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
# Rows of which one makes a guess, at most: more would save little.
_LARGEST_GROUP = 8


class Network(NamedTuple):
  """What the loss asks of a network; parameters are already bound.

  Attributes:
    prefill: (tokens_BS, length_B, first_BP=) -> (h_BSD, cache, auxiliary);
      no token sees what is before its `first`.
    denoise: (tokens_BL, sc_BLD, cache, start_BK, first_BK) -> h_BLD; `sc_BLD`
      is None where self-conditioning is off.
    logits: h [..., D] -> float32 [..., V].
    soft_embedding: h_BLD -> [B, L, D], the mean embedding of what they predict:
      the self-conditioning signal.
    frozen: the same network with no gradients to its parameters.
  """

  prefill: Callable[..., Any]
  denoise: Callable[..., Any]
  logits: Callable[..., Any]
  soft_embedding: Callable[..., Any]
  frozen: 'Network | None' = None


class Counts(NamedTuple):
  """What sums over a batch are divided by; at least 1 each.

  Attributes:
    targets: tokens that the AR loss predicts.
    rows: rows that have a canvas.
    corrupted: positions of canvases that were drawn anew.
  """

  targets: jax.Array
  rows: jax.Array
  corrupted: jax.Array


class Noise(flax.struct.PyTreeNode):
  """Every random choice of one batch, for K canvases of each row; L = K * C.

  Attributes:
    start_BK: int32, position of each canvas.
    first_BK: int32, position where its document begins.
    valid_BK: bool, canvases that the row has; others are not learnt.
    t_BK: float32, the time of each.
    canvas_BL: int32, the noisy canvases.
    corrupted_BL: bool, the positions drawn anew.
    guesses_B: int32, passes without gradient before the one that is learnt
      from, each of which sees what the one before it gave; 0 for a row that
      sees nothing. None where no row ever does.
    group_size: of so many rows, which follow each other, at most one sees its
      guess, so that the others need not make any.
    most_guesses: no row has more.
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
  """Raises `ValueError` unless the batch is exactly what the loss reads.

  Batch:
    tokens_BS: int32, one document or more in a row, padded on the right.
    length_B: int32, real tokens of each row.
    first_BS: int32, position where the document of each token begins.
    canvas_start_BK: int32, positions at which a canvas may start, -1 for none
      at the end of a row. They don't overlap, and each has a token before it.
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

  `canvases` is 'one', drawn from those of the row, or 'all' of them. A row
  that is self-conditioned sees its own guess after 1 to
  `self_conditioning_passes` passes. Each is with the same probability p, but
  not each for itself: of a group of rows after each other one at most, so
  that there is less to compute. A group has as many as divide the batch, up to
  1 / p and 8. The loss is the same in the mean.
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
  # Those that a row does not have still lie somewhere in it.
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
    told_G1 = jnp.floor(uniform_G1 / self_conditioning_probability)
    told_B = (told_G1 == jnp.arange(group_size)[None, :]).reshape(B)
    passes_key, most = jax.random.fold_in(sc_key, 1), self_conditioning_passes
    passes_B = jax.random.randint(passes_key, (B,), 1, most + 1, jnp.int32)
    guesses_B = jnp.where(told_B, passes_B, 0)
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
  """Prefill, from which canvases are denoised, and the loss of what it reads.

  Args:
    network: the functions of a network.
    batch: see `check_batch`.
    canvas_length: C.
    counts: what sums are divided by.
    is_learnt: without, the loss is 0, and the text of the last canvas is not
      read.

  Returns:
    (autoregressive loss in nats a token, cache, what `network.prefill` returns
    third).
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
  # No canvas sees further than where the last one can begin.
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
    counts: what sums are divided by.
    leave_one_out: hand the network the evidence of each token, so that it
      learns from the others alone; see the top of the file.

  Returns:
    (nats a token, share of corrupted positions whose argmax is right). Every
    row with a canvas counts the same, and every canvas of a row.
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
  """How much there is to learn in a batch."""
  rows = jnp.any(batch['canvas_start_BK'] >= 0, axis=1)
  corrupted_BKC = drawn.corrupted_BL.reshape(*drawn.valid_BK.shape, -1)
  counted = (
    batch['target_mask_BS'][:, 1:],
    rows,
    corrupted_BKC & drawn.valid_BK[:, :, None],
  )
  return Counts(*(jnp.maximum(jnp.sum(x), 1) for x in counted))


def denoise_canvases(network: Network, cache, drawn: Noise) -> jax.Array:
  """The pass over the canvases that is learnt from, and those without
  gradients before it, where a row may see what they give.

  A canvas sees the clean text before it and nothing else, though the cache
  holds the answer too.
  """
  places = (drawn.start_BK, drawn.first_BK)
  if drawn.guesses_B is None:
    return network.denoise(drawn.canvas_BL, None, cache, *places)
  guesses_GN = drawn.guesses_B.reshape(-1, drawn.group_size)
  which_G = jnp.argmax(guesses_GN, axis=1)
  canvas_GL, guesses_G, frozen_cache, *guess_places = jax.tree.map(
    lambda x: _one_of_each_group(x, which_G, drawn.group_size),
    jax.lax.stop_gradient((drawn.canvas_BL, drawn.guesses_B, cache, *places)),
  )

  def guess(sc_GLD):
    h_GLD = network.frozen.denoise(
      canvas_GL, sc_GLD, frozen_cache, *guess_places
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
  return network.denoise(drawn.canvas_BL, sc_BLD, cache, *places)


def _one_of_each_group(
  x_B: jax.Array, which_G: jax.Array, size: int
) -> jax.Array:
  """Of each group of neighbouring rows [B, ...] one: [B / size, ...]."""
  x_GN = x_B.reshape(-1, size, *x_B.shape[1:])
  which = which_G.reshape(-1, *(1,) * (x_B.ndim - 1))
  which = jnp.broadcast_to(which, x_GN[:, 0].shape)
  return jax.lax.select_n(which, *(x_GN[:, i] for i in range(size)))


def slice_canvases(
  tokens_BS: jax.Array, start_BK: jax.Array, canvas_length: int
) -> jax.Array:
  """The canvases of each row that start there, [B, K * C]."""
  place_BKC = start_BK[:, :, None] + jnp.arange(canvas_length)[None, None, :]
  place_BL = place_BKC.reshape(len(start_BK), -1)
  return jnp.take_along_axis(tokens_BS, place_BL, axis=1, mode='clip')
