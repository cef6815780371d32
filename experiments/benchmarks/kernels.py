"""Each kernel of the GPU beside its floor and what XLA makes in its place.

  python -m experiments.benchmarks.kernels --out=kernels.json

takes the shapes of `configs/26b_a4b.py`, random weights, experts of int4 and
all others of int8 unless it says otherwise, a canvas of 256 tokens, and writes
for each kernel

  seconds   of one run among many, medians: the kernel, and XLA alone
  floor     max(bytes / bandwidth, FLOPs / peak) of this GPU
  differs   the largest difference between the two results, as a part of the
            largest value

and the fit  seconds = start + bytes / bandwidth  over linears of several sizes.
Only a GPU has the kernels. Not run to its end yet.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
import functools
import json
import pathlib
import statistics
import sys
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma import config as configs
from diffusiongemma import ops
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.tools import benchmark
from diffusiongemma.tools import plan
from experiments import machine

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / '26b_a4b.py'
CONTEXTS = (1024, 8192, 32768)
RUNS, MEDIAN_OF = 50, 7


class Case(NamedTuple):
  """Something that has a kernel.

  Attributes:
    name: what it is.
    function: what is run, with the kernel where there is one.
    arguments: pytrees of arrays.
  """

  name: str
  function: Callable
  arguments: tuple


def make_cases(
  model: configs.ModelConfig, T: int, contexts: tuple[int, ...]
) -> Iterator[Case]:
  """What a denoising step runs on T tokens, after caches of some lengths. One
  by one, so that the arrays of one are freed before the next are made."""
  D, F, E = model.embed_dim, model.expert_dim, model.num_experts
  k, epsilon = model.experts_per_token, model.norm_epsilon
  counter = iter(range(10_000))

  def normal(*shape, dtype=model.dtype):
    key = jax.random.fold_in(jax.random.key(0), next(counter))
    return jax.jit(lambda: jax.random.normal(key, shape, dtype))()

  def few_bits(*shape, **how):
    axis = how['axis']
    make = functools.partial(ops.weights.quantize, **how)
    return jax.jit(make)(normal(*shape) * shape[axis] ** -0.5)

  int4 = functools.partial(
    few_bits, kind='int4', axis=-1, group_size=64, scales_transposed=True
  )
  int8 = functools.partial(few_bits, kind='int8')
  ones_D = jnp.ones((D,))

  def norms(x_BLD, y_BLD, scale_D):
    dtypes = (jnp.float32, x_BLD.dtype, x_BLD.dtype)
    return ops.norms.add_and_norm(
      x_BLD, y_BLD, scale_D, [scale_D] * 3, dtypes, epsilon
    )

  x_BLD = normal(1, T, D)
  yield Case('norms', norms, (x_BLD, normal(1, T, D), ones_D))
  logits_BLE = normal(1, T, E, dtype='float32')
  choose = functools.partial(ops.routing.choose, k=k)
  yield Case('choice of experts', choose, (logits_BLE, jnp.ones((E,))))
  expert_R = choose(logits_BLE, jnp.ones((E,)))[1].reshape(-1)
  weights = int4(E, 2 * F, D)
  make_groups = functools.partial(
    ops.routing.make_groups,
    num_experts=E,
    tile=ops.routing.default_tile(len(expert_R), E, weights),
  )
  yield Case('layout of their rows', make_groups, (expert_R,))
  groups = jax.jit(make_groups)(expert_R)
  gate = lambda x_MD, w, groups: ops.routing.gather_from_tiles(
    ops.experts.gated_matmul(x_MD, w, groups, k), groups
  )
  yield Case('experts, gate', gate, (x_BLD[0], weights, groups))
  del weights
  hidden_TF = normal(len(groups.row_T), F)
  down = lambda hidden_TF, w, groups: ops.routing.gather_from_tiles(
    ops.experts.grouped_matmul(hidden_TF, w, groups), groups
  )
  yield Case('experts, down', down, (hidden_TF, int4(E, D, F), groups))
  del groups, hidden_TF
  gate_and_up = [int8(D, model.mlp_dim, axis=-2) for _ in range(2)]
  yield Case('shared MLP, gate', ops.linear.gated, (x_BLD, *gate_and_up))
  matrix = int8(model.mlp_dim, D, axis=-2)
  hidden_BLF = normal(1, T, model.mlp_dim)
  yield Case('shared MLP, down', ops.linear.apply, (hidden_BLF, matrix))
  for kind in ('local', 'global'):
    K, H = kv_cache.kv_shape(model, kind)
    N = model.num_heads
    counts = {'q': N, 'k': K} | ({'v': K} if kind == 'local' else {})
    weights = {name: int8(D, n, H, axis=-3) for name, n in counts.items()}
    scales = {'q': jnp.ones((H,)), 'k': jnp.ones((H,))}
    frequencies = ops.heads.rotary_frequencies(H, 1e4)
    cos_sin = ops.heads.rotary_cos_sin(jnp.arange(T)[None], frequencies)
    project = functools.partial(ops.heads.project, epsilon=epsilon)
    yield Case(f'{kind} heads', project, (x_BLD, weights, scales, cos_sin))
    weights = {name: normal(D, n, H) * D**-0.5 for name, n in counts.items()}
    given = (x_BLD, weights, scales, cos_sin)
    yield Case(f'{kind} heads, {model.dtype}', project, given)
    q_BLNH, own = normal(1, T, N, H), [normal(1, T, K, H) for _ in range(2)]
    for context in contexts if kind == 'global' else (model.sliding_window,):
      cached = [normal(1, context, K, H) for _ in range(2)]
      mask_BLS = jnp.ones((1, 1, context + T), jnp.bool_)
      yield Case(
        f'{kind} attention, context {context}',
        lambda q_BLNH, cached, own, mask_BLS: ops.attention.attend(
          q_BLNH, (cached, own), mask_BLS
        ),
        (q_BLNH, cached, own, mask_BLS),
      )
  summarize = functools.partial(
    ops.vocabulary.summarize, softcap=model.logit_softcap
  )
  uniforms_RU = jnp.full(
    (T, ops.vocabulary.num_halvings(model.vocab_size)), 0.4
  )
  table_VD = normal(model.vocab_size, D) * D**-0.5
  given = (x_BLD[0], table_VD, jnp.float32(0.6), uniforms_RU)
  yield Case('vocabulary', summarize, given)


def num_bytes(tree: Any) -> int:
  """Of all arrays; two values of four bits share a byte."""
  return sum(x.size * _bits(x.dtype) // 8 for x in jax.tree.leaves(tree))


def _bits(dtype: np.dtype) -> int:
  return 4 if dtype == jnp.int4 else 8 * dtype.itemsize


def measure(function: Callable, arguments: tuple) -> tuple[float, Any]:
  """(seconds of a run on the device, what it gives)."""
  shapes = jax.eval_shape(function, *arguments)

  @jax.jit
  def repeated(*arguments):
    def again(_, out):
      # Else it would be run once, before the loop.
      given, _ = jax.lax.optimization_barrier((arguments, out))
      return function(*given)

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, RUNS, again, start)

  made = jax.block_until_ready(repeated(*arguments))  # This compiles.
  whole = _median_seconds(lambda: repeated(*arguments))
  return max(whole - _start_seconds(), 0.0) / RUNS, made


@functools.cache
def _start_seconds() -> float:
  """Of a program that does next to nothing."""
  nothing = jax.jit(lambda x: x + 1)
  nothing(0)
  return _median_seconds(lambda: nothing(0))


def _median_seconds(run: Callable) -> float:
  return statistics.median(benchmark.seconds(run) for _ in range(MEDIAN_OF))


def difference(ours: Any, theirs: Any) -> float:
  """The largest, as a part of the largest value of its array."""
  found = []
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    found.append(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
  return float(np.max(found))  # Not `max`, which may lose a NaN.


def compare(case: Case, chip: plan.Chip) -> dict:
  """The numbers of one case."""
  seconds, ours = measure(case.function, case.arguments)
  with ops.dispatch.switched_off():
    flops = plan.count_flops(jax.make_jaxpr(case.function)(*case.arguments))
    seconds_by_xla, theirs = measure(case.function, case.arguments)
  moved = num_bytes((case.arguments, ours))
  floor = max(moved / chip.bandwidth, flops / chip.flops)
  return {
    'name': case.name,
    'seconds': seconds,
    'seconds_by_xla': seconds_by_xla,
    'bytes': moved,
    'flops': flops,
    'floor_seconds': floor,
    'times_the_floor': seconds / floor,
    'differs': difference(ours, theirs),
  }


def fit_linears(T: int, D: int) -> dict:
  """seconds = start + bytes / bandwidth, by least squares over linears of int8
  with more and more outputs."""
  x_TD = jnp.ones((T, D), jnp.bfloat16)
  points = []
  for outputs in (2048, 4096, 8192, 16384, 32768, 65536):
    w = ops.weights.Quantized(
      jnp.ones((D, outputs), jnp.int8),
      jnp.ones((1, outputs), jnp.bfloat16),
      -2,
    )
    seconds, made = measure(ops.linear.apply, (x_TD, w))
    points.append((num_bytes((x_TD, w, made)), seconds))
  slope, start = np.polyfit(*np.transpose(points), 1)
  return {
    'start_seconds': float(start),
    'bytes_per_second': float(1 / slope),
    'points': points,
  }


def chip_of(device_kind: str) -> plan.Chip | None:
  """What the vendor says of it."""
  known = (n for n in plan.CHIPS if n.upper() in device_kind.upper())
  return plan.CHIPS.get(next(known, None))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', required=True, help='JSON file to write')
  given = parser.parse_args()
  chip = chip_of(jax.devices()[0].device_kind)
  if jax.default_backend() != 'gpu' or chip is None:
    sys.exit(
      f'The kernels are those of an H100 or H200; this is '
      f'{jax.devices()[0].device_kind}.'
    )
  config = configs.load_config(str(CONFIG))
  T = config.diffusion.canvas_length
  cases = []
  for case in make_cases(config.model, T, CONTEXTS):
    cases.append(compare(case, chip))
    print(json.dumps(cases[-1]), flush=True)
  results = {
    'command': machine.command('experiments.benchmarks.kernels'),
    'cases': cases,
    'fit_of_linears': fit_linears(T, config.model.embed_dim),
    **machine.describe(),
  }
  machine.write(results, given.out)


if __name__ == '__main__':
  main()
