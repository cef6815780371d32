"""GGUF files written by the `gguf` package, against its dequantisation."""

import dataclasses
import re
import struct
import sys

from flax import traverse_util
import gguf as library
import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tensors as files

import diffusiongemma as dg
from diffusiongemma import config as configs
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import contents
from diffusiongemma.checkpoints import formats
from diffusiongemma.checkpoints import gguf
from diffusiongemma.checkpoints import huggingface
from diffusiongemma.checkpoints.formats import ggml
from diffusiongemma.model import denoiser
from diffusiongemma.ops import blocks
from diffusiongemma.text import tokenizer as tokenizers

MODEL = configs.ModelConfig(
  vocab_size=64,
  embed_dim=256,
  attention_pattern=('local', 'global'),
  num_heads=4,
  num_kv_heads=2,
  head_dim=64,
  num_global_kv_heads=1,
  global_head_dim=128,
  sliding_window=4,
  mlp_dim=256,
  num_experts=3,
  experts_per_token=2,
  expert_dim=32,
  context_length=128,
  dtype='bfloat16',
  param_dtype='bfloat16',
)
KINDS = [name for name, *_ in ggml.TYPES.values()]
# Where the numbers of single or half precision are in a block.
HALVES = {
  **{'Q8_0': (0,), 'Q4_0': (0,), 'Q4_K': (0, 2), 'Q5_K': (0, 2)},
  'Q6_K': (208,),
}


def random_blocks(kind, shape, rng):
  """Random bytes, but for scales of a sensible size."""
  size, num_bytes = {name: rest for name, *rest in ggml.TYPES.values()}[kind]
  data = rng.integers(
    0, 256, (*shape[:-1], shape[-1] // size, num_bytes), np.uint8
  )
  for first in HALVES[kind]:
    scale = rng.uniform(1e-4, 1e-3, data.shape[:-1]).astype(np.float16)
    data[..., first : first + 2] = scale[..., None].view(np.uint8)
  return data.reshape(*shape[:-1], -1)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('shape', [(6, 512), (3, 4, 256)])
def test_blocks_are_dequantised_as_by_the_library(kind, shape):
  data = random_blocks(kind, shape, np.random.default_rng(0))
  theirs = library.quants.dequantize(
    data, library.GGMLQuantizationType[kind]
  ).reshape(shape)
  array = formats.Array('w', 'f', data.dtype, data.shape, lambda: data)
  parts = ggml.find({f'{ggml.SUFFIX}{kind}': array}, shape)
  read = {name: jnp.asarray(x.read()) for name, x in parts.items()}
  for name, x in parts.items():
    assert (x.shape, x.dtype) == (read[name].shape, read[name].dtype)
  ours = blocks.of_arrays(read).astype(jnp.float32)
  # A difference of two products may be rounded once instead of twice.
  scale = np.abs(theirs).max()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=scale * 2**-22)
  if kind not in ('Q4_K', 'Q5_K'):
    np.testing.assert_array_equal(ours, theirs)


NAMES = {
  **{theirs: ours for ours, theirs in gguf._OTHERS.items()},
}


def their_name(name):
  """The name of a tensor in GGUF, from that of Hugging Face."""
  name = name.removesuffix('.weight').removeprefix('model.')
  role, _, rest = name.rpartition('layers.')
  if not role:
    return f'{NAMES[name.removeprefix("decoder.")]}.weight'
  layer, _, part = rest.partition('.')
  (own,) = [
    ours
    for ours, theirs in gguf._LAYER.items()
    if theirs == part and 'switch' not in theirs
  ]
  if role.startswith('encoder'):
    own = f'enc_{own}'
  own = own if '.' in own else f'{own}.weight'
  return f'blk.{layer}.{own}'


