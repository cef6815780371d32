"""Maps Hugging Face's DiffusionGemma tensors to our parameters.

  model.decoder.layers.7.self_attn.q_proj.weight  [N*H, D]
    = layer_07/attention/q_proj  [D, N, H]          transposed, then split

Every leaf of the parameters is one tensor of a folder; types and bits are never
changed. Encoder and decoder share all weights of the text layers, and the head
is the embedding: a folder may hold such a tensor under several of its names,
with the same bits, or under any one of them. Names as in `transformers` 5.24.
"""

from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

from absl import logging
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import foreign
from diffusiongemma.checkpoints import safetensors
from diffusiongemma.config import ModelConfig
from diffusiongemma.model import denoiser
from diffusiongemma.model import parameters

# (our path, their name, whether transposed); * is the number of the layer.
_TEXT_LAYER = (
  ('norm_in/scale', 'input_layernorm.weight', False),
  ('attention/q_proj', 'self_attn.q_proj.weight', True),
  ('attention/k_proj', 'self_attn.k_proj.weight', True),
  ('attention/v_proj', 'self_attn.v_proj.weight', True),
  ('attention/o_proj', 'self_attn.o_proj.weight', True),
  ('attention/q_norm/scale', 'self_attn.q_norm.weight', False),
  ('attention/k_norm/scale', 'self_attn.k_norm.weight', False),
  ('norm_post_attn/scale', 'post_attention_layernorm.weight', False),
  ('norm_pre_ffw/scale', 'pre_feedforward_layernorm.weight', False),
  ('shared_mlp/gate', 'mlp.gate_proj.weight', True),
  ('shared_mlp/up', 'mlp.up_proj.weight', True),
  ('shared_mlp/down', 'mlp.down_proj.weight', True),
  ('norm_post_ffw_1/scale', 'post_feedforward_layernorm_1.weight', False),
  ('norm_pre_ffw_2/scale', 'pre_feedforward_layernorm_2.weight', False),
  ('router/scale', 'router.scale', False),
  ('router/proj', 'router.proj.weight', True),
  ('router/per_expert_scale', 'router.per_expert_scale', False),
  ('experts/gate_up', 'experts.gate_up_proj', False),
  ('experts/down', 'experts.down_proj', False),
  ('norm_post_ffw_2/scale', 'post_feedforward_layernorm_2.weight', False),
  ('norm_post_ffw/scale', 'post_feedforward_layernorm.weight', False),
  ('denoise_scalar', 'layer_scalar', False),
)
_VISION_LAYER = (
  ('norm_in/scale', 'input_layernorm.weight', False),
  ('attention/q_proj', 'self_attn.q_proj.linear.weight', True),
  ('attention/k_proj', 'self_attn.k_proj.linear.weight', True),
  ('attention/v_proj', 'self_attn.v_proj.linear.weight', True),
  ('attention/o_proj', 'self_attn.o_proj.linear.weight', True),
  ('attention/q_norm/scale', 'self_attn.q_norm.weight', False),
  ('attention/k_norm/scale', 'self_attn.k_norm.weight', False),
  ('norm_post_attn/scale', 'post_attention_layernorm.weight', False),
  ('norm_pre_ffw/scale', 'pre_feedforward_layernorm.weight', False),
  ('mlp/gate', 'mlp.gate_proj.linear.weight', True),
  ('mlp/up', 'mlp.up_proj.linear.weight', True),
  ('mlp/down', 'mlp.down_proj.linear.weight', True),
  ('norm_post_ffw/scale', 'post_feedforward_layernorm.weight', False),
)
_DECODER, _ENCODER = 'model.decoder', 'model.encoder'
_TOWER = f'{_ENCODER}.vision_tower'
_CONDITIONING = f'{_DECODER}.self_conditioning'
_TABLE = (
  ('embedding', f'{_DECODER}.embed_tokens.weight', False),
  ('final_norm/scale', f'{_DECODER}.norm.weight', False),
  ('self_conditioning/norm/scale', f'{_CONDITIONING}.pre_norm.weight', False),
  ('self_conditioning/mlp/gate', f'{_CONDITIONING}.gate_proj.weight', True),
  ('self_conditioning/mlp/up', f'{_CONDITIONING}.up_proj.weight', True),
  ('self_conditioning/mlp/down', f'{_CONDITIONING}.down_proj.weight', True),
  *(
    (f'layer_*/{ours}', f'{_DECODER}.layers.*.{theirs}', transposed)
    for ours, theirs, transposed in _TEXT_LAYER
  ),
  # The only weights that differ between encoder and decoder.
  (
    'layer_*/prefill_scalar',
    f'{_ENCODER}.language_model.layers.*.layer_scalar',
    False,
  ),
  ('vision/input_proj', f'{_TOWER}.patch_embedder.input_proj.weight', True),
  (
    'vision/position_table',
    f'{_TOWER}.patch_embedder.position_embedding_table',
    False,
  ),
  *(
    (
      f'vision/layer_*/{ours}',
      f'{_TOWER}.encoder.layers.*.{theirs}',
      transposed,
    )
    for ours, theirs, transposed in _VISION_LAYER
  ),
  ('vision/std_bias', f'{_TOWER}.std_bias', False),
  ('vision/std_scale', f'{_TOWER}.std_scale', False),
  (
    'vision/projection',
    f'{_ENCODER}.embed_vision.embedding_projection.weight',
    True,
  ),
)
_RULES = {ours: (theirs, transposed) for ours, theirs, transposed in _TABLE}
_TEXT_ENCODER = f'{_ENCODER}.language_model'
_SCALAR = 'layer_scalar'
# Buffers that follow from the config; some versions store a few of them.
_DERIVED = ('inv_freq', 'position_ids', 'embed_scale')
_ONE_WEIGHT = (
  'this network has one weight for both roles, encoder and decoder, and for '
  'embedding and head'
)


