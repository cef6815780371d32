"""All statistics of the logits for the sampler, in one pass over the table.

  x = softcap(h E^T) / T,   p = softmax(x)
  argmax p,  max p,  H = log sum e^x - sum p x,  a draw from p,  p E

This is an attention whose keys and values are both E: the table is processed in
chunks for all rows, sums are rescaled as the maximum grows, and no [rows, V]
array ever exists.

A draw halves the vocabulary until one token is left: down to a bin of adjacent
tokens by the masses recorded in the pass, then within the bin, whose logits are
recomputed. Each halving has its own uniform number,
  P(right) = right / (left + right),
so that every token is drawn with its probability, up to rounding, however
small: a single float32 uniform for the whole vocabulary has too few values to
reach most rare tokens.
"""

import functools
import math

import flax
import jax
import jax.numpy as jnp

from diffusiongemma import powers
from diffusiongemma.ops import dispatch
from diffusiongemma.ops.weights import FewBits
from diffusiongemma.ops.weights import rows

_BIN_HALVINGS = 4
BIN = 2**_BIN_HALVINGS  # Adjacent tokens of a bin.
_CHUNK_ELEMENTS = 2**19  # Logits of a chunk: 2 MB, to fit a cache.
_DRAWN_TOGETHER = 256  # Rows per step; each reads a bin of the table again.


class Summary(flax.struct.PyTreeNode):
  """Statistics of each row's distribution.

  Attributes:
    sample_R: int32, a draw.
    argmax_R: int32, the most probable token, the first of several.
    entropy_R: float32, nats.
    confidence_R: float32, the probability of `argmax_R`.
    mean_RD: float32, the mean row of the table.
  """

  sample_R: jax.Array
  argmax_R: jax.Array
  entropy_R: jax.Array
  confidence_R: jax.Array
  mean_RD: jax.Array


def summarize(
  h_RD: jax.Array,
  table_VD: jax.Array | FewBits,
  temperature: jax.Array,
  uniforms_RU: jax.Array,
  *,
  softcap: float = 0.0,
  chunk: int | None = None,
  with_mean: jax.Array | None = None,
  implementation: dispatch.Implementation = None,
) -> Summary:
  """The `Summary` of softmax(softcap(h E^T) / T) for each row of h.

  Products are in the type of h, with float32 results; all else is in float32.

  Args:
    h_RD: hidden states.
    table_VD: E.
    temperature: T > 0, a scalar or [R].
    uniforms_RU: float32 in [-1/2, 1/2], U = `num_halvings(V)`; x >= 0 means x,
      x < 0 means 1 + x: see `noise.uniform_from_nearer_end`.
    softcap: c of c tanh(x / c); 0 is none.
    chunk: rows of E per chunk, a multiple of `BIN`; None is as many as have 2
      MB of logits.
    with_mean: bool, a scalar: whether the mean is needed; else it is zero, and
      a CPU skips it, which is half of the work. None is True.
    implementation: see `ops`.
  """
  R, V = len(h_RD), table_VD.shape[0]
  _check_uniforms(uniforms_RU, V)
  temperature_R = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (R,))

  def plain(h_RD, table_VD, temperature_R, _):
    size = chunk or default_chunk(R)
    return _walk(h_RD, table_VD, temperature_R, look_at, size, softcap)

  def without_unused_mean(h_RD, table_VD, temperature_R, with_mean):
    take_in = functools.partial(look_at, with_mean=with_mean)
    size = chunk or default_chunk(R)
    return _walk(h_RD, table_VD, temperature_R, take_in, size, softcap)

  def choose_cuda():
    from diffusiongemma.ops.gpu import vocabulary as gpu

    gpu_chunk = chunk or default_chunk(R, gpu.CHUNK_ELEMENTS)
    sizes = [size for _, size in _chunks(V, gpu_chunk)]
    if not all(gpu.supports(h_RD, table_VD, size, BIN) for size in sizes):
      return None
    take_in = functools.partial(gpu.look_at, bin_size=BIN)
    return lambda h_RD, table_VD, temperature_R, _: _walk(
      h_RD, table_VD, temperature_R, take_in, gpu_chunk, softcap
    )

  statistics, mass_RX = dispatch.run(
    *(plain, h_RD, table_VD, temperature_R, with_mean),
    implementation=implementation,
    cpu=lambda: None if with_mean is None else without_unused_mean,
    cuda=choose_cuda,
  )
  max_R, weighted_R, argmax_R, mean_RD = statistics
  sum_R = jnp.sum(mass_RX, axis=1)

  num_outer = uniforms_RU.shape[1] - _BIN_HALVINGS
  outer_RU, inner_RU = jnp.split(uniforms_RU, [num_outer], axis=1)

  def draw(row):
    """Draws a token of the row's bin."""
    h_D, temperature, first, inner_U = row
    token_B = first + jnp.arange(BIN, dtype=jnp.int32)
    rows_BD = table_VD[jnp.minimum(token_B, V - 1)].astype(h_RD.dtype)
    product_B = jnp.einsum(
      'd,bd->b', h_D, rows_BD, preferred_element_type=jnp.float32
    )
    x_B = _scaled(product_B, softcap, temperature)
    x_B = jnp.where(token_B < V, x_B, -jnp.inf)
    return first + _halve(jnp.exp(x_B - jnp.max(x_B)), inner_U)

  first_R = draw_index(mass_RX, outer_RU) * BIN
  sample_R = jax.lax.map(
    draw, (h_RD, temperature_R, first_R, inner_RU), batch_size=_DRAWN_TOGETHER
  )
  mean_RD = mean_RD / sum_R[:, None]
  if with_mean is not None:
    mean_RD = jnp.where(with_mean, mean_RD, 0.0)
  return Summary(
    sample_R=sample_R,
    argmax_R=argmax_R,
    entropy_R=jnp.log(sum_R) + max_R - weighted_R / sum_R,
    confidence_R=1.0 / sum_R,
    mean_RD=mean_RD,
  )


