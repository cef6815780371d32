"""The sampler, driven by denoisers that know the answer.

No network is needed: an oracle returns logits that favour a target.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import ops
from diffusiongemma.config import Config
from diffusiongemma.config import ConfigError
from diffusiongemma.config import DiffusionConfig
from diffusiongemma.diffusion import sampler
from diffusiongemma.diffusion import sampling
from diffusiongemma.diffusion import strategies
from diffusiongemma.diffusion.sampling import Sampling

B, L, V, D = 3, 16, 31, 5
CONFIG = DiffusionConfig(
  canvas_length=L, max_denoising_steps=16, stop_token_ids=(1,)
)
TARGET_BL = jax.random.randint(jax.random.key(9), (B, L), 0, V)
TABLE_VD = jax.random.normal(jax.random.key(8), (V, D))


def oracle(
  tokens_BL, sc_BLD, temperature, uniforms_BLU, step, target=TARGET_BL
):
  """Surer of the target the more of it is on the canvas already, and of its
  later rows than of its first; looks at its self-conditioning too."""
  right_BL = tokens_BL == target
  share_B1 = right_BL.mean(1, keepdims=True)
  row_B1 = jnp.arange(1, len(target) + 1)[:, None]
  wave_L = 1.2 + jnp.sin(jnp.arange(L) * 1.0)
  peak_BL = (row_B1 + 12 * share_B1) * wave_L + 3 * right_BL
  logits_BLV = peak_BL[..., None] * jax.nn.one_hot(target, V)
  logits_BLV += 0.01 * (sc_BLD @ TABLE_VD.T)
  return sampler.predict(
    logits_BLV, temperature, uniforms_BLU, lambda p_BLV: p_BLV @ TABLE_VD
  )


def sample(key=None, denoise_fn=oracle, config=CONFIG, batch=B, **options):
  return sampler.sample_canvas(
    denoise_fn,
    jax.random.key(0) if key is None else key,
    config,
    batch_size=batch,
    vocab_size=V,
    embed_dim=D,
    **options,
  )


def test_ten_line_oracle_is_sampled():
  """A sure denoiser is followed exactly, in two steps: say it, confirm it."""

  def sure(tokens_BL, sc_BLD, temperature, uniforms_BLU, step):
    del tokens_BL, sc_BLD, step
    logits_BLV = 99.0 * jax.nn.one_hot(TARGET_BL, V)
    embed = lambda p_BLV: p_BLV @ TABLE_VD
    return sampler.predict(logits_BLV, temperature, uniforms_BLU, embed)

  state, _ = jax.jit(lambda: sample(denoise_fn=sure))()
  np.testing.assert_array_equal(state.draft_BL, TARGET_BL)
  assert state.converged_B.all() and state.steps_B.tolist() == [2] * B


def test_scan_equals_while_equals_python():
  last, _ = jax.jit(functools.partial(sample, trajectory=False))()
  scanned, states = jax.jit(functools.partial(sample, trajectory=True))()
  keys_B = sampler.row_keys(jax.random.key(0), B)
  step_fn = jax.jit(functools.partial(sampler.denoise_step, oracle, CONFIG))
  N_B = jnp.full((B,), CONFIG.max_denoising_steps)
  state = sampler.init_state(sampler.draw_canvas(keys_B, CONFIG, V), D, N_B)
  for n in range(CONFIG.max_denoising_steps, 0, -1):
    drawn = sampler.draw_step_noise(keys_B, jnp.full((B,), n), CONFIG, V)
    state = step_fn(state, drawn)
    index = CONFIG.max_denoising_steps - n
    np.testing.assert_array_equal(state.canvas_BL, states.canvas_BL[index])
    np.testing.assert_array_equal(state.accepted_BL, states.accepted_BL[index])
  assert 1 < int(last.steps_B.max()) < CONFIG.max_denoising_steps
  assert len(set(last.steps_B.tolist())) > 1, 'rows should differ'
  for other in (scanned, state):
    for name in ('draft_BL', 'canvas_BL', 'steps_B', 'converged_B'):
      np.testing.assert_array_equal(getattr(other, name), getattr(last, name))
    # Three programs, fused in three ways: equal up to rounding.
    np.testing.assert_allclose(other.entropy_BL, last.entropy_BL, atol=1e-5)


def test_converged_row_never_changes():
  _, states = jax.jit(functools.partial(sample, trajectory=True))()
  for b in range(B):
    (frozen,) = np.nonzero(np.asarray(states.converged_B[:, b]))
    assert frozen.size, f'row {b} should converge'
    for leaf in jax.tree.leaves(states):
      rows = np.asarray(leaf)[frozen[0] :, b]
      np.testing.assert_array_equal(rows, np.broadcast_to(rows[:1], rows.shape))


def test_rows_do_not_depend_on_the_batch():
  keys_B = jax.random.split(jax.random.key(7), B)
  together, _ = sample(keys_B)
  # Row 2 alone, with the oracle of its own target.
  alone_fn = lambda *arguments: jax.tree.map(
    lambda x: x[2:],
    oracle(
      *(jnp.concatenate([x, x, x]) if jnp.ndim(x) else x for x in arguments)
    ),
  )
  alone, _ = sample(keys_B[2:], alone_fn, batch=1)
  np.testing.assert_array_equal(alone.draft_BL[0], together.draft_BL[2])
  assert alone.steps_B[0] == together.steps_B[2]


def test_same_key_same_tokens_other_key_other_tokens():
  one, again = sample(jax.random.key(1))[0], sample(jax.random.key(1))[0]
  np.testing.assert_array_equal(one.canvas_BL, again.canvas_BL)
  first = [
    sampler.draw_canvas(sampler.row_keys(jax.random.key(k), B), CONFIG, V)
    for k in (1, 2)
  ]
  assert (first[0] != first[1]).any()
  assert (first[0][0] != first[0][1]).any()


def test_temperature_falls_from_t_max_to_t_min():
  time = sampling.Time(jnp.array([[48], [24], [1]]), jnp.full((3, 1), 48))
  found_B1 = sampling.falling_temperature(CONFIG, time)
  wanted = [0.8, 0.6, 0.4 + 0.4 / 48]
  np.testing.assert_allclose(found_B1[:, 0], wanted, rtol=1e-6)


@pytest.mark.parametrize('threshold', [0, 1, 3])
def test_stability_counts_unchanged_drafts(threshold):
  """The draft settles at once; a row then waits `threshold` more steps."""
  config = dataclasses.replace(CONFIG, stability_threshold=threshold)

  def sure(tokens_BL, sc_BLD, temperature, uniforms_BLU, step):
    del tokens_BL, temperature, uniforms_BLU, step
    zero = jnp.zeros((B, L))
    return sampler.Prediction(TARGET_BL, TARGET_BL, zero, zero + 1, sc_BLD)

  state, _ = sample(denoise_fn=sure, config=config)
  assert state.steps_B.tolist() == [threshold + 1] * B


def test_rejected_positions_are_renoised_accepted_ones_sampled():
  keys_B = sampler.row_keys(jax.random.key(0), B)
  N_B = jnp.full((B,), 16)
  state = sampler.init_state(sampler.draw_canvas(keys_B, CONFIG, V), D, N_B)
  drawn = sampler.draw_step_noise(keys_B, N_B, CONFIG, V)
  new = sampler.denoise_step(oracle, CONFIG, state, drawn)
  prediction = oracle(
    state.canvas_BL, state.sc_BLD, 0.8, drawn.uniforms_BLU, 16
  )
  accepted = np.asarray(new.accepted_BL)
  assert accepted.any() and not accepted.all()
  np.testing.assert_array_equal(
    new.canvas_BL, np.where(accepted, prediction.sample_BL, drawn.tokens_BL)
  )
  np.testing.assert_array_equal(new.draft_BL, prediction.argmax_BL)


def test_predict_scales_by_temperature_and_forbids():
  logits = jnp.array([[[1.0, 2.0, -jnp.inf, 0.0]]])
  prediction = sampler.predict(
    logits, 0.5, jnp.full((1, 1, 4), 0.3), lambda p: p
  )
  p = np.exp([2.0, 4.0, -np.inf, 0.0])
  p /= p.sum()
  np.testing.assert_allclose(prediction.sc_BLD[0, 0], p, rtol=1e-5)
  kept = p[p > 0]
  entropy = -(kept * np.log(kept)).sum()
  np.testing.assert_allclose(prediction.entropy_BL[0, 0], entropy, rtol=1e-5)
  assert prediction.argmax_BL[0, 0] == 1


def test_a_forbidden_token_has_no_gradient():
  """That of the entropy is the one without the token."""

  def entropy(logits):
    U = ops.vocabulary.num_halvings(logits.shape[-1])
    uniforms_BLU = jnp.full((1, 1, U), 0.3)
    predicted = sampler.predict(logits, 0.5, uniforms_BLU, lambda p: p)
    return jnp.sum(predicted.entropy_BL)

  free = jnp.array([[[1.0, 2.0, 0.5]]])
  banned = jnp.concatenate([free, jnp.full((1, 1, 1), -jnp.inf)], axis=-1)
  found, expected = jax.grad(entropy)(banned), jax.grad(entropy)(free)
  np.testing.assert_allclose(found[..., :3], expected, atol=1e-6)
  assert found[0, 0, 3] == 0 and np.abs(expected).max() > 0.1


PINNED = sampling.Pinned(
  mask_BL=jnp.arange(L)[None, :] % jnp.array([[3], [5], [1]]) == 0,
  tokens_BL=jnp.broadcast_to((jnp.arange(L) * 7) % V, (B, L)),
)


@pytest.mark.parametrize('strategy', strategies.STRATEGIES)
def test_pinned_tokens_stand_from_the_first_canvas_on(strategy):
  """At every step, on the canvas and in the draft; the network sees them.
  Row 2 is pinned altogether, and needs one step and one to be stable, but for
  ancestral sampling, which takes all."""
  seen = []
  note = lambda tokens_BL: seen.append(np.asarray(tokens_BL))

  def watched(tokens_BL, *arguments):
    jax.debug.callback(note, tokens_BL, ordered=True)
    return oracle(tokens_BL, *arguments)

  config = dataclasses.replace(CONFIG, strategy=strategy)
  state, states = sample(
    denoise_fn=watched,
    config=config,
    sampling=Sampling(pinned=PINNED),
    trajectory=True,
  )
  jax.effects_barrier()
  mask = np.asarray(PINNED.mask_BL)
  tokens = np.asarray(PINNED.tokens_BL)[mask]
  assert len(seen) == CONFIG.max_denoising_steps
  for canvas in (*seen, *states.canvas_BL, *states.draft_BL):
    np.testing.assert_array_equal(np.asarray(canvas)[mask], tokens)
  assert np.asarray(states.accepted_BL)[:, mask].all()
  most = CONFIG.max_denoising_steps
  assert state.steps_B[2] == (most if strategy == 'ancestral' else 2)
  assert (np.asarray(state.draft_BL)[~mask] == TARGET_BL[~mask]).mean() > 0.8


@pytest.mark.parametrize(
  'strategy', ['entropy_bound', 'confidence', 'top_k_confident']
)
def test_free_positions_are_accepted_as_if_they_were_alone(strategy):
  """Pinned ones take none of their places."""
  N, free = CONFIG.max_denoising_steps, 4
  last = jnp.arange(L) >= L - free
  pins = sampling.Pinned(
    mask_BL=jnp.broadcast_to(~last, (B, L)), tokens_BL=TARGET_BL
  )
  config = dataclasses.replace(
    CONFIG, strategy=strategy, confidence_threshold=0.0
  )

  def accepted(targets_BL, config, pinned):
    def network(tokens_BL, sc_BLD, temperature, uniforms_BLU, step):
      logits_BLV = 2.0 * jax.nn.one_hot(targets_BL, V)
      return sampler.predict(logits_BLV, 1.0, uniforms_BLU, lambda p: sc_BLD)

    _, states = sample(
      denoise_fn=network,
      config=config,
      sampling=Sampling(pinned=pinned),
      trajectory=True,
    )
    return states.accepted_BL[:, :, -free:].sum(-1)

  alone = dataclasses.replace(config, canvas_length=free)
  with_pins = accepted(TARGET_BL, config, pins)
  without = accepted(TARGET_BL[:, -free:], alone, None)
  np.testing.assert_array_equal(with_pins, without)
  assert with_pins.shape == (N, B) and (with_pins[0] > 0).all()


def settled(entropy_BL):
  """A network that always says the same, so sure of it."""

  def network(tokens_BL, sc_BLD, *_):
    return sampler.Prediction(
      TARGET_BL, TARGET_BL, entropy_BL, jnp.ones((B, L)), sc_BLD
    )

  return network


def test_a_row_stops_when_it_is_sure_in_the_mean():
  """However unsure it is of one place."""
  for mean, steps in ((0.0049, 2), (0.0051, CONFIG.max_denoising_steps)):
    entropy_BL = jnp.zeros((B, L)).at[:, 3].set(L * mean)
    state, _ = sample(denoise_fn=settled(entropy_BL))
    assert state.steps_B.tolist() == [steps] * B


def test_pinned_tokens_take_no_share_of_the_bound():
  """Uncertain where pinned, certain elsewhere: all is accepted at once, and
  the mean entropy is that of the free positions."""
  unsure_BL = jnp.where(PINNED.mask_BL, 5.0, 0.0051)
  state, _ = sample(
    denoise_fn=settled(unsure_BL), sampling=Sampling(pinned=PINNED)
  )
  most = CONFIG.max_denoising_steps
  assert state.steps_B.tolist() == [most, most, 2]  # The last has none free.
  flat_BL = jnp.where(PINNED.mask_BL, 5.0, 0.0049)
  state, _ = sample(
    denoise_fn=settled(flat_BL), sampling=Sampling(pinned=PINNED)
  )
  free = ~np.asarray(PINNED.mask_BL)
  assert np.asarray(state.accepted_BL).all()
  assert (np.asarray(state.draft_BL)[free] == np.asarray(TARGET_BL)[free]).all()
  assert state.steps_B.tolist() == [2] * B


def test_noise_and_first_canvas_can_be_given():
  """The same numbers by hand give the same states."""
  keys_B = sampler.row_keys(jax.random.key(0), B)
  expected, _ = sample()
  given, _ = sample(
    jax.random.key(99),
    initial_canvas_BL=sampler.draw_canvas(keys_B, CONFIG, V),
    noise_fn=lambda n_B: sampler.draw_step_noise(keys_B, n_B, CONFIG, V),
  )
  for a, b in zip(
    jax.tree.leaves(expected), jax.tree.leaves(given), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_rows_that_are_done_are_left_alone():
  done_B = jnp.array([False, True, False])
  state, _ = sample(done_B=done_B)
  expected, _ = sample()
  assert state.steps_B[1] == 0 and (state.draft_BL[1] == -1).all()
  for row in (0, 2):
    np.testing.assert_array_equal(state.draft_BL[row], expected.draft_BL[row])


def test_temperature_and_strategy_can_be_functions():
  def network(tokens_BL, sc_BLD, temperature, uniforms_BLU, step):
    prediction = oracle(tokens_BL, sc_BLD, temperature, uniforms_BLU, step)
    shown_BL = jnp.broadcast_to(temperature, tokens_BL.shape)
    return prediction.replace(entropy_BL=shown_BL)

  def all_at_once(config, canvas_BL, prediction, time, drawn):
    del config, canvas_BL, time
    return strategies.renoise(jnp.ones((B, L), bool), prediction, drawn)

  state, states = sample(
    denoise_fn=network,
    config=dataclasses.replace(CONFIG, confidence_threshold=0.0),
    sampling=Sampling(
      strategy=all_at_once,
      temperature=lambda config, time: 0.1 * time.left_B1 + 0 * config.t_min,
    ),
    trajectory=True,
  )
  expected_N = 0.1 * np.arange(16, 0, -1)
  for row in range(B):
    np.testing.assert_allclose(
      states.entropy_BL[:, row, 0], expected_N, rtol=1e-6
    )
  assert state.accepted_BL.all()


@pytest.mark.parametrize('strategy', strategies.STRATEGIES)
def test_rows_have_steps_and_temperatures_of_their_own(strategy):
  """Each is what it is alone with them."""
  config = dataclasses.replace(
    CONFIG, strategy=strategy, confidence_threshold=0.0
  )
  keys_B = jax.random.split(jax.random.key(7), B)
  steps, temperatures = [16, 5, 1], [0.3, 0.9, 2.0]
  together, _ = sample(
    keys_B,
    config=config,
    sampling=Sampling(
      num_steps=jnp.array(steps), temperature=jnp.array(temperatures)
    ),
  )
  assert together.steps_B.tolist() == steps
  for row in range(B):
    alone, _ = sample(
      keys_B,
      config=dataclasses.replace(config, max_denoising_steps=steps[row]),
      sampling=Sampling(temperature=temperatures[row]),
    )
    for name in ('draft_BL', 'canvas_BL', 'accepted_BL'):
      np.testing.assert_array_equal(
        getattr(together, name)[row], getattr(alone, name)[row]
      )


def test_another_value_compiles_nothing_anew():
  count = 0

  @jax.jit
  def run(sampling):
    nonlocal count
    count += 1
    return sample(sampling=sampling)[0].draft_BL

  def shifted(shift, config, time):
    return 0.5 + shift * time.left_B1

  for scale in (0.1, 0.2):
    run(
      Sampling(
        strategy='confidence',
        temperature=jax.tree_util.Partial(shifted, jnp.float32(scale)),
        num_steps=jnp.full((B,), int(50 * scale)),
        pinned=PINNED.replace(tokens_BL=PINNED.tokens_BL + int(10 * scale)),
      )
    )
  assert count == 1


def test_hook_and_constraint_see_canvas_time_and_state():
  """The constraint has the last word."""
  seen = []

  def hook(canvas_BL, logits_BLV, time, state):
    note = lambda *x: seen.append([y.tolist() for y in x])
    jax.debug.callback(note, time.left_B1, state.steps_B, ordered=True)
    assert canvas_BL is state.canvas_BL
    return jnp.where(jnp.arange(V) == 5, 1e4, logits_BLV)

  def constraint(canvas_BL, logits_BLV, time, state):
    return jnp.where(jnp.arange(V) % 2 == 0, logits_BLV, -jnp.inf)

  def network(tokens_BL, sc_BLD, temperature, uniforms, left, change_logits):
    logits_BLV = change_logits(jnp.zeros((B, L, V)).at[:, :, 4].set(99.0))
    return sampler.predict(
      logits_BLV, temperature, uniforms, lambda p_BLV: p_BLV @ TABLE_VD
    )

  for given, token in (
    (Sampling(logit_hook=hook), 5),
    (Sampling(logit_hook=hook, constraint=constraint), 4),
  ):
    state, _ = sample(denoise_fn=network, sampling=given)
    assert (state.draft_BL == token).all()
  jax.effects_barrier()
  assert seen[0] == [[[16]] * B, [0] * B] and seen[1] == [[[15]] * B, [1] * B]


def test_samplings_that_cannot_be():
  for given, message in (
    ({'temperature': 0.0}, 'temperature must be positive'),
    ({'num_steps': jnp.array([3, 0, 2])}, 'num_steps must be positive'),
  ):
    with pytest.raises(ConfigError, match=message):
      sample(sampling=Sampling(**given))
  with pytest.raises(ValueError, match='one for each of 3 rows'):
    sample(sampling=Sampling(temperature=jnp.ones(2)))
  with pytest.raises(ConfigError, match="Did you mean 'confidence'"):
    Sampling(strategy='confidnce')
  with pytest.raises(ConfigError, match='a Sampling, it is a dict'):
    sample(sampling={'temperature': 1.0})


def test_sizes_come_with_the_network_or_are_asked_for():
  def network(*arguments):
    return oracle(*arguments)

  with pytest.raises(TypeError, match='needs batch_size'):
    sampler.sample_canvas(network, jax.random.key(0), CONFIG)
  network.sizes = {'batch_size': B, 'vocab_size': V, 'embed_dim': D}
  state, _ = sampler.sample_canvas(network, jax.random.key(0), CONFIG)
  np.testing.assert_array_equal(state.draft_BL, sample()[0].draft_BL)


def test_inside_jit_vmap_and_scan():
  """Over keys at once, and canvas after canvas, as research code does it."""
  keys = jax.random.split(jax.random.key(3), 4)
  many = jax.jit(jax.vmap(lambda key: sample(key)[0].draft_BL))(keys)
  for key, draft_BL in zip(keys, many, strict=True):
    np.testing.assert_array_equal(sample(key)[0].draft_BL, draft_BL)
  _, scanned = jax.jit(
    lambda: jax.lax.scan(lambda _, k: (None, sample(k)[0].draft_BL), None, keys)
  )()
  np.testing.assert_array_equal(scanned, many)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'initial_canvas_BL': jnp.zeros((B, L + 1), int)}, 'initial_canvas_BL'),
    (
      {'sampling': Sampling(pinned=PINNED.replace(mask_BL=PINNED.mask_BL[:1]))},
      'mask_BL must',
    ),
    (
      {'sampling': Sampling(pinned=PINNED.replace(tokens_BL=TARGET_BL.T))},
      'tokens_BL must',
    ),
  ],
)
def test_wrong_shapes_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    sample(**options)


def test_pin_by_index():
  pinned = sampling.pin([{0: 5, 3: 6}, {}], 4, V)
  assert pinned.mask_BL.tolist() == [[True, False, False, True], [False] * 4]
  assert pinned.hold(jnp.full((2, 4), 9)).tolist() == [[5, 9, 9, 6], [9] * 4]
  for index in (-1, 4):
    with pytest.raises(ValueError, match=f'index {index}, outside of its canv'):
      sampling.pin([{index: 5}], 4, V)
  with pytest.raises(ValueError, match='Row 1 pins token 31, outside of the'):
    sampling.pin([{}, {1: V}], 4, V)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'strategy': 'entropy_bond'}, "'entropy_bound' or 'confidence' or"),
    ({'max_denoising_steps': 0}, 'max_denoising_steps must be positive'),
    ({'t_min': 0.0}, 't_min must be positive'),
    ({'t_max': -1.0}, 't_max must be positive'),
    ({'t_min': 0.9}, 't_min is above'),
  ],
)
def test_settings_that_cannot_be(changes, message):
  with pytest.raises(ConfigError, match=message):
    sample(config=dataclasses.replace(CONFIG, **changes))


def test_what_is_no_prediction_is_refused():
  config = DiffusionConfig(canvas_length=4, max_denoising_steps=2)
  sizes = dict(batch_size=1, vocab_size=8, embed_dim=3)

  def sample(network, config=config):
    sampler.sample_canvas(network, jax.random.key(0), config, **sizes)

  with pytest.raises(TypeError, match=r'must return a Prediction.*\[1, 4, 8\]'):
    sample(lambda *_: jnp.zeros((1, 4, 8)))

  def narrow(tokens_BL, sc_BLD, temperature, uniforms_BLU, step):
    return sampler.predict(
      jnp.zeros((1, 4, 7)), temperature, uniforms_BLU, lambda p: sc_BLD
    )

  with pytest.raises(
    ValueError, match=r'logits_BLV .*\[1, 4, 8\].*\[1, 4, 7\]'
  ):
    sample(narrow)
  with pytest.raises(ConfigError, match='DiffusionConfig, it is a Conf'):
    sample(narrow, Config())
