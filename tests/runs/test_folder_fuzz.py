"""Random Hugging Face folders: our verdict beside that of transformers.

A small folder is changed in its config, its tensors and its index, at random.
Both read the same network from it, or both refuse it, or the difference is one
of `EXPLAINED`. `FOLDERS=200` tries so many, `SEED=1` others.
"""

import collections
import copy
import dataclasses
import json
import os
import random

import hf_folder
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusiongemma
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import huggingface
from diffusiongemma.checkpoints import huggingface_config
from diffusiongemma.checkpoints import safetensors_writer

parity = pytest.importorskip('parity', reason='needs torch, transformers')
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

# With room for a canvas of the default length.
MODEL = dataclasses.replace(hf_folder.MODEL, context_length=1024)
DECODER, ENCODER = hf_folder.DECODER, hf_folder.ENCODER
FOLDERS = int(os.environ.get('FOLDERS', 24))
SEED = int(os.environ.get('SEED', 0))

# Where the verdicts may differ: {kind of change: (ours, theirs, why)}.
SAME, OTHER, REFUSED = 'reads it', 'reads another', 'refuses'
INVENTS = 'transformers makes up what is missing'
UNSEEN = 'no tensor shows it, so it is refused unless it is known'
EXPLAINED = {
  'tensor missing': (REFUSED, OTHER, INVENTS),
  'tensor renamed': (REFUSED, OTHER, INVENTS),
  'weights untied': (REFUSED, OTHER, INVENTS),
  'vision kind': (REFUSED, OTHER, INVENTS),
  'scalars missing': (SAME, OTHER, 'those of the other role stand in'),
  'encoder names alone': (SAME, OTHER, 'its scalars are for both roles'),
  'tensor unknown': (REFUSED, SAME, 'it may be a part of another network'),
  'copy differs': (REFUSED, OTHER, 'one weight for both roles'),
  'two in a folder': (REFUSED, OTHER, 'nobody knows which is meant'),
  'index without metadata': (SAME, REFUSED, 'they say nothing'),
  'index beside the file': (REFUSED, SAME, 'it must be readable'),
  'path with ..': (REFUSED, SAME, 'files lie in the folder'),
  'null': (SAME, REFUSED, 'null counts as absent'),
  'whole number': (SAME, REFUSED, 'a whole number is a number'),
  'key not read': (SAME, REFUSED, 'it says nothing of the network'),
  'activation': (REFUSED, OTHER, UNSEEN),
  'rotation': (REFUSED, OTHER, UNSEEN),
  'layer skipped': (REFUSED, OTHER, UNSEEN),
  'no model_type': (REFUSED, SAME, 'it was told the class'),
}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """(config, arrays) as transformers 5.24 writes them."""
  folder = tmp_path_factory.mktemp('base')
  parity.make_reference(MODEL, 8).save_pretrained(folder)
  config = json.loads((folder / 'config.json').read_text())
  return config, hf_folder.arrays_of(folder)


# Changes of the config: (kind, change of the values).

NUMBERS = (
  'text_config.rms_norm_eps',
  'text_config.final_logit_softcapping',
  'text_config.sliding_window',
  'text_config.top_k_experts',
  'text_config.max_position_embeddings',
  'text_config.hidden_size',
  'text_config.head_dim',
  'text_config.num_attention_heads',
  'text_config.intermediate_size',
  'text_config.vocab_size',
  'text_config.rope_parameters.full_attention.rope_theta',
  'text_config.rope_parameters.full_attention.partial_rotary_factor',
  'text_config.rope_parameters.sliding_attention.rope_theta',
  'vision_config.rms_norm_eps',
  'vision_config.num_attention_heads',
  'vision_config.pooling_kernel_size',
  'vision_config.rope_parameters.rope_theta',
  'canvas_length',
  'image_token_id',
)
OTHERS = (
  'text_config.rope_parameters.full_attention.rope_type',
  'text_config.rope_parameters.sliding_attention.rope_type',
  'text_config.rope_parameters.sliding_attention',
  'text_config.rope_parameters',
  'text_config.layer_types',
  'text_config.hidden_activation',
  'text_config.attention_bias',
  'text_config.tie_word_embeddings',
  'text_config.use_bidirectional_attention',
  'vision_config.rope_parameters.rope_type',
  'vision_config.rope_parameters',
  'vision_config.standardize',
  'vision_config.attention_bias',
  'tie_word_embeddings',
  'dtype',
  'architectures',
)
NOT_READ = (
  'text_config.initializer_range',
  'text_config.attention_dropout',
  'vision_config.max_position_embeddings',
  'initializer_range',
  'transformers_version',
)
NOTES = {
  'notes': ['anything', {}],
  'global_head_dim': 72,
  'default_output_length': 280,
  'attention_k_eq_v': True,
  'num_kv_shared_layers': 0,
  'id2label': {'0': 'LABEL_0'},
  'quantization_config': None,
  'use_cache': False,
}


