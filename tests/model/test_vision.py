"""The image encoder against transformers', and what it must not depend on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma import config as configs
from diffusiongemma import ops
from diffusiongemma.model import vision

VISION = configs.VisionConfig(
  embed_dim=24,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=20,
  patch_size=2,
  pooling_kernel=3,
  position_table_size=16,
  soft_tokens_per_image=4,
)
VARIANTS = {
  'grouped heads, kernel 3': {},
  'kernel 2, not standardised': {
    'pooling_kernel': 2,
    'num_kv_heads': 4,
    'standardize': False,
    'head_dim': 12,
    'rope_theta': 30.0,
  },
}
# Soft tokens (rows, columns) of the images of a batch: no two alike, one that
# fills all slots, one with padding.
GRIDS = ((1, 4), (2, 2), (3, 1))

# (our leaf, their tensor); those of a layer without its number.
LAYER_TENSORS = {
  ('norm_in', 'scale'): 'input_layernorm.weight',
  ('attention', 'q_proj'): 'self_attn.q_proj.linear.weight',
  ('attention', 'k_proj'): 'self_attn.k_proj.linear.weight',
  ('attention', 'v_proj'): 'self_attn.v_proj.linear.weight',
  ('attention', 'o_proj'): 'self_attn.o_proj.linear.weight',
  ('attention', 'q_norm', 'scale'): 'self_attn.q_norm.weight',
  ('attention', 'k_norm', 'scale'): 'self_attn.k_norm.weight',
  ('norm_post_attn', 'scale'): 'post_attention_layernorm.weight',
  ('norm_pre_ffw', 'scale'): 'pre_feedforward_layernorm.weight',
  ('mlp', 'gate'): 'mlp.gate_proj.linear.weight',
  ('mlp', 'up'): 'mlp.up_proj.linear.weight',
  ('mlp', 'down'): 'mlp.down_proj.linear.weight',
  ('norm_post_ffw', 'scale'): 'post_feedforward_layernorm.weight',
}
TOP_TENSORS = {
  ('input_proj',): 'patch_embedder.input_proj.weight',
  ('position_table',): 'patch_embedder.position_embedding_table',
  ('std_bias',): 'std_bias',
  ('std_scale',): 'std_scale',
  ('projection',): 'embedding_projection.weight',
}


def make_config(dtype='float32', **changes):
  return configs.ModelConfig(
    vocab_size=97,
    embed_dim=28,
    vision=dataclasses.replace(VISION, **changes),
    dtype=dtype,
  )


def make_images(config, grids=GRIDS, seed=0):
  """Patches of random pixels, and their positions, padded to 4 soft tokens."""
  cfg, rng = config.vision, np.random.default_rng(seed)
  M = 4 * cfg.pooling_kernel**2
  patches_IMX = rng.random((len(grids), M, 3 * cfg.patch_size**2), np.float32)
  positions_IM2 = np.full((len(grids), M, 2), -1, np.int32)
  for positions_M2, (rows, columns) in zip(positions_IM2, grids, strict=True):
    y, x = np.divmod(
      np.arange(rows * columns * cfg.pooling_kernel**2),
      columns * cfg.pooling_kernel,
    )
    positions_M2[: len(x)] = np.stack([x, y], axis=-1)
  return jnp.asarray(patches_IMX), jnp.asarray(positions_IM2)


@functools.cache
def random_params(config):
  """Every leaf random, so that none can be left out unseen."""
  rng = np.random.default_rng(1)

  def fill(path, leaf):
    name = jax.tree_util.keystr(path)
    if 'scale' in name:
      return jnp.asarray(rng.uniform(0.6, 1.4, leaf.shape), leaf.dtype)
    fan_in = {'position_table': 1, 'std_bias': 1}.get(path[-1].key)
    if fan_in is None:
      fan_in = np.prod(leaf.shape[:2]) if 'o_proj' in name else leaf.shape[0]
    return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape), leaf.dtype)

  encoder = vision.VisionEncoder(config)
  shapes = jax.eval_shape(
    lambda: encoder.init(jax.random.key(0), *make_images(config))['params']
  )
  return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.partial(jax.jit, static_argnums=0)
def encode(config, params, patches_IMX, positions_IM2):
  encoder = vision.VisionEncoder(config, lower_once=True)
  return encoder.apply({'params': params}, patches_IMX, positions_IM2)


def error(ours, theirs):
  """Largest difference over the largest value."""
  ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


class Reference:
  """transformers' encoder and projection with our parameters."""

  def __init__(self, config, params, dtype='float32'):
    self.torch = pytest.importorskip(
      'torch', reason='torch is installed by the [test] extra'
    )
    reason = 'transformers is installed by the [test] extra'
    gemma4 = pytest.importorskip(
      'transformers.models.gemma4.modeling_gemma4', reason=reason
    )
    diffusion_gemma = pytest.importorskip(
      'transformers.models.diffusion_gemma.modeling_diffusion_gemma',
      reason=reason,
    )
    cfg = config.vision
    theirs = gemma4.Gemma4VisionConfig(
      hidden_size=cfg.embed_dim,
      intermediate_size=cfg.mlp_dim,
      num_hidden_layers=cfg.num_layers,
      num_attention_heads=cfg.num_heads,
      num_key_value_heads=cfg.num_kv_heads,
      head_dim=cfg.head_dim,
      rms_norm_eps=cfg.norm_epsilon,
      rope_parameters={'rope_type': 'axial', 'rope_theta': cfg.rope_theta},
      pooling_kernel_size=cfg.pooling_kernel,
      patch_size=cfg.patch_size,
      position_embedding_size=cfg.position_table_size,
      standardize=cfg.standardize,
      attn_implementation='eager',
    )
    text = diffusion_gemma.DiffusionGemmaTextConfig(
      hidden_size=config.embed_dim
    )
    self.tower = gemma4.Gemma4VisionModel(theirs).eval()
    self.project = diffusion_gemma.DiffusionGemmaMultimodalEmbedder(
      theirs, text
    )
    self.load(params)
    for module in (self.tower, self.project):
      module.to(getattr(self.torch, dtype))

  def load(self, params):
    """Fills all of their tensors, each from one of our leaves."""
    state = {**self.tower.state_dict(), **self.project.state_dict()}
    filled = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      path = tuple(key.key for key in path)
      if path[0].startswith('layer_'):
        prefix = f'encoder.layers.{int(path[0][6:])}.'
        name = prefix + LAYER_TENSORS[path[1:]]
      else:
        name = TOP_TENSORS[path]
      leaf, tensor = np.asarray(leaf, np.float32), state[name]
      if tensor.ndim == 2:  # Their linears are [out, in].
        outputs = 1 if path[-1] == 'o_proj' else leaf.ndim - 1
        leaf = leaf.reshape(-1, np.prod(leaf.shape[-outputs:])).T
      with self.torch.no_grad():
        tensor.copy_(self.torch.tensor(leaf.copy()))
      filled.add(name)
    assert filled == state.keys()

  def __call__(self, patches_IMX, positions_IM2):
    """(their features [all soft tokens, D], the inputs of each layer and the
    output of the last)."""
    hidden = []
    hooks = [
      layer.register_forward_hook(
        lambda _, inputs, output: hidden.extend([inputs[0], output])
      )
      for layer in self.tower.encoder.layers
    ]
    with self.torch.no_grad():
      encoded = self.tower(
        pixel_values=self.torch.tensor(np.array(patches_IMX)),
        pixel_position_ids=self.torch.tensor(np.array(positions_IM2)).long(),
      ).last_hidden_state
      features = self.project(encoded).float().numpy()
    for hook in hooks:
      hook.remove()
    hidden = [h.float().numpy() for h in hidden[::2] + hidden[-1:]]
    return features, hidden


