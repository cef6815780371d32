"""The table of tensors and the configs, against the released checkpoint and
against what `transformers` reads and writes."""

import copy
import dataclasses
import json
import pathlib

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from diffusiongemma import config as configs
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import huggingface
from diffusiongemma.checkpoints import huggingface_config
from diffusiongemma.model import denoiser
from diffusiongemma.runs import huggingface_folder
from experiments.conversion import transformers_versions

REFERENCE = pathlib.Path(__file__).parents[1] / 'reference'
RELEASED_CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / '26b_a4b.py'


@pytest.fixture(scope='module')
def released():
  return json.loads((REFERENCE / 'config.json').read_text())


def released_shapes():
  """`{name: shape}` of the 1047 tensors."""
  shapes = {}
  for line in (REFERENCE / 'tensors.tsv').read_text().splitlines()[1:]:
    name, shape = line.split('\t')
    shapes[name] = tuple(map(int, shape.split('x')))
  return shapes


def test_every_released_tensor_has_its_place(released):
  """Names and shapes, each once, and every leaf of ours is filled once."""
  config = huggingface_config.model_config(released)
  params = denoiser.abstract_params(config)
  table = huggingface.tensor_table(params)
  theirs = {name: entry.their_shape for name, entry in table.items()}
  assert theirs == released_shapes() and len(theirs) == 1047
  ours = {entry.path: entry.shape for entry in table.values()}
  leaves = jax.tree_util.tree_leaves_with_path(params)
  assert ours == {tuple(k.key for k in keys): x.shape for keys, x in leaves}


def test_the_config_file_is_the_released_network():
  ours = configs.load_config(str(RELEASED_CONFIG))
  configs.validate(ours)
  theirs = huggingface_folder.read_config(str(REFERENCE))
  assert ours == theirs


def test_released_config_comes_back(released):
  """All their keys but those of training, with the same values."""
  model = huggingface_config.model_config(released)
  generation = json.loads((REFERENCE / 'generation_config.json').read_text())
  diffusion = huggingface_config.diffusion_config(
    released, generation, model.vocab_size, ''
  )
  back = huggingface_config.to_config(model, diffusion, 'bfloat16')
  only_training = ('initializer_range', 'attention_dropout')
  read_by_nobody = (
    'config.vision_config.default_output_length',
    'config.vision_config.global_head_dim',
  )

  def check(theirs, ours, path):
    for key, value in theirs.items():
      if key in only_training or f'{path}.{key}' in read_by_nobody:
        continue
      if isinstance(value, dict):
        check(value, ours[key], f'{path}.{key}')
      else:
        assert ours[key] == value, f'{path}.{key}'

  check(released, back, 'config')
  # The head divides the vocabulary in two there: they tell of no kv heads.
  check(generation, huggingface_config.to_generation_config(diffusion), 'g')


@pytest.mark.parametrize('are_equal', [False, True])
def test_a_config_that_transformers_has_saved(released, tmp_path, are_equal):
  """It writes sizes of global layers layer by layer, where they differ."""
  transformers = pytest.importorskip(
    'transformers', reason='transformers is installed by the [test] extra'
  )
  released, text = copy.deepcopy(released), released['text_config']
  if are_equal:
    released['text_config'] |= {
      'global_head_dim': text['head_dim'],
      'num_global_key_value_heads': text['num_key_value_heads'],
    }
  kind = transformers.models.diffusion_gemma.DiffusionGemmaConfig
  kind.from_dict(copy.deepcopy(released)).save_pretrained(tmp_path)
  saved = json.loads((tmp_path / 'config.json').read_text())
  assert 'per_layer_config' in saved['text_config']
  expected = huggingface_config.model_config(released)
  assert huggingface_config.model_config(saved) == expected


VERSIONS = transformers_versions.VERSIONS


