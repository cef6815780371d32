"""Measures speed, compared with `transformers` on the same weights.

  a step  = a denoising pass and all that the sampler does with it
  tokens/s = B * C / (16 steps + commit),  without prefill

The measured program is that of `generate`: the loop over a canvas on the
device, with a fixed number of steps. A step is the mean of them; on a CPU the
last one is cheaper (`vocabulary`). Times are medians of several; the two
programs alternate, since the speed of a shared machine varies over minutes.
"""

from collections.abc import Callable
import dataclasses
import functools
import gc
import importlib.util
import math
import re
import statistics
import time
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma import config as configs
from diffusiongemma import ops
from diffusiongemma.config import Config
from diffusiongemma.config import QuantizationConfig
from diffusiongemma.devices import memory
from diffusiongemma.diffusion import sampler
from diffusiongemma.generation import engine
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import denoiser
from diffusiongemma.model import parameters
from diffusiongemma.ops.weights import Params
from diffusiongemma.tools import peer as peer_lib
from diffusiongemma.training import step as steps_lib
from diffusiongemma.training import train_state

# Programs that are timed separately: name -> the method of `Ours`.
_PROGRAMS = {
  'prefill': 'read_prompt',
  'commit': 'commit',
  'vocabulary': 'vocabulary',
}


def random_params(config: Config, key: jax.Array) -> dict[str, Any]:
  """Random parameters of the config's shapes, in its compute type, quantised as
  it says; computed one by one on the device, so that the network never exists
  unquantised."""
  parameters.check_not_stored(config.quantization)
  dtype = jnp.dtype(config.model.dtype)
  text = dataclasses.replace(config.model, vision=None)
  abstract = traverse_util.flatten_dict(denoiser.abstract_params(text))
  params = {}
  for index, (path, leaf) in enumerate(abstract.items()):
    own_key = jax.random.fold_in(key, index)
    type_of = leaf.dtype if leaf.ndim == 1 else dtype
    w = parameters.random(own_key, path, leaf.shape, type_of)
    params[path] = parameters.quantize_array(config.quantization, path, w)
  return traverse_util.unflatten_dict(params)


class Ours:
  """Our programs for a batch and a context, compiled."""

  def __init__(self, config: Config, params: Params, batch: int, context: int):
    self.config = fixed_steps(config, sampler.TYPICAL_STEPS)
    self.params = params
    self.batch, self.context = batch, context
    model, C = config.model, config.diffusion.canvas_length
    rng = np.random.default_rng(0)
    shape = (batch, context)
    self.tokens_BP = rng.integers(3, model.vocab_size, shape).astype(np.int32)
    self.length_B = np.full(batch, context, np.int32)
    self.empty = kv_cache.init_cache(model, batch, context + C)
    self.cache = self.read_prompt()
    keys_B = sampler.row_keys(jax.random.key(1), batch)
    self.given = (self.cache, keys_B, jnp.zeros((batch,), bool))
    start = time.perf_counter()
    self.program = engine.denoise_canvas.lower(
      self.config, params, *self.given
    ).compile()
    self.compile_seconds = time.perf_counter() - start
    # Random tokens, like text, use all experts; a repeated one would use few.
    canvas_BL = rng.integers(3, model.vocab_size, (batch, C))
    self.canvas_BL = jnp.asarray(canvas_BL, jnp.int32)
    self.need = memory.need_of(
      self.program, {**parameters.by_part(params), 'cache': self.cache}
    )

  def read_prompt(self):
    return prompt_lib.read_prompt(
      *(self.config.model, self.params, self.tokens_BP, self.length_B),
      self.empty,
    )

  def write(self):
    return self.program(self.params, *self.given)

  def commit(self):
    C = self.canvas_BL.shape[1]
    count_B = np.full(self.batch, C, np.int32)
    return prompt_lib.read_tokens(
      self.config.model, self.params, self.canvas_BL, count_B, self.cache
    )

  def vocabulary(self):
    """Only the sampler's pass over the vocabulary."""
    model, R = self.config.model, self.canvas_BL.size
    h_RD = jnp.ones((R, model.embed_dim), model.dtype)
    uniforms_RU = jnp.full(
      (R, ops.vocabulary.num_halvings(model.vocab_size)), 0.4
    )
    return _summarize(model, self.params, h_RD, uniforms_RU)


