"""What a plan counts, against formulas; what it says, against what is there."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import micro_config
import pytest

from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma import ops
from diffusiongemma.devices import memory
from diffusiongemma.devices import sharding
from diffusiongemma.tools import hlo
from diffusiongemma.tools import plan
from diffusiongemma.training import step as steps


def count_training(config, rows_apart=1) -> float:
  """FLOPs of a step on so many devices, which share the rows."""
  mesh = jax.sharding.AbstractMesh((rows_apart, 1, 1, 1), sharding.AXES)
  return plan.count_flops(steps.trace_step(config, mesh))


@pytest.fixture(scope='module')
def config() -> configs.Config:
  """Wide enough for products to be all that counts."""
  micro = micro_config.get_config()
  model = dataclasses.replace(
    micro.model, embed_dim=64, mlp_dim=128, expert_dim=32, context_length=256
  )
  data = dataclasses.replace(micro.data, sequence_length=64, batch_size=4)
  return dataclasses.replace(micro, model=model, data=data)


@pytest.fixture
def one_layer(config) -> configs.Config:
  """Where it does not matter what is compiled."""
  return fields.override(config, 'model.attention_pattern', "('global',)")


def layer_flops(model, rows, keys, kind) -> float:
  """Of one layer on so many tokens in all, each of which meets `keys`."""
  N, D = model.num_heads, model.embed_dim
  K, H = model.num_kv_heads, model.head_dim
  if kind == 'global':
    K, H = model.num_global_kv_heads, model.global_head_dim
  projections = D * H * (2 * N + K * (2 if kind == 'local' else 1))
  attention = 2 * N * H * keys
  router = D * model.num_experts
  attended = 2.0 * rows * (projections + attention + router)
  return attended + mlp_flops(model, rows)


def mlp_flops(model, rows) -> float:
  """Of the shared MLP and the experts of one layer."""
  D = model.embed_dim
  routed = rows * model.experts_per_token
  tile = ops.routing.default_tile(routed, model.num_experts)
  padded = (-(-routed // tile) + model.num_experts) * tile
  return 2.0 * 3 * D * (rows * model.mlp_dim + padded * model.expert_dim)


def stack_flops(model, rows, keys) -> float:
  return sum(
    layer_flops(model, rows, keys, kind) for kind in model.attention_pattern
  )


@pytest.mark.parametrize('ar_loss_weight, passes', [(1.0, 1), (0.0, 3)])
def test_flops_of_training_are_those_of_the_formula(
  config, ar_loss_weight, passes
):
  train = dataclasses.replace(
    config.train,
    ar_loss_weight=ar_loss_weight,
    self_conditioning_passes=passes,
  )
  config = dataclasses.replace(config, train=train)
  model, (B, S) = config.model, (4, 64)
  C = config.diffusion.canvas_length
  D, V = model.embed_dim, model.vocab_size
  self_conditioning = 2.0 * B * C * 3 * D * model.mlp_dim
  if ar_loss_weight:
    prefill = stack_flops(model, B * S, S) + 2.0 * B * S * D * V
  else:
    # The text of the last canvas is not read, and of the last layer no more
    # than keys matters: to gradients, two thirds of the work, and to the rest
    # no more than what its router is told, for the statistics.
    S -= C
    last = layer_flops(model, B * S, S, model.attention_pattern[-1])
    keys = 2.0 * B * S * D * model.num_global_kv_heads * model.global_head_dim
    prefill = stack_flops(model, B * S, S) - 2 / 3 * (last - keys)
    prefill -= mlp_flops(model, B * S) / 3
  denoise = stack_flops(model, B * C, S + C)
  second = denoise + self_conditioning + 2.0 * B * C * D * V
  # Every other row guesses: what layers give, logits, and the soft embedding.
  assert train.self_conditioning_probability == 1 / 2
  first = stack_flops(model, B * C // 2, S + C) + 2.0 * B * C * D * V
  again = first + self_conditioning / 2
  expected = 3 * (prefill + second) + first + (passes - 1) * again
  counted = count_training(config)
  assert counted == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
  'devices, parts, told',
  [
    (1, 1, 1 / 2),
    (2, 1, 1 / 2),
    (1, 2, 1 / 2),
    (4, 1, 1),
    (2, 2, 1),
    (1, 4, 1),
  ],
)
def test_rows_share_a_guess_where_they_are_together(
  config, devices, parts, told
):
  """Four rows in parts one by one, on devices side by side."""
  config = fields.override(config, 'train.accumulate_steps', str(parts))
  never = fields.override(config, 'train.self_conditioning_probability', '0')
  every = fields.override(config, 'train.self_conditioning_probability', '1')
  some, none, all_rows = (
    count_training(c, devices) for c in (config, never, every)
  )
  model, C = config.model, config.diffusion.canvas_length
  B, D = 4, model.embed_dim
  # Three times for each row: the conditioning itself, there and back.
  mixed = 3 * 2.0 * B * C * 3 * D * model.mlp_dim
  guesses = (some - none - mixed) / (all_rows - none - mixed)
  assert guesses == pytest.approx(told, abs=0.1)  # But for padded tiles.


def test_flops_of_a_denoising_step_are_those_of_the_formula(config):
  model, context = config.model, 64
  C, D = config.diffusion.canvas_length, model.embed_dim
  window = min(model.sliding_window, context)
  expected = 2.0 * C * 3 * D * model.mlp_dim + 4.0 * C * D * model.vocab_size
  for kind in model.attention_pattern:
    keys = C + (window if kind == 'local' else context)
    expected += layer_flops(model, C, keys, kind)
  counted = plan.count_flops(plan._lower_sampling(config, 1, context, None))
  assert counted == pytest.approx(expected, rel=0.05)


def test_ways_for_single_devices_are_not_counted():
  x_MD = jax.ShapeDtypeStruct((8, 16), jnp.float32)

  def run(x_MD):
    once = lambda x_MD: x_MD @ jnp.ones((16, 4))
    more = lambda x_MD: once(x_MD @ x_MD.T @ x_MD)
    ways = {'cpu': lambda: more, 'cuda': lambda: more}
    return ops.dispatch.run(once, x_MD, **ways)

  assert plan.count_flops(jax.make_jaxpr(run)(x_MD)) == 2 * 8 * 16 * 4


def test_of_a_condition_the_longest_branch_is_counted():
  x_MM = jax.ShapeDtypeStruct((8, 8), jnp.float32)

  def run(x_MM):
    more, once = lambda x_MM: x_MM @ x_MM @ x_MM, lambda x_MM: x_MM @ x_MM
    return jax.lax.cond(x_MM[0, 0] > 0, more, once, x_MM)

  assert plan.count_flops(jax.make_jaxpr(run)(x_MM)) == 2 * 2 * 8**3


def test_gradients_of_what_is_frozen_are_not_counted():
  x_MD, w_DF = jnp.ones((8, 16)), jnp.ones((16, 32))

  def gradient(argument):
    return jax.grad(lambda *x: jnp.sum(ops.linear.multiply(*x) ** 2), argument)

  counted = [
    plan.count_flops(jax.make_jaxpr(gradient(argument))(x_MD, w_DF))
    for argument in (0, 1, (0, 1))
  ]
  product = 2.0 * 8 * 16 * 32
  assert counted == [2 * product, 2 * product, 3 * product]


def test_recomputing_is_counted(config):
  none, dots, full = (
    count_training(fields.override(config, 'train.remat', kind))
    for kind in ('none', 'dots', 'full')
  )
  assert full > 1.1 * none
  assert none < dots < none + 0.8 * (full - none)


def test_collectives_are_found_by_kind_and_size():
  text = """
    %a = f32[4,8]{1,0} all-reduce(%x), channel_id=1
    %b = bf16[16]{0} all-gather(%y), dimensions={0}
    %c = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%y), dimensions={0}
    %d = bf16[16]{0} all-gather-done(%c)
    %e = f32[2]{0} fusion(%all-reduce.3)
    %f = (f32[2]{0}, f32[3]{0}) all-reduce-start(%x, %y), channel_id=2
    %g = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%x)
    %h = bf16[16]{0} all-gather(%y), attributes={chain_id="7"}
    %i = bf16[16]{0} all-gather(%z), attributes={chain_id="7"}
  """
  assert hlo.collectives(text) == {
    'all-gather': hlo.Collective(3, 96, 32),
    'all-reduce': hlo.Collective(2, 148, 128),
    'collective-permute': hlo.Collective(1, 20, 20),
  }


def test_kernels_of_the_busiest_computation_are_counted():
  text = """HloModule jit_step, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %add = f32[4]{0} add(%p, %p)
}