def put(values, path, value):
  """Sets the value at a path of names, or removes it for `...`."""
  *parents, last = path.split('.')
  for name in parents:
    values = values[name]
  if value is ...:
    values.pop(last, None)
  else:
    values[last] = value


def get(values, path):
  for name in path.split('.'):
    values = values[name]
  return values


def at(kind, path, *choices):
  return kind, lambda values, rng: put(values, path, rng.choice(choices))


def change_null(values, rng):
  put(values, rng.choice((*NUMBERS, *OTHERS)), None)


def change_removed(values, rng):
  put(values, rng.choice((*NUMBERS, *OTHERS, *NOT_READ)), ...)


def change_type(values, rng):
  wrong = rng.choice(('x', [1], {'a': 1}, True, -1, 2**70))
  put(values, rng.choice(NUMBERS), wrong)


def change_number(values, rng):
  path = rng.choice(NUMBERS)
  value = get(values, path)
  put(values, path, value * 2 if isinstance(value, int) else value * 0.5)


def change_whole(values, rng):
  paths = [p for p in NUMBERS if isinstance(get(values, p), float)]
  put(values, rng.choice(paths), 1)


def change_not_read(values, rng):
  put(values, rng.choice(NOT_READ), rng.choice(('x', {}, None, [])))


def add_note(values, rng):
  key = rng.choice(list(NOTES))
  inside = rng.choice((values, values['text_config'], values['vision_config']))
  if key != 'global_head_dim' or inside is values['vision_config']:
    inside[key] = copy.deepcopy(NOTES[key])


def change_released(values, rng):
  """Sizes of global layers as before 5.17."""
  text = values['text_config']
  text |= {'global_head_dim': 8, 'num_global_key_value_heads': 1}
  del text['per_layer_config']
  put(values, 'vision_config.rope_parameters.rope_type', 'default')


def change_layers(values, rng):
  sizes = {'head_dim': 8, 'num_key_value_heads': 1}
  values['text_config']['per_layer_config'] = rng.choice(
    (
      {'01': sizes},
      {'0': {}, '1': sizes},
      {'1': sizes, '2': sizes},
      {'1': sizes | {'sliding_window': 3}},
      {'1': sizes | {'rms_norm_eps': 0.5}},
      {'1': sizes | {'note': 3}},
      {'x': sizes},
      {'0': sizes},
      [sizes],
    )
  )


FULL = 'text_config.rope_parameters.full_attention'
LOCAL = 'text_config.rope_parameters.sliding_attention'
SIGLIP = {'model_type': 'siglip_vision_model', 'hidden_size': 8}
CONFIG_CHANGES = (
  ('null', change_null),
  ('removed', change_removed),
  ('type', change_type),
  ('number', change_number),
  ('number', change_number),
  ('whole number', change_whole),
  ('key not read', change_not_read),
  ('note', add_note),
  ('note', add_note),
  ('released', change_released),
  ('layers', change_layers),
  at('rotation name', 'vision_config.rope_parameters.rope_type', 'default'),
  at('rotation', f'{FULL}.rope_type', 'default', 'linear', 'x', ...),
  at('rotation', f'{LOCAL}.rope_type', 'proportional', 'linear', 'x', ...),
  at('rotation', 'vision_config.rope_parameters.rope_type', 'linear', 'x'),
  at('rotation', f'{FULL}.factor', 2.0),
  at('rotation', 'vision_config.rope_scaling', {'rope_theta': 7.0}, {}),
  at('rotation', 'text_config.rope_scaling', {'rope_type': 'linear'}),
  at('note', f'{LOCAL}.factor', 2.0),
  at('note', f'{FULL}.attention_factor', 2.0),
  at('note', 'text_config.rope_parameters.chunked_attention', {}),
  at('activation', 'text_config.hidden_activation', 'silu', 'gelu_new', 'x'),
  at('activation', 'vision_config.hidden_activation', 'silu', 'relu'),
  at('bias', 'text_config.attention_bias', True, False),
  at('weights untied', 'tie_word_embeddings', False),
  at('note', 'text_config.tie_word_embeddings', False),
  at('layer skipped', 'text_config.per_layer_config.1.skip', ['mlp']),
  at('vision kind', 'vision_config', SIGLIP),
  at('no model_type', 'model_type', ..., None, 'gemma4'),
  at('note', 'text_config.model_type', 'gemma3_text'),
  at(
    'quantised', 'quantization_config', {}, {'quant_method': 'x'}, {'bits': 4}
  ),
  at('quantised', 'quantization', {'bits': 4, 'group_size': 32}),
  at('type', 'text_config', [], None, 'x'),
  at('last layer', 'text_config.layer_types', ['sliding_attention'] * 2),
  at('note', 'dtype', 'bfloat16', 'float16', None),
)


