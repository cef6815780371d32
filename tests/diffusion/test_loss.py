"""The training loss: what it sees, what it must not see, and its pieces."""

import functools

import jax
import jax.numpy as jnp
import joint_loss
import numpy as np
import pytest

from diffusiongemma import config as configs
from diffusiongemma.diffusion import chunks
from diffusiongemma.diffusion import cross_entropy
from diffusiongemma.diffusion import loss
from diffusiongemma.generation import network as network_lib
from diffusiongemma.model import denoiser

B, S, C = 2, 30, 6
PROMPT_B = np.array([4, 9])


def make_network(model_config, params):
  return network_lib.bind(configs.Config(model=model_config), params)


@pytest.fixture(scope='module')
def network(model_config, params):
  """Compiled function by function, which tests share."""
  made = make_network(model_config, params)
  compiled = lambda functions: loss.Network(*map(jax.jit, functions[:-1]))
  return compiled(made)._replace(frozen=compiled(made.frozen))


def canvas_starts(prompt_B, length_B):
  """Canvases after the prompt, as many as a row has room for."""
  start_BK = prompt_B[:, None] + np.arange((S - 1) // C) * C
  return np.where(start_BK + C <= length_B[:, None], start_BK, -1)


@pytest.fixture(scope='module')
def batch(model_config):
  rng = np.random.default_rng(0)
  length_B = np.array([S, 25])
  position = np.arange(S)[None]
  return jax.device_put(
    {
      'tokens_BS': rng.integers(0, model_config.vocab_size, (B, S), np.int32),
      'length_B': length_B,
      'first_BS': np.zeros((B, S), np.int32),
      'canvas_start_BK': canvas_starts(PROMPT_B, length_B),
      'target_mask_BS': (position > 0) & (position < length_B[:, None]),
    }
  )


def drawn_for(batch, selected, guesses=1):
  """Noise for canvas number `selected` of both rows, each told of its own
  guess after so many passes."""
  start_B = PROMPT_B + selected * C
  place_BL = start_B[:, None] + np.arange(C)
  clean_BL = np.take_along_axis(np.asarray(batch['tokens_BS']), place_BL, 1)
  corrupted_BL = np.arange(C)[None] % 2 == np.array([[0], [1]])
  canvas_BL = np.where(corrupted_BL, (clean_BL + 5) % 97, clean_BL)
  return jax.device_put(
    loss.Noise(
      start_B[:, None],
      np.zeros((B, 1), np.int32),
      np.ones((B, 1), bool),
      np.full((B, 1), 0.5, np.float32),
      canvas_BL,
      corrupted_BL,
      np.full(B, guesses),
    )
  )


def test_accuracy_is_that_of_corrupted_positions(network, model_config, batch):
  """Of a network that undoes `drawn_for`, also where nothing was done."""

  def undo(tokens_BL, *_, **__):
    return (tokens_BL[..., None] + 92) % 97

  def logits(h_BL1):
    return 9.0 * jax.nn.one_hot(h_BL1[..., 0], model_config.vocab_size)

  def nothing(h_BL1):
    return jnp.zeros((*h_BL1.shape[:2], model_config.embed_dim))

  fake = dict(denoise=undo, logits=logits, soft_embedding=nothing)
  fake = network._replace(**fake, frozen=network.frozen._replace(**fake))
  drawn = drawn_for(batch, 0)
  _, metrics = joint_loss.joint_loss(fake, batch, drawn, 0.0)
  assert metrics['accuracy'] == 1.0
  # Of a batch in two parts, one of which has no canvas.
  valid_BK = jnp.array([[True], [False]])
  drawn = drawn.replace(valid_BK=valid_BK)
  counts = jax.tree.map(lambda n: n / 2, loss.count(batch, drawn))
  parts = [
    joint_loss.joint_loss(
      fake,
      jax.tree.map(lambda x, row=row: x[row : row + 1], batch),
      jax.tree.map(lambda x, row=row: x[row : row + 1], drawn),
      0.0,
      counts=counts,
    )[1]['accuracy']
    for row in (0, 1)
  ]
  assert sum(parts) / 2 == 1.0


def test_the_canvas_sees_what_is_before_it_and_nothing_else(
  model_config, params, batch
):
  """By gradient: perturb the embeddings of clean tokens. A `<=` where `<`
  belongs would let the canvas read its own answer out of the cache."""
  network = make_network(model_config, params)
  drawn = drawn_for(batch, 1)

  def denoising_loss(nudge_BSD):
    """The loss as a function of what the prefill pass embeds."""
    model = denoiser.Denoiser(model_config)

    def prefill(tokens_BS, length_B, first_BP):
      del first_BP  # One document a row.

      def nudged(module, tokens):
        return denoiser.Denoiser.embed(module, tokens) + nudge_BSD

      def method(module, tokens, length):
        original = module.embed
        object.__setattr__(module, 'embed', functools.partial(nudged, module))
        try:
          return module.prefill(tokens, length)
        finally:
          object.__setattr__(module, 'embed', original)

      return model.apply({'params': params}, tokens_BS, length_B, method=method)

    _, metrics = joint_loss.joint_loss(
      network._replace(prefill=prefill), batch, drawn, 1.0
    )
    return metrics['loss_denoise']

  zero = jnp.zeros((B, S, model_config.embed_dim))
  gradient = jax.jit(jax.grad(denoising_loss))(zero)
  felt_BS = np.abs(np.asarray(gradient)).sum(-1) > 0
  for b in range(B):
    start = int(drawn.start_BK[b, 0])
    assert felt_BS[b, 1:start].all(), 'the text before the canvas is read'
    assert not felt_BS[b, start:].any(), 'the canvas itself must not be'


def test_later_text_does_not_change_the_denoising_loss(network, batch):
  """By perturbation: other tokens after the canvas, the same loss."""
  drawn = drawn_for(batch, 0)
  run = jax.jit(lambda b: joint_loss.joint_loss(network, b, drawn, 1.0)[1])
  position = jnp.arange(S)[None]
  after = position >= drawn.start_BK + C
  other = jnp.where(after, (batch['tokens_BS'] + 11) % 97, batch['tokens_BS'])
  before, changed = run(batch), run({**batch, 'tokens_BS': other})
  assert before['loss_denoise'] == changed['loss_denoise']
  assert abs(before['loss_ar'] - changed['loss_ar']) > 1e-3


def test_content_of_padding_is_irrelevant(network, batch):
  drawn = drawn_for(batch, 1)
  run = jax.jit(lambda b: joint_loss.joint_loss(network, b, drawn, 1.0)[0])
  padding = jnp.arange(S)[None] >= batch['length_B'][:, None]
  other = jnp.where(padding, 50, batch['tokens_BS'])
  assert run(batch) == run({**batch, 'tokens_BS': other})


def test_self_conditioning_off_in_one_row_of_a_mixed_batch(network, batch):
  """Bit for bit what a batch without any self-conditioning gives the row."""
  _, cache, _ = network.prefill(batch['tokens_BS'], batch['length_B'])

  @jax.jit
  def run(guesses_B):
    drawn = drawn_for(batch, 1).replace(guesses_B=guesses_B)
    return loss.denoise_canvases(network, cache, drawn)

  off, mixed = run(jnp.array([0, 0])), run(jnp.array([0, 1]))
  np.testing.assert_array_equal(off[0], mixed[0])
  assert np.abs(off[1] - mixed[1]).max() > 1e-3
  np.testing.assert_allclose(off, run(None), atol=1e-5)


@pytest.mark.parametrize('guesses_B', [(1, 1), (2, 1)])
def test_a_guess_is_a_constant(model_config, params, network, batch, guesses_B):
  """After one pass or more: the gradient is that of a constant signal, for
  parameters and the cache."""
  drawn = drawn_for(batch, 1).replace(
    guesses_B=jnp.array(guesses_B), most_guesses=max(guesses_B)
  )
  _, cache, _ = network.prefill(batch['tokens_BS'], batch['length_B'])
  cut = cache.replace(length_B=drawn.start_BK[:, 0])

  @jax.jit
  def guess(sc_BLD):
    h_BLD = network.denoise(drawn.canvas_BL, sc_BLD, cut)
    return network.soft_embedding(h_BLD)

  signals = [jnp.zeros((B, C, model_config.embed_dim))]
  for _ in range(max(guesses_B)):
    signals.append(guess(signals[-1]))
  signal = jnp.stack([signals[n][b] for b, n in enumerate(guesses_B)])

  def twice(params, k):
    network, given = make_network(model_config, params), cache.replace(k=k)
    h_BLD = loss.denoise_canvases(network, given, drawn)
    return jnp.sum(h_BLD**2)

  def constant(params, k):
    network, given = make_network(model_config, params), cut.replace(k=k)
    return jnp.sum(network.denoise(drawn.canvas_BL, signal, given) ** 2)

  got, wanted = (
    jax.jit(jax.grad(function, argnums=(0, 1)))(params, cache.k)
    for function in (twice, constant)
  )
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * (1 + np.abs(b).max()))