@pytest.mark.parametrize('version', VERSIONS)
def test_configs_of_every_version_of_transformers(version):
  """What each has written for the same network."""
  folder = REFERENCE / 'configs' / version
  written = json.loads((folder / 'config.json').read_text())
  assert written['transformers_version'] == version
  rope = written['vision_config']['rope_parameters']
  is_old = version in ('5.11.0', '5.14.1')
  assert rope['rope_type'] == ('default' if is_old else 'axial')
  assert ('per_layer_config' in written['text_config']) is not is_old
  config = huggingface_folder.read_config(str(folder))
  assert config.model == transformers_versions.NETWORK
  # It stores no sampler but that of a generation_config.
  stops = transformers_versions.DIFFUSION.stop_token_ids
  assert config.diffusion == configs.DiffusionConfig(
    canvas_length=8, stop_token_ids=stops
  )


def edited(values, path, value):
  """A copy with a value at a path of names; `...` removes what is there."""
  values = copy.deepcopy(values)
  node = values
  *parents, last = path.split('.')
  for name in parents:
    node = node[name]
  node[last] = value
  if value is ...:
    del node[last]
  return values


@pytest.mark.parametrize(
  ('path', 'value'),
  [
    ('vision_config.rope_parameters.rope_type', 'axial'),
    ('vision_config.rope_parameters.rope_type', ...),
    ('vision_config.rope_parameters.rope_type', None),
    ('vision_config.rope_parameters', {'type': 'axial', 'rope_theta': 100.0}),
    ('vision_config.rope_parameters', None),
    ('vision_config.rope_parameters.partial_rotary_factor', 0.5),
    ('vision_config.rope_scaling', None),
    ('vision_config.model_type', ...),
    ('vision_config.attention_bias', None),
    ('vision_config.global_head_dim', ...),
    ('vision_config.default_output_length', 1120),
    ('vision_config.id2label', {'0': 'LABEL_0'}),
    ('text_config.tie_word_embeddings', False),
    ('text_config.tie_word_embeddings', None),
    ('text_config.model_type', 'gemma4_text'),
    ('text_config.attention_k_eq_v', True),
    ('text_config.num_kv_shared_layers', 0),
    ('text_config.layer_types', None),
    ('text_config.rope_parameters', None),
    ('text_config.rope_scaling', None),
    ('text_config.rope_theta', 5.0),
    ('text_config.rope_parameters.sliding_attention.rope_type', ...),
    ('text_config.rope_parameters.sliding_attention.factor', 2.0),
    ('text_config.rope_parameters.chunked_attention', {'rope_type': 'yarn'}),
    ('text_config.quantization_config', None),
    ('text_config.per_layer_config', None),
    (
      'text_config.per_layer_config',
      {
        str(i): {'head_dim': 512, 'num_key_value_heads': 2, 'num_experts': 128}
        for i in range(5, 30, 6)
      },
    ),
    ('tie_word_embeddings', None),
    ('tie_word_embeddings', False),  # What is stored decides.
    ('quantization_config', {}),
    ('quantization_config', None),
    ('compression_config', None),
    ('notes', ['anything']),
    ('architectures', ['DiffusionGemmaModel']),
  ],
)
def test_what_changes_no_numbers_is_no_reason_to_refuse(released, path, value):
  expected = huggingface_config.model_config(released)
  changed = edited(released, path, value)
  assert huggingface_config.model_config(changed) == expected


def test_a_whole_rotation_has_two_names(released):
  full = 'text_config.rope_parameters.full_attention'
  for kind in ('default', 'proportional', ...):
    values = edited(released, f'{full}.partial_rotary_factor', 1.0)
    values = edited(values, f'{full}.rope_type', kind)
    model = huggingface_config.model_config(values)
    assert model.global_rotary_fraction == 1.0
  values = edited(released, 'vision_config.rope_parameters.rope_theta', ...)
  values['vision_config']['rope_theta'] = 7.0
  assert huggingface_config.model_config(values).vision.rope_theta == 7.0


