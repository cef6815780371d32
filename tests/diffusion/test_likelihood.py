"""The bound of the likelihood: against enumeration, papers and float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.diffusion import chunks
from diffusiongemma.diffusion import likelihood
from diffusiongemma.diffusion import loss
from diffusiongemma.diffusion import noise

# Gauss-Legendre nodes and weights in u, where t = u^2; clipped as by the code.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)
U, DU = (_NODES + 1) / 2, _WEIGHTS / 2
TIMES = np.clip(U**2, loss.T_MARGIN, 1 - loss.T_MARGIN)

density = jax.jit(likelihood.nelbo_density)


def exact_times(t):
  """The nearest times for which float32 holds both t and alpha exactly."""
  one = np.float32(1)
  return (one - (one - np.float32(t))).astype(np.float64)


def kernel(t, V):
  """q(z | x) at a time t, [z, x]."""
  return (1 - t) * np.eye(V) + t / V


def on_axes(matrix, i, L):
  """The [z_i, x_i] matrix beside arrays of the axes [z_1, ..., z_L, x_i]."""
  return matrix.reshape(
    [len(matrix) if j in (i, L) else 1 for j in range(L + 1)]
  )


def joint(p, i, t):
  """p(z, x_i), by summing over all other x; [z_1, ..., z_L, x_i]."""
  V, L = len(p), p.ndim
  for j in range(L):
    if j != i:
      p = np.moveaxis(np.tensordot(kernel(t, V), p, (1, j)), 0, j)
  p = np.expand_dims(np.moveaxis(p, i, -1), i)
  return p * on_axes(kernel(t, V), i, L)


def normalized(p):
  return p / p.sum(-1, keepdims=True)


def posterior(p):
  """p(x_i | z): what plain cross entropy teaches a denoiser."""
  return lambda i, t: normalized(joint(p, i, t))


def leave_one_out(p):
  """p(x_i | z without z_i): the posterior without the evidence of z_i."""
  L = p.ndim
  return lambda i, t: normalized(
    joint(p, i, t) / on_axes(kernel(t, len(p)), i, L)
  )


def marginal(p):
  """p(x_i), the best that ignores z."""
  single = lambda i: p.sum(tuple(j for j in range(p.ndim) if j != i))
  return lambda i, t: np.broadcast_to(single(i), (*p.shape, len(p)))


def exact_nelbo(p, mu):
  """The bound under the data p: the sum over all x and z, quadrature over t.

  `mu` is a function (i, t) -> mu_i, [z_1, ..., z_L, x_i].
  """
  V, rows, weights = len(p), [], []
  x = np.tile(np.arange(V), p.size)
  for t, u, du in zip(TIMES, U, DU, strict=True):
    for i in range(p.ndim):
      z = np.repeat(np.indices(p.shape)[i].ravel(), V)
      log_mu = np.log(mu(i, t)).reshape(-1, V)
      rows.append((np.repeat(log_mu, V, axis=0), x, z, np.full(len(x), t)))
      weights.append(2 * u * du * joint(p, i, t).ravel())
  log_mu, x, z, t = (np.concatenate(a) for a in zip(*rows, strict=True))
  nats = density(np.float32(log_mu), x, z, np.float32(t))
  return np.sum(np.concatenate(weights) * np.asarray(nats, np.float64))


def entropy(p):
  return -np.sum(p * np.log(p))


def random_joint(V, L, seed=0):
  """Strictly positive, with strong ties between the positions."""
  rng = np.random.default_rng(seed)
  p = rng.dirichlet(np.full(V**L, 0.2)).reshape((V,) * L) + 1e-3
  return p / p.sum()


@pytest.mark.parametrize('V, L', [(3, 2), (2, 3)])
def test_the_optimal_predictor_reaches_the_entropy(V, L):
  """And one that ignores z the sum of the entropies of single tokens."""
  p = random_joint(V, L)
  np.testing.assert_allclose(
    exact_nelbo(p, leave_one_out(p)), entropy(p), atol=1e-3
  )
  singles = [p.sum(tuple(j for j in range(L) if j != i)) for i in range(L)]
  alone = exact_nelbo(p, marginal(p))
  np.testing.assert_allclose(alone, sum(map(entropy, singles)), atol=1e-3)
  assert alone > entropy(p) + 0.1


def test_no_predictor_goes_below_the_entropy():
  """Not one near the best, and not the posterior given all of z, which knows
  more: told twice of z_i, it is too sure of it."""
  p, rng = random_joint(3, 2), np.random.default_rng(1)
  best = leave_one_out(p)

  def tilted(scale):
    tilt = np.exp(rng.normal(size=(2, 3)) * scale)
    return lambda i, t: normalized(best(i, t) * tilt[i])

  excess = [exact_nelbo(p, tilted(s)) - entropy(p) for s in (0.1, 0.3, 1, 3)]
  assert excess[0] > 1e-3 and np.all(np.diff(excess) > 0)
  assert exact_nelbo(p, posterior(p)) > entropy(p) + 0.1


def test_one_token_costs_minus_log_mu():
  """Alone, its bound is tight for every token and not only on average."""
  mu = np.array([0.62, 0.3, 0.08])
  for x in range(3):
    point = np.eye(3)[x]
    np.testing.assert_allclose(
      exact_nelbo(point, lambda i, t: np.tile(mu, (3, 1))),
      -np.log(mu[x]),
      atol=1e-3,
    )


def one_hot(x, V):
  return (np.arange(V) == x[:, None]).astype(np.float64)


def bars(log_mu, x, t):
  """qbar and pbar in float64."""
  V, t = log_mu.shape[-1], t[:, None]
  qbar = (1 - t) * one_hot(x, V) + t / V
  return qbar, (1 - t) * np.exp(log_mu) + t / V


def at(values, index):
  return values[np.arange(len(index)), index]


def score_entropy(log_mu, x, z, t):
  """Lou et al. 2024, with the concrete scores of uniform noise."""
  V = log_mu.shape[-1]
  qbar, pbar = bars(log_mu, x, t)
  s, a = pbar / at(pbar, z)[:, None], qbar / at(qbar, z)[:, None]
  terms = s - a * np.log(s) + a * (np.log(a) - 1)
  other = np.arange(V) != z[:, None]
  return (terms * other).sum(1) / ((1 - t) * V)


def udlm(log_mu, x, z, t):
  """Schiff et al. 2024, the continuous-time bound for uniform noise."""
  N, alpha = log_mu.shape[-1], 1 - t[:, None]
  x_bar = N * alpha * one_hot(x, N) + 1 - alpha
  x_theta = N * alpha * np.exp(log_mu) + 1 - alpha
  x_bar_z, x_theta_z = at(x_bar, z)[:, None], at(x_theta, z)[:, None]
  logs = np.log(x_theta_z / x_theta * x_bar / x_bar_z)
  inner = N / x_bar_z - N / x_theta_z
  inner = inner[:, 0] - (x_bar / x_bar_z * logs).sum(1)
  return -1 / (N * alpha[:, 0]) * inner


def discrete_time(log_mu, x, z, t, steps):
  """One term of the bound of a chain of so many steps, times their number."""
  V, s = log_mu.shape[-1], t - 1 / steps
  ratio = ((1 - t) / (1 - s))[:, None]
  step = ratio * one_hot(z, V) + (1 - ratio) / V

  def reverse(mean):
    """q(z_s | z_t, x), with a distribution in the place of x."""
    alpha_s, alpha_t = 1 - s[:, None], 1 - t[:, None]
    before = alpha_s * mean + (1 - alpha_s) / V
    after = alpha_t * at(mean, z)[:, None] + (1 - alpha_t) / V
    return step * before / after

  q, p = reverse(one_hot(x, V)), reverse(np.exp(log_mu))
  np.testing.assert_allclose(p.sum(1), 1)
  return steps * (q * np.log(q / p)).sum(1)


def examples(V, times, rows, scale=2.0, seed=0):
  """Random predictors at each time, a third of them nearly sure and right;
  half of the tokens are kept."""
  rng = np.random.default_rng(seed)
  t = np.repeat(exact_times(times), rows)
  x = rng.integers(0, V, len(t))
  logits = rng.normal(size=(len(t), V)) * scale
  sure = np.arange(0, len(t), 3)
  logits[sure, x[sure]] = logits[sure].max(1) + np.log(V) + 3
  log_mu = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  z = np.where(np.arange(len(t)) % 2, x, rng.integers(0, V, len(t)))
  return log_mu, x, z, t


def ours(log_mu, x, z, t):
  nats = density(np.float32(log_mu), x, z, np.float32(t))
  assert nats.dtype == jnp.float32
  return np.asarray(nats, np.float64)


def by_definition(log_mu, x, z, t):
  """The equation at the top of the module, in float64."""
  V = log_mu.shape[-1]
  qbar, pbar = bars(log_mu, x, t)
  kl = (qbar * np.log(qbar / pbar)).sum(1)
  r = at(qbar, z) / at(pbar, z)
  return (kl + r - np.log(r) - 1) / (V * (1 - t) * at(qbar, z))


@pytest.mark.parametrize(
  'form, rtol',
  [
    (score_entropy, 1e-5),
    (udlm, 1e-5),
    (lambda *args: discrete_time(*args, steps=1e6), 1e-4),
  ],
  ids=['score_entropy', 'udlm', 'discrete_time'],
)
def test_published_forms_are_the_same(form, rtol):
  args = examples(7, (0.05, 0.3, 0.6, 0.95), 50)
  np.testing.assert_allclose(ours(*args), form(*args), rtol, atol=1e-8)


@pytest.mark.parametrize('V', [5, 50_000])
@pytest.mark.parametrize('t', [1e-4, 1e-3, 0.5, 1 - 1e-4])
def test_float32_is_enough(V, t):
  args = examples(V, (t,), 24)
  got, wanted = ours(*args), by_definition(*args)
  np.testing.assert_allclose(got, wanted, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize('V', [5, 262_144])
@pytest.mark.parametrize('t', [1e-4, 0.5, 1 - 1e-4])
@pytest.mark.parametrize('floor', [-60.0, -np.inf])
def test_a_predictor_that_is_sure_and_wrong(V, t, floor):
  """A finite price: noise might have made any token. None if it is right."""
  log_mu = np.full((3, V), floor)
  log_mu[:, 1] = 0
  wrong = (log_mu, np.array([0, 0, 0]), np.array([0, 1, 2]))
  wrong = (*wrong, exact_times([t] * 3))
  got = ours(*wrong)
  assert np.isfinite(got).all() and (got > 0).all()
  np.testing.assert_allclose(got, by_definition(*wrong), rtol=3e-6)
  right = (log_mu, np.array([1, 1, 1]), *wrong[2:])
  assert (ours(*right) >= 0).all()
  np.testing.assert_allclose(ours(*right), 0, atol=1e-15)


def test_never_negative():
  """Also where mu is right to the last bits, and logs nearly cancel."""
  times = np.linspace(1e-4, 1 - 1e-4, 20)
  for scale in (1e-4, 1, 30):
    args = examples(7, times, 10, scale=scale)
    assert ours(*args).min() >= 0
  miss = np.tile(np.geomspace(1e-8, 1e-2, 10), 20)
  log_mu = np.tile(np.log(miss / 6)[:, None], 7)
  log_mu[:, 0] = np.log1p(-miss)
  assert ours(log_mu, 0 * args[1], *args[2:]).min() >= 0


def test_times_are_stratified_and_weighted():
  n, draw = 500, jax.jit(likelihood.draw_times, static_argnums=(1, 2))
  t, weight = map(np.asarray, draw(jax.random.key(0), (2, 3), n))
  assert t.shape == weight.shape == (n, 2, 3)
  j = np.arange(n)[:, None, None]
  assert (abs(weight / 2 * n - j - 0.5) < 0.5 + 1e-4).all()
  assert t.min() >= np.float32(loss.T_MARGIN)
  assert t.max() <= np.float32(1 - loss.T_MARGIN)
  assert len(np.unique(t[n // 2])) == 6, 'a time for each canvas'
  for f, integral in ((np.ones_like, 1), (np.sqrt, 2 / 3), (np.log, -1)):
    means = np.mean(weight * f(t), axis=0)
    np.testing.assert_allclose(means, integral, atol=1e-3)


# Rows of N tokens after a first one, from a joint distribution.
V, N = 3, 4
JOINT = random_joint(V, N, seed=2)
ROWS = np.array([[0, 2, 0, 1, 1], [1, 0, 0, 2, 0]], np.int32)
FIXED = 0.4


def given(k, C):
  """p(canvas k, text before it), [text, C axes]."""
  after = tuple(range((k + 1) * C, N))
  return JOINT.sum(after).reshape(-1, *[V] * C)


def code(tokens_BM):
  """A number for each text."""
  return tokens_BM @ V ** np.arange(tokens_BM.shape[1])[::-1]


@functools.cache
def fake_network(C):
  """Leave-one-out and best at the time FIXED; it is not told the time.

  mu is looked up by the text before the canvas and by its z; hidden states
  are log mu.
  """
  tables = []
  for k in range(N // C):
    mu = [[leave_one_out(g)(i, FIXED) for i in range(C)] for g in given(k, C)]
    mu = np.moveaxis(np.array(mu), 1, -2).reshape(-1, V**C, C, V)
    tables.append(np.log(np.float32(mu)))

  def denoise(z_BL, sc_BLD, text_BS, start_BK):
    assert sc_BLD is None
    out = []
    for k, table in enumerate(tables):
      before_BM, z_BC = text_BS[:, 1 : 1 + k * C], z_BL[:, k * C : (k + 1) * C]
      log_mu_BCV = jnp.asarray(table)[code(before_BM), code(z_BC)]
      placed_B = start_BK[:, k] == 1 + k * C
      out.append(jnp.where(placed_B[:, None, None], log_mu_BCV, jnp.nan))
    return jnp.concatenate(out, axis=1)

  prefill = lambda tokens_BS, length_B: (None, tokens_BS, ())
  return loss.Network(prefill, denoise, lambda h: h, None)


def estimator(C, repetitions):
  """counted_L -> nats_nB of the rows, each repeated with noise of its own."""
  rows_BS = np.repeat(ROWS, repetitions, axis=0)
  B = len(rows_BS)

  # Optimising would take longer than running.
  @functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
  )
  def run(counted_BL):
    return likelihood.nelbo(
      fake_network(C),
      jax.random.key(C),
      rows_BS,
      np.full(B, N + 1),
      np.tile(np.arange(1, N + 1, C), (B, 1)),
      counted_BL,
      V,
      num_draws=12,
    )

  return lambda *counted: np.asarray(
    run(np.tile(np.array(counted, bool), (B, 1)))
  )


@pytest.fixture(scope='module')
def estimate():
  return estimator(C=2, repetitions=1)


def exact_nelbo_of_row(row, C):
  """By enumeration, canvas by canvas."""
  nats = 0
  for k in range(N // C):
    start = 1 + k * C
    best = leave_one_out(given(k, C)[code(row[None, 1:start])[0]])
    point = np.zeros((V,) * C)
    point[tuple(row[start : start + C])] = 1
    nats += exact_nelbo(point, lambda i, t, mu=best: mu(i, FIXED))
  return nats


@pytest.mark.parametrize('C', [2, 1])
def test_estimates_are_unbiased(C):
  """And their standard error is what repetitions show. For canvases of one
  token the best network needs no time, and the bound is tight."""
  nats_nB = estimator(C, repetitions=2500)(*[True] * N)
  assert nats_nB.dtype == np.float32 and nats_nB.shape == (12, 5_000)
  for row, nats_nR in zip(ROWS, np.split(nats_nB, 2, axis=1), strict=True):
    wanted = exact_nelbo_of_row(row, C)
    if C == 1:
      minus_log_p = -np.log(JOINT[tuple(row[1:])])
      np.testing.assert_allclose(wanted, minus_log_p, atol=1e-3)
    pairs = [likelihood.combine(nats_n[:, None]) for nats_n in nats_nR.T]
    totals, errors = np.array(pairs).T
    spread = np.std(totals, ddof=1)
    off_by = abs(totals.mean() - wanted) / (spread / np.sqrt(len(totals)))
    assert off_by < 4 and spread / np.sqrt(len(totals)) < 0.06
    ratio = np.sqrt(np.mean(errors**2)) / spread
    assert 0.95 < ratio < 1.15


def test_combine_adds_rows_and_averages_draws():
  total, error = likelihood.combine(np.float32([[1, 10], [3, 10], [2, 40]]))
  assert total.dtype == error.dtype == np.float64
  np.testing.assert_allclose(total, 22)
  np.testing.assert_allclose(error, np.sqrt((1 + 300) / 3))
  with pytest.raises(ValueError, match='2 draws or more, not 1'):
    likelihood.combine(np.ones((1, 4)))


def test_what_is_not_counted_adds_nothing(estimate):
  """The parts add up to the whole."""
  first, other = estimate(1, 1, 0, 1), estimate(0, 0, 1, 0)
  np.testing.assert_allclose(first + other, estimate(1, 1, 1, 1), rtol=1e-5)
  assert (other > 0).any() and (first > 0).any()
  assert not estimate(0, 0, 0, 0).any()


def test_logits_in_chunks_are_the_same(estimate, monkeypatch):
  """The last chunk is padded with tokens of no meaning, at t = 0."""
  whole = estimate(1, 1, 1, 1)
  monkeypatch.setattr(chunks, 'CHUNK_LOGITS', 3 * 2 * V)
  chunked = estimator(C=2, repetitions=1)(1, 1, 1, 1)
  np.testing.assert_allclose(chunked, whole, rtol=1e-6)


def test_every_canvas_and_draw_has_its_own_time_and_noise(monkeypatch):
  """Without noise the density at these times, with their weights, is left."""
  seen = []

  def spy(key, tokens_BL, t_BL, vocab_size):
    assert vocab_size == V
    jax.debug.callback(
      lambda *drawn: seen.append(drawn), t_BL, jax.random.key_data(key)
    )
    return tokens_BL, None

  monkeypatch.setattr(noise, 'corrupt', spy)
  nats_nB = estimator(C=2, repetitions=2)(1, 1, 1, 1)
  jax.effects_barrier()
  t_nBL, keys_n = (np.array(a) for a in zip(*seen, strict=True))
  t_nBKC = t_nBL.reshape(12, 4, 2, 2)
  assert (t_nBKC[..., 0] == t_nBKC[..., 1]).all(), 'one time in a canvas'
  assert len(np.unique(t_nBKC)) == 12 * 4 * 2
  assert len(np.unique(keys_n, axis=0)) == 12

  rows_BS, start_BK = np.repeat(ROWS, 2, axis=0), np.tile([1, 3], (4, 1))
  x_BL = rows_BS[:, 1:]
  log_mu_BLV = fake_network(2).denoise(x_BL, None, rows_BS, start_BK)
  x = np.tile(x_BL.ravel(), 12)
  nats = ours(np.tile(log_mu_BLV.reshape(-1, V), (12, 1)), x, x, t_nBL.ravel())
  wanted = 2 * np.sqrt(t_nBL) * nats.reshape(t_nBL.shape)
  # Callbacks may come in another order; the times of draw 0 may be clipped.
  wanted_nB = wanted.sum(2)[np.argsort(t_nBL[:, 0, 0])]
  np.testing.assert_allclose(nats_nB[1:], wanted_nB[1:], rtol=1e-5)
