"""Prompt to tokens with a random network: the seams between the parts."""

import dataclasses

import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import pytest

from diffusiongemma import config as configs
from diffusiongemma.config import Config
from diffusiongemma.config import DiffusionConfig
from diffusiongemma.diffusion import sampler
from diffusiongemma.diffusion.sampling import Sampling
from diffusiongemma.generation import engine
from diffusiongemma.generation import generate
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.model import cache as kv_cache

C = 6
PROMPT = [2, 10, 20, 30]


@pytest.fixture(scope='module')
def config(model_config):
  diffusion = DiffusionConfig(
    canvas_length=C, max_denoising_steps=4, stop_token_ids=()
  )
  return Config(model=model_config, diffusion=diffusion)


def run(config, params, new_tokens, **callbacks):
  (row,), *_ = generate.generate_tokens(
    config, params, [PROMPT], jax.random.key(0), new_tokens, **callbacks
  )
  return row


def test_watching_changes_nothing(config, params):
  """The step by step driver writes what the loop on the device writes."""
  steps, canvases = [], []
  quiet = run(config, params, 2 * C)
  watched = run(
    config,
    params,
    2 * C,
    on_step=lambda step, state: steps.append(step),
    on_canvas=lambda kept: canvases.append(kept[0]),
  )
  assert watched == quiet
  assert steps == [0, 1, 2, 3, 4] * 2
  assert sum(canvases, []) == quiet.tokens


@pytest.mark.parametrize(
  'hook', [None, lambda canvas_BL, logits_BLV, *_: logits_BLV]
)
def test_no_self_conditioning_after_the_last_step(config, params, hook):
  """Nobody would see it, and it is half of what the vocabulary costs."""
  norms = []
  run(
    config,
    params,
    C,
    sampling=Sampling(logit_hook=hook),
    on_step=lambda step, state: norms.append(float(jnp.sum(state.sc_BLD**2))),
  )
  assert norms[0] == norms[-1] == 0 and min(norms[1:-1]) > 0


def test_limit_cuts_inside_a_canvas(config, params):
  whole, cut = run(config, params, 2 * C), run(config, params, C + 2)
  assert cut.tokens == whole.tokens[: C + 2]
  assert cut.stopped_by == 'max_new_tokens'
  assert cut.tokens_per_forward == len(cut.tokens) / cut.steps


