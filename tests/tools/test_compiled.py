"""What XLA makes of the loop over a canvas: its steps read weights as they lie.

A copy, a transposition or a conversion of a matrix, made anew at every step,
costs as much as reading it, which is most of what a step of few rows costs.
"""

import functools
import math
import pathlib
import re

import jax
from jax.experimental import topologies
import pytest

from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma import ops
from diffusiongemma.tools import hlo
from diffusiongemma.tools import plan

MICRO = pathlib.Path(__file__).parents[1] / 'micro_config.py'
RELEASED = MICRO.parents[1] / 'configs' / '26b_a4b.py'
TPU_KERNEL = 'custom_call_target="tpu_custom_call"'
HOPPER_KERNEL = 'custom_call_target="mosaic_gpu'  # A number follows.
REWRITES = ('copy', 'transpose', 'convert', 'concatenate', 'pad')
INSTRUCTION = re.compile(
  r'\s*(?:ROOT )?%?[\w.\-]+ = \w+\[([\d,]+)\]\S* ([\w\-]+)\('
)


@pytest.fixture(scope='module')
def config():
  """Sizes of which no product of rows, heads or slots of the cache is that of
  a matrix."""
  config = configs.load_config(str(MICRO))
  for field, value in (
    ('model.vocab_size', '2011'),
    ('model.embed_dim', '88'),
    ('model.head_dim', '24'),
    ('model.global_head_dim', '40'),
    ('model.mlp_dim', '104'),
    ('model.num_experts', '7'),
    ('model.expert_dim', '56'),
  ):
    config = fields.override(config, field, value)
  return config


def rewritten(text: str, sizes: set[int]) -> list[str]:
  """The instructions that write an array of one of the sizes and do nothing
  but move or convert it. In a fusion, only what comes out of it is written."""
  fused = set(re.findall(r'calls=%([\w.\-]+)', text))
  found, inside = [], None
  for line in text.splitlines():
    if not line.startswith(' '):
      inside = line.split(' ')[0].lstrip('%')
    match = INSTRUCTION.match(line)
    if not match or match[2] not in REWRITES:
      continue
    is_written = inside not in fused or line.lstrip().startswith('ROOT')
    if is_written and math.prod(map(int, match[1].split(','))) in sizes:
      found.append(match[0].strip())
  return found


def make_mesh(config, topology):
  """A mesh of one device of the topology; skips without the plugin."""
  try:
    _, devices = plan._devices(topology)
  except plan.PlanError as error:
    pytest.skip(str(error))
  return plan.sharding.make_mesh(config.mesh, devices[:1])


def compile_loop(config, topology, room=32):
  """(the compiled text, sizes of the matrices), after so many tokens."""
  mesh = make_mesh(config, topology)
  with plan.lowering_for(mesh):
    lowered, _ = plan._lower_sampling(config, 1, room, mesh)
    text = lowered.compile().as_text()
  params = plan.denoiser.fresh_params
  leaves = jax.tree.leaves(jax.eval_shape(lambda: params(config)))
  # One matrix of an expert is what a step may take out of all of them.
  sizes = {math.prod(x.shape) for x in leaves if x.ndim > 1}
  return text, sizes


def test_a_rewritten_matrix_is_found():
  text = """
%fused (p: f32[88,104]) -> f32[9152] {
  %copy.0 = f32[104,88]{1,0} copy(%p)
  ROOT %convert = bf16[9152]{0} convert(%copy.0)
}

%body (p: f32[88,104]) -> f32[88,104] {
  %copy.1 = f32[88,104]{1,0} copy(%p.3)
  %fusion.1 = f32[9152]{0} fusion(%p.3), kind=kLoop, calls=%fused
  %dot = f32[88,104]{1,0} dot(%a, %b)
  %copy.2 = f32[4]{0} copy(%y)
}
  """
  found = rewritten(text, {88 * 104})
  assert [line.split(' = ')[0] for line in found] == [
    'ROOT %convert',
    '%copy.1',
  ]


