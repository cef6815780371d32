"""Hugging Face's DiffusionGemma tensors: what each of them is here.

  model.decoder.layers.7.self_attn.q_proj.weight  [N*H, D]
    = layer_07/attention/q_proj  [D, N, H]          transposed, then split

Every tensor of a folder is one leaf of the parameters and the other way
round; types and bits are never changed. Names as in `transformers` 5.24.
"""

from collections.abc import Iterator
import math
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import safetensors

# (our path, their name, whether it is transposed); * is the layer's number.
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
  # All that differs between the roles; the rest is stored once.
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


class Entry(NamedTuple):
  """One tensor in both worlds.

  Attributes:
    name: theirs.
    path: ours, the keys from the root of the parameters.
    shape: ours.
    their_shape: theirs.
    transposed: whether they store it output-major.
  """

  name: str
  path: tuple[str, ...]
  shape: tuple[int, ...]
  their_shape: tuple[int, ...]
  transposed: bool

  def to_ours(self, array: np.ndarray) -> np.ndarray:
    """Their tensor as ours, the same bits."""
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
      # Heads are merged; only the output projection has them on the input.
      inputs = 2 if path[-1] == 'o_proj' else 1
      their_shape = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
    table[name] = Entry(name, path, shape, their_shape, transposed)
  return table


def check_tensors(
  folder: str, table: dict[str, Entry]
) -> dict[str, safetensors.Tensor]:
  """The tensors in `folder`, which must be exactly those of the table.

  Raises:
    CheckpointError: names are missing or unknown, or a shape is another.
  """
  found = safetensors.list_tensors(folder)
  problems = []
  for what, names in (
    ('missing', sorted(table.keys() - found.keys())),
    ('unknown', sorted(found.keys() - table.keys())),
  ):
    if names:
      problems.append(f'{what}: {files.listed(names)}')
  if problems:
    raise CheckpointError(
      f'The tensors in {folder} are not those of its config.json; '
      f'{"; ".join(problems)}.'
    )
  for name, tensor in found.items():
    if tensor.shape != table[name].their_shape:
      raise CheckpointError(
        f'{name} in {tensor.path} has the shape {list(tensor.shape)}; by '
        f'config.json it is {list(table[name].their_shape)}.'
      )
  return found


def read_arrays(
  folder: str, table: dict[str, Entry]
) -> Iterator[tuple[Entry, np.ndarray]]:
  """Our arrays one after the other; no more than one is held.

  Raises:
    CheckpointError: see `check_tensors`, before anything is read; or a file
      changes meanwhile.
  """
  tensors = check_tensors(folder, table)
  for name, entry in table.items():
    yield entry, entry.to_ours(safetensors.read_tensor(tensors[name]))
