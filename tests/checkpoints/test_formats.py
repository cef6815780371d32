"""Quantised matrices of other tools, packed here field by field, against the
formulas of the tools."""

import dataclasses
import json

from flax import traverse_util
import hf_folder
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensors as files

import diffusiongemma as dg
from diffusiongemma import config as configs
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import contents
from diffusiongemma.checkpoints import formats
from diffusiongemma.checkpoints import huggingface
from diffusiongemma.checkpoints import huggingface_config
from diffusiongemma.model import denoiser
from diffusiongemma.model import lora
from diffusiongemma.ops import blocks
from diffusiongemma.runs import load as load_lib

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
BFLOAT16 = ml_dtypes.bfloat16
FLOAT8 = ml_dtypes.float8_e4m3fn


def bfloat16(x):
  return np.float32(x).astype(BFLOAT16)


def pack(fields, bits, word=np.int32, high_first=False):
  """Fields along the last axis in words, bit by bit."""
  fields = np.asarray(fields)
  bit = (fields[..., None].astype(np.uint8) >> np.arange(bits)) & 1
  if high_first:
    bit = bit.reshape(*fields.shape[:-1], -1, 2, bits)[..., ::-1, :]
  flat = bit.reshape(*fields.shape[:-1], -1)
  return np.packbits(flat, axis=-1, bitorder='little').view(word)