def kind_of(name):
  if 'experts.down' in name:
    return 'Q8_0'  # Of rows of 32.
  if 'experts' in name:
    return 'Q4_K'
  if 'embed_tokens' in name:
    return 'Q6_K'
  if 'self_attn' in name and 'proj' in name:
    return 'Q5_K'
  if 'mlp' in name:
    return 'Q4_0'
  return 'BF16' if 'self_conditioning' in name and 'proj' in name else 'F32'


def metadata(writer):
  name = gguf.ARCHITECTURE
  writer.add_uint32(f'{name}.block_count', 2)
  writer.add_uint32(f'{name}.context_length', 128)
  writer.add_uint32(f'{name}.embedding_length', 256)
  writer.add_uint32(f'{name}.feed_forward_length', 256)
  writer.add_uint32(f'{name}.expert_feed_forward_length', 32)
  writer.add_uint32(f'{name}.expert_count', 3)
  writer.add_uint32(f'{name}.expert_used_count', 2)
  writer.add_uint32(f'{name}.attention.head_count', 4)
  writer.add_array(f'{name}.attention.head_count_kv', [2, 1])
  writer.add_uint32(f'{name}.attention.key_length', 128)
  writer.add_uint32(f'{name}.attention.key_length_swa', 64)
  writer.add_uint32(f'{name}.attention.sliding_window', 4)
  pattern = [True, False]
  writer.add_array(f'{name}.attention.sliding_window_pattern', pattern)
  writer.add_float32(f'{name}.attention.layer_norm_rms_epsilon', 1e-6)
  writer.add_float32(f'{name}.rope.freq_base', 1e6)
  writer.add_float32(f'{name}.final_logit_softcapping', 30.0)
  writer.add_uint32('diffusion.canvas_length', 8)
  writer.add_uint32('diffusion.eb_max_steps', 12)
  writer.add_float32('diffusion.eb_entropy_bound', 0.3)


def add_tokenizer(writer, model):
  """The pieces of a SentencePiece model of byte pairs: a merge for each way to
  make a piece of two others, the earliest pieces first."""
  processor = sentencepiece.SentencePieceProcessor(model_proto=model)
  count = processor.vocab_size()
  renamed = {'<s>': '<bos>', '</s>': '<eos>'}
  tokens = [processor.id_to_piece(i) for i in range(count)]
  tokens = [renamed.get(token, token) for token in tokens]
  kinds = [
    3
    if processor.is_control(i)
    else 6
    if processor.is_byte(i)
    else 4
    if token in ('\n', '\n\n')
    else 1
    for i, token in enumerate(tokens)
  ]
  ids = {t: i for i, t in enumerate(tokens) if kinds[i] == 1}
  merges = []
  for token in sorted(ids, key=lambda t: -processor.get_score(ids[t])):
    halves = [(token[:i], token[i:]) for i in range(1, len(token))]
    halves = [(a, b) for a, b in halves if a in ids and b in ids]
    halves.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    merges += [f'{a} {b}' for a, b in halves]
  writer.add_tokenizer_model('gemma4')
  writer.add_token_list(tokens)
  writer.add_token_types(kinds)
  writer.add_token_merges(merges)
  for name, token in ('bos', 2), ('eos', 1), ('padding', 0):
    writer.add_uint32(f'tokenizer.ggml.{name}_token_id', token)
  writer.add_chat_template('{{ messages }}')