# Changes of the tensors: from arrays to arrays.


def add_copies(arrays, rng):
  """All, or some."""
  copies = hf_folder.copies_of(arrays)
  names = rng.sample(sorted(copies), rng.choice((1, 3, len(copies))))
  return arrays | {name: copies[name] for name in names}


def change_copy(arrays, rng):
  copies = hf_folder.copies_of(arrays)
  copies = {n: x for n, x in copies.items() if n not in arrays}
  name = rng.choice(sorted(copies))
  return arrays | copies | {name: copies[name] + np.float32(1)}


def drop(arrays, rng):
  names = [n for n in arrays if not n.endswith('layer_scalar')]
  return hf_folder.without(arrays, rng.choice(names))


def drop_scalars(arrays, rng):
  role = rng.choice((DECODER, ENCODER))
  return {
    n: x
    for n, x in arrays.items()
    if not (n.startswith(role) and n.endswith('layer_scalar'))
  }


def rename(arrays, rng):
  old = rng.choice([n for n in arrays if 'layer_scalar' not in n])
  new = rng.choice((old + '_packed', f'module.{old}', old.replace('e', 'E')))
  return {new if n == old else n: x for n, x in arrays.items()}


def add(arrays, *names):
  return arrays | dict.fromkeys(names, np.ones(3, np.float32))


def add_unknown(arrays, rng):
  return add(arrays, rng.choice(('x', 'model.x.bias', 'vision_head.weight')))


def add_derived(arrays, rng):
  prefix = rng.choice((DECODER, ENCODER, 'model.encoder.vision_tower.'))
  last = rng.choice(('rotary_emb.inv_freq', 'x.position_ids', 'inv_freq'))
  return add(arrays, prefix + last)


def reshape(arrays, rng):
  name = rng.choice(sorted(arrays))
  return arrays | {name: np.ones((*arrays[name].shape, 2), np.float32)}


def unprefix(arrays, rng):
  some = rng.choice(('model.', 'model.decoder.', 'model.encoder.'))
  return {
    n.removeprefix('model.') if n.startswith(some) else n: x
    for n, x in arrays.items()
  }


def add_unprefixed(arrays, rng):
  return arrays | {n.removeprefix('model.'): x for n, x in arrays.items()}


def change_unprefixed(arrays, rng):
  name = rng.choice(sorted(arrays))
  other = arrays[name] + np.float32(1)
  return arrays | {name.removeprefix('model.'): other}


TENSOR_CHANGES = (
  ('copies', add_copies),
  ('copies', add_copies),
  ('copy differs', change_copy),
  ('tensor missing', drop),
  ('scalars missing', drop_scalars),
  ('tensor renamed', rename),
  ('tensor unknown', add_unknown),
  ('derived', add_derived),
  ('shape', reshape),
  ('no prefix', unprefix),
  ('both prefixes', add_unprefixed),
  ('two in a folder', change_unprefixed),
  ('two prefixes', lambda a, rng: {f'model.{n}': x for n, x in a.items()}),
  ('encoder names alone', lambda a, rng: hf_folder.encoder_names(a)),
)


# Ways to store them: (kind, writes arrays into a folder).


def write(folder, arrays):
  folder.mkdir(exist_ok=True)
  safetensors_writer.write_folder(
    str(folder),
    {name: (x.shape, x.dtype) for name, x in arrays.items()},
    arrays.__getitem__,
  )


