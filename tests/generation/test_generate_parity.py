"""Whole trajectories against `transformers`' generate, token for token.

Both draw the same numbers: torch's random functions are replaced by ours.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import config as configs
from diffusiongemma import ops
from diffusiongemma.diffusion import sampler
from diffusiongemma.generation import generate

parity = pytest.importorskip('parity', reason='needs torch, transformers')
torch = pytest.importorskip('torch')
reference = pytest.importorskip(
  'transformers.models.diffusion_gemma.generation_diffusion_gemma'
)

L, CANVASES = 8, 3
BASE = configs.DiffusionConfig(
  canvas_length=L,
  max_denoising_steps=6,
  stop_token_ids=(),
  t_min=0.3,
  t_max=0.9,
)
replace = dataclasses.replace
CASES = {
  'released settings': BASE,
  'many accepted': replace(BASE, entropy_bound=4.0),
  'rows converge': replace(
    BASE, entropy_bound=9.0, confidence_threshold=2.0, max_denoising_steps=12
  ),
  'two stable steps': replace(
    BASE,
    entropy_bound=9.0,
    confidence_threshold=2.0,
    stability_threshold=2,
    max_denoising_steps=12,
  ),
  'rows stop': replace(
    BASE,
    entropy_bound=9.0,
    confidence_threshold=2.0,
    max_denoising_steps=12,
    stop_token_ids=tuple(range(1, 80, 11)),
  ),
}


@pytest.fixture(scope='module', params=[5, 64])
def pair(request):
  """A network whose logits are sharp enough to settle; windows that the text
  outgrows and does not outgrow."""
  config = replace(
    parity.BASE,
    attention_pattern=('local', 'local', 'global'),
    sliding_window=request.param,
  )
  pair = parity.Pair(config, L)
  with torch.no_grad():
    decoder = pair.theirs.model.decoder
    decoder.norm.weight.mul_(4.0)
    # In a random network self-conditioning magnifies a rounding five times a
    # step, and a draw soon falls on the other side of a bound.
    decoder.self_conditioning.down_proj.weight.mul_(0.1)
  pair.params = parity.convert(pair.theirs, config)
  return pair


class Injected:
  """Our random numbers in the order in which theirs are asked for: a canvas;
  then, for each step, a sample and the tokens of renoising. Is a streamer too,
  and notes what each step made."""

  def __init__(self, keys_B, config, vocab_size):
    self.keys_B, self.config, self.vocab_size = keys_B, config, vocab_size
    self.canvas, self.drawn = -1, None
    self.noted = {}

  def randint(self, low, high, size, device=None):
    assert (low, high) == (0, self.vocab_size) and tuple(size) == (2, L)
    if self.drawn is not None:
      tokens, self.drawn = self.drawn.tokens_BL, None
    else:
      self.canvas, self.done = self.canvas + 1, 0
      fold = lambda key: jax.random.fold_in(key, self.canvas)
      self.canvas_keys_B = jax.vmap(fold)(self.keys_B)
      tokens = sampler.draw_canvas(
        self.canvas_keys_B, self.config, self.vocab_size
      )
    return torch.tensor(np.asarray(tokens), dtype=torch.long)

  def multinomial(self, probabilities, num_samples):
    assert num_samples == 1
    step = self.config.max_denoising_steps - self.done
    self.done += 1
    self.drawn = sampler.draw_step_noise(
      self.canvas_keys_B, jnp.full((2,), step), self.config, self.vocab_size
    )
    tokens_BL = ops.vocabulary.sample(
      jnp.asarray(probabilities.numpy()).reshape(2, L, -1),
      self.drawn.uniforms_BLU,
    )
    return torch.tensor(np.asarray(tokens_BL), dtype=torch.long).reshape(-1, 1)

  def note(self, name, tensor):
    self.noted[self.canvas, self.done, name] = tensor.numpy().copy()

  def put(self, value):
    pass

  def end(self):
    pass

  def put_draft(self, value):
    self.note('draft_BL', value)

  def replace_torch(self, monkeypatch):
    monkeypatch.setattr(torch, 'randint', self.randint)
    monkeypatch.setattr(torch, 'multinomial', self.multinomial)
    kind = reference.EntropyBoundSampler
    accept, renoise = kind.accept_canvas, kind.renoise_canvas

    def accept_canvas(theirs, *arguments):
      result = accept(theirs, *arguments)
      self.note('accepted_BL', theirs.accepted_token_mask)
      return result

    def renoise_canvas(theirs, *arguments):
      result = renoise(theirs, *arguments)
      self.note('canvas_BL', result)
      return result

    monkeypatch.setattr(kind, 'accept_canvas', accept_canvas)
    monkeypatch.setattr(kind, 'renoise_canvas', renoise_canvas)


@pytest.mark.parametrize('case', CASES)
def test_trajectories_are_equal(pair, case, monkeypatch):
  """Canvases, drafts and accepted sets of every step, step counts, stops and
  the padding behind them, over three canvases of two rows."""
  diffusion = CASES[case]
  config = configs.Config(model=pair.config, diffusion=diffusion)
  keys_B = jax.random.split(jax.random.key(13), 2)
  prompts = pair.prompt_BP[:, :9]
  states = []
  ours, *_ = generate.generate_tokens(
    config,
    pair.params,
    prompts.tolist(),
    keys_B,
    CANVASES * L,
    on_step=lambda step, state: states.append((step, state)),
  )
  injected = Injected(keys_B, diffusion, pair.config.vocab_size)
  injected.replace_torch(monkeypatch)
  theirs = pair.theirs.generate(
    torch.tensor(prompts, dtype=torch.long),
    streamer=injected,
    generation_config=reference.DiffusionGemmaGenerationConfig(
      max_new_tokens=CANVASES * L,
      max_denoising_steps=diffusion.max_denoising_steps,
      sampler_config=reference.EntropyBoundSamplerConfig(
        diffusion.entropy_bound
      ),
      t_min=diffusion.t_min,
      t_max=diffusion.t_max,
      stability_threshold=diffusion.stability_threshold,
      confidence_threshold=diffusion.confidence_threshold,
      # No list is "that of the model": an id that is never written.
      eos_token_id=list(diffusion.stop_token_ids) or [10**6],
      pad_token_id=0,
    ),
  )
  written = theirs.sequences.numpy()[:, prompts.shape[1] :]
  for row, generation in enumerate(ours):
    padding = [0] * (written.shape[1] - len(generation.tokens))
    assert written[row].tolist() == generation.tokens + padding
    assert float(theirs.tokens_per_forward[row]) == pytest.approx(
      generation.tokens_per_forward
    )
  compared = compare_steps(states, injected.noted)
  assert compared == sum(generation.steps for generation in ours)
  steps = [generation.steps for generation in ours]
  if case == 'rows converge':
    assert min(steps) < CANVASES * diffusion.max_denoising_steps
    assert steps[0] != steps[1]
  if case == 'rows stop':
    assert {generation.stopped_by for generation in ours} >= {'stop_token'}


def compare_steps(states, noted):
  """Asserts every step of the rows that were sampled in it; their number."""
  canvas, compared, frozen_B = -1, 0, None
  for step, state in states:
    if step == 0:
      canvas += 1
    else:
      for row in np.flatnonzero(~frozen_B):
        for name in ('draft_BL', 'accepted_BL', 'canvas_BL'):
          np.testing.assert_array_equal(
            getattr(state, name)[row], noted[canvas, step, name][row]
          )
        compared += 1
    frozen_B = np.asarray(state.converged_B)
  return compared