def make_file(path, only=None, tokenizer=None):
  """{path in our parameters: the matrix as the library dequantises it}."""
  writer = library.GGUFWriter(str(path), gguf.ARCHITECTURE)
  metadata(writer)
  if tokenizer:
    add_tokenizer(writer, tokenizer)
  rng, dense = np.random.default_rng(0), {}
  table = huggingface.tensor_table(denoiser.abstract_params(MODEL))
  for name, entry in table.items():
    kind, shape = kind_of(name), entry.their_shape
    if only and not re.search(only, name):
      continue
    theirs = library.GGMLQuantizationType[kind]
    if kind in KINDS:
      data = random_blocks(kind, shape, rng)
      w = library.quants.dequantize(data, theirs).reshape(shape)
      writer.add_tensor(their_name(name), data, raw_dtype=theirs)
    elif kind == 'F32':
      data = w = rng.normal(size=shape).astype(np.float32)
      writer.add_tensor(their_name(name), data)
    else:
      w = np.float32(jnp.asarray(rng.normal(size=shape), jnp.bfloat16))
      data = library.quants.quantize(w, theirs)
      writer.add_tensor(their_name(name), data, raw_dtype=theirs)
    dense[entry.path] = entry.to_ours(w)
  factors = np.float32([1.0] * 16 + [1e30] * 48)
  writer.add_tensor('rope_freqs.weight', factors)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return dense


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  path = tmp_path_factory.mktemp('gguf') / 'small-Q4_K_M.gguf'
  return path, make_file(path)


def test_a_file_is_a_network(made, tmp_path):
  path, dense = made
  run = dg.load(path)
  assert run.config.model == MODEL
  assert run.config.diffusion.canvas_length == 8
  assert run.config.diffusion.max_denoising_steps == 12
  assert run.config.diffusion.entropy_bound == 0.3
  dg.convert(str(path.parent), str(tmp_path / 'run'))
  again = dg.load(tmp_path / 'run')
  assert again.config == run.config
  dg.export(str(tmp_path / 'run'), str(tmp_path / 'out'))
  assert dg.load(tmp_path / 'out').config.model.embed_dim == 256
  for params in run.params, again.params:
    flat = traverse_util.flatten_dict(params)
    assert flat.keys() == dense.keys()
    for name, w in flat.items():
      scale = np.abs(dense[name]).max()
      np.testing.assert_allclose(
        *(np.asarray(w.astype(jnp.float32)), dense[name]),
        *(0, scale * 2**-22),
        err_msg=str(name),
      )
    assert type(flat['layer_00', 'experts', 'gate_up']).__name__ == 'Blocks'
    assert flat['layer_00', 'experts', 'down'].values.dtype == jnp.int8
  dense_params = traverse_util.unflatten_dict(
    {name: jnp.asarray(w) for name, w in dense.items()}
  )
  network = denoiser.Denoiser(dataclasses.replace(MODEL, dtype='float32'))
  tokens = jnp.arange(12)[None]
  hidden = [
    network.apply(
      {'params': params}, tokens, jnp.array([12]), method='prefill'
    )[0]
    for params in (run.params, dense_params)
  ]
  np.testing.assert_allclose(*hidden, atol=2e-3)


TEXT = """ROMEO. O, she doth teach the torches to burn bright!
It seems she hangs upon the cheek of night   like a rich jewel in an Ethiope's
ear;\n\n straße 你好 <b>"""


def test_the_tokenizer_inside(tmp_path, monkeypatch):
  """Of byte pairs, equal to the model that it was made of."""
  model = tokenizers.SHIPPED_MODEL.read_bytes()
  theirs = tokenizers.make_tokenizer(model, 'x.model')
  monkeypatch.setattr(
    sys.modules[__name__], 'MODEL', dataclasses.replace(MODEL, vocab_size=2048)
  )
  make_file(tmp_path / 'a.gguf', tokenizer=model)
  run = dg.load(tmp_path / 'a.gguf')
  assert run.chat_template == '{{ messages }}'
  assert run.tokenizer.encode(TEXT) == theirs.encode(TEXT)
  assert run.tokenizer.decode(run.tokenizer.encode(TEXT)) == TEXT
  assert run.tokenizer.eos_id == theirs.eos_id
  dg.convert(str(tmp_path / 'a.gguf'), str(tmp_path / 'run'))
  again = dg.load(tmp_path / 'run')
  assert again.tokenizer.encode(TEXT) == theirs.encode(TEXT)
  assert again.chat_template == run.chat_template
  (tmp_path / 'tokenizer.model').write_bytes(model)
  assert dg.load(tmp_path / 'a.gguf').tokenizer.file_name == 'tokenizer.model'