def _chunks(num_rows: int, chunk: int) -> list[tuple[int, int]]:
  """(count, size) of whole chunks, and of the remainder."""
  whole, rest = divmod(num_rows, chunk)
  return [(n, size) for n, size in ((whole, chunk), (1, rest)) if n * size]


def _walk(h_RD, table_VD, temperature_R, look_at, chunk, softcap):
  """Scans the table: (the last carry of `look_at`, the mass of each bin)."""
  R, D = h_RD.shape
  carry = (
    jnp.full((R,), -jnp.inf, jnp.float32),
    jnp.zeros((R,), jnp.float32),
    jnp.zeros((R,), jnp.int32),
    jnp.zeros((R, D), jnp.float32),
  )
  recorded, first = [], 0
  for number, size in _chunks(table_VD.shape[0], chunk):
    last = first + number * size
    take_in = functools.partial(look_at, size=size, softcap=softcap)
    carry, (bins_nRX, at_nR) = jax.lax.scan(
      lambda carry, start, take_in=take_in: take_in(
        carry, h_RD, table_VD, temperature_R, start
      ),
      carry,
      jnp.arange(first, last, size, dtype=jnp.int32),
    )
    recorded.append((jnp.moveaxis(bins_nRX, 0, 1), at_nR.T))
    first = last
  mass_RX = jnp.concatenate(
    [
      (bins_RnX * jnp.exp(at_Rn - carry[0][:, None])[:, :, None]).reshape(R, -1)
      for bins_RnX, at_Rn in recorded
    ],
    axis=1,
  )
  return carry, mass_RX


def look_at(
  carry: tuple[jax.Array, ...],
  h_RD: jax.Array,
  table_VD: jax.Array | FewBits,
  temperature_R: jax.Array,
  start: jax.Array,
  *,
  size: int,
  softcap: float,
  with_mean: jax.Array | None = None,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, jax.Array]]:
  """Accumulates the statistics of E[start : start + size].

  Args:
    carry: for each row, of the chunks before: the maximum, the sum of x e^x,
      the argmax, the sum of e^x E, with sums relative to the maximum.
    h_RD, table_VD, temperature_R, softcap, with_mean: see `summarize`.
    start: int32.
    size: rows of E.

  Returns:
    (the new carry, (sums of e^x of each bin of the chunk, the maximum to which
    they are relative)).
  """
  max_R, weighted_R, argmax_R, mean_RD = carry
  rows_cD = rows(table_VD, start, size).astype(h_RD.dtype)
  product_Rc = jnp.einsum(
    'rd,cd->rc', h_RD, rows_cD, preferred_element_type=jnp.float32
  )
  x_Rc = _scaled(product_Rc, softcap, temperature_R[:, None])
  here_R = jnp.max(x_Rc, axis=-1)
  # Not argmax nor a minimum of integers, which are not vectorised everywhere.
  left_c = jnp.arange(size, 0, -1, dtype=jnp.float32)
  left_R = jnp.max(jnp.where(x_Rc == here_R[:, None], left_c, 0.0), axis=1)
  index_R = size - left_R.astype(jnp.int32)
  argmax_R = jnp.where(here_R > max_R, start + index_R, argmax_R)
  new_max_R = jnp.maximum(max_R, here_R)
  shrink_R = jnp.exp(max_R - new_max_R)
  p_Rc = jnp.exp(x_Rc - new_max_R[:, None])
  bins_RX = jnp.sum(_blocks(p_Rc, BIN), axis=-1)
  weighted_R = weighted_R * shrink_R + jnp.sum(p_Rc * x_Rc, axis=-1)

  def add_to_mean(mean_RD):
    part_RD = jnp.einsum(
      'rc,cd->rd',
      p_Rc.astype(h_RD.dtype),
      rows_cD,
      preferred_element_type=jnp.float32,
    )
    return mean_RD * shrink_R[:, None] + part_RD

  if with_mean is None:
    mean_RD = add_to_mean(mean_RD)
  else:
    mean_RD = jax.lax.cond(with_mean, add_to_mean, lambda x: x, mean_RD)
  carry = new_max_R, weighted_R, argmax_R, mean_RD
  return carry, (bins_RX, new_max_R)


