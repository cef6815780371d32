"""The measurement itself: an oracle gets full marks, and others what is due."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusiongemma as dg
from diffusiongemma.diffusion import sampler
from diffusiongemma.runs import load
from diffusiongemma.text import tokenizer as tokenizers
from experiments.sudoku import make_puzzles
from experiments.sudoku import solve

PROMPTS = ['1..4', '..3.', '.21.', '2...']
RESPONSES = ['1234', '1234', '4213', '2143']
CELLS = 4


@pytest.fixture(scope='module')
def run():
  """A random network for puzzles of four cells."""
  config = dg.Config(
    model=dg.ModelConfig(
      vocab_size=11,
      embed_dim=8,
      attention_pattern=('global',),
      num_heads=1,
      num_kv_heads=1,
      head_dim=8,
      num_global_kv_heads=1,
      global_head_dim=8,
      sliding_window=16,
      mlp_dim=8,
      num_experts=2,
      experts_per_token=1,
      expert_dim=8,
      context_length=32,
      dtype='float32',
    ),
    diffusion=dg.DiffusionConfig(
      canvas_length=CELLS + 1, max_denoising_steps=9, stop_token_ids=(1,)
    ),
  )
  tokenizer = tokenizers.SentencePieceTokenizer(make_puzzles.make_tokenizer(6))
  return load.Run(config, tokenizer, 70, random_params(config.model))


def random_params(config):
  """Without compiling anything. Large norms, so that a token is not answered
  with itself."""
  model = dg.Denoiser(config)
  shapes = jax.eval_shape(lambda: dg.init_params(model, jax.random.key(0)))
  rng = np.random.default_rng(3)

  def draw(leaf):
    scale = 4 if leaf.ndim == 1 else 1
    return jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)

  return jax.tree.map(draw, shapes)


@pytest.fixture
def oracle(run, monkeypatch):
  """Takes answers, and makes every network one that is sure of them."""
  D = run.config.model.embed_dim

  def make_denoise_fn(model, params, cache):
    answers_BL = params['answers_ML'][cache.length_B]  # The row, see `read`.

    def denoise(tokens_BL, sc_BLD, temperature, uniforms_BLU, step):
      logits_BLV = 1e4 * jax.nn.one_hot(answers_BL, model.vocab_size)
      soft_embedding = lambda p_BLV: jnp.zeros((*p_BLV.shape[:2], D))
      return sampler.predict(
        logits_BLV, temperature, uniforms_BLU, soft_embedding
      )

    return denoise

  def read(run, prompts):
    rows = [PROMPTS.index(prompt) for prompt in prompts]
    return dg.KVCache((), (), jnp.array(rows))

  monkeypatch.setattr(dg, 'make_denoise_fn', make_denoise_fn)
  monkeypatch.setattr(solve, 'read', read)

  def answering(texts):
    eos = run.tokenizer.eos_id
    tokens = [[*run.tokenizer.encode(text), eos] for text in texts]
    return run.replace(params={'answers_ML': jnp.array(tokens)})

  return answering


def test_an_oracle_gets_full_marks(oracle):
  results = solve.measure_denoising(
    oracle(RESPONSES),
    PROMPTS,
    RESPONSES,
    budgets=[1, 2, 3],
    batch_size=2,
    seeds=2,
  )
  for budget, record in enumerate(results['budgets'], 1):
    assert record == {
      'budget': budget,
      'seed': 0,
      'solved': 1.0,
      'cells_right': 1.0,
      'givens_altered': 0,
      # Its second draft is its first, and it stops.
      'steps': min(budget, 2.0),
    }
  for way in ('free', 'pinned'):
    assert results[way]['solved'] == {'mean': 1.0, 'least': 1.0, 'most': 1.0}
    assert results[way]['steps']['mean'] == 2
    assert [r['seed'] for r in results[way]['records']] == [0, 1]


def test_pinned_givens_are_not_altered(oracle):
  """By a network that is sure of something else."""
  results = solve.measure_denoising(
    oracle(['5555'] * 4), PROMPTS, RESPONSES, budgets=[1], batch_size=4, seeds=1
  )
  assert results['free']['givens_altered']['mean'] == 6
  assert results['free']['cells_right']['mean'] == 0
  assert results['pinned']['givens_altered']['mean'] == 0
  assert results['pinned']['cells_right']['mean'] == 6 / 16
  assert results['pinned']['solved']['mean'] == 0


def test_score():
  right = solve.score(RESPONSES, PROMPTS, RESPONSES)
  assert right == {'solved': 1, 'cells_right': 1, 'givens_altered': 0}
  # A given altered; a cell wrong; three cells too few, two of them givens;
  # and nothing.
  wrong = solve.score(['2234', '5234', '4', '2143'], PROMPTS, RESPONSES)
  assert wrong == {
    'solved': 1 / 4,
    'cells_right': (3 + 3 + 1 + 4) / 16,
    'givens_altered': 1 + 0 + 2 + 0,
  }
  longer = solve.score(['12344'], ['1...'], ['1234'])
  assert longer == {'solved': 0, 'cells_right': 1, 'givens_altered': 0}


def test_cells_stay_in_their_places(run):
  """Also after a stop token in the middle of an answer."""
  tokenizer = run.tokenizer
  one, four = tokenizer.encode('14')
  eos, pad = tokenizer.eos_id, tokenizer.pad_id
  tokens_ML = np.array([[one, four, eos, pad], [eos, one, pad, four]])
  assert solve.answers(tokenizer, tokens_ML) == ['14', ' 1 4']


def test_greedy_decoding_is_prefill_over_growing_texts(run):
  """A Python loop that reads the whole text again for each token."""
  model, count = dg.Denoiser(run.config.model), CELLS + 1
  apply = functools.partial(model.apply, {'params': run.params})

  @jax.jit
  def most_probable(tokens_BS, length):
    length_B = jnp.full(len(tokens_BS), length)
    h_BSD, *_ = apply(tokens_BS, length_B, method='prefill')
    logits_BSV = apply(h_BSD, method='logits')
    return jnp.argmax(logits_BSV[:, length - 1], axis=-1)

  prompts_BP = solve.encode(run, PROMPTS)
  tokens_BS = np.pad(prompts_BP, ((0, 0), (0, count)))
  for length in range(prompts_BP.shape[1], tokens_BS.shape[1]):
    tokens_BS[:, length] = most_probable(tokens_BS, length)
  written_BL = solve.write_greedily(
    run.config.model, run.params, prompts_BP, count
  )
  np.testing.assert_array_equal(written_BL, tokens_BS[:, -count:])
  assert len(np.unique(written_BL)) > 4, 'a text that says something'


def test_read_puzzles(tmp_path):
  path = tmp_path / 'puzzles.jsonl'

  def write(*pairs):
    lines = [json.dumps({'prompt': p, 'response': r}) + '\n' for p, r in pairs]
    path.write_text(''.join(lines))

  write(*zip(PROMPTS, RESPONSES, strict=True))
  assert solve.read_puzzles(path, 2) == (PROMPTS[:2], RESPONSES[:2])
  assert solve.read_puzzles(path, 9) == (PROMPTS, RESPONSES)
  write(('1..4', '1234'), ('1..4', '1235'))
  with pytest.raises(solve.PuzzleError, match='Line 2 .* other givens'):
    solve.read_puzzles(path, 9)
  write(('1..4', '1234'), ('1..', '123'))
  with pytest.raises(solve.PuzzleError, match='Line 2 .* one length'):
    solve.read_puzzles(path, 9)
  for text in ('{"prompt": "1"}', '{"prompt"', '[]', '{"prompt": 1}', '\xff'):
    path.write_bytes(text.encode('latin-1'))
    with pytest.raises(solve.PuzzleError, match='Line 1 of'):
      solve.read_puzzles(path, 9)
  path.write_text('')
  with pytest.raises(solve.PuzzleError, match='no puzzle'):
    solve.read_puzzles(path, 9)


def test_networks_for_other_puzzles_are_refused(run, monkeypatch):
  def load(prompts, **fields):
    monkeypatch.setattr(dg, 'load', lambda path: run.replace(**fields))
    return solve.load('runs/x', prompts)

  assert load(PROMPTS).params is run.params
  with pytest.raises(solve.PuzzleError, match='runs/x holds no network'):
    load(['1' * (CELLS + 2)])
  shakespeare = tokenizers.load_tokenizer('')
  with pytest.raises(solve.PuzzleError, match='runs/x holds no network'):
    load(['with'], maybe_tokenizer=shakespeare)  # One piece, not four.
  with pytest.raises(dg.Error, match='no tokenizer'):
    load(PROMPTS, maybe_tokenizer=None)


def test_training_seconds(run, tmp_path):
  data = run.config.data
  tokens = data.batch_size * data.sequence_length  # Of a step.
  records = [
    {'step': 40, 'tokens_per_second': tokens / 2},  # 2 s a step.
    {'step': 40, 'heldout_loss_ar': 1.0},
    {'step': 70, 'tokens_per_second': tokens / 3},
    {'step': 99, 'tokens_per_second': 1.0},  # After the checkpoint.
  ]
  text = ''.join(json.dumps(record) + '\n' for record in records)
  assert solve.training_seconds(run, tmp_path) is None
  (tmp_path / 'metrics.jsonl').write_text(text)
  assert solve.training_seconds(run, tmp_path) == 40 * 2 + 30 * 3


def run_main(monkeypatch, *arguments):
  monkeypatch.setattr(sys, 'argv', ['solve.py', *map(str, arguments)])
  solve.main()


def test_all_of_it(run, tmp_path, monkeypatch):
  monkeypatch.setattr(dg, 'load', lambda path: run)
  puzzles = tmp_path / 'heldout.jsonl'
  lines = [
    json.dumps({'prompt': p, 'response': r}) + '\n'
    for p, r in zip(PROMPTS, RESPONSES, strict=True)
  ]
  puzzles.write_text(''.join(lines))
  run_main(
    monkeypatch,
    f'--puzzles={puzzles}',
    '--workdir=runs/both',
    '--ar_workdir=runs/ar',
    '--budgets=1',
    '--seeds=2',
    f'--output={tmp_path}/new',
    '--name=2x2',
  )
  results = json.loads((tmp_path / 'new' / '2x2.json').read_text())
  assert results['puzzles'] == 4
  assert results['run']['training_steps'] == 70
  assert results['run']['training_seconds'] is None
  assert results['ar_run']['workdir'] == 'runs/ar'
  assert results['ar'] == results['ar_alone']  # It is the same network here.
  assert results['ar']['steps'] == CELLS + 1
  assert results['denoising']['pinned']['givens_altered']['most'] == 0
  assert '--name=2x2' in results['command']
  picture = (tmp_path / 'new' / '2x2.png').read_bytes()
  assert picture.startswith(b'\x89PNG')


def test_errors_are_one_line(tmp_path, monkeypatch):
  puzzles = tmp_path / 'heldout.jsonl'
  for text, message in (
    (None, 'heldout.jsonl cannot be read: No such file'),
    ('{"prompt": "1..4", "response": "1234"}\n', 'holds no run'),
  ):
    if text:
      puzzles.write_text(text)
    with pytest.raises(SystemExit) as stopped:
      run_main(
        monkeypatch,
        f'--puzzles={puzzles}',
        f'--workdir={tmp_path}',
        f'--output={tmp_path}',
      )
    assert message in stopped.value.code
    assert '\n' not in stopped.value.code