@pytest.mark.parametrize(
  'topology, canvas', [('local', 8), ('local', 64), ('h100', 8)]
)
def test_no_weight_is_rewritten(config, topology, canvas):
  """With few rows an expert, and with so many that a CPU multiplies the first
  ones of all experts at once."""
  routed = canvas * config.model.experts_per_token
  window = ops.routing.default_window(routed, config.model.num_experts)
  assert bool(window) == (canvas == 64)
  config = fields.override(config, 'diffusion.canvas_length', str(canvas))
  if topology == 'h100':
    config = fields.override(config, 'model.dtype', 'bfloat16')
  text, sizes = compile_loop(config, topology)
  assert ' while(' in text
  assert not rewritten(text, sizes)


def test_layers_are_lowered_once(config):
  """One of each kind: so many layers take no longer to trace and to lower."""
  mesh, pattern = make_mesh(config, 'local'), ('local', 'global')
  products = []
  for kinds in (pattern, pattern * 3):
    config = fields.override(config, 'model.attention_pattern', str(kinds))
    with plan.lowering_for(mesh):
      lowered, _ = plan._lower_sampling(config, 1, 32, mesh)
    products.append(lowered.as_text().count('stablehlo.dot_general'))
  assert products[0] == products[1]


@pytest.fixture(scope='module')
def tpu_mesh():
  return make_mesh(configs.load_config(str(RELEASED)), 'v5e:2x2')


def compile_for(mesh, function, *given):
  """The compiled text of a function of arrays that are whole on each device."""
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  given = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), given
  )
  with plan.lowering_for(mesh):
    return jax.jit(function).lower(*given).compile().as_text()


def matrix(shape, kind, axis):
  """bfloat16, or in few bits: of 4, groups of 64 along the axis."""
  if kind == 'bfloat16':
    return jax.ShapeDtypeStruct(shape, kind)
  group_size = 64 if kind == 'int4' else None
  of_experts = len(shape) == 3
  return jax.eval_shape(
    lambda w: ops.weights.quantize(w, kind, axis, group_size, of_experts),
    jax.ShapeDtypeStruct(shape, 'bfloat16'),
  )


def compile_experts(mesh, kind):
  """(the compiled text of the experts of the released network, sizes of their
  matrices)."""
  config = configs.load_config(str(RELEASED))
  model, tokens = config.model, config.diffusion.canvas_length
  D, F, E, k = (
    getattr(model, name)
    for name in ('embed_dim', 'expert_dim', 'num_experts', 'experts_per_token')
  )
  text = compile_for(
    *(mesh, functools.partial(ops.experts.mix, num_experts=E)),
    jax.ShapeDtypeStruct((tokens, D), 'bfloat16'),
    jax.ShapeDtypeStruct((tokens, k), 'bfloat16'),
    jax.ShapeDtypeStruct((tokens, k), 'int32'),
    matrix((E, 2 * F, D), kind, -1),
    matrix((E, D, F), kind, -1),
  )
  return text, {E * D * F, 2 * E * D * F, D * F, 2 * D * F}


@pytest.mark.parametrize('kind', ['bfloat16', 'int8', 'int4', 'fp8'])
def test_experts_are_two_kernels_on_a_tpu(tpu_mesh, kind):
  """Their matrices are read as they lie."""
  text, sizes = compile_experts(tpu_mesh, kind)
  assert text.count(TPU_KERNEL) == 2
  assert not rewritten(text, sizes)


@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_experts_of_few_bits_are_two_kernels_on_hopper(kind):
  mesh = make_mesh(configs.load_config(str(RELEASED)), 'h100')
  text, sizes = compile_experts(mesh, kind)
  assert text.count(HOPPER_KERNEL) == 2
  assert not rewritten(text, sizes)