def test_ids_are_looked_for_where_transformers_writes_them(released):
  read = lambda generation, values=released: (
    huggingface_config.diffusion_config(values, generation, 10**6, '')
  )
  assert read({}).stop_token_ids == (1, 106, 50)  # Those of config.json.
  assert read({'eos_token_id': None}).stop_token_ids == (1, 106, 50)
  assert read({'eos_token_id': 1}).stop_token_ids == (1,)
  assert read({'eos_token_id': []}).stop_token_ids == ()
  values = edited(released, 'eos_token_id', ...)
  assert read({}, edited(values, 'text_config.eos_token_id', 7)) == (
    read({'eos_token_id': [7]})
  )
  assert read({}, {'text_config': {}}).stop_token_ids == (1,)
  assert read({}).bos_token_id == 2
  values = edited(released, 'text_config.bos_token_id', 9)
  assert read({}, values).bos_token_id == 9
  assert read({'bos_token_id': None}, values).bos_token_id == 9
  assert read({'bos_token_id': 5}, values).bos_token_id == 5
  assert read({}, {}).bos_token_id == 2
  generation = huggingface_config.to_generation_config(read({}))
  assert 'bos_token_id' not in generation


def test_the_last_layer_is_global_whatever_is_written(released):
  """transformers overrules the config there, and so must we."""
  values = copy.deepcopy(released)
  values['text_config']['layer_types'][-1] = 'sliding_attention'
  pattern = huggingface_config.model_config(values).attention_pattern
  assert pattern[-1] == 'global'


def test_defaults_are_those_of_transformers():
  """A config of nothing but what has no default."""
  transformers = pytest.importorskip(
    'transformers', reason='transformers is installed by the [test] extra'
  )
  experts = dict(num_experts=4, top_k_experts=2, moe_intermediate_size=8)
  short = {
    'model_type': 'diffusion_gemma',
    'text_config': experts,
    'dtype': 'float32',
  }
  kind = transformers.models.diffusion_gemma.DiffusionGemmaConfig
  full = kind.from_dict(copy.deepcopy(short)).to_dict()
  ours = huggingface_config.model_config(short)
  assert ours == huggingface_config.model_config(full)
  assert ours.embed_dim == 2304 and ours.vision.num_layers == 16


sizes = st.integers(1, 64)
vision_configs = st.builds(
  configs.VisionConfig,
  embed_dim=sizes,
  num_layers=st.integers(0, 5),
  patch_size=sizes,
  standardize=st.booleans(),
  bidirectional=st.booleans(),
  rope_theta=st.floats(1, 1e6),
)
model_configs = st.builds(
  configs.ModelConfig,
  vocab_size=st.integers(100, 10**6),
  embed_dim=sizes,
  attention_pattern=st.lists(st.sampled_from(['local', 'global'])).map(
    lambda kinds: (*kinds, 'global')
  ),
  num_kv_heads=sizes,
  num_global_kv_heads=sizes,
  global_head_dim=sizes,
  sliding_window=sizes,
  global_rotary_fraction=st.floats(0, 1),
  logit_softcap=st.floats(1e-3, 100),
  norm_epsilon=st.floats(1e-9, 1e-3),
  vision=vision_configs,
  dtype=st.just('float32'),
)


@hypothesis.given(model_configs, st.integers(1, 512))
def test_any_config_goes_there_and_back(model, canvas_length):
  diffusion = configs.DiffusionConfig(canvas_length=canvas_length)
  values = huggingface_config.to_config(model, diffusion, 'float32')
  values = json.loads(json.dumps(values))
  assert huggingface_config.model_config(values) == model
  generation = huggingface_config.to_generation_config(diffusion)
  back = huggingface_config.diffusion_config(
    values, generation, model.vocab_size, ''
  )
  stops = tuple(t for t in diffusion.stop_token_ids if t < model.vocab_size)
  assert back == dataclasses.replace(diffusion, stop_token_ids=stops)


