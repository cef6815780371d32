"""An upper bound of the negative log-likelihood of a leave-one-out network.

  -log p(x) <= Int_0^1 dt E_z sum_i l(mu_i, x_i, z_i, t),    z ~ q(z_t | x)
  l = -alpha' / (V alpha qbar_z) (KL(qbar || pbar) + r - log r - 1)
  qbar_v = alpha 1[v = x] + (1 - alpha) / V,    r = qbar_z / pbar_z
  pbar_v = alpha mu_v + (1 - alpha) / V

mu_i predicts x_i from all of z but z_i. A network trained with `loo_ce` returns
its logits, mu = softmax(f). One trained with `ce` does not: its logits contain
what `cross_entropy.add_evidence` adds, and the bound would be very loose.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.diffusion import chunks
from diffusiongemma.diffusion import loss
from diffusiongemma.diffusion import noise

DRAWS = 4  # Denoising passes per measured text.


def nelbo_density(
  log_mu_MV: jax.Array, x_M: jax.Array, z_M: jax.Array, t_M: jax.Array
) -> jax.Array:
  """The integrand l of the bound, for each token.

  With  y = pbar / qbar  and  g(d) = e^d - 1 - d >= 0,
  KL = sum_v qbar_v g(log y_v)  and  r - log r - 1 = g(-log y_z). No terms
  cancel, and mu = 0 is no special case.

  Args:
    log_mu_MV: float32, normalised log-probabilities; -inf is allowed.
    x_M: int32, clean tokens.
    z_M: int32, noisy tokens.
    t_M: float32 in (0, 1), the time of each token.

  Returns:
    l in nats per unit of time, float32 [M], at least 0; M may be several axes.

  Source: the score entropy of Lou et al., https://arxiv.org/abs/2310.16834,
  for uniform noise, and Schiff et al., https://arxiv.org/abs/2412.10193.
  """
  V = log_mu_MV.shape[-1]
  alpha_M, slope_M = jax.jvp(
    noise.noise_schedule, (t_M,), (jnp.ones_like(t_M),)
  )
  # qbar in units of (1 - alpha) / V: 1, and more at x.
  rho_M1 = (V * alpha_M / (1 - alpha_M))[..., None]
  extra_MV = rho_M1 * (jnp.arange(V) == x_M[..., None])
  log_y_MV = jnp.log1p(rho_M1 * jnp.exp(log_mu_MV)) - jnp.log1p(extra_MV)
  kl_M = jnp.sum((1 + extra_MV) * _excess(log_y_MV), axis=-1)
  kl_M *= (1 - alpha_M) / V
  jump_M = _excess(-_pick(log_y_MV, z_M))
  qbar_z_M = (1 - alpha_M) * (1 + _pick(extra_MV, z_M))  # times V
  return -slope_M / (alpha_M * qbar_z_M) * (kl_M + jump_M)


def _pick(values_MV: jax.Array, index_M: jax.Array) -> jax.Array:
  return jnp.take_along_axis(values_MV, index_M[..., None], axis=-1)[..., 0]


def _excess(d: jax.Array) -> jax.Array:
  """e^d - 1 - d; by its series near 0, where the terms cancel."""
  series = 1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6)))
  return jnp.where(jnp.abs(d) < 0.2, d * d / 2 * series, jnp.expm1(d) - d)


def draw_times(
  key: jax.Array, shape: tuple[int, ...], num_draws: int
) -> tuple[jax.Array, jax.Array]:
  """Times and weights: the mean of weight * f(t) estimates Int_0^1 f dt.

  t = u^2 with weight dt/du = 2u, because near t = 0 the integrand is about
  1/t with probability t, whose variance under uniform t is infinite. Times are
  stratified: draw j has its u in [j/n, (j+1)/n).

  Returns:
    (t, weight), float32 [num_draws, *shape]; t is clipped to `loss.T_MARGIN`
    from 0 and 1, which lowers the bound of a token by 1e-4 nats, whatever the
    network.
  """
  uniforms = jax.random.uniform(key, (num_draws, *shape), jnp.float32)
  stratum = jnp.arange(num_draws).reshape(-1, *(1 for _ in shape))
  u = (stratum + uniforms) / num_draws
  return jnp.clip(u**2, loss.T_MARGIN, 1 - loss.T_MARGIN), 2 * u


def nelbo(
  network: loss.Network,
  key: jax.Array,
  tokens_BS: jax.Array,
  length_B: jax.Array,
  start_BK: jax.Array,
  counted_BL: jax.Array,
  vocab_size: int,
  num_draws: int,
) -> jax.Array:
  """Estimates of the bound for K canvases of each row; L = K * C.

  Probabilities of consecutive canvases multiply,  p(x) = prod_k p(x_k |
  before),  so their bounds add up:  -log p(canvases | text before) <= E[nats].
  Padding is not counted. It is still seen, as noisy as the rest: the bound is
  that of the counted tokens given the others, so of a text given its end.

  Args:
    network: the functions of a network whose logits are leave-one-out.
    key: one key; every draw, row and canvas has its own time and noise.
    tokens_BS: int32, clean rows of one document each.
    length_B: int32, tokens of each row without padding.
    start_BK: int32, start of each canvas, which sees the tokens before it.
    counted_BL: bool, the positions that count.
    vocab_size: V.
    num_draws: n, denoising passes over the batch; memory is that of one.

  Returns:
    nats_nB, float32: one estimate for each draw and row, to be averaged over
    all n draws (a single one is biased: it covers only its stratum of times).
  """
  time_key, corrupt_key = jax.random.split(key)
  C = counted_BL.shape[1] // start_BK.shape[1]
  clean_BL = loss.slice_canvases(tokens_BS, start_BK, C)
  _, cache, _ = network.prefill(tokens_BS, length_B)

  def density(h_BLD, x_BL, z_BL, t_BL):
    log_mu_BLV = jax.nn.log_softmax(network.logits(h_BLD), axis=-1)
    return nelbo_density(log_mu_BLV, x_BL, z_BL, t_BL)

  def draw(drawn):
    t_BK, weight_BK, draw_key = drawn
    t_BL = jnp.repeat(t_BK, C, axis=1)
    z_BL, _ = noise.corrupt(draw_key, clean_BL, t_BL, vocab_size)
    h_BLD = network.denoise(z_BL, None, cache, start_BK)
    size = chunks.chunk_size(network.logits, h_BLD)
    nats_BL = chunks.in_chunks(density, size, h_BLD, clean_BL, z_BL, t_BL)
    nats_BL *= jnp.repeat(weight_BK, C, axis=1)
    return jnp.sum(jnp.where(counted_BL, nats_BL, 0.0), axis=1)

  t_nBK, weight_nBK = draw_times(time_key, start_BK.shape, num_draws)
  keys_n = jax.random.split(corrupt_key, num_draws)
  return jax.lax.map(draw, (t_nBK, weight_nBK, keys_n))


def combine(nats_nB: np.ndarray) -> tuple[np.float64, np.float64]:
  """The bound in nats, summed over the rows, and its standard error.

  Args:
    nats_nB: result of `nelbo`, in nats.

  Returns:
    (total, standard error), float64. The error is that of independent draws.
    Since the times are stratified, the true one is smaller: by a third for a
    canvas of 64 tokens and 8 draws.

  Raises:
    ValueError: there are fewer than two draws.
  """
  nats_nB = np.asarray(nats_nB, np.float64)
  n = len(nats_nB)
  if n < 2:
    raise ValueError(f'A standard error needs 2 draws or more, not {n}.')
  variance_B = np.var(nats_nB, axis=0, ddof=1)
  return nats_nB.mean(0).sum(), np.sqrt(variance_B.sum() / n)