%body (t: (f32[4], s32[])) -> (f32[4], s32[]) {
  %t = (f32[4]{0}, s32[]) parameter(0)
  %x = f32[4]{0} get-tuple-element(%t), index=0
  %a = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  %b = (f32[4]{0}, s32[2]{0}) custom-call(%a), custom_call_target="triton"
  ROOT %r = (f32[4]{0}, s32[]) tuple(%a, %b)
}
"""
  assert hlo.count_kernels(text) == 2
  assert hlo.count_kernels('') == 0


@pytest.mark.parametrize('program', ['train', 'sample'])
def test_a_plan_for_this_machine(config, program):
  made = plan.plan(config, 'local', program, context=64)
  of_parameters = sum(
    size for part, size in made.need.arrays.items() if 'parameters' in part
  )
  assert made.devices == 1 and of_parameters > 10_000
  assert made.need.peak > sum(made.need.arrays.values())
  assert made.fits and made.seconds is None
  told = json.loads(json.dumps(plan.to_json(made)))
  assert told['fits'] is True and told['peak_bytes'] == made.need.peak
  text = plan.to_text(made)
  assert 'parameters' in text and '  fits' in text
  assert 'not measured' not in text


def test_a_chip_gives_a_limit_and_an_estimate(config, monkeypatch):
  tiny = plan.Chip(1e3, 1e9, 1e9, 1e9)
  monkeypatch.setitem(plan.CHIPS, 'local', tiny)
  made = plan.plan(config, 'local', 'sample', context=64)
  assert made.fits is False and made.limit == 1000
  assert made.seconds >= made.flops / 1e9
  text = plan.to_text(made)
  assert 'does not fit' in text and 'estimate, not measured' in text


def test_what_would_fit_is_compiled(one_layer, monkeypatch):
  """The first of the changes whose program needs no more than there is."""
  config = fields.override(one_layer, 'train.remat', 'dots')
  remat = fields.override(config, 'train.remat', 'full')
  half = fields.override(remat, 'data.batch_size', '2')
  of_config = {c: plan.plan(c, 'local') for c in (remat, half)}
  needs = [made.need.peak for made in of_config.values()]
  assert needs[1] < needs[0]
  # More devices than there are, which it finds out, stand between the two.
  changes = [what for what, _ in plan.smaller(config, 'train')]
  assert changes == [
    'config.train.remat=full',
    'config.mesh.fsdp=2',
    'config.data.batch_size=2',
  ]

  def limited_to(memory):
    """`nearest_fit` where a device has so much, with what was compiled."""

    def again(config, topology, program):
      sharding.make_mesh(config.mesh)
      return of_config[config]._replace(limit=memory)

    monkeypatch.setattr(plan, 'plan', again)
    return plan.nearest_fit(config, 'local', 'train')

  assert limited_to(sum(needs) / 2) == 'config.data.batch_size=2'
  assert limited_to(max(needs)) == 'config.train.remat=full'
  assert limited_to(1.0) is None


@pytest.mark.parametrize('topology', ['h1000', 'v9:2x2', 'v5p', 'h100x12'])
def test_unknown_topologies_are_errors(topology):
  with pytest.raises(configs.ConfigError, match=topology):
    plan._devices(topology)


def test_what_does_not_fit_is_a_table():
  need = memory.Need({'parameters': 30 * 10**9}, 5 * 10**9, 35 * 10**9)
  memory.check(need, None)
  memory.check(need, 36 * 10**9)
  with pytest.raises(configs.ConfigError) as info:
    memory.check(need, 34 * 10**9)
  for part in ('30.00 GB', '5.00 GB', '34.00 GB', 'tiny.py', '--mode=plan'):
    assert part in str(info.value)


def test_what_the_compiler_refuses_does_not_fit(one_layer, monkeypatch):
  def refuse(self):
    raise jax.errors.JaxRuntimeError(
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20G of '
      '16G hbm.\n\nTotal hbm usage >= 20G:\n  buffers'
    )

  monkeypatch.setattr(jax.stages.Lowered, 'compile', refuse)
  with pytest.raises(plan.TooLarge, match='does not fit.*Used 20G of 16G'):
    plan.plan(one_layer, 'local')
  assert plan.nearest_fit(one_layer, 'local', 'train') is None


def test_another_libtpu_is_named(monkeypatch):
  """One that this jax is made for, one of another, none."""
  versions = {'libtpu': '0.0.99'}
  requires = ['numpy>=2.0', 'libtpu==0.0.42.*; extra == "tpu"']

  def version(name):
    if name not in versions:
      raise plan.importlib.metadata.PackageNotFoundError(name)
    return versions[name]

  monkeypatch.setattr(plan.importlib.metadata, 'version', version)
  monkeypatch.setattr(plan.importlib.metadata, 'requires', lambda _: requires)
  with pytest.raises(plan.PlanError) as raised:
    plan.plan(micro_config.get_config(), 'v5e:2x2', 'train')
  told = str(raised.value)
  assert 'libtpu 0.0.99 is installed' in told and '==0.0.42.*' in told
  assert f"pip install 'jax[tpu]=={jax.__version__}'" in told
  versions['libtpu'] = '0.0.42.1'
  plan._check_libtpu()
  versions.clear()
  plan._check_libtpu()


def test_the_plugin_for_gpus_initialises_without_a_driver(monkeypatch):
  """See findings/jax_cuda_plugin_without_driver.sh."""
  name, seen = 'JAX_SKIP_CUDA_CONSTRAINTS_CHECK', []
  monkeypatch.delenv(name, raising=False)

  def describe(*unused, **also_unused):
    seen.append(os.environ.get(name))
    raise RuntimeError('no plugin here')

  monkeypatch.setattr(plan.topologies, 'get_topology_desc', describe)
  with pytest.raises(plan.PlanError, match='no plugin here'):
    plan._devices('h100')
  assert seen == ['1']
  os.environ.pop(name)