def test_a_last_layer_that_is_local_has_no_counterpart(released):
  model = huggingface_config.model_config(released)
  model = dataclasses.replace(model, attention_pattern=('global', 'local'))
  with pytest.raises(CheckpointError, match='last layer is local'):
    huggingface_config.to_config(model, configs.DiffusionConfig(), 'float32')


def test_logits_without_a_softcap_have_no_counterpart(released):
  model = huggingface_config.model_config(released)
  model = dataclasses.replace(model, logit_softcap=0.0)
  with pytest.raises(CheckpointError, match='logit_softcap is 0'):
    huggingface_config.to_config(model, configs.DiffusionConfig(), 'float32')


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    ('model_type', 'gemma4', "model_type 'gemma4'"),
    ('tie_word_embeddings', 'yes', 'tie_word_embeddings must be of type bool'),
    ('text_config', [1], 'text_config must be an object'),
    ('text_config.hidden_size', '2816', 'text_config.hidden_size must be of'),
    ('text_config.hidden_size', True, 'text_config.hidden_size must be of'),
    ('text_config.hidden_size', -1, 'text_config.hidden_size cannot be -1'),
    ('text_config.hidden_size', 2**70, 'text_config.hidden_size cannot be'),
    ('text_config.num_experts', None, 'text_config.num_experts is missing'),
    ('text_config.rms_norm_eps', float('nan'), 'rms_norm_eps cannot be nan'),
    ('text_config.hidden_activation', 'silu', "hidden_activation = 'silu'"),
    ('text_config.attention_bias', True, 'attention_bias = True'),
    ('text_config.use_bidirectional_attention', 'all', "'all' is not"),
    ('text_config.num_hidden_layers', 29, '30 entries for 29 layers'),
    ('text_config.num_hidden_layers', 10**9, 'num_hidden_layers is'),
    ('text_config.layer_types', ['linear'], 'layer_types must be a list of'),
    ('text_config.layer_types', [['x']] * 30, 'layer_types must be a list of'),
    *(
      ('text_config.per_layer_config', value, 'per_layer_config must give')
      for value in (
        {'1': {'head_dim': 128}},
        {'5': {'head_dim': 128}},
        {'30': {}},
        {'x': {}},
      )
    ),
    ('text_config.final_logit_softcapping', 0.0, 'softcapping cannot be 0'),
    ('text_config.rope_parameters', 3, 'rope_parameters must be an object'),
    (
      'text_config.rope_parameters.full_attention.rope_type',
      'yarn',
      "rope_type = 'yarn' is not supported",
    ),
    (
      'text_config.rope_parameters.full_attention.rope_type',
      ...,
      "rope_type = 'default' is not supported, only proportional with",
    ),
    (
      'text_config.rope_parameters.full_attention.rope_theta',
      None,
      'full_attention.rope_theta is missing',
    ),
    (
      'text_config.rope_parameters.full_attention.factor',
      8.0,
      'full_attention.factor = 8.0 is not supported',
    ),
    (
      'text_config.rope_parameters.sliding_attention.partial_rotary_factor',
      0.5,
      "sliding_attention.rope_type = 'default' is not supported",
    ),
    (
      'text_config.rope_parameters.sliding_attention',
      {
        'rope_type': 'proportional',
        'rope_theta': 1e4,
        'partial_rotary_factor': 0.5,
      },
      'sliding_attention.partial_rotary_factor = 0.5 is not supported',
    ),
    ('text_config.rope_parameters', {}, 'rope_theta is missing'),
    ('text_config.rope_scaling', {'factor': 2}, 'rope_scaling is not support'),
    ('vision_config.rope_scaling', {'factor': 2}, 'rope_scaling is not supp'),
    ('vision_config.model_type', 'siglip', "model_type = 'siglip'"),
    (
      'text_config.per_layer_config',
      {'5': {'head_dim': 512, 'sliding_window': 8}},
      "per_layer_config.5: 'sliding_window' differs",
    ),
    (
      'text_config.per_layer_config',
      {'1': {'skip': ['mlp']}},
      "per_layer_config.1: 'skip' differs",
    ),
    ('vision_config.use_clipped_linears', True, 'use_clipped_linears = True'),
    ('vision_config.num_hidden_layers', 10**6, 'too large'),
    ('vision_config.rope_parameters.rope_type', 'x', "rope_type = 'x'"),
  ],
)
def test_what_the_network_does_not_have_is_refused(
  released, path, value, message
):
  values = edited(released, path, value)
  with pytest.raises(CheckpointError) as caught:
    huggingface_config.model_config(values, 'folder/config.json')
    huggingface_config.is_tied(values, 'folder/config.json')
  assert message in str(caught.value)
  assert str(caught.value).startswith('folder/config.json')