def default_chunk(num_rows: int, elements: int = _CHUNK_ELEMENTS) -> int:
  """Rows of the table per chunk, a power of two, for `num_rows` rows of h."""
  return powers.largest_power_of_two(max(BIN, elements // num_rows))


def _scaled(
  product: jax.Array, softcap: float, temperature: jax.Array
) -> jax.Array:
  """Softcapped logits over the temperature."""
  if softcap:
    product = softcap * jnp.tanh(product / softcap)
  return product / temperature


def _blocks(p: jax.Array, size: int) -> jax.Array:
  """The last axis split into blocks, the last one padded with zeros."""
  padding = [(0, 0)] * (p.ndim - 1) + [(0, -p.shape[-1] % size)]
  return jnp.pad(p, padding).reshape(*p.shape[:-1], -1, size)


def _take(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
  """The element, or block, of each row at its index along `axis` < 0."""
  index = jnp.expand_dims(index, tuple(range(axis, 0)))
  return jnp.squeeze(jnp.take_along_axis(x, index, axis), axis)


def num_halvings(vocab_size: int) -> int:
  """U: number of uniforms for a draw from `vocab_size` tokens."""
  return _BIN_HALVINGS + _num_halvings(-(-vocab_size // BIN))


def sample(p: jax.Array, uniforms: jax.Array) -> jax.Array:
  """The draw of `summarize`, from probabilities [..., V]: int32 [...].

  A token of probability zero is never drawn.

  Args:
    p: probabilities, or anything proportional to them.
    uniforms: float32 in [-1/2, 1/2], [..., U]; see `summarize`.
  """
  _check_uniforms(uniforms, p.shape[-1])
  bins = _blocks(p, BIN)
  num_outer = uniforms.shape[-1] - _BIN_HALVINGS
  drawn = draw_index(jnp.sum(bins, axis=-1), uniforms[..., :num_outer])
  inside = _halve(_take(bins, drawn, -2), uniforms[..., num_outer:])
  return drawn * BIN + inside


def _check_uniforms(uniforms: jax.Array, vocab_size: int) -> None:
  if uniforms.shape[-1] != num_halvings(vocab_size):
    raise ValueError(
      f'A draw from {vocab_size} tokens needs {num_halvings(vocab_size)} '
      f'uniforms, and {uniforms.shape[-1]} were given.'
    )


def draw_index(mass: jax.Array, uniforms: jax.Array) -> jax.Array:
  """Draws an index along the last axis in proportion to its mass: int32. An
  index of mass 0 is never drawn.

  First a block is drawn by halving, then an index within it.

  Args:
    mass: float32 [..., n], >= 0, not all zero.
    uniforms: float32 in [-1/2, 1/2], [..., ceil(log2 n)].
  """
  size = powers.largest_power_of_two(math.isqrt(mass.shape[-1]))
  blocks = _blocks(mass, size)
  num_outer = _num_halvings(blocks.shape[-2])
  drawn = _halve(jnp.sum(blocks, axis=-1), uniforms[..., :num_outer])
  inside = _halve(_take(blocks, drawn, -2), uniforms[..., num_outer:])
  return drawn * size + inside


def _num_halvings(count: int) -> int:
  """Number of halvings from `count` elements to one."""
  return (count - 1).bit_length()


def _halve(mass: jax.Array, uniforms: jax.Array) -> jax.Array:
  """`draw_index` for few elements: sums of pairs, pairs of pairs and so on,
  then down again. A uniform number is relative to the nearer end and is
  compared with the mass at that end, so that arbitrarily small masses can be
  drawn."""
  sums = _blocks(mass, 2 ** _num_halvings(mass.shape[-1]))[..., 0, :]
  halves = []
  while sums.shape[-1] > 1:
    pairs = _blocks(sums, 2)
    halves.append(pairs)
    sums = jnp.sum(pairs, axis=-1)
  index = jnp.zeros(mass.shape[:-1], jnp.int32)
  for level, pairs in enumerate(reversed(halves)):
    pair, uniform = _take(pairs, index, -2), uniforms[..., level]
    left, right = pair[..., 0], pair[..., 1]
    near = jnp.abs(uniform) * (left + right)
    is_right = jnp.where(uniform < 0, near < right, near >= left)
    index = 2 * index + is_right
  return index
