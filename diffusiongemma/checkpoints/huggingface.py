"""Maps Hugging Face's DiffusionGemma tensors to our parameters.

  model.decoder.layers.7.self_attn.q_proj.weight  [N*H, D]
    = layer_07/attention/q_proj  [D, N, H]          transposed, then split

Every leaf of the parameters is one tensor of a folder; types and bits are never
changed. Encoder and decoder share all weights of the text layers, and the head
is the embedding: their tensors have several names. Names as in `transformers`
5.24; `contents` finds them in a folder.
"""

from collections.abc import Mapping
import math
from typing import Any
from typing import NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

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
DECODER, _ENCODER = 'model.decoder', 'model.encoder'
_TOWER = f'{_ENCODER}.vision_tower'
_CONDITIONING = f'{DECODER}.self_conditioning'
_TABLE = (
  ('embedding', f'{DECODER}.embed_tokens.weight', False),
  ('final_norm/scale', f'{DECODER}.norm.weight', False),
  ('self_conditioning/norm/scale', f'{_CONDITIONING}.pre_norm.weight', False),
  ('self_conditioning/mlp/gate', f'{_CONDITIONING}.gate_proj.weight', True),
  ('self_conditioning/mlp/up', f'{_CONDITIONING}.up_proj.weight', True),
  ('self_conditioning/mlp/down', f'{_CONDITIONING}.down_proj.weight', True),
  *(
    (f'layer_*/{ours}', f'{DECODER}.layers.*.{theirs}', transposed)
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
TEXT_ENCODER = f'{_ENCODER}.language_model'
SCALAR = 'layer_scalar'


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
  if not name.startswith(f'{DECODER}.') or name.startswith(_CONDITIONING):
    return ()
  if name.endswith(SCALAR):
    return ()
  copies = (TEXT_ENCODER + name.removeprefix(DECODER),)
  return (*copies, 'lm_head.weight') if 'embed_tokens' in name else copies


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