@jax.jit(static_argnums=0)
def _summarize(model, params, h_RD, uniforms_RU):
  return denoiser.Denoiser(model).apply(
    {'params': params}, h_RD, 0.6, uniforms_RU, method='summarize'
  )


def fixed_steps(config: Config, steps: int) -> Config:
  """The config with a sampler that always takes `steps` steps."""
  diffusion = dataclasses.replace(
    config.diffusion, max_denoising_steps=steps, confidence_threshold=0.0
  )
  return dataclasses.replace(config, diffusion=diffusion)


def measure(
  config: Config,
  params: Params,
  grid: list[tuple[int, int]],
  repeats: int = 5,
  peer: peer_lib.Transformers | None = None,
) -> list[dict[str, Any]]:
  """Times for each (batch, context) of the grid: medians in seconds, the spread
  of a step and, with a `peer`, its step, eager and compiled, and how many times
  as fast ours is."""
  rows = []
  for batch, context in grid:
    ours = Ours(config, params, batch, context)
    C = config.diffusion.canvas_length
    for method in (*_PROGRAMS.values(), 'write'):
      getattr(ours, method)()  # Warm-up.
    peers: dict[str, Callable[[int], None]] = {}
    refusal = None
    if peer is not None:
      peers, refusal = peer.writers(config, ours.tokens_BP)
    names = (*_PROGRAMS, 'step', *(f'{name}_step' for name in peers))
    took: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
      for name, method in _PROGRAMS.items():
        took[name].append(seconds(getattr(ours, method)))
      took['step'].append(seconds(ours.write) / sampler.TYPICAL_STEPS)
      for name, write in peers.items():
        few, many = (
          seconds(functools.partial(write, steps)) for steps in (1, 5)
        )
        took[f'{name}_step'].append((many - few) / 4)
    row: dict[str, Any] = {
      'batch': batch,
      'context': context,
      'compile_seconds': ours.compile_seconds,
      'peak_bytes': ours.need.peak,
      'array_bytes': ours.need.arrays,
    }
    for name, values in took.items():
      row[f'{name}_seconds'] = statistics.median(values)
    row['step_spread'] = [min(took['step']), max(took['step'])]
    canvas = sampler.TYPICAL_STEPS * row['step_seconds'] + row['commit_seconds']
    row['tokens_per_second'] = batch * C / canvas
    for name in peers:
      ratios = zip(took[f'{name}_step'], took['step'], strict=True)
      row[f'times_as_fast_as_{name}'] = statistics.median(
        theirs / our for theirs, our in ratios
      )
    if refusal:
      row['compiled_peer_refusal'] = refusal
    rows.append(row)
    del ours
    gc.collect()
  return rows


def seconds(run) -> float:
  """Seconds that a call takes until its arrays are ready."""
  start = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - start


def measure_training(
  config: Config, repeats: int = 5, peer: peer_lib.Transformers | None = None
) -> dict[str, float]:
  """Tokens per second of the training step, and its compilation time; with a
  `peer`, its step and how many times as fast ours is."""
  B, S = config.data.batch_size, config.data.sequence_length
  C = config.diffusion.canvas_length
  rng = np.random.default_rng(0)
  batch = {
    'tokens_BS': rng.integers(3, config.model.vocab_size, (B, S)),
    'length_B': np.full(B, S),
    'first_BS': np.zeros((B, S)),
    'canvas_start_BK': np.tile(np.arange(C, S - C + 1, C)[None], (B, 1)),
    'target_mask_BS': np.tile(np.arange(S) >= C, (B, 1)),
  }
  batch = {
    k: v if v.dtype == bool else v.astype(np.int32) for k, v in batch.items()
  }
  state = train_state.init_train_state(config)
  start = time.perf_counter()
  step = steps_lib.make_train_step(config).lower(state, batch, None).compile()
  compile_seconds = time.perf_counter() - start

  def learn():
    nonlocal state
    state, _ = step(state, batch, None)
    return state

  def steady_seconds(run):
    """Seconds of the second of two calls, as are all but one in training: in
    the first, the memory it needs is still held by the other program."""
    seconds(run)
    return seconds(run)

  took, peer_took = [], []
  for _ in range(repeats):
    took.append(steady_seconds(learn))
    if peer is not None:
      peer_took.append(steady_seconds(lambda: peer.learn(config, batch)))
  numbers = {
    'compile_seconds': compile_seconds,
    'step_seconds': statistics.median(took),
    'tokens_per_second': B * S / statistics.median(took),
  }
  if peer is not None:
    ratios = zip(peer_took, took, strict=True)
    numbers['peer_step_seconds'] = statistics.median(peer_took)
    numbers['times_as_fast_as_peer'] = statistics.median(
      p / o for p, o in ratios
    )
  return numbers