def test_losses_are_means_over_the_right_places(model_config, network, batch):
  drawn = drawn_for(batch, 1, guesses=0)
  tokens_BS = np.asarray(batch['tokens_BS'])
  _, metrics = joint_loss.joint_loss(network, batch, drawn, 1.0)
  h_BSD, cache, _ = network.prefill(batch['tokens_BS'], batch['length_B'])
  log_p = np.asarray(jax.nn.log_softmax(network.logits(h_BSD)))
  nats = [
    -log_p[b, s, tokens_BS[b, s + 1]]
    for b in range(B)
    for s in range(int(batch['length_B'][b]) - 1)
  ]
  np.testing.assert_allclose(metrics['loss_ar'], np.mean(nats), rtol=1e-5)
  zeros = jnp.zeros((B, C, model_config.embed_dim))
  cut = cache.replace(length_B=drawn.start_BK[:, 0])
  h_BLD = network.denoise(drawn.canvas_BL, zeros, cut)
  log_p = np.asarray(jax.nn.log_softmax(network.logits(h_BLD)))
  nats = [
    -log_p[b, i, tokens_BS[b, int(drawn.start_BK[b, 0]) + i]]
    for b in range(B)
    for i in range(C)
  ]
  np.testing.assert_allclose(metrics['loss_denoise'], np.mean(nats), rtol=1e-5)
  np.testing.assert_allclose(
    metrics['loss'], metrics['loss_ar'] + metrics['loss_denoise'], rtol=1e-6
  )