def stripped(soft_ITD, config, positions_IM2):
  """Soft tokens of all images one after the other, as theirs come out."""
  counts_I = vision.num_soft_tokens(positions_IM2, config.vision.pooling_kernel)
  return np.concatenate(
    [soft[:count] for soft, count in zip(soft_ITD, counts_I, strict=True)]
  )


@pytest.mark.parametrize('variant', VARIANTS)
def test_equals_transformers(variant):
  config = make_config(**VARIANTS[variant])
  params = random_params(config)
  patches_IMX, positions_IM2 = make_images(config)
  theirs, hidden = Reference(config, params)(patches_IMX, positions_IM2)
  real_IM = np.asarray(vision.is_patch(positions_IM2))
  assert 0 < real_IM.mean() < 1

  encoder = vision.VisionEncoder(config)
  embedded = encoder.apply(
    {'params': params}, patches_IMX, positions_IM2, method='embed'
  )
  assert error(embedded[real_IM], hidden[0][real_IM]) < 1e-6
  layer = jax.jit(vision.Layer(config).apply)
  for index, (x_IMW, y_IMW) in enumerate(
    zip(hidden[:-1], hidden[1:], strict=True)
  ):
    layer_params = {'params': params[f'layer_{index:02d}']}
    ours = layer(layer_params, jnp.asarray(x_IMW), positions_IM2)
    assert error(ours[real_IM], y_IMW[real_IM]) < 5e-6

  soft_ITD = encode(config, params, patches_IMX, positions_IM2)
  assert soft_ITD.shape == (3, 4, config.embed_dim)
  assert error(stripped(soft_ITD, config, positions_IM2), theirs) < 2e-5