def parse_grid(config: Config, cells: list[str]) -> list[tuple[int, int]]:
  """(batch, context) of each cell, 'BATCHxCONTEXT'. Raises `ConfigError`."""
  matches = [re.fullmatch(r'(\d+)x(\d+)', cell) for cell in cells]
  grid = [(int(cell[1]), int(cell[2])) if cell else (0, 0) for cell in matches]
  room = config.model.context_length - config.diffusion.canvas_length
  if any(batch < 1 or not 1 <= context <= room for batch, context in grid):
    raise configs.ConfigError(
      f'--grid={",".join(cells)}: say BATCHxCONTEXT, such as 1x256,8x1024, '
      f'with contexts of up to {room}.'
    )
  return grid


def run(
  config: Config, grid: list[tuple[int, int]], beside_peer: bool
) -> dict[str, Any]:
  """All measurements of a config, as plain values; sizes in bytes.

  `transformers` is measured too if it is installed, for float32 without
  quantisation. Training is measured without quantisation, if its state fits.
  There are no images.
  """
  model = dataclasses.replace(config.model, vision=None)
  config = dataclasses.replace(config, model=model)
  whole = config.quantization == QuantizationConfig()
  comparable = whole and config.model.dtype == 'float32'
  peer = None
  if beside_peer and comparable and importlib.util.find_spec('transformers'):
    peer = peer_lib.Transformers(config)
  params = peer.params if peer else random_params(config, jax.random.key(0))
  params = ops.weights.arrange(params, donate=True)
  result = {
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
    'transformers': peer and peer.version,
    'sampling': measure(config, params, grid, peer=peer),
  }
  del params
  gc.collect()
  state = memory.bytes_on_a_device(train_state.abstract_state(config))
  limit = memory.available(jax.devices()[0]) or math.inf
  fits = 2 * state < limit  # Gradients and activations besides.
  result['training'] = None
  if whole and fits:
    result['training'] = measure_training(config, peer=peer)
  return result


def to_text(made: dict[str, Any]) -> str:
  """The result of `run` as a table, in milliseconds."""
  rows, training = made['sampling'], made['training']
  head = ['batch', 'context', 'prefill', 'step', 'vocabulary', 'commit']
  head += ['tokens/s', 'peak GB', 'compile s']
  peers = [
    name
    for name in peer_lib.WAYS
    if any(f'{name}_step_seconds' in row for row in rows)
  ]
  for name in peers:
    head += [peer_lib.WAYS[name][1], 'times as fast']
  lines = []
  for row in rows:
    line = [str(row['batch']), str(row['context'])]
    for name in ('prefill', 'step', 'vocabulary', 'commit'):
      line.append(f'{1e3 * row[f"{name}_seconds"]:.1f}')
    line.append(f'{row["tokens_per_second"]:,.1f}')
    line.append(f'{row["peak_bytes"] / 1e9:.2f}')
    line.append(f'{row["compile_seconds"]:.0f}')
    for name in peers:
      step = row.get(f'{name}_step_seconds', math.nan)
      line.append(f'{1e3 * step:.1f}')
      line.append(f'{row.get(f"times_as_fast_as_{name}", math.nan):.2f}')
    lines.append(line)
  widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
  text = [
    '  '.join(cell.rjust(w) for cell, w in zip(line, widths, strict=True))
    for line in (head, *lines)
  ]
  for refusal in {row.get('compiled_peer_refusal') for row in rows} - {None}:
    text.append(f'transformers could not be compiled: {refusal}')
  if training:
    text.append(
      f'training: {training["tokens_per_second"]:,.0f} tokens/s, a step in '
      f'{1e3 * training["step_seconds"]:.0f} ms'
    )
    if 'times_as_fast_as_peer' in training:
      text.append(
        f'training with transformers: a step in '
        f'{1e3 * training["peer_step_seconds"]:.0f} ms, ours '
        f'{training["times_as_fast_as_peer"]:.2f} times as fast'
      )
  return '\n'.join(text)