@pytest.mark.parametrize('pass_rows', [1, 9, 1000])
def test_a_soft_embedding_is_the_mean_of_the_table(
  model_config, params, network, monkeypatch, pass_rows
):
  """However many rows meet the table in one pass."""
  monkeypatch.setattr(chunks, 'PASS_ROWS', pass_rows)
  shape = (B, S, model_config.embed_dim)
  h_BLD = jax.random.normal(jax.random.key(0), shape)
  p_BLV = jax.nn.softmax(network.logits(h_BLD))
  wanted_BLD = p_BLV @ params['embedding'] * model_config.embed_dim**0.5
  made = make_network(model_config, params)
  found_BLD = jax.jit(lambda h_BLD: made.soft_embedding(h_BLD))(h_BLD)
  np.testing.assert_allclose(found_BLD, wanted_BLD, rtol=1e-5, atol=1e-5)


def test_noise_covers_all_canvases_and_no_more(model_config, batch):
  many = jax.tree.map(lambda x: jnp.repeat(x, 400, axis=0), batch)
  drawn = jax.jit(
    lambda: loss.draw_noise(jax.random.key(0), many, C, 97, 0.5)
  )()
  for b, prompt, length in ((0, 4, S), (1, 9, 25)):
    starts = set(drawn.start_BK[b * 400 : (b + 1) * 400, 0].tolist())
    expected = range(prompt, length - C + 1, C)
    assert starts == set(expected)
  assert 0 < drawn.t_BK.min() < 0.02 and 0.98 < drawn.t_BK.max() < 1
  np.testing.assert_allclose(drawn.guesses_B.mean(), 0.5, atol=0.08)
  assert drawn.guesses_B.max() == 1
  noisy = np.asarray(drawn.canvas_BL)[np.asarray(drawn.t_BK[:, 0]) > 0.7]
  assert len(np.unique(noisy, axis=0)) == len(noisy), 'rows share their noise'


@pytest.mark.parametrize('guesses_B', [(1, 0), (0, 2), (0, 0)])
def test_a_row_that_is_told_nothing_needs_no_guess(network, batch, guesses_B):
  """Of two neighbours one guesses: all as where both do."""
  _, cache, _ = network.prefill(batch['tokens_BS'], batch['length_B'])
  drawn = drawn_for(batch, 1).replace(guesses_B=jnp.array(guesses_B))

  def run(group_size):
    rows = []

    def denoise(tokens_BL, *args):
      rows.append(len(tokens_BL))
      return network.frozen.denoise(tokens_BL, *args)

    counting = network._replace(frozen=network.frozen._replace(denoise=denoise))
    told = drawn.replace(group_size=group_size, most_guesses=2)
    return loss.denoise_canvases(counting, cache, told), set(rows)

  (wanted, all_rows), (found, rows) = run(1), run(2)
  assert (all_rows, rows) == ({2}, {1})
  np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
  ('p', 'rows', 'group_size'),
  [
    (0.5, 4, 2),
    (0.5, 3, 1),
    (0.3, 6, 3),
    (0.3, 4, 2),
    (0.8, 6, 1),
    (1e-9, 16, 8),
  ],
)
def test_each_row_is_told_as_often_and_one_of_a_group(
  batch, p, rows, group_size
):
  """And it has nothing to do with the time or what is corrupted."""
  some = jax.tree.map(lambda x: jnp.repeat(x[:1], rows, axis=0), batch)
  draw = lambda key: loss.draw_noise(key, some, C, 97, p)
  assert draw(jax.random.key(0)).group_size == group_size
  drawn_M = jax.vmap(draw)(jax.random.split(jax.random.key(0), 4000))
  told_MB = np.asarray(drawn_M.guesses_B)
  np.testing.assert_allclose(told_MB.mean(0), p, atol=0.03)
  if p < 0.01:
    return
  assert told_MB.reshape(-1, group_size).sum(1).max() == 1
  for other in (drawn_M.t_BK[:, :, 0], drawn_M.corrupted_BL.mean(2)):
    assert abs(np.corrcoef(told_MB.ravel(), other.ravel())[0, 1]) < 0.05


