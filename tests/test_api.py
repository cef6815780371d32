"""The front door: what `import diffusiongemma` does with a run."""

import ast
import dataclasses
import gc
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import diffusiongemma as dg
from diffusiongemma import config as configs
from diffusiongemma import ops
from diffusiongemma.diffusion import strategies
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.model import parameters
from diffusiongemma.text import template as templates

TEXT = 'what is this '


@pytest.fixture(scope='module')
def run(chat_run):
  return chat_run


def test_matrices_are_transposed_once_and_go_with_the_run(run):
  transposed = ops.weights._TRANSPOSED
  params = jax.tree.map(jnp.copy, run.params)
  own, before = run.replace(params=params), len(transposed)
  written = dg.generate(own, TEXT, max_new_tokens=8)
  count = len(transposed)
  assert count > before
  assert written == dg.generate(own, TEXT, max_new_tokens=8)
  assert len(transposed) == count
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(own.params))
  del own, params
  gc.collect()
  assert len(transposed) == before


def test_what_is_changed_beside_the_experts_is_seen(run):
  """The experts of a run that learns may be frozen: the same arrays."""
  dg.generate(run, TEXT, max_new_tokens=8)
  changed = {**run.params, 'embedding': run.params['embedding'][::-1]}
  found = dg.generate(run.replace(params=changed), TEXT, max_new_tokens=8)
  tokens = [run.tokenizer.bos_id, *run.tokenizer.encode(TEXT)]
  wanted = dg.generate_tokens(
    run.config, changed, [tokens], jax.random.key(0), 8
  )
  assert found.tokens == wanted.rows[0].tokens


def test_a_text_token_ids_and_lists_of_either(run):
  tokens = [run.tokenizer.bos_id, *run.tokenizer.encode(TEXT)]
  one = dg.generate(run, TEXT, max_new_tokens=20, key=3)
  assert len(one.tokens) <= 20 and one.steps > 0
  assert one.text == run.tokenizer.decode(one.tokens)
  for same in (tokens, tuple(tokens), np.array(tokens)):
    assert dg.generate(run, same, max_new_tokens=20, key=3) == one
  key = jax.random.key(3)
  assert dg.generate(run, TEXT, max_new_tokens=20, key=key) == one
  several = dg.generate(run, [TEXT, tokens, 'model'], max_new_tokens=9)
  assert len(several) == 3 and {len(w.tokens) for w in several} <= {*range(10)}


def test_it_writes_what_the_pure_function_writes(run, chat_run):
  """With parameters as they are stored, too."""
  tokens = [run.tokenizer.bos_id, *run.tokenizer.encode(TEXT)]
  rows = dg.generate_tokens(
    run.config, chat_run.params, [tokens], jax.random.key(0), 16
  ).rows
  assert dg.generate(run, TEXT, max_new_tokens=16).tokens == rows[0].tokens


def test_pieces_of_a_stream_are_the_text(run):
  whole = dg.generate(run, TEXT, max_new_tokens=30)
  pieces = list(dg.stream(run, TEXT, max_new_tokens=30))
  assert len(pieces) > 1
  assert ''.join(piece.text for piece in pieces) == whole.text
  assert sum((piece.tokens for piece in pieces), []) == whole.tokens
  assert sum(piece.steps for piece in pieces) == whole.steps
  assert [piece.stopped_by for piece in pieces[:-1]] == [None] * (
    len(pieces) - 1
  )
  assert pieces[-1].stopped_by == whole.stopped_by


def test_a_character_cut_by_a_canvas_is_told_whole(run):
  """Its bytes are tokens of their own, the first ones in one canvas."""
  tokenizer, C = run.tokenizer, run.config.diffusion.canvas_length
  text = 'this is' + 'é' * C
  tokens = tokenizer.encode(text)[: 2 * C]
  while '\N{REPLACEMENT CHARACTER}' not in tokenizer.decode(tokens[:C]):
    tokens = tokenizer.encode('t')[-1:] + tokens
  tokens = tokens[: 2 * C]
  pins = dict(enumerate(tokens))
  pieces = list(dg.stream(run, TEXT, max_new_tokens=len(tokens), pinned=pins))
  assert '\N{REPLACEMENT CHARACTER}' not in pieces[0].text
  assert ''.join(p.text for p in pieces) == tokenizer.decode(tokens)