@pytest.fixture(params=['h100', 'a100'])
def gpu_mesh(request, monkeypatch):
  """Of a GPU with more and one with less shared memory."""
  config = configs.load_config(str(RELEASED))
  mesh = make_mesh(config, 'h100')
  if request.param == 'h100':
    return mesh
  monkeypatch.setattr(ops.dispatch, '_compute_capabilities', lambda: [(8, 0)])
  jax.clear_caches()
  assets = pathlib.Path(plan.__file__).parents[1] / 'assets'
  text = (assets / 'h100.textproto').read_text()
  for old, new in (
    ('major: 9', 'major: 8'),
    ('optin: 232448', 'optin: 166912'),
    ('per_core: 233472', 'per_core: 167936'),
    ('core_count: 132', 'core_count: 108'),
  ):
    assert old in text
    text = text.replace(old, new)
  a100 = topologies.get_topology_desc(
    '', 'cuda', target_config=text, topology='1x1x1'
  )
  return plan.sharding.make_mesh(config.mesh, list(a100.devices))


def test_kernels_find_room_in_shared_memory(gpu_mesh):
  """In float32, and with the longest heads: what takes most."""

  def array(*shape, dtype='float32'):
    return jax.ShapeDtypeStruct(shape, dtype)

  D, F, E, k, T = 512, 256, 32, 4, 512
  text = compile_for(
    *(gpu_mesh, functools.partial(ops.experts.mix, num_experts=E)),
    *(array(T, D), array(T, k), array(T, k, dtype='int32')),
    *(array(E, 2 * F, D), array(E, D, F)),
  )
  assert 'grouped_gate' in text and 'grouped_matmul' in text
  text = compile_for(
    *(gpu_mesh, functools.partial(ops.vocabulary.summarize, softcap=30.0)),
    *(array(2 * T, D), array(32768, D), array(), array(2 * T, 15)),
  )
  assert 'vocabulary_statistics' in text and 'vocabulary_mean' in text
  matrices_DF = [matrix((2816, 2112), 'int8', -2)] * 2
  text = compile_for(gpu_mesh, ops.linear.gated, array(T, 2816), *matrices_DF)
  assert 'quantized_gate' in text

  def attend(q_BLNH, parts, mask_BLS, filled_B):
    return ops.attention.attend(q_BLNH, parts, mask_BLS, filled_B=filled_B)

  for dtype, kernels in (('bfloat16', 1), ('float32', 0)):
    q_BLNH = array(1, 256, 16, 512, dtype=dtype)
    k_BSKH = array(1, 8192, 2, 512, dtype=dtype)
    text = compile_for(
      *(gpu_mesh, attend, q_BLNH, [(k_BSKH, k_BSKH)]),
      *(array(1, 256, 8192, dtype='bool'), array(1, dtype='int32')),
    )
    assert text.count('name = "attention"') == kernels


@pytest.mark.parametrize('kind', ['int8', 'int4', 'fp8'])
@pytest.mark.parametrize('D, F', [(2816, 4096), (2816, 2112), (2112, 2816)])
def test_a_quantised_linear_is_one_kernel_on_a_tpu(tpu_mesh, kind, D, F):
  """Queries, and both ways of the shared MLP, of the released network."""
  x_LD = jax.ShapeDtypeStruct((256, D), 'bfloat16')
  text = compile_for(tpu_mesh, ops.linear.apply, x_LD, matrix((D, F), kind, -2))
  assert text.count(TPU_KERNEL) == 1
  assert not rewritten(text, {D * F})


def test_a_step_starts_few_kernels():
  """Of the released network in few bits, by what six layers more add."""
  config = configs.load_config(str(RELEASED))
  for field, value in (
    ('quantization.experts', 'int4'),
    ('quantization.linears', 'int8'),
  ):
    config = fields.override(config, field, value)
  pattern = config.model.attention_pattern
  some, more = (
    hlo.count_kernels(compile_loop(shortened, 'h100', room=8192)[0])
    for shortened in (
      fields.override(config, 'model.attention_pattern', str(pattern[:number]))
      for number in (6, 12)
    )
  )
  assert pattern == pattern[:6] * 5
  assert some + 4 * (more - some) < 600