def test_guesses_after_one_pass_or_more(batch):
  many = jax.tree.map(lambda x: jnp.repeat(x, 400, axis=0), batch)
  drawn = loss.draw_noise(
    jax.random.key(0), many, C, 97, 0.6, self_conditioning_passes=3
  )
  guesses_B, t_B = np.asarray(drawn.guesses_B), drawn.t_BK[:, 0]
  told_B = guesses_B > 0
  assert abs(np.corrcoef(guesses_B[told_B], t_B[told_B])[0, 1]) < 0.15
  share = np.bincount(drawn.guesses_B, minlength=4) / len(drawn.guesses_B)
  np.testing.assert_allclose(share, [0.4, 0.2, 0.2, 0.2], atol=0.05)
  one = loss.draw_noise(jax.random.key(0), many, C, 97, 0.6)
  np.testing.assert_array_equal(one.guesses_B > 0, drawn.guesses_B > 0)


def test_without_its_weight_text_of_no_use_to_a_canvas_is_not_read(
  model_config, params, batch
):
  """The denoising loss and its gradient are the same."""
  drawn = drawn_for(batch, 2)
  read = []

  def run(ar_loss_weight, params):
    network = make_network(model_config, params)

    def prefill(tokens_BS, *args, **kwargs):
      read.append(tokens_BS.shape[1])
      return network.prefill(tokens_BS, *args, **kwargs)

    _, metrics = joint_loss.joint_loss(
      network._replace(prefill=prefill), batch, drawn, ar_loss_weight
    )
    return metrics['loss_denoise']

  gradient = jax.jit(jax.value_and_grad(run, argnums=1), static_argnums=0)
  got, wanted = gradient(0.0, params), gradient(1.0, params)
  assert read == [S - C, S]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    got,
    wanted,
  )


def test_unknown_and_missing_batch_keys_are_errors(batch):
  with pytest.raises(ValueError, match='labels'):
    loss.check_batch({**batch, 'labels': 0}, C)
  missing = {k: v for k, v in batch.items() if k != 'length_B'}
  with pytest.raises(ValueError, match='length_B'):
    loss.check_batch(missing, C)
  with pytest.raises(ValueError, match='no room'):
    loss.check_batch(batch, S)


def all_canvases(batch):
  """Noise for every canvas of both rows."""
  return loss.draw_noise(jax.random.key(5), batch, C, 97, 0.5, 'all')


def only(drawn, index):
  """The noise of one canvas of each row."""
  canvas = slice(index * C, (index + 1) * C)
  return drawn.replace(
    **{
      name: getattr(drawn, name)[:, index : index + 1]
      for name in ('start_BK', 'first_BK', 'valid_BK', 't_BK')
    },
    canvas_BL=drawn.canvas_BL[:, canvas],
    corrupted_BL=drawn.corrupted_BL[:, canvas],
  )


@pytest.mark.parametrize('objective', ['ce', 'loo_ce'])
def test_all_canvases_at_once_are_the_mean_of_single_ones(
  network, batch, objective
):
  drawn = all_canvases(batch)
  rows = batch, drawn.replace(group_size=1)
  one_row = lambda b: jax.tree.map(lambda x: x[b : b + 1], rows)

  @jax.jit
  def run(batch, drawn):
    value, metrics = joint_loss.joint_loss(
      network, batch, drawn, 1.0, objective=objective
    )
    return metrics['loss_denoise']

  means = []
  for b, count in enumerate((4, 2)):  # 26 and 16 tokens after the prompt.
    row, noise_row = one_row(b)
    assert noise_row.valid_BK.sum() == count
    alone = [run(row, only(noise_row, i)) for i in range(count)]
    means.append(np.mean(alone))
    np.testing.assert_allclose(run(row, noise_row), means[-1], rtol=1e-5)
  np.testing.assert_allclose(run(batch, drawn), np.mean(means), rtol=1e-5)