def write_two(folder, arrays, rng):
  """Two files and their index, which is returned."""
  names = sorted(arrays)
  cut = rng.randrange(1, len(names))
  weight_map = {}
  for file, some in ('a', names[:cut]), ('b', names[cut:]):
    write(folder, {name: arrays[name] for name in some})
    file += '.safetensors'
    (folder / 'model.safetensors').rename(folder / file)
    weight_map |= dict.fromkeys(some, file)
  return {'metadata': {'total_size': 0}, 'weight_map': weight_map}


def change_index(change):
  def store(folder, arrays, rng):
    index = write_two(folder, arrays, rng)
    index = change(folder, index, rng) or index
    path = folder / 'model.safetensors.index.json'
    path.write_text(json.dumps(index))

  return store


def lack(folder, index, rng):
  """A tensor that is not the last of its file."""
  counts = collections.Counter(index['weight_map'].values())
  for name, file in sorted(index['weight_map'].items()):
    if counts[file] > 1:
      del index['weight_map'][name]
      return


def paths(prefix):
  def change(folder, index, rng):
    places = index['weight_map'].items()
    index['weight_map'] = {name: prefix + file for name, file in places}

  return change


def below(folder, index, rng):
  (folder / 'sub').mkdir()
  (folder / 'a.safetensors').rename(folder / 'sub' / 'a.safetensors')
  for name, file in index['weight_map'].items():
    if file == 'a.safetensors':
      index['weight_map'][name] = 'sub/a.safetensors'


def twice(difference):
  """A tensor of one file in the other too, which is read last."""

  def store(folder, arrays, rng):
    index = write_two(folder, arrays, rng)
    names = sorted(n for n, f in index['weight_map'].items() if f[0] == 'a')
    again = rng.choice(names)
    some = {n: arrays[n] for n, f in index['weight_map'].items() if f[0] == 'b'}
    write(folder, some | {again: arrays[again] + np.float32(difference)})
    (folder / 'model.safetensors').rename(folder / 'b.safetensors')
    path = folder / 'model.safetensors.index.json'
    path.write_text(json.dumps(index))

  return store


def write_single(folder, arrays, rng):
  write(folder, arrays)


def write_beside(index):
  def store(folder, arrays, rng):
    write(folder, arrays)
    (folder / 'model.safetensors.index.json').write_text(index)

  return store


def write_bfloat16(folder, arrays, rng):
  write(folder, {n: x.astype(jnp.bfloat16) for n, x in arrays.items()})


SHARD = 'a.safetensors'
STALE = '{"metadata": {}, "weight_map": {"x": "gone.safetensors"}}'
STORES = (
  *[('single', write_single)] * 6,
  *[('index', change_index(lambda *_: None))] * 2,
  ('index lacks', change_index(lack)),
  ('index', change_index(lambda f, i, r: i['weight_map'].update(x=SHARD))),
  ('index', change_index(paths('./'))),
  ('index', change_index(below)),
  ('path with ..', change_index(paths('sub/../'))),
  ('path outside', change_index(paths('../'))),
  ('shard missing', change_index(paths('x'))),
  ('index without metadata', change_index(lambda f, i, r: i.pop('metadata'))),
  ('index', change_index(lambda f, i, r: i['metadata'].clear())),
  ('no index', change_index(lambda *_: [])),
  ('same twice', twice(0)),
  ('two in a folder', twice(1)),
  ('single', write_beside(STALE)),
  ('index beside the file', write_beside('{')),
  ('bfloat16', write_bfloat16),
)


# Verdicts.


def make_folder(folder, base, rng):
  """A folder with changes; their kinds."""
  values, arrays = copy.deepcopy(base[0]), dict(base[1])
  kinds = []
  which = rng.choice(('config', 'tensors', 'both', 'stored'))
  if which in ('config', 'both'):
    kind, change = rng.choice(CONFIG_CHANGES)
    change(values, rng)
    kinds.append(kind)
  if which in ('tensors', 'both'):
    kind, change = rng.choice(TENSOR_CHANGES)
    arrays = change(arrays, rng)
    kinds.append(kind)
  kind, store = rng.choice(STORES)
  folder.mkdir()
  store(folder, arrays, rng)
  (folder / 'config.json').write_text(json.dumps(values))
  return [*kinds, kind]


def read_ours(folder):
  """(network, parameters), or the reason why not."""
  try:
    run = diffusiongemma.load(str(folder))
  except CheckpointError as error:
    assert str(error).isprintable() and len(str(error)) < 2000
    return str(error)
  return run.config, run.params


TOKENS = np.array([[2, 5, 9, 33, 7, 21]])