def test_stops_at_a_stop_token(config, params):
  """Declares a token that is written a stop token: the text ends with it."""
  whole = run(config, params, 3 * C)
  stop = whole.tokens[C + 3]
  diffusion = dataclasses.replace(config.diffusion, stop_token_ids=(stop,))
  stopped = run(dataclasses.replace(config, diffusion=diffusion), params, 3 * C)
  first = whole.tokens.index(stop)
  assert stopped.tokens == whole.tokens[: first + 1]
  assert stopped.stopped_by == 'stop_token'
  assert stopped.steps == 4 * (first // C + 1)


def test_second_canvas_continues_the_first(config, params):
  """Committing equals a prefill of the whole text in one go."""
  whole = run(config, params, 2 * C)
  text = PROMPT + whole.tokens[:C]
  cache = kv_cache.init_cache(config.model, 1, len(text))
  cache = prompt_lib.prefill(
    config.model, params, np.array([text]), np.array([len(text)]), cache
  )
  (row_key,) = sampler.row_keys(jax.random.key(0), 1)
  keys_B = jax.random.fold_in(row_key, 1)[None]
  state = engine.denoise_canvas(
    config, params, cache, keys_B, jnp.zeros(1, bool)
  )
  assert state.draft_BL[0].tolist() == whole.tokens[C:]


def test_prompts_of_one_bucket_compile_once(config, params):
  run(config, params, C)
  programs = (prompt_lib.read_tokens, engine.denoise_canvas)
  before = [program._cache_size() for program in programs]
  for length in (2, 7, 16):
    prompt = list(range(2, 2 + length))
    generate.generate_tokens(config, params, [prompt], jax.random.key(1), C)
  after = [program._cache_size() for program in programs]
  assert after == before


@pytest.mark.parametrize(
  'prompt, new_tokens, message',
  [
    ([], 4, 'The prompt is empty'),
    ([2] + [5] * 300, 4, 'more than the context of 256: shorten it'),
    ([2] + [5] * 200, 100, 'ask for at most 54 new tokens'),
    ([2, 5], 0, 'must be positive'),
    ([2, 97], 4, 'outside the vocabulary of 97'),
    ([2, -1], 4, 'outside the vocabulary of 97'),
  ],
)
def test_prompts_that_cannot_be_continued(
  config, params, prompt, new_tokens, message
):
  with pytest.raises(prompt_lib.PromptError, match=message):
    generate.generate_tokens(
      config, params, [prompt], jax.random.key(0), new_tokens
    )


@pytest.mark.parametrize(
  'key', [0, jax.random.PRNGKey(0), jax.random.split(jax.random.key(0), 3)]
)
def test_what_is_no_key_for_the_batch_is_refused(config, params, key):
  with pytest.raises(ValueError, match='key must be one of jax.random.key, or'):
    generate.generate_tokens(config, params, [PROMPT], key, C)


@pytest.mark.parametrize(
  'prompts, message',
  [
    (['ROMEO.'], r'Prompt 0 is a text, .*tokenizer\.encode'),
    ('ROMEO.', r'The prompts are a text, .*tokenizer\.encode'),
    ([2, 10], 'Prompt 0 is no list of token ids'),
    ([PROMPT, [2, 1.5]], 'Prompt 1 is no list of token ids'),
  ],
)
def test_what_is_no_token_ids_is_refused(config, params, prompts, message):
  with pytest.raises(prompt_lib.PromptError, match=message):
    generate.generate_tokens(config, params, prompts, jax.random.key(0), C)


def test_a_config_of_another_kind_is_refused(config, params):
  """It says which part is the right one, where there is one."""
  cache = kv_cache.init_cache(config.model, 1, 8)
  tokens = jnp.array([PROMPT]), jnp.array([4])
  key = jax.random.key(0)
  wanted = r'config must be a ModelConfig, it is a Config: give config\.model\.'
  for call in (
    lambda: kv_cache.init_cache(config, 1, 8),
    lambda: prompt_lib.prefill(config, params, *tokens, cache),
    lambda: prompt_lib.read_prompt(config, params, *tokens, cache),
    lambda: engine.make_denoise_fn(config, params, cache),
  ):
    with pytest.raises(configs.ConfigError, match=wanted):
      call()
  with pytest.raises(
    configs.ConfigError, match='a Config, it is a ModelConfig'
  ):
    generate.generate_tokens(config.model, params, [PROMPT], key, C)


def test_what_is_no_parameters_or_number_is_refused(config, params):
  def write(params, count):
    generate.generate_tokens(config, params, [PROMPT], jax.random.key(0), count)

  with pytest.raises(prompt_lib.PromptError, match='run.params; it is a tuple'):
    write((params,), C)
  with pytest.raises(
    prompt_lib.PromptError, match="'8' must be a whole number"
  ):
    write(params, '8')
  cache = kv_cache.init_cache(config.model, 2, 8)
  with pytest.raises(prompt_lib.PromptError, match='cache of 2 rows'):
    prompt_lib.prefill(
      config.model, params, jnp.array([PROMPT]), jnp.array([4]), cache
    )


@pytest.mark.parametrize('window', [4, 64])
def test_a_cache_without_room_is_an_error_or_poison(config, params, window):
  """Global layers, and local ones with fewer slots than their window. Inside
  of `jit` the row is no text, then and after, and the others are."""
  model = dataclasses.replace(config.model, sliding_window=window)
  cache = kv_cache.init_cache(model, 2, 6)
  tokens = jnp.array([PROMPT * 2, PROMPT * 2]), jnp.array([5, 7])
  with pytest.raises(prompt_lib.PromptError, match='6 tokens; with these .* 7'):
    prompt_lib.prefill(model, params, *tokens, cache)

  @jax.jit
  def write(length_B):
    read = prompt_lib.prefill(model, params, tokens[0], length_B, cache)
    more = prompt_lib.prefill(model, params, tokens[0], jnp.ones(2, int), read)
    denoise_fn = engine.make_denoise_fn(model, params, read)
    state, _ = sampler.sample_canvas(
      denoise_fn, jax.random.key(0), config.diffusion
    )
    return read, more, state

  read, more, state = write(tokens[1])
  assert read.length_B.tolist() == [5, kv_cache.OVERFLOWED]
  assert more.length_B.tolist() == [6, kv_cache.OVERFLOWED]
  assert (state.draft_BL[0] >= 0).all() and (state.draft_BL[1] == -1).all()
  with pytest.raises(prompt_lib.PromptError, match='Row 1 of the cache is no'):
    prompt_lib.prefill(model, params, tokens[0], jnp.array([1, 1]), read)
  # Local layers alone, that hold their windows, read on for ever.
  local = dataclasses.replace(
    model, attention_pattern=('local',) * len(model.attention_pattern)
  )
  ring = kv_cache.init_cache(local, 1, 64)
  assert kv_cache.room(local, ring) == (None if window <= 64 else 64)


@pytest.mark.parametrize('name', ['batch_size', 'vocab_size', 'embed_dim'])
def test_sizes_that_are_not_those_of_the_network(config, params, name):
  cache = kv_cache.init_cache(config.model, 1, 8)
  denoise_fn = engine.make_denoise_fn(config.model, params, cache)
  sizes = {**denoise_fn.sizes, name: 10}
  with pytest.raises(ValueError, match=f'{name} = 10, and the network'):
    sampler.sample_canvas(
      denoise_fn, jax.random.key(0), config.diffusion, **sizes
    )


def test_rows_of_a_batch_are_what_they_are_alone(config, params):
  """Prompts of many lengths; whatever the other rows hold, and when some of
  them stop before others."""
  rng = np.random.default_rng(0)
  prompts = [rng.integers(2, 97, n).tolist() for n in (1, 9, 17, 30)]
  keys_B = jax.random.split(jax.random.key(4), 4)
  together, *_ = generate.generate_tokens(
    config, params, prompts, keys_B, 3 * C
  )
  stop = together[1].tokens[C + 2]  # Row 1 stops in its second canvas.
  diffusion = dataclasses.replace(config.diffusion, stop_token_ids=(stop,))
  for case in (config, dataclasses.replace(config, diffusion=diffusion)):
    together, *_ = generate.generate_tokens(
      case, params, prompts, keys_B, 3 * C
    )
    for row, prompt in enumerate(prompts):
      (alone,), *_ = generate.generate_tokens(
        case, params, [prompt], keys_B[row : row + 1], 3 * C
      )
      assert alone == together[row]
  assert together[1].stopped_by == 'stop_token'
  assert len({row.steps for row in together}) > 1


def test_a_turn_goes_on_from_the_cache_of_the_last(config, params):
  """As if the whole conversation were the prompt; one row stops early, and
  its unread rest is not in the cache."""
  prompts = [[2, 10, 20, 30], [2, 40]]
  keys_B = jax.random.split(jax.random.key(5), 2)
  first, *_ = generate.generate_tokens(config, params, prompts, keys_B, 2 * C)
  stop = first[0].tokens[2]
  diffusion = dataclasses.replace(config.diffusion, stop_token_ids=(stop,))
  config = dataclasses.replace(config, diffusion=diffusion)
  first, cache, _ = generate.generate_tokens(
    config, params, prompts, keys_B, 2 * C, keep_cache=True
  )
  lengths = [
    len(p) + len(r.tokens) for p, r in zip(prompts, first, strict=True)
  ]
  assert cache.length_B.tolist() == lengths and lengths[0] < 4 + C
  news = [[50, 51, 52], [60]]
  second, *_ = generate.generate_tokens(
    config, params, news, keys_B, C, cache=cache, keep_cache=True
  )
  whole = [
    prompt + row.tokens + new
    for prompt, row, new in zip(prompts, first, news, strict=True)
  ]
  assert generate.generate_tokens(config, params, whole, keys_B, C)[0] == second


def test_the_cache_of_the_prompts_alone(config, params):
  """Another answer after the same prompt, which is not read again."""
  keys_B = jax.random.split(jax.random.key(5), 2)
  prompts = [[2, 10, 20, 30], [2, 40]]
  *_, prompt_cache = generate.generate_tokens(
    config, params, prompts, keys_B, 2 * C, keep_cache=True
  )
  assert prompt_cache.length_B.tolist() == [4, 2]
  news = [[50, 51, 52], [60]]
  after, *_ = generate.generate_tokens(
    config, params, news, keys_B, C, cache=prompt_cache
  )
  whole = [p + new for p, new in zip(prompts, news, strict=True)]
  assert (
    generate.generate_tokens(config, params, whole, keys_B, C).rows == after
  )


def test_pinned_tokens_over_several_canvases(config, params):
  """They are where they were put, in both drivers, and the rest is not as it
  was without them; a row without pins is what it is alone."""
  keys_B = jax.random.split(jax.random.key(6), 2)
  prompts = [[2, 10, 20, 30], [2, 40]]
  pinned = [{0: 7, 3: 8, C: 9, 2 * C - 1: 10}, {}]
  start = (config, params, prompts, keys_B, 2 * C)
  free, *_ = generate.generate_tokens(*start)
  held, *_ = generate.generate_tokens(*start, pinned=pinned)
  watched, *_ = generate.generate_tokens(
    *start, pinned=pinned, on_step=lambda step, state: None
  )
  assert held == watched and held[1] == free[1]
  for place, token in pinned[0].items():
    assert held[0].tokens[place] == token != free[0].tokens[place]
  others = [i for i in range(2 * C) if i not in pinned[0]]
  assert [held[0].tokens[i] for i in others] != [
    free[0].tokens[i] for i in others
  ]


def test_a_text_does_not_end_before_its_last_pin(config, params):
  """A stop token between pins is a token like others; a pinned one stops."""
  whole = run(config, params, 2 * C)
  stop = whole.tokens[1]
  assert whole.tokens.index(stop) <= 1
  diffusion = dataclasses.replace(config.diffusion, stop_token_ids=(stop,))
  config = dataclasses.replace(config, diffusion=diffusion)
  assert len(run(config, params, 2 * C).tokens) <= 2
  places = {i: whole.tokens[i] for i in range(C)}
  held = run(config, params, 2 * C, pinned=[places | {C + 2: stop}])
  assert held.tokens[:C] == whole.tokens[:C]
  assert held.tokens[-1] == stop and len(held.tokens) == C + 3
  assert held.stopped_by == 'stop_token'


@pytest.mark.parametrize(
  'pinned, message',
  [
    (
      [{2 * C: 5}],
      'Position 12 that prompt 0 pins is outside of its 2 canvases',
    ),
    ([{-1: 5}], 'Position -1'),
    ([{0: 97}], 'pins token 97, outside of the vocabulary of 97'),
    ([{}, {}], '2 rows of pinned tokens for 1 prompts'),
  ],
)
def test_pins_that_cannot_be(config, params, pinned, message):
  with pytest.raises(prompt_lib.PromptError, match=message):
    run(config, params, 2 * C, pinned=pinned)


def test_a_logit_hook_bans_and_forces(config, params):
  """Only even tokens, and the third is always 42; the step counts down."""
  steps = []

  def hook(canvas_BL, logits_BLV, time, state):
    note = lambda left_B1: steps.append(int(left_B1[0, 0]))
    jax.debug.callback(note, time.left_B1, ordered=True)
    even_V = jnp.arange(97) % 2 == 0
    logits_BLV = jnp.where(even_V, logits_BLV, -jnp.inf)
    forced_BLV = jnp.where(jnp.arange(97) == 42, logits_BLV, -jnp.inf)
    is_third_L1 = (jnp.arange(C) == 2)[:, None]
    return jnp.where(is_third_L1, forced_BLV, logits_BLV)

  row = run(config, params, 2 * C, sampling=Sampling(logit_hook=hook))
  jax.effects_barrier()
  assert all(token % 2 == 0 for token in row.tokens)
  assert row.tokens[2] == row.tokens[C + 2] == 42
  assert steps == [4, 3, 2, 1] * 2


def test_another_constraint_compiles_nothing_anew(config, params):
  """What it bans is data."""

  def ban(is_banned_V, canvas_BL, logits_BLV, time, state):
    return jnp.where(is_banned_V, -jnp.inf, logits_BLV)

  def write(start):
    constraint = jax.tree_util.Partial(ban, jnp.arange(97) % 3 != start)
    sampling = Sampling(constraint=constraint)
    return run(config, params, C, sampling=sampling).tokens

  first, programs = write(0), engine.denoise_canvas._cache_size()
  second = write(1)
  assert {token % 3 for token in first} == {0}
  assert {token % 3 for token in second} == {1}
  assert engine.denoise_canvas._cache_size() == programs


def test_pads_do_not_count_as_tokens_per_forward(config, params):
  whole = run(config, params, C)
  diffusion = dataclasses.replace(
    config.diffusion, pad_token_id=whole.tokens[0]
  )
  padded = run(dataclasses.replace(config, diffusion=diffusion), params, C)
  assert padded.tokens == whole.tokens
  pads = whole.tokens.count(whole.tokens[0])
  assert padded.tokens_per_forward == (C - pads) / whole.steps


def test_batches_that_do_not_fit(config, params):
  key = jax.random.key(0)
  with pytest.raises(prompt_lib.PromptError, match='There is no prompt'):
    generate.generate_tokens(config, params, [], key, C)
  cache = kv_cache.init_cache(config.model, 2, 40)
  with pytest.raises(
    prompt_lib.PromptError, match='1 prompts for a cache of 2'
  ):
    generate.generate_tokens(config, params, [PROMPT], key, C, cache=cache)
  cache = cache.replace(length_B=jnp.array([3, 250]))
  with pytest.raises(prompt_lib.PromptError, match='has 254 tokens; with 1'):
    generate.generate_tokens(config, params, [PROMPT] * 2, key, C, cache=cache)
  with pytest.raises(prompt_lib.PromptError, match='reads text only'):
    generate.generate_tokens(
      config, params, [PROMPT], key, C, pictures=[['a.png']]
    )


def test_cut_at_stop():
  tokens = np.array([5, 6, 1, 7, 1])
  assert generate.cut_at_stop(tokens, (1, 50)) == ([5, 6, 1], True)
  assert generate.cut_at_stop(tokens, (50,)) == (tokens.tolist(), False)
  assert generate.cut_at_stop(jnp.array([1, 2]), (1,)) == ([1], True)


ON_EIGHT_DEVICES = """
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
from diffusiongemma.config import Config
from diffusiongemma.config import DiffusionConfig
from diffusiongemma.config import ModelConfig
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import denoiser
from diffusiongemma.generation import engine
from diffusiongemma.generation import generate
from diffusiongemma.generation import prompt as prompt_lib

model = ModelConfig(
  vocab_size=97, embed_dim=24, attention_pattern=('local', 'global'),
  num_heads=4, num_kv_heads=2, head_dim=8, num_global_kv_heads=1,
  global_head_dim=16, sliding_window=5, mlp_dim=20, num_experts=6,
  experts_per_token=2, expert_dim=12, context_length=256, dtype='float32')
config = Config(model=model, diffusion=DiffusionConfig(
  canvas_length=6, max_denoising_steps=4, stop_token_ids=(9,)))
params = denoiser.init_params(denoiser.Denoiser(model), jax.random.key(0))
mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
everywhere = NamedSharding(mesh, PartitionSpec())
by_row = NamedSharding(mesh, PartitionSpec('data'))
keys_B = jax.random.split(jax.random.key(1), 8)
rng = np.random.default_rng(0)

prompts = rng.integers(10, 97, (8, 7)).astype(np.int32)
cache = prompt_lib.read_prompt(model, params, prompts, np.arange(8) % 7 + 1,
                               kv_cache.init_cache(model, 8, 8))
done_B = np.zeros(8, bool)
one = engine.denoise_canvas(config, params, cache, keys_B, done_B)
eight = engine.denoise_canvas(
  config, jax.device_put(params, everywhere), jax.device_put(cache, by_row),
  jax.device_put(keys_B, by_row), jax.device_put(done_B, by_row))
assert len(one.draft_BL.sharding.device_set) == 1
assert eight.draft_BL.sharding.is_equivalent_to(by_row, 2)
for name in ('draft_BL', 'canvas_BL', 'accepted_BL', 'steps_B'):
  assert (getattr(one, name) == np.asarray(getattr(eight, name))).all(), name

ragged = [row[: i % 7 + 1].tolist() for i, row in enumerate(prompts)]
single = generate.generate_tokens(config, params, ragged, keys_B, 18)
spread = generate.generate_tokens(
  config, jax.device_put(params, everywhere), ragged, keys_B, 18)
assert single.rows == spread.rows
print(len({row.steps for row in single.rows}), 'equal')
"""


def test_the_same_tokens_on_one_device_and_on_eight():
  """Rows on a device each, and everything on all of them."""
  output = many_devices.run(ON_EIGHT_DEVICES, devices=8)
  assert output.endswith('equal\n')


def test_lengths_up_to_four_canvases_share_a_program(config, params):
  run(config, params, 4 * C)
  programs = (prompt_lib.read_tokens, engine.denoise_canvas)
  before = [program._cache_size() for program in programs]
  for new_tokens in (1, C, 2 * C, 3 * C):
    run(config, params, new_tokens)
  assert [program._cache_size() for program in programs] == before