@pytest.mark.parametrize('index', [0, 1, 2])
def test_a_canvas_of_many_is_denoised_as_it_is_alone(network, batch, index):
  """As sampling does it: the text before it is read, and nothing else."""
  drawn = all_canvases(batch)
  tokens_BS, length_B = batch['tokens_BS'][:1], batch['length_B'][:1]
  start = int(drawn.start_BK[0, index])
  _, cache, _ = network.prefill(tokens_BS, length_B)
  _, prefix, _ = network.prefill(tokens_BS[:, :start], jnp.array([start]))
  canvas_BL, place = drawn.canvas_BL[:1], slice(index * C, (index + 1) * C)
  together = network.denoise(canvas_BL, None, cache, drawn.start_BK[:1])
  alone = network.denoise(canvas_BL[:, place], None, prefix)
  np.testing.assert_allclose(together[:, place], alone, atol=2e-5)


def test_packed_documents_do_not_see_each_other(network):
  """Both passes give what they give to each document in a row of its own."""
  rng = np.random.default_rng(0)
  one, two = (jnp.asarray(rng.integers(3, 97, n)) for n in (11, 17))
  row_BS = jnp.concatenate([one, two])[None]
  first_BS = jnp.array([[0] * 11 + [11] * 17])
  h_BSD, cache, _ = network.prefill(row_BS, jnp.array([28]), first_BP=first_BS)
  start_BK, canvas_BL = jnp.array([[4, 19]]), jnp.arange(2 * C)[None] + 9
  together = network.denoise(
    canvas_BL, None, cache, start_BK, jnp.array([[0, 11]])
  )
  for i, (begin, text) in enumerate(((0, one), (11, two))):
    h_alone, of_text, _ = network.prefill(text[None], jnp.array([len(text)]))
    np.testing.assert_allclose(
      h_BSD[:, begin : begin + len(text)], h_alone, atol=2e-5
    )
    place = slice(i * C, (i + 1) * C)
    alone = network.denoise(
      canvas_BL[:, place], None, of_text, start_BK[:, i : i + 1] - begin
    )
    np.testing.assert_allclose(together[:, place], alone, atol=2e-5)


def test_evidence_makes_a_leave_one_out_predictor_the_posterior():
  """Bayes' rule on all pairs of three tokens."""
  V, t = 3, 0.3
  joint = np.random.default_rng(1).dirichlet(np.ones(9)).reshape(V, V)
  q = (1 - t) * np.eye(V) + t / V  # q(z | x)
  for z in np.ndindex(V, V):
    leave_one_out = joint @ q[:, z[1]]  # p(x_0, z_1)
    posterior = leave_one_out * q[:, z[0]]
    logits = cross_entropy.add_evidence(
      jnp.log(leave_one_out)[None], jnp.array([z[0]]), jnp.array([t])
    )
    np.testing.assert_allclose(
      jax.nn.softmax(logits[0]), posterior / posterior.sum(), rtol=1e-5
    )


def test_rows_without_a_canvas_do_not_count(network, batch):
  drawn = all_canvases(batch)
  run = jax.jit(lambda *given: joint_loss.joint_loss(network, *given, 1.0)[1])
  none = batch['canvas_start_BK'].at[1].set(-1)
  noise = drawn.replace(valid_BK=drawn.valid_BK.at[1].set(False))
  both = run({**batch, 'canvas_start_BK': none}, noise)
  row = batch, drawn.replace(group_size=1)
  alone = run(*jax.tree.map(lambda x: x[:1], row))
  np.testing.assert_allclose(
    both['loss_denoise'], alone['loss_denoise'], rtol=1e-5
  )


def test_objectives(network, batch):
  drawn = all_canvases(batch)
  run = lambda objective, network=network: joint_loss.joint_loss(
    network, batch, drawn, 0.5, objective=objective
  )[1]
  ce, loo, ar = run('ce'), run('loo_ce'), run('ar')
  assert ce['loss_denoise'] != loo['loss_denoise']
  assert ce['loss_ar'] == loo['loss_ar'] == ar['loss_ar']
  never = network._replace(denoise=None)
  assert run('ar', never)['loss'] == 0.5 * ar['loss_ar']