def test_what_a_config_says_of_quantisation_is_not_asked(released):
  """The tensors tell."""
  plain = huggingface_config.model_config(released, 'c.json')
  for key, value in (
    ('quantization_config', {'quant_method': 'modelopt'}),
    ('text_config.quantization', {'bits': 4, 'group_size': 32}),
    ('compression_config', 'fp8'),
  ):
    values = edited(released, key, value)
    assert huggingface_config.model_config(values, 'c.json') == plain


json_values = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda children: (
    st.lists(children, max_size=3)
    | st.dictionaries(st.text(), children, max_size=3)
  ),
  max_leaves=5,
)


@hypothesis.given(st.data())
def test_any_json_is_a_config_or_an_error(released, data):
  """One value of the config replaced by anything."""
  values = copy.deepcopy(released)
  node = values
  while True:
    key = data.draw(st.sampled_from(sorted(node)))
    if not isinstance(node[key], dict) or data.draw(st.booleans()):
      break
    node = node[key]
  node[key] = data.draw(json_values)
  try:
    config = huggingface_config.model_config(values)
    huggingface_config.diffusion_config(values, values, config.vocab_size, '')
  except CheckpointError:
    return
  assert isinstance(config, configs.ModelConfig)


def test_arrays_are_turned_and_turned_back():
  """Element by element: q_proj[d, n, h] is their weight[n*H + h, d]."""
  config = configs.ModelConfig(
    vocab_size=11,
    embed_dim=6,
    attention_pattern=('local', 'global'),
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    num_global_kv_heads=1,
    global_head_dim=4,
    mlp_dim=5,
    num_experts=3,
    experts_per_token=1,
    expert_dim=7,
  )
  table = huggingface.tensor_table(denoiser.abstract_params(config))
  prefix = 'model.decoder.layers.0.self_attn'
  entry = table[f'{prefix}.q_proj.weight']
  theirs = np.arange(8 * 6).reshape(8, 6)
  ours = entry.to_ours(theirs)
  assert ours.shape == (6, 4, 2) and ours[5, 3, 1] == theirs[3 * 2 + 1, 5]
  entry = table[f'{prefix}.o_proj.weight']
  theirs = np.arange(6 * 8).reshape(6, 8)
  ours = entry.to_ours(theirs)
  assert ours.shape == (4, 2, 6) and ours[3, 1, 5] == theirs[5, 3 * 2 + 1]
  assert table['model.decoder.layers.1.layer_scalar'].path == (
    'layer_01',
    'denoise_scalar',
  )
  assert table['model.encoder.language_model.layers.1.layer_scalar'].path == (
    'layer_01',
    'prefill_scalar',
  )
  for entry in table.values():
    theirs = np.random.default_rng(0).normal(size=entry.their_shape)
    back = entry.to_theirs(entry.to_ours(theirs))
    np.testing.assert_array_equal(back, theirs)