class Entry(NamedTuple):
  """One tensor, ours and theirs.

  Attributes:
    name: their name, under which it is written.
    copies: their other names for it, tied to `name`.
    path: our keys from the root of the parameters.
    shape: our shape.
    their_shape: their shape.
    transposed: whether they store it output-major.
  """

  name: str
  copies: tuple[str, ...]
  path: tuple[str, ...]
  shape: tuple[int, ...]
  their_shape: tuple[int, ...]
  transposed: bool

  def to_ours(self, array: np.ndarray) -> np.ndarray:
    """Their tensor in our shape, with the same bits."""
    if self.transposed:
      array = np.ascontiguousarray(array.T)
    return array.reshape(self.shape)

  def to_theirs(self, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`."""
    if self.transposed:
      array = np.ascontiguousarray(array.reshape(self.their_shape[::-1]).T)
    return array.reshape(self.their_shape)


def tensor_table(abstract_params: Any) -> dict[str, Entry]:
  """`{their name: entry}` for every leaf of the parameters.

  Args:
    abstract_params: nested dict of arrays or `jax.ShapeDtypeStruct`.
  """
  table = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract_params):
    path = tuple(key.key for key in keys)
    number, pattern = '', []
    for part in path:
      if part.startswith('layer_'):
        number, part = str(int(part.removeprefix('layer_'))), 'layer_*'
      pattern.append(part)
    name, transposed = _RULES['/'.join(pattern)]
    name, shape = name.replace('*', number), tuple(leaf.shape)
    their_shape = shape
    if transposed:
      inputs, outputs = parameters.row_of(path).sizes(shape)
      their_shape = (math.prod(outputs), math.prod(inputs))  # Heads merged.
    table[name] = Entry(
      name, _copies(name), path, shape, their_shape, transposed
    )
  return table


def _copies(name: str) -> tuple[str, ...]:
  """The names that `transformers` ties to this one."""
  if not name.startswith(f'{_DECODER}.') or name.startswith(_CONDITIONING):
    return ()
  if name.endswith(_SCALAR):
    return ()
  copies = (_TEXT_ENCODER + name.removeprefix(_DECODER),)
  return (*copies, 'lm_head.weight') if 'embed_tokens' in name else copies


def find_tensors(
  folder: str, table: dict[str, Entry], are_tied: bool = True
) -> dict[str, list[safetensors.Tensor]]:
  """Finds the tensors of each entry in a folder; reads only headers.

  Args:
    folder: of safetensors.
    table: see `tensor_table`.
    are_tied: whether one copy of a tied tensor is enough.

  Returns:
    `{name of an entry: its tensors}`, one or more copies, which must be equal.

  Raises:
    CheckpointError: names are missing or unknown, or a shape or type is wrong.
  """
  entry_of = {
    name: entry.name
    for entry in table.values()
    for name in (entry.name, *entry.copies)
  }
  by_name: dict[str, list[safetensors.Tensor]] = {}
  unknown, derived = [], []
  for name, tensor in safetensors.list_tensors(folder).items():
    name = _full_name(name, entry_of)
    if name in entry_of:
      by_name.setdefault(name, []).append(tensor)
    elif name.endswith(_DERIVED):
      derived.append(name)
    else:
      unknown.append(name)
  tensors = {
    entry.name: [
      tensor
      for name in (entry.name, *entry.copies)
      for tensor in by_name.get(name, ())
    ]
    for entry in table.values()
  }
  _fill_scalars(tensors, folder)
  missing = [name for name, copies in tensors.items() if not copies]
  _check_names(folder, missing, unknown)
  _check_tied(folder, [] if are_tied else entry_of.keys() - by_name.keys())
  if derived:
    logging.warning(
      '%s: %s are not read; they follow from config.json.',
      *(folder, files.listed(derived)),
    )
  for name, copies in tensors.items():
    for tensor in copies:
      _check_tensor(tensor, table[name])
  return tensors


def _full_name(name: str, known: Collection[str]) -> str:
  """The full name of a tensor; the inner model, saved alone, lacks a prefix."""
  for full in (name, f'model.{name}', name.removeprefix('model.')):
    if full in known:
      return full
  return name


def _fill_scalars(
  tensors: dict[str, list[safetensors.Tensor]], folder: str
) -> None:
  """If all scalars of a role (encoder, decoder) are missing, uses those of the
  other: some tools drop the encoder's, and the released ones are equal."""
  for role, other in (_TEXT_ENCODER, _DECODER), (_DECODER, _TEXT_ENCODER):
    names = [n for n in tensors if n.startswith(role) and n.endswith(_SCALAR)]
    stand_ins = [tensors[other + n.removeprefix(role)] for n in names]
    if any(tensors[n] for n in names) or not names or not all(stand_ins):
      continue
    tensors.update(zip(names, stand_ins, strict=True))
    logging.warning(
      '%s has no %s.layers.*.%s: those of %s are used instead.',
      *(folder, role, _SCALAR, other),
    )


def _check_names(folder: str, missing: list[str], unknown: list[str]) -> None:
  problems = [
    f'{what}: {files.listed(names)}'
    for what, names in (('missing', missing), ('unknown', unknown))
    if names
  ]
  if problems:
    raise CheckpointError(
      f'The tensors in {folder} are not those of its config.json; '
      f'{"; ".join(problems)}{foreign.describe_names(unknown)}.'
    )


def _check_tied(folder: str, lost: Collection[str]) -> None:
  """Raises `CheckpointError` if untied weights lack a copy of their own."""
  if lost:
    raise CheckpointError(
      f'The config.json in {folder} unties weights (tie_word_embeddings is '
      f'false), and {files.listed(lost)} are missing, but {_ONE_WEIGHT}. If '
      'they are tied, set it to true.'
    )


def _check_tensor(tensor: safetensors.Tensor, entry: Entry) -> None:
  if tensor.shape != entry.their_shape:
    raise CheckpointError(
      f'{tensor.name} in {tensor.path} has the shape {list(tensor.shape)}; by '
      f'config.json it is {list(entry.their_shape)}.'
    )
  if tensor.dtype not in safetensors.DTYPE_NAMES:
    raise CheckpointError(
      f'{tensor.name} in {tensor.path} has the type {tensor.dtype}; supported '
      f'are {", ".join(x.name for x in safetensors.DTYPE_NAMES)}. Quantised '
      'weights are not read.'
    )


def read_array(
  entry: Entry, tensors: Sequence[safetensors.Tensor]
) -> np.ndarray:
  """One array in our shape, with the same bits.

  Args:
    entry: of the table.
    tensors: its copies, one or more; see `find_tensors`.

  Raises:
    CheckpointError: copies of a tied tensor differ, or a file changes
      meanwhile.
  """
  first, *copies = tensors
  array = safetensors.read_tensor(first)
  for copy in copies:
    if not safetensors.has_bits(copy, array):
      raise CheckpointError(
        f'{copy.name} in {copy.path} differs from {first.name} in '
        f'{first.path}, but {_ONE_WEIGHT}.'
      )
  return entry.to_ours(array)


def from_state_dict(
  config: ModelConfig, state: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Our parameters from the state dict of a `transformers` model."""
  table = tensor_table(denoiser.abstract_params(config))
  return traverse_util.unflatten_dict(
    {
      entry.path: jnp.asarray(entry.to_ours(np.asarray(state[name])))
      for name, entry in table.items()
    }
  )