def per_input(x, inputs):
  """Numbers per group, once for each input."""
  return np.repeat(np.float32(x), inputs // x.shape[-1], axis=-1)


def e2m1(codes):
  return np.where(codes < 8, 1, -1) * E2M1[codes % 8]


def make_case(name, rng, outputs=16, inputs=128):
  """(tensors by suffix, dequantised matrix) as the tool `name` has them."""
  shape, scales = (outputs, inputs), rng.uniform(0.01, 0.1, (outputs, inputs))
  code = lambda bits: rng.integers(0, 2**bits, shape)
  group = lambda size: bfloat16(scales[:, : inputs // size])
  if name == 'fp8 rows':
    w = rng.normal(size=shape).astype(FLOAT8)
    return dict(weight=w, weight_scale=group(inputs)), (
      np.float32(w) * np.float32(group(inputs))
    )
  if name == 'fp8 blocks':
    outputs, inputs = 160, 192
    w = rng.normal(size=(outputs, inputs)).astype(FLOAT8)
    s = bfloat16(rng.uniform(0.01, 0.1, (2, 2)))
    whole = np.repeat(np.repeat(np.float32(s), 128, 0), 128, 1)
    whole = whole[:outputs, :inputs]
    return dict(weight=w, weight_scale=s), np.float32(w) * whole
  if name == 'fp8 matrix':
    w = rng.normal(size=shape).astype(FLOAT8)
    s = np.float32(0.07)
    return dict(weight=w, weight_scale=s.reshape(())), np.float32(w) * s
  if name == 'int8 rows':
    w = (code(8) - 128).astype(np.int8)
    return dict(weight=w, weight_scale=group(inputs)), (
      w * np.float32(group(inputs))
    )
  if name.startswith('packed'):
    bits, size = (8, inputs) if '8' in name else (4, 32)
    q, s = code(bits), group(size)
    tensors = dict(
      weight_packed=pack(q, bits),
      weight_scale=s,
      weight_shape=np.array(shape, np.int64),
    )
    zero = np.full_like(s, 2 ** (bits - 1), dtype=np.float32)
    if 'asymmetric' in name:
      z = rng.integers(0, 2**bits, s.shape)
      tensors['weight_zero_point'] = pack(z.T, bits).T
      zero = np.float32(z)
    return tensors, (q - per_input(zero, inputs)) * per_input(s, inputs)
  if 'nvfp4' in name:
    q, s = code(4), np.float32(scales[:, : inputs // 16] * 100).astype(FLOAT8)
    w = e2m1(q) * per_input(s, inputs)
    if name == 'nvfp4':
      outer = np.array([320.0], np.float32)
      return dict(
        weight_packed=pack(q, 4, np.uint8),
        weight_scale=s,
        weight_global_scale=outer,
      ), w / outer
    outer = np.float32(0.003)
    if name == 'modelopt nvfp4':
      return dict(
        weight=pack(q, 4, np.uint8),
        weight_scale=s,
        weight_scale_2=outer.reshape(()),
      ), w * outer
    return dict(weight=pack(q, 4, np.uint32), scales=s.view(np.uint8)), w
  if 'mxfp4' in name:
    q = code(4)
    s = rng.integers(120, 130, (outputs, inputs // 32)).astype(np.uint8)
    w = e2m1(q) * per_input(2.0 ** (s.astype(int) - 127), inputs)
    if name == 'mxfp4':
      return dict(weight_packed=pack(q, 4, np.uint8), weight_scale=s), w
    return dict(weight=pack(q, 4, np.uint32), scales=s), w
  if name == 'mlx mxfp8':
    q = np.float32(rng.normal(size=shape)).astype(FLOAT8)
    s = rng.integers(120, 130, (outputs, inputs // 32)).astype(np.uint8)
    words = pack(q.view(np.uint8), 8, np.uint32)
    scale = per_input(2.0 ** (s.astype(int) - 127), inputs)
    return dict(weight=words, scales=s), np.float32(q) * scale
  if name.startswith('mlx'):
    bits = int(name[-1])
    q, s = code(bits), group(64)
    b = bfloat16(rng.normal(size=s.shape))
    w = bfloat16(q * per_input(s, inputs))
    w = bfloat16(np.float32(w) + per_input(b, inputs))
    return dict(
      weight=pack(q, bits, np.uint32), scales=s, biases=b
    ), np.float32(w)
  q, s = code(4), np.float16(scales[:, : inputs // 32])
  z = rng.integers(0, 15, s.shape)
  if name == 'gptq':
    w = (q - per_input(z + 1, inputs)) * per_input(s, inputs)
    return dict(
      qweight=pack(q, 4).T,
      qzeros=pack(z.T, 4),
      scales=s.T,
      g_idx=np.arange(inputs, dtype=np.int32) // 32,
    ), w
  if name == 'awq':
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    mixed = lambda x: x.T.reshape(len(x.T), -1, 8)[..., order]
    flat = lambda x: pack(mixed(x).reshape(len(x.T), -1), 4)
    w = (q - per_input(z, inputs)) * per_input(s, inputs)
    return dict(qweight=flat(q), qzeros=flat(z), scales=s.T), w
  if name == 'bitsandbytes int8':
    w = (code(8) - 128).astype(np.int8)
    most = np.float32(rng.uniform(1, 2, outputs))
    whole = w * (most[:, None] / np.float32(127))
    return dict(weight=w, SCB=most), np.float32(bfloat16(whole))
  if name == 'torchao int8':
    w = (code(8) - 128).astype(np.int8)
    s = np.float32(rng.uniform(0.01, 0.1, (outputs, 1)))
    return dict(_weight_qdata=w, _weight_scale=s), np.float32(bfloat16(w * s))
  assert name == 'bitsandbytes nf4'
  levels = np.sort(np.float32(rng.normal(size=16)))
  most = np.float32(rng.uniform(1, 2, outputs * inputs // 64))
  whole = levels[q].reshape(-1, 64) * most[:, None]
  tensors = {
    'weight': pack(q.reshape(-1), 4, np.uint8, high_first=True)[:, None],
    'weight.absmax': most,
    'weight.quant_map': levels,
    'weight.quant_state.bitsandbytes__nf4': np.frombuffer(b'{}', np.uint8),
  }
  return tensors, np.float32(bfloat16(whole)).reshape(shape)


CASES = (
  *('fp8 rows', 'fp8 blocks', 'fp8 matrix', 'int8 rows'),
  *('packed 4', 'packed 8', 'packed 4 asymmetric', 'packed 8 asymmetric'),
  *('nvfp4', 'modelopt nvfp4', 'mlx nvfp4', 'mxfp4', 'mlx mxfp4', 'mlx mxfp8'),
  *('mlx 2', 'mlx 3', 'mlx 4', 'mlx 5', 'mlx 6', 'mlx 8', 'gptq', 'awq'),
  *('bitsandbytes int8', 'bitsandbytes nf4', 'torchao int8'),
)
# A reciprocal and a product instead of a division: one rounding of float32.
ROUNDED = ('nvfp4', 'modelopt nvfp4')


def arrays_of(tensors):
  return {
    name: formats.Array(name, 'file', x.dtype, x.shape, lambda x=x: x)
    for name, x in sorted(tensors.items())
  }


def find(tensors, shape):
  arrays = arrays_of(tensors)
  found = (scheme(arrays, shape) for scheme in contents.SCHEMES)
  return next((parts for parts in found if parts), None)


def dequantised(parts):
  read = {name: array.read() for name, array in parts.items()}
  for name, array in parts.items():
    assert (array.shape, array.dtype) == (read[name].shape, read[name].dtype)
  if read.keys() == {''}:
    return np.float32(read[''])
  w = blocks.of_arrays({name: jnp.asarray(x) for name, x in read.items()})
  return np.asarray(w.astype(jnp.float32))


@pytest.mark.parametrize('name', CASES)
def test_every_format_is_its_formula(name):
  tensors, expected = make_case(name, np.random.default_rng(0))
  parts = find(tensors, expected.shape)
  assert parts is not None
  w = dequantised(parts)
  if name in ROUNDED:
    np.testing.assert_allclose(w, expected, rtol=3e-7, atol=0)
  else:
    np.testing.assert_array_equal(w, np.float32(expected))


@pytest.mark.parametrize('name', CASES)
def test_what_does_not_fit_is_refused(name):
  """A missing array is no format, or not this one; a shape that is wrong is one
  sentence. Nothing else is raised."""
  tensors, expected = make_case(name, np.random.default_rng(0))
  refused = 0
  for lost in tensors:
    rest = {key: x for key, x in tensors.items() if key != lost}
    try:
      find(rest, expected.shape)
    except CheckpointError:
      refused += 1
  for key, x in tensors.items():
    for wrong in (x[..., :-1], x[None]) if x.ndim else (np.ones(3, x.dtype),):
      try:
        find({**tensors, key: wrong}, expected.shape)
      except CheckpointError as error:
        refused += 1
        assert str(error).count('\n') == 0
  assert refused


def test_fused_experts_and_vectors():
  rng = np.random.default_rng(0)
  w = rng.normal(size=(3, 8, 16)).astype(FLOAT8)
  s = bfloat16(rng.uniform(0.01, 0.1, (3, 8, 1)))
  parts = find(dict(weight=w, weight_scale=s), w.shape)
  expected = np.float32(w) * np.float32(s)
  np.testing.assert_array_equal(dequantised(parts), expected)
  tensors, _ = make_case('gptq', rng)
  assert find(tensors, (3, 16, 128)) is None
  vector = {'weight': w[0, 0], 'weight_scale': s[0, 0]}
  entry = huggingface.tensor_table(denoiser.abstract_params(hf_folder.MODEL))[
    hf_folder.NORM
  ]
  with pytest.raises(CheckpointError, match='is stored as'):
    contents._matrix(entry, arrays_of(vector), (16,))


@pytest.mark.parametrize(
  ('name', 'key', 'change', 'message'),
  [
    ('packed 4', 'weight_scale', lambda x: x > 0, 'type bool'),
    ('packed 4', 'weight_scale', lambda x: x.view(np.int16), 'type int16'),
    ('packed 4', 'weight_packed', lambda x: x.view(np.float32), 'type float32'),
    ('packed 4', 'weight_shape', lambda x: x + 1, 'by the config'),
    ('nvfp4', 'weight_global_scale', lambda x: 0 * x, 'no scale'),
    ('nvfp4', 'weight_packed', lambda x: x.view(np.int8), 'not uint8'),
    ('mlx 4', 'biases', lambda x: x.view(np.uint16), 'uint16'),
    ('bitsandbytes nf4', 'weight.quant_map', lambda x: x[:3], 'shape'),
    ('bitsandbytes nf4', 'weight', lambda x: x.view(np.int8), 'not uint8'),
  ],
)
def test_types_and_values_are_checked(name, key, change, message):
  tensors, expected = make_case(name, np.random.default_rng(0))
  tensors[key] = change(tensors[key])
  with pytest.raises(CheckpointError, match=message) as caught:
    dequantised(find(tensors, expected.shape))
  assert key in str(caught.value)


def test_zero_points_of_torchao_are_refused():
  tensors, expected = make_case('torchao int8', np.random.default_rng(0))
  zeros = np.zeros((16, 1), np.int8)
  parts = find(tensors | {'_weight_zero_point': zeros}, expected.shape)
  np.testing.assert_array_equal(dequantised(parts), expected)
  parts = find(tensors | {'_weight_zero_point': zeros + 1}, expected.shape)
  with pytest.raises(CheckpointError, match='is not zero'):
    dequantised(parts)


def test_a_permutation_of_inputs_is_refused():
  tensors, expected = make_case('gptq', np.random.default_rng(0))
  tensors['g_idx'] = tensors['g_idx'][::-1].copy()
  parts = find(tensors, expected.shape)
  with pytest.raises(CheckpointError, match='act-order'):
    parts['scales'].read()


MODEL = dataclasses.replace(
  hf_folder.MODEL, embed_dim=32, mlp_dim=32, expert_dim=32, head_dim=8
)


def nvfp4(w, rng, outer):
  """Random NVFP4 of the shape of `w`."""
  q = rng.integers(0, 16, w.shape)
  s = rng.uniform(0.5, 2, (len(w), w.shape[1] // 16)).astype(FLOAT8)
  outer = np.array([outer], np.float32)
  dense = e2m1(q) * per_input(s, w.shape[1]) * (np.float32(1) / outer)
  return {
    '_packed': pack(q, 4, np.uint8),
    '_scale': s,
    '_global_scale': outer,
  }, dense.astype(np.float32)


@pytest.fixture(scope='module')
def quantised(tmp_path_factory):
  """(folder, the matrices that it means): experts apart in NVFP4, with a global
  scale each; the projections of attention in packed int4; the router in MLX's
  8 bits; the rest plain, with copies under the encoder's names."""
  rng = np.random.default_rng(0)
  table = huggingface.tensor_table(denoiser.abstract_params(MODEL))
  tensors, dense = {}, {}
  for name, entry in table.items():
    w = bfloat16(rng.normal(size=entry.their_shape) * 0.3)
    stem = name.removesuffix('.weight')
    if 'experts.' in name:
      matrices = np.zeros(entry.their_shape, np.float32)
      halves = {'gate_up_proj': ('gate_proj', 'up_proj')}
      own = stem.rpartition('.')[2]
      for expert, matrix in enumerate(matrices):
        parts = halves.get(own, (own,))
        for half, rows in zip(parts, np.split(matrix, len(parts)), strict=True):
          few, rows[:] = nvfp4(rows, rng, outer=rng.uniform(4, 9))
          home = name.replace(own, f'{expert}.{half}.weight')
          tensors |= {home + key: x for key, x in few.items()}
      dense[entry.path] = matrices
    elif 'self_attn' in name and 'proj' in name and 'vision' not in name:
      q = rng.integers(0, 16, w.shape)
      s = bfloat16(rng.uniform(0.01, 0.1, (len(w), w.shape[1] // 16)))
      few = {
        f'{name}_packed': pack(q, 4),
        f'{name}_scale': s,
        f'{name}_shape': np.array(w.shape, np.int64),
      }
      tensors |= few
      encoder = name.replace('model.decoder', 'model.encoder.language_model')
      tensors |= {key.replace(name, encoder): x for key, x in few.items()}
      dense[entry.path] = (q - np.float32(8)) * per_input(s, w.shape[1])
    elif name.endswith('router.proj.weight'):
      q = rng.integers(0, 256, w.shape)
      s, b = (bfloat16(rng.normal(size=(len(w), 1)) * 0.01) for _ in 'sb')
      product = np.float32(bfloat16(q * np.float32(s)))
      dense[entry.path] = np.float32(bfloat16(product + np.float32(b)))
      tensors[name] = pack(q, 8, np.uint32)
      tensors |= {f'{stem}.scales': s, f'{stem}.biases': b}
    else:
      tensors[name], dense[entry.path] = w, np.float32(w)
  folder = tmp_path_factory.mktemp('few') / 'bits'
  folder.mkdir()
  write(folder, tensors)
  return (
    folder,
    tensors,
    {entry.path: entry.to_ours(dense[entry.path]) for entry in table.values()},
  )


TYPES = {
  'bfloat16': 'BF16',
  'float8_e4m3fn': 'F8_E4M3',
  'float32': 'F32',
  'int32': 'I32',
  'int64': 'I64',
  'uint32': 'U32',
  'uint8': 'U8',
}


def write(folder, tensors):
  """Types that we don't write, too."""
  header, data = {}, b''
  for name, x in tensors.items():
    end = len(data) + x.nbytes
    header[name] = files.entry(len(data), end, TYPES[x.dtype.name], x.shape)
    data += np.ascontiguousarray(x).tobytes()
  (folder / 'model.safetensors').write_bytes(files.pack(header, data))
  values = huggingface_config.to_config(MODEL, hf_folder.DIFFUSION, 'bfloat16')
  values['quantization_config'] = {'quant_method': 'not asked'}
  (folder / 'config.json').write_text(json.dumps(values))


def matrices(params):
  flat = traverse_util.flatten_dict(params)
  return {path: np.asarray(w.astype(jnp.float32)) for path, w in flat.items()}


def kinds(params):
  return {
    '/'.join(path): type(w).__name__
    for path, w in traverse_util.flatten_dict(params).items()
  }


def check(params, expected):
  for path, w in matrices(params).items():
    np.testing.assert_allclose(w, expected[path], rtol=3e-7, err_msg=str(path))


def test_a_folder_stays_in_few_bits(quantised, tmp_path):
  folder, _, expected = quantised
  run = dg.load(str(folder))
  check(run.params, expected)
  assert run.config.quantization == configs.QuantizationConfig(
    experts='stored', linears='stored'
  )
  kind = kinds(run.params)
  assert kind['layer_00/experts/gate_up'] == 'Blocks'
  assert kind['layer_00/attention/o_proj'] == 'Quantized'
  assert kind['layer_00/router/proj'] == 'ArrayImpl'
  dg.convert(str(folder), str(tmp_path / 'run'))
  again = dg.load(str(tmp_path / 'run'))
  check(again.params, expected)
  assert kinds(again.params) == kind
  assert again.config == run.config


def test_the_network_is_that_of_its_matrices(quantised):
  folder, _, expected = quantised
  run = dg.load(str(folder))
  model = dataclasses.replace(run.config.model, dtype='float32')
  network = denoiser.Denoiser(model)
  dense = traverse_util.unflatten_dict(
    {path: jnp.asarray(w) for path, w in expected.items()}
  )
  tokens = jnp.arange(24).reshape(2, 12) % 50

  def logits(params):
    apply = lambda *args, method: network.apply(
      {'params': params}, *args, method=method
    )
    length = jnp.full((2,), 12)
    _, cache, _ = apply(tokens, length, method='prefill')
    return apply(
      apply(tokens[:, :8], None, cache, method='denoise'), method='logits'
    )

  np.testing.assert_allclose(logits(run.params), logits(dense), atol=2e-4)


def test_a_run_is_exported_in_bfloat16(quantised, tmp_path):
  folder, _, expected = quantised
  dg.convert(str(folder), str(tmp_path / 'run'))
  dg.export(str(tmp_path / 'run'), str(tmp_path / 'out'))
  values = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert 'quantization_config' not in values
  run = dg.load(str(tmp_path / 'out'))
  assert set(kinds(run.params).values()) == {'ArrayImpl'}
  for path, w in matrices(run.params).items():
    np.testing.assert_allclose(w, expected[path], rtol=2**-8)


def test_stored_is_for_what_is_stored(quantised, tmp_path):
  from diffusiongemma.runs import convert

  folder, _, _ = quantised
  kept = configs.QuantizationConfig(experts='stored')
  with pytest.raises(configs.ConfigError, match="'stored' is what another"):
    convert.quantize(str(folder), str(tmp_path / 'run'), kept)


def test_it_is_quantised_anew_or_not_at_all(quantised, tmp_path):
  folder, _, expected = quantised
  ours = configs.QuantizationConfig(experts='int8')
  from diffusiongemma.runs import convert

  convert.quantize(str(folder), str(tmp_path / 'run'), ours)
  run = dg.load(str(tmp_path / 'run'))
  assert run.config.quantization.linears == 'stored'
  w = run.params['layer_00']['experts']['down']
  assert w.values.dtype == jnp.int8
  dense = expected['layer_00', 'experts', 'down']
  assert np.abs(w.astype(jnp.float32) - dense).max() < np.abs(dense).max() / 100
  whole = dataclasses.replace(
    run.config, quantization=configs.QuantizationConfig()
  )
  plain = dg.load(str(folder), whole).params
  assert set(kinds(plain).values()) == {'ArrayImpl'}
  for path, w in matrices(plain).items():
    np.testing.assert_allclose(w, expected[path], rtol=2**-8)


def test_adapters_are_trained_over_it(quantised):
  folder, _, _ = quantised
  config = configs.Config(
    lora=configs.LoraConfig(rank=2),
    train=configs.TrainConfig(init_from=str(folder)),
  )
  adopted = load_lib.adopt(config, 'nowhere')
  from diffusiongemma.training import train_state

  base = train_state.abstract_base(adopted)
  assert kinds(base)['layer_00/experts/gate_up'] == 'Blocks'


def test_gradients_of_adapters_are_those_over_its_matrices(quantised):
  folder, _, expected = quantised
  run = dg.load(str(folder))
  config = configs.LoraConfig(
    rank=2, targets=('*/attention/*', '*/shared_mlp/*', '*/experts/*')
  )
  dense = traverse_util.unflatten_dict(
    {path: jnp.asarray(w) for path, w in expected.items()}
  )
  adapters = lora.init_adapters(config, dense, jax.random.key(0))
  adapters = jax.tree.map(lambda x: x + 0.1, adapters)  # B is zero at first.
  model = dataclasses.replace(run.config.model, dtype='float32')
  network = denoiser.Denoiser(model)
  tokens = jnp.arange(24).reshape(2, 12) % 50

  def loss(adapters, base):
    params = lora.attach(config, base, adapters)
    hidden, *_ = network.apply(
      {'params': params}, tokens, jnp.full((2,), 12), method='prefill'
    )
    return jnp.mean(jnp.sin(hidden))

  ours, theirs = (
    jax.jit(jax.grad(loss))(adapters, base) for base in (run.params, dense)
  )
  assert min(jnp.abs(x).max() for x in jax.tree.leaves(theirs)) > 0
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, atol=1e-3 * float(jnp.abs(b).max())
    ),
    *(ours, theirs),
  )


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda t: t.pop(f'{HOME}.weight_scale'), 'is stored as'),
    (lambda t: t.pop(f'{HOME}.weight_packed'), 'is stored as'),
    (lambda t: drop(t, 'experts.1.'), 'Experts are missing'),
    (lambda t: t.update({FUSED: np.zeros((3, 32, 32), BFLOAT16)}), 'as well'),
    (lambda t: drop(t, HOME), 'Experts are missing'),
    (lambda t: t.update({f'{HOME}.bias': np.ones(1, np.float32)}), 'stored as'),
    (lambda t: t.update({f'{HOME}.input_scale': np.ones(1, 'f4')}), None),
    (
      lambda t: drop(t, HOME) or t.update({f'{HOME}.weight': PLAIN}),
      'must be alike',
    ),
    (
      lambda t: t.update({f'{HOME}.weight_scale': np.ones((32, 3), FLOAT8)}),
      'has the shape',
    ),
  ],
)
def test_what_is_missing_is_named(quantised, tmp_path, change, message):
  _, tensors, _ = quantised
  tensors = dict(tensors)
  change(tensors)
  folder = tmp_path / 'bits'
  folder.mkdir()
  write(folder, tensors)
  if message is None:
    dg.load(str(folder))
    return
  with pytest.raises(CheckpointError, match=message) as caught:
    dg.load(str(folder))
  assert 'experts' in str(caught.value)


HOME = 'model.decoder.layers.1.experts.2.down_proj'
FUSED = 'model.decoder.layers.1.experts.down_proj'
PLAIN = np.zeros((32, 32), BFLOAT16)


def drop(tensors, part):
  for name in [name for name in tensors if part in name]:
    del tensors[name]


def test_copies_of_packed_tensors_are_compared(quantised, tmp_path):
  _, tensors, _ = quantised
  name = 'model.encoder.language_model.layers.0.self_attn.q_proj.weight_packed'
  folder = tmp_path / 'bits'
  folder.mkdir()
  write(folder, tensors | {name: tensors[name] ^ 1})
  with pytest.raises(CheckpointError, match='one weight for both roles'):
    dg.load(str(folder))


def test_a_text_only_folder_has_no_images(quantised, tmp_path):
  _, tensors, _ = quantised
  folder = tmp_path / 'bits'
  folder.mkdir()
  few = dict(tensors)
  drop(few, 'vision_tower')
  write(folder, few)
  run = dg.load(str(folder))
  assert run.config.model.vision is None and 'vision' not in run.params