def test_a_strategy_of_ones_own_and_fields_one_by_one(run):
  calls = []

  def mine(config, canvas_BL, prediction, time, drawn):
    calls.append(time)
    return strategies.confidence(config, canvas_BL, prediction, time, drawn)

  found = dg.generate(run, TEXT, max_new_tokens=8, strategy=mine)
  assert calls
  named = dg.generate(run, TEXT, max_new_tokens=8, strategy='confidence')
  config = dataclasses.replace(
    run.config,
    diffusion=dataclasses.replace(run.config.diffusion, strategy='confidence'),
  )
  configured = dg.generate(run.replace(config=config), TEXT, max_new_tokens=8)
  assert found == named == configured
  sampling = dg.Sampling(num_steps=1)
  assert dg.generate(run, TEXT, max_new_tokens=8, sampling=sampling).steps == 1


def test_chat_is_a_reply(run):
  messages = [{'role': 'user', 'content': 'what is this'}]
  reply = dg.chat(run, messages, max_new_tokens=16)
  assert reply == dg.chat(run, messages, max_new_tokens=16)
  assert reply.written.tokens and isinstance(reply.text, str)
  first = lambda canvas, logits, time, state: logits.at[:, 0, 70].set(99.0)
  forced = dg.chat(run, messages, max_new_tokens=8, logit_hook=first)
  assert forced.written.tokens[0] == 70


def test_what_cannot_be_is_a_sentence(run):
  cases = (
    (lambda: dg.generate('runs/tiny', 'x'), 'what load returns'),
    (lambda: dg.generate(run, ''), 'The prompt is empty'),
    (lambda: dg.generate(run, 3), 'token ids, or a list of either'),
    (lambda: dg.generate(run, []), 'There is no prompt'),
    (lambda: dg.generate(run, [2.5, 3]), 'no list of token ids'),
    (lambda: dg.generate(run, 'x', strategi='y'), "mean 'strategy'"),
    (lambda: dg.generate(run, 'x', strategy='best'), 'There are entropy'),
    (lambda: dg.generate(run, 'x', sampling=0.7), 'must be a Sampling'),
    (lambda: dg.stream(run, ['x', 'y']), 'takes one prompt'),
    (lambda: dg.generate(run, 'x', max_new_tokens=0), 'must be positive'),
    (lambda: dg.log_likelihood(run, [2]), 'A text of 1 tokens'),
    (lambda: dg.loss(run.config.model, run.params, {}, None), 'a Config'),
  )
  for call, message in cases:
    with pytest.raises(ValueError, match=message):
      call()
  with pytest.raises(templates.TemplateError):
    dg.chat(run, [{'role': 'nobody', 'content': 'x'}])
  with pytest.raises(prompt_lib.PromptError, match='There is no prompt'):
    dg.generate(run, ())


def test_likelihood_is_that_of_the_network_read_from_left_to_right(run):
  found = dg.log_likelihood(run, TEXT)
  tokens_BS = jnp.array([found.tokens])
  model = dg.Denoiser(run.config.model)
  h_BSD, *_ = model.apply(
    {'params': run.params},
    tokens_BS,
    jnp.array([len(found.tokens)]),
    method='prefill',
  )
  logits = model.apply({'params': run.params}, h_BSD, method='logits')
  log_p = jax.nn.log_softmax(logits[0], axis=-1)
  wanted = [log_p[i, t] for i, t in enumerate(found.tokens[1:])]
  np.testing.assert_allclose(found.log_p_of_token, wanted, rtol=1e-4)
  np.testing.assert_allclose(found.log_p, np.sum(wanted), rtol=1e-4)
  assert found.denoising_bound is None
  several = dg.log_likelihood(run, [TEXT, 'model'])
  np.testing.assert_allclose(several[0].log_p, found.log_p, rtol=1e-5)