def read_theirs(folder):
  """(network, parameters, logits), or the reason why not; the network is None
  where it is one that we do not have."""
  kind = parity.modeling_diffusion_gemma.DiffusionGemmaForBlockDiffusion
  try:
    model, report = kind.from_pretrained(
      str(folder), output_loading_info=True, attn_implementation='eager'
    )
    with torch.no_grad():
      tokens = torch.tensor(TOKENS)
      logits = model(input_ids=tokens, decoder_input_ids=tokens).logits
  except Exception as error:  # Whatever it meets: it has no error of its own.
    return f'{type(error).__name__}: {error}'
  named = dict(model.named_parameters(remove_duplicate=False))
  for name, tensor in named.items():
    twin = named.get(name.replace(ENCODER, DECODER), tensor)
    twin = named[f'{DECODER}embed_tokens.weight'] if 'lm_head' in name else twin
    if tensor is not twin and not torch.equal(tensor, twin):
      return None, None, None
  values = json.loads(json.dumps(model.config.to_dict(), default=str))
  try:
    network = huggingface_config.model_config(values)
  except CheckpointError:
    return None, None, None
  if report['missing_keys']:
    return None, None, None
  state = {n: x.float().numpy() for n, x in model.state_dict().items()}
  params = huggingface.from_state_dict(network, state)
  return network, params, logits.float().numpy()


@jax.jit
def our_logits(params):
  cache = diffusiongemma.init_cache(MODEL, 1, 6)
  cache = diffusiongemma.prefill(
    MODEL, params, jnp.asarray(TOKENS), jnp.array([6]), cache
  )
  network, bound = diffusiongemma.Denoiser(MODEL), {'params': params}
  h = network.apply(
    bound, jnp.asarray(TOKENS), jnp.zeros((1, 6, 16)), cache, method='denoise'
  )
  return network.apply(bound, h, method='logits')


def compare(folder):
  """(our verdict, theirs, reasons)."""
  ours, theirs = read_ours(folder), read_theirs(folder)
  reasons = [x for x in (ours, theirs) if isinstance(x, str)]
  if isinstance(ours, str) or isinstance(theirs, str):
    if isinstance(theirs, str):
      return REFUSED if isinstance(ours, str) else SAME, REFUSED, reasons
    return REFUSED, SAME if theirs[0] else OTHER, reasons
  (config, params), (network, their_params, logits) = ours, theirs
  if network is None:
    return SAME, OTHER, reasons
  types = {'dtype': 'float32', 'param_dtype': 'float32'}
  ours_alone = dataclasses.replace(config.model, **types)
  if ours_alone != dataclasses.replace(network, **types):
    return SAME, OTHER, [config.model, network]
  # What is stored stays as it is; transformers rounds it to the config's type.
  dtype = jnp.dtype(config.model.param_dtype)
  round_ = lambda x: x.astype(dtype).astype(jnp.float32)
  if not hf_folder.same_trees(
    jax.tree.map(round_, params), jax.tree.map(round_, their_params)
  ):
    return SAME, OTHER, ['parameters']
  if ours_alone == MODEL and dtype == jnp.float32:
    float32 = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    assert parity.difference(our_logits(float32), logits) < 1e-4
  return SAME, SAME, reasons


def is_explained(ours, theirs, kinds):
  pairs = [EXPLAINED[kind][:2] for kind in kinds if kind in EXPLAINED]
  if ours == REFUSED:
    return any(pair[0] == REFUSED for pair in pairs)
  # Ours reads what is stored.
  return any(pair[1] == theirs and pair[0] == SAME for pair in pairs)


def test_verdicts_on_random_folders(tmp_path, base):
  changes = (*CONFIG_CHANGES, *TENSOR_CHANGES, *STORES)
  assert EXPLAINED.keys() <= {kind for kind, _ in changes}
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  seen, unexplained = collections.Counter(), []
  for index in range(FOLDERS):
    rng = random.Random(f'{SEED} {index}')
    folder = tmp_path / str(index)
    kinds = make_folder(folder, base, rng)
    ours, theirs, reasons = compare(folder)
    seen[ours, theirs] += 1
    if ours != theirs:
      seen['differ'] += 1
      if not is_explained(ours, theirs, kinds):
        unexplained.append((index, kinds, ours, theirs, reasons))
  print(dict(seen))
  assert not unexplained, '\n'.join(map(str, unexplained))
  assert seen[SAME, SAME] > FOLDERS / 4 and seen[REFUSED, REFUSED]