def test_experts_with_gate_and_up_apart(made):
  """As other models of this format have them."""
  assert contents.find  # The names are those of MLX's halves.
  assert gguf._their_name('blk.3.ffn_up_exps.weight', 'weight') == (
    'model.decoder.layers.3.experts.switch_glu.up_proj.weight'
  )


def test_several_files_in_a_folder(made, tmp_path):
  for name in ('a-Q4_0.gguf', 'b-Q8_0.gguf'):
    (tmp_path / name).write_bytes(made[0].read_bytes())
  files.refused(lambda: dg.load(tmp_path), 'give the path of one of them')
  (tmp_path / 'b-Q8_0.gguf').rename(tmp_path / 'mmproj-x.gguf')
  dg.load(tmp_path)
  (tmp_path / 'a-Q4_0.gguf').rename(tmp_path / 'a-00001-of-00002.gguf')
  files.refused(lambda: dg.load(tmp_path), 'a-00002-of-00002.gguf', 'missing')


def test_shards(made, tmp_path):
  make_file(tmp_path / 'a-00001-of-00002.gguf', only='layers.0|embed')
  make_file(tmp_path / 'a-00002-of-00002.gguf', only='layers.1|decoder.norm')
  files.refused(lambda: dg.load(tmp_path), 'rope_freqs.weight')


def changed(data, kind):
  """Files that are wrong, and a part of what is said."""
  magic, rest = data[:8], data[8:]
  return {
    'magic': (b'GGML' + data[4:], 'is no GGUF file'),
    'version': (b'GGUF' + struct.pack('<I', 1) + rest, 'version 1'),
    'tensors': (magic + struct.pack('<Q', 2**60) + rest[8:], 'tensors: it is'),
    'keys': (magic + rest[:8] + struct.pack('<Q', 2**60) + rest[16:], 'keys'),
    'key': (
      magic + rest[:16] + struct.pack('<Q', 2**62) + rest[24:],
      'truncated',
    ),
    'short': (data[:-100], 'download it again'),
    'header': (data[:100], 'truncated'),
    'other': (data.replace(b'diffusion-gemma', b'diffusion_gemma'), 'only'),
    'name': (data.replace(b'blk.0.attn_q.', b'blk.0.attn_x.'), 'none of this'),
    'pattern': (
      data.replace(b'sliding_window_pattern', b'sliding_window_patterm'),
      'lacks the key',
    ),
    'type': (
      data.replace(
        b'blk.0.ffn_down_exps.weight\3\0\0\0',
        b'blk.0.ffn_down_exps.weight\x7f\0\0\0',
      ),
      '127 axes',
    ),
  }[kind]


@pytest.mark.parametrize(
  'kind',
  ['magic', 'version', 'tensors', 'keys', 'key', 'short', 'header', 'other']
  + ['type', 'name', 'pattern'],
)
def test_what_is_wrong_is_said(made, tmp_path, kind):
  wrong, message = changed(made[0].read_bytes(), kind)
  path = tmp_path / 'x.gguf'
  path.write_bytes(wrong)
  files.refused(lambda: dg.load(path), message)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(data=st.data())
def test_random_damage_is_an_error_or_harmless(made, data, tmp_path_factory):
  """No other exception, and no memory beyond the size of the file."""
  content = bytearray(made[0].read_bytes())
  for _ in range(data.draw(st.integers(1, 4))):
    place = data.draw(st.integers(0, 6000))
    content[place] = data.draw(st.integers(0, 255))
  path = tmp_path_factory.mktemp('fuzz') / 'x.gguf'
  path.write_bytes(content)
  try:
    found = gguf.read([str(path)])
    gguf.config_values(found, str(path))
    gguf.with_their_names(found)
    gguf.files_inside(found, str(path))
    for tensor in found.tensors.values():
      tensor.array.read()
  except CheckpointError as error:
    assert len(str(error)) < 1000