def test_bfloat16():
  config = make_config()
  patches_IMX, positions_IM2 = make_images(config)
  exact = encode(config, random_params(config), patches_IMX, positions_IM2)
  half = make_config('bfloat16')
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(config))
  ours = encode(half, params, patches_IMX, positions_IM2)
  # What the layers get is bfloat16, not only what comes out at the end.
  embedded = vision.VisionEncoder(half).apply(
    {'params': params}, patches_IMX, positions_IM2, method='embed'
  )
  assert embedded.dtype == ours.dtype == jnp.bfloat16
  assert 1e-4 < error(ours, exact) < 0.03
  theirs, _ = Reference(config, params, 'bfloat16')(patches_IMX, positions_IM2)
  assert error(stripped(ours, config, positions_IM2), theirs) < 0.03


def test_slots_behind_an_image_are_zero():
  config = make_config()
  patches_IMX, positions_IM2 = make_images(config)
  counts_I = vision.num_soft_tokens(positions_IM2, 3)
  assert counts_I.tolist() == [4, 4, 3] and counts_I.dtype == jnp.int32
  soft_ITD = encode(config, random_params(config), patches_IMX, positions_IM2)
  assert np.all(soft_ITD[2, 3] == 0)
  assert np.all(np.abs(soft_ITD[2, :3]).max(axis=-1) > 0.1)


def test_padding_and_other_images_change_nothing():
  config = make_config()
  params = random_params(config)
  patches_IMX, positions_IM2 = make_images(config)
  before = np.asarray(encode(config, params, patches_IMX, positions_IM2))
  padding_IM = ~vision.is_patch(positions_IM2)
  for garbage in (1e6, np.nan):
    patches = jnp.where(padding_IM[..., None], garbage, patches_IMX)
    after = encode(config, params, patches, positions_IM2)
    np.testing.assert_array_equal(after, before)
  others = patches_IMX.at[1:].set(0.25)
  after = encode(config, params, others, positions_IM2)
  np.testing.assert_array_equal(after[0], before[0])
  assert np.abs(after[1] - before[1]).max() > 0.1


def test_every_patch_reaches_every_soft_token_of_its_image():
  config = make_config()
  params = random_params(config)
  patches_IMX, positions_IM2 = make_images(config)
  reach_ITMX = jax.jit(
    jax.jacobian(
      lambda patches: jnp.sum(
        jnp.sin(encode(config, params, patches, positions_IM2)),
        axis=(0, 2),
      )
    )
  )(patches_IMX)
  # [T, I, M]: how much of a token is due to a patch.
  reach_TIM = np.abs(reach_ITMX).max(axis=-1)
  real_IM = np.asarray(vision.is_patch(positions_IM2))
  assert np.isfinite(reach_TIM).all()
  assert np.all(reach_TIM[:, ~real_IM] == 0)
  assert np.all(reach_TIM[:3, real_IM] > 0)
  assert np.all(reach_TIM[3, 2] == 0)  # The slot that its image leaves empty.


def test_the_order_of_patches_is_in_their_positions():
  config = make_config()
  params = random_params(config)
  patches_IMX, positions_IM2 = make_images(config)
  before = encode(config, params, patches_IMX, positions_IM2)
  order = np.random.default_rng(2).permutation(patches_IMX.shape[1])
  after = encode(config, params, patches_IMX[:, order], positions_IM2[:, order])
  assert error(after, before) < 2e-5
  swapped = encode(config, params, patches_IMX, positions_IM2[..., ::-1])
  assert error(swapped[1], before[1]) > 0.1


def test_pooling_takes_squares_in_reading_order():
  for kernel, rows, columns in ((1, 2, 3), (2, 3, 2), (3, 1, 2)):
    y, x = np.divmod(
      np.arange(rows * columns * kernel**2, dtype=np.int32), columns * kernel
    )
    positions_M2 = np.stack([x, y], axis=-1)
    image_MW = np.random.default_rng(0).random((len(x), 5), np.float32)
    grid = image_MW.reshape(rows, kernel, columns, kernel, 5)
    pooled = vision.pool(image_MW[None], positions_M2[None], kernel)
    np.testing.assert_allclose(
      pooled[0], grid.mean(axis=(1, 3)).reshape(-1, 5), rtol=1e-6
    )


