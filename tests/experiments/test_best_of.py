"""Of several answers the network keeps the one that it finds most probable."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import config
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import denoiser
from diffusiongemma.text import tokenizer as tokenizers
from experiments.sudoku import best_of
from experiments.sudoku import make_puzzles
from experiments.sudoku import solve


def test_the_judge_adds_what_stands_on_the_canvas(model_config, params):
  run = types.SimpleNamespace(
    config=types.SimpleNamespace(model=model_config), params=params
  )

  @functools.partial(jax.jit, static_argnames='method')
  def apply(*given, method):
    model = denoiser.Denoiser(model_config)
    return model.apply({'params': params}, *given, method=method)

  prompt_BP = jnp.array([[5, 6, 7], [8, 9, 10]])
  _, cache, _ = apply(prompt_BP, jnp.array([3, 3]), method='prefill')
  assert isinstance(cache, kv_cache.KVCache)
  tokens_BL = jnp.array([[3, 4, 5, 6], [7, 7, 8, 9]])
  h_BLD = apply(tokens_BL, None, cache, method='denoise')
  logits_BLV = apply(h_BLD, method='logits')
  log_p_BLV = np.log(jax.nn.softmax(logits_BLV))
  expected = [
    sum(log_p_BLV[row, place, token] for place, token in enumerate(tokens))
    for row, tokens in enumerate(tokens_BL.tolist())
  ]
  found = best_of.make_judge(run)(cache, tokens_BL)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.fixture
def sudoku_run():
  """As much of a run as puzzles of 6x6 need, on canvases of 40 tokens."""
  return types.SimpleNamespace(
    tokenizer=tokenizers.SentencePieceTokenizer(make_puzzles.make_tokenizer(6)),
    config=types.SimpleNamespace(
      diffusion=config.DiffusionConfig(canvas_length=40)
    ),
  )


RULES = make_puzzles.Rules(6)


def canvas_of(run, text):
  return np.array([*run.tokenizer.encode(text), 1, 1, 1, 1])


def solve_it(prompt):
  cells = [0 if cell == solve.EMPTY else int(cell) for cell in prompt]
  (solution,) = make_puzzles.solutions(RULES, cells)
  return ''.join(map(str, solution))


def make_prompts(count):
  rng = np.random.default_rng(0)
  puzzles = [make_puzzles.make_puzzle(RULES, rng)[0] for _ in range(count)]
  return [''.join(map(str, p)).replace('0', solve.EMPTY) for p in puzzles]


def test_the_answer_to_another_puzzle_is_read_back(sudoku_run):
  rng = np.random.default_rng(1)
  for prompt in make_prompts(5):
    symmetry = make_puzzles.draw_symmetry(RULES, rng)
    posed = best_of.pose(sudoku_run, prompt, symmetry)
    assert posed.prompt != prompt
    tokens_L = canvas_of(sudoku_run, solve_it(posed.prompt))
    read_L = posed.read(tokens_L)
    expected_L = canvas_of(sudoku_run, solve_it(prompt))
    assert read_L.tolist() == expected_L.tolist()


def test_what_the_network_is_not_sure_of_is_asked_again(
  sudoku_run, monkeypatch
):
  prompts = make_prompts(3)
  responses = [solve_it(prompt) for prompt in prompts]
  asked = []
  # The sums of each try. Of the second puzzle the first and third answers are
  # right, of the third the last.
  sums = [[0.0, -5.0, -9.0], [-7.0, -8.0], [-5.5, -0.001]]
  is_right = [[True, True, False], [False, False], [True, True]]

  def answer(run, solver, judge, prompts, seed, batch_size):
    asked.append(prompts)
    texts = [
      solve_it(prompt) if right else '6' * 36
      for prompt, right in zip(prompts, is_right[seed], strict=True)
    ]
    tokens_ML = np.stack([canvas_of(run, text) for text in texts])
    return tokens_ML, np.array(sums[seed]), np.full(len(prompts), 10)

  monkeypatch.setattr(best_of, 'answer', answer)
  monkeypatch.setattr(best_of, 'make_judge', lambda run: None)
  monkeypatch.setattr(solve, 'make_solver', lambda run, diffusion: None)
  records = best_of.measure(sudoku_run, prompts, responses, 3, -0.003, 4)
  assert asked[0] == prompts
  assert [len(prompts) for prompts in asked] == [3, 2, 2]
  assert not set(asked[1] + asked[2]) & set(prompts)
  assert [r['solved'] for r in records] == pytest.approx([2 / 3, 2 / 3, 1])
  assert [r['unsure'] for r in records] == [2, 2, 1]
  assert [r['steps'] for r in records] == pytest.approx([10, 50 / 3, 70 / 3])