def test_a_leave_one_out_run_has_a_bound(run):
  train = dataclasses.replace(run.config.train, objective='loo_ce')
  config = dataclasses.replace(run.config, train=train)
  found = dg.log_likelihood(run.replace(config=config), TEXT)
  assert found.denoising_bound < 0 < found.denoising_bound_error
  # A network that knows nothing is about as bad as a guess.
  guess = -len(found.tokens[1:]) * np.log(run.config.model.vocab_size)
  assert 3 * guess < found.denoising_bound < guess / 3


@pytest.mark.parametrize('arrange', [lambda params: params, dg.arrange])
def test_the_loss_is_learnt_in_a_loop_of_ones_own(run, arrange):
  """From arranged parameters too, which are stored as others."""
  config = run.config
  C = config.diffusion.canvas_length
  tokens_BS = np.tile(np.arange(3, 35, dtype=np.int32), (2, 1))
  batch = {
    'tokens_BS': tokens_BS,
    'length_B': np.full(2, 32, np.int32),
    'first_BS': np.zeros((2, 32), np.int32),
    'canvas_start_BK': np.array([[8, 8 + C]] * 2, np.int32),
    'target_mask_BS': np.ones((2, 32), bool),
  }
  optimizer = optax.adam(1e-2)

  @jax.jit
  def step(params, state, key):
    loss_fn = lambda params: dg.loss(config, params, batch, key)
    (value, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
      params
    )
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, value, metrics

  params = arrange(run.params)
  state, values = optimizer.init(params), []
  for n in range(12):
    params, state, value, metrics = step(params, state, jax.random.key(n))
    values.append(float(value))
  assert values[-1] < values[0] - 0.5
  assert {'loss', 'loss_denoise', 'loss_ar', 'accuracy'} == set(metrics)
  stored = parameters.to_stored(params)
  experts = stored['layer_00']['experts']['gate_up']
  assert experts.shape == params['layer_00']['experts']['gate_up'].shape
  np.testing.assert_array_equal(
    experts, np.asarray(params['layer_00']['experts']['gate_up'])
  )


def test_sizes_and_parameters_are_checked(run):
  cache = dg.init_cache(run.config.model, 1, 32)
  denoise_fn = dg.make_denoise_fn(run.config.model, run.params, cache)
  with pytest.raises(ValueError, match='vocab_size = 10, and the network'):
    dg.sample_canvas(
      denoise_fn, jax.random.key(0), run.config.diffusion, vocab_size=10
    )
  state, _ = dg.sample_canvas(
    denoise_fn, jax.random.key(0), run.config.diffusion
  )
  assert state.draft_BL.shape == (1, run.config.diffusion.canvas_length)
  with pytest.raises(prompt_lib.PromptError, match='run.params; it is a Run'):
    dg.make_denoise_fn(run.config.model, run, cache)
  with pytest.raises(configs.ConfigError, match='ModelConfig'):
    dg.make_denoise_fn(run.config, run.params, cache)


def test_public_names_are_imported_when_they_are_asked_for():
  """`import diffusiongemma` imports nothing but itself; the sampler no Orbax,
  tokenizers or Pallas."""
  script = (
    'import sys\n'
    'import diffusiongemma as dg\n'
    'assert "jax" not in sys.modules\n'
    'from diffusiongemma.diffusion import sampler\n'
    'heavy = ("orbax", "tokenizers", "sentencepiece", "grain",\n'
    '         "jax.experimental.pallas")\n'
    'found = [name for name in heavy if name in sys.modules]\n'
    'assert not found, found\n'
    'for name in dg.__all__: getattr(dg, name)\n'
    'assert set(dg.__all__) <= set(dir(dg))\n'
    'try: dg.nothing\n'
    'except AttributeError: print("good")\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=False
  )
  assert done.stdout == 'good\n', done.stderr


def test_type_checkers_see_the_names_that_there_are():
  source = pathlib.Path(dg.__file__).read_text()
  (block,) = (
    node for node in ast.parse(source).body if isinstance(node, ast.If)
  )
  seen = {
    (name.name, node.module) for node in block.body for name in node.names
  }
  homes = {
    (name, 'diffusiongemma.diffusion' if name == 'strategies' else home)
    for name, home in dg._HOME.items()
  }
  assert seen == homes