def test_scores_of_the_largest_image_stay_bounded():
  """The largest array of a layer over 10080 patches, and of its gradient."""
  config = configs.ModelConfig(vision=configs.VisionConfig())
  layer = vision.Layer(config)
  x_IMW = jax.ShapeDtypeStruct((1, 10080, 1152), jnp.bfloat16)
  positions_IM2 = jax.ShapeDtypeStruct((1, 10080, 2), jnp.int32)
  params = jax.eval_shape(layer.init, jax.random.key(0), x_IMW, positions_IM2)

  def total(params, x_IMW, positions_IM2):
    return jnp.sum(layer.apply(params, x_IMW, positions_IM2)).astype('float32')

  for function in (layer.apply, jax.grad(total)):
    jaxpr = jax.make_jaxpr(function)(params, x_IMW, positions_IM2)
    largest = max(sizes(jaxpr.jaxpr))
    assert ops.attention.MAX_SCORES / 2 < largest <= ops.attention.MAX_SCORES


def sizes(jaxpr):
  """Of all arrays that are made anywhere in a computation."""
  for equation in jaxpr.eqns:
    yield from (variable.aval.size for variable in equation.outvars)
    for inner in jax.tree.leaves(
      equation.params, is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      if hasattr(inner, 'eqns'):
        yield from sizes(getattr(inner, 'jaxpr', inner))


def test_layers_are_lowered_once():
  products = set()
  for num_layers in (1, 3):
    config = make_config(num_layers=num_layers)
    given = (config, random_params(config), *make_images(config))
    text = encode.lower(*given).as_text()
    products.add(text.count('stablehlo.dot_general'))
  assert len(products) == 1


def test_parameters():
  """Names and shapes, which a table of checkpoint tensors relies on."""
  config = make_config()
  encoder = vision.VisionEncoder(config)
  fresh = jax.jit(encoder.init)(jax.random.key(0), *make_images(config))
  fresh = fresh['params']
  shapes = {
    '/'.join(key.key for key in path): (leaf.shape, leaf.dtype.name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(fresh)
  }
  layer = {
    'norm_in/scale': (24,),
    'attention/q_proj': (24, 4, 8),
    'attention/k_proj': (24, 2, 8),
    'attention/v_proj': (24, 2, 8),
    'attention/o_proj': (4, 8, 24),
    'attention/q_norm/scale': (8,),
    'attention/k_norm/scale': (8,),
    'norm_post_attn/scale': (24,),
    'norm_pre_ffw/scale': (24,),
    'mlp/gate': (24, 20),
    'mlp/up': (24, 20),
    'mlp/down': (20, 24),
    'norm_post_ffw/scale': (24,),
  }
  expected = {
    'input_proj': (12, 24),
    'position_table': (2, 16, 24),
    'std_bias': (24,),
    'std_scale': (24,),
    'projection': (24, 28),
  } | {
    f'layer_{index:02d}/{name}': shape
    for index in range(3)
    for name, shape in layer.items()
  }
  assert shapes == {k: (shape, 'float32') for k, shape in expected.items()}
  assert np.all(fresh['std_bias'] == 0) and np.all(fresh['std_scale'] == 1)
  soft_ITD = encode(config, fresh, *make_images(config))
  assert 0.3 < np.std(soft_ITD[0]) < 3

  half = dataclasses.replace(config, param_dtype='bfloat16')
  halves = jax.eval_shape(
    lambda: vision.VisionEncoder(half).init(
      jax.random.key(0), *make_images(config)
    )
  )
  for path, leaf in jax.tree_util.tree_leaves_with_path(halves):
    name = jax.tree_util.keystr(path)
    kept = 'scale' in name or 'std_' in name
    assert leaf.dtype == (jnp.float32 if kept else jnp.bfloat16), name


def test_shapes_that_do_not_fit_are_errors():
  config = make_config()
  patches_IMX, positions_IM2 = make_images(config)
  params = random_params(config)
  for patches in (patches_IMX[:, :-1], patches_IMX[..., :-1]):
    with pytest.raises(ValueError, match='a multiple of 9, 12'):
      encode(config, params, patches, positions_IM2[:, : patches.shape[1]])


def test_positions_beyond_the_table_are_not_clamped():
  config = make_config()
  patches_IMX, positions_IM2 = make_images(config)
  beyond = positions_IM2.at[0].add(6)
  soft_ITD = encode(config, random_params(config), patches_IMX, beyond)
  assert np.isnan(soft_ITD[0]).any()
  assert np.isfinite(soft_ITD[1:]).all()
