"""The image encoder: patches to soft tokens of the text's width.

  x = 2 (pixels - 1/2) W_in + table_x[px] + table_y[py]
  layer: h = x + norm(attn(norm(x))),   x = h + norm(GeGLU(norm(h)))
  soft = (sqrt(W) * mean of k x k patches - std_bias) * std_scale
  out  = bare_RMSNorm(soft) W_out

A patch attends to all patches of its image; one half of each head is rotated by
px, the other by py. Axes, here: I images, M patches, X pixel values of a
patch, W width, T soft tokens.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusiongemma import ops
from diffusiongemma.config import ModelConfig
from diffusiongemma.model import layers
from diffusiongemma.model import parameters


def num_soft_tokens(positions_IM2: jax.Array, kernel: int) -> jax.Array:
  """int32 [I], number of soft tokens of each image.

  Args:
    positions_IM2: (x, y) of each patch, -1 at padding.
    kernel: patches a side that are pooled to one soft token.
  """
  num_patches_I = jnp.sum(is_patch(positions_IM2), axis=-1, dtype=jnp.int32)
  return num_patches_I // kernel**2


def is_patch(positions_IM2: jax.Array) -> jax.Array:
  """bool [I, M], False at padding."""
  return jnp.any(positions_IM2 != -1, axis=-1)


def pool(x_IMW: jax.Array, positions_IM2: jax.Array, kernel: int) -> jax.Array:
  """Mean over squares of `kernel` x `kernel` patches, float32 [I, T, W].

  The squares are in reading order, whatever the order of the patches; after the
  last one of an image there are zeros.
  """
  num_slots = x_IMW.shape[1] // kernel**2
  width_I1 = jnp.max(positions_IM2[..., 0], axis=1, keepdims=True) + 1
  square_IM2 = positions_IM2 // kernel
  slot_IM = square_IM2[..., 0] + width_I1 // kernel * square_IM2[..., 1]
  # Padding, at (-1, -1), has a negative slot, which `one_hot` ignores. A matrix
  # product instead of a scatter, for deterministic sums; in highest precision,
  # so that TPUs and GPUs do not round the other operand to bfloat16 or TF32.
  summed_ITW = jnp.einsum(
    'imt,imw->itw',
    jax.nn.one_hot(slot_IM, num_slots, dtype=jnp.float32),
    x_IMW.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  return summed_ITW / kernel**2


def axial_rotary(
  x_IMNH: jax.Array, positions_IM2: jax.Array, frequencies: jax.Array
) -> jax.Array:
  """Rotates the first half of each head by x, the second by y."""
  halves = jnp.split(x_IMNH, 2, axis=-1)
  rotated = [
    ops.heads.rotary(
      half, ops.heads.rotary_cos_sin(positions_IM2[..., axis], frequencies)
    )
    for axis, half in enumerate(halves)
  ]
  return jnp.concatenate(rotated, axis=-1)


class Attention(nn.Module):
  """Projections, norms and axial rotary positions of one layer."""

  config: ModelConfig

  def setup(self):
    cfg = self.config.image_encoder
    W, N, K, H = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

    def declare(name, *shape):
      return parameters.declare(
        self, f'attention/{name}', shape, self.config.param_dtype
      )

    self.q_proj = declare('q_proj', W, N, H)
    self.k_proj = declare('k_proj', W, K, H)
    self.v_proj = declare('v_proj', W, K, H)
    self.o_proj = declare('o_proj', N, H, W)
    self.q_norm = layers.RMSNorm(H, cfg.norm_epsilon, 'attention/q_norm')
    self.k_norm = layers.RMSNorm(H, cfg.norm_epsilon, 'attention/k_norm')
    self.frequencies = ops.heads.rotary_frequencies(H // 2, cfg.rope_theta)

  def __call__(self, x_IMW: jax.Array, positions_IM2: jax.Array) -> jax.Array:
    dtype = x_IMW.dtype
    q = jnp.einsum('imw,wnh->imnh', x_IMW, self.q_proj.astype(dtype))
    k = jnp.einsum('imw,wkh->imkh', x_IMW, self.k_proj.astype(dtype))
    v = jnp.einsum('imw,wkh->imkh', x_IMW, self.v_proj.astype(dtype))
    q = axial_rotary(self.q_norm(q), positions_IM2, self.frequencies)
    k = axial_rotary(self.k_norm(k), positions_IM2, self.frequencies)
    v = ops.norms.rms_norm(v, self.config.image_encoder.norm_epsilon)
    seen_I1M = is_patch(positions_IM2)[:, None, :]
    out_IMNH = ops.attention.attend(q, [(k, v)], seen_I1M)
    return jnp.einsum('imnh,nhw->imw', out_IMNH, self.o_proj.astype(dtype))


class Layer(nn.Module):
  """Attention, then the MLP, with a norm before and after each; for `rules` see
  `denoiser.Layer`."""

  config: ModelConfig
  rules: tuple[Any, ...] = ()

  def setup(self):
    cfg = self.config.image_encoder
    norm = functools.partial(layers.RMSNorm, cfg.embed_dim, cfg.norm_epsilon)
    self.norm_in = norm()
    self.attention = Attention(self.config)
    self.norm_post_attn = norm()
    self.norm_pre_ffw = norm()
    self.mlp = layers.GatedMLP(
      cfg.embed_dim, cfg.mlp_dim, self.config.param_dtype, features=None
    )
    self.norm_post_ffw = norm()

  def __call__(self, x_IMW: jax.Array, positions_IM2: jax.Array) -> jax.Array:
    attended = self.attention(self.norm_in(x_IMW), positions_IM2)
    h_IMW = x_IMW + self.norm_post_attn(attended)
    return h_IMW + self.norm_post_ffw(self.mlp(self.norm_pre_ffw(h_IMW)))


LayerLoweredOnce = nn.jit(Layer)


class VisionEncoder(nn.Module):
  """Encoder and projection of `config.vision`, which must not be None.

  Source: transformers' Gemma4VisionModel and its multimodal embedder. In a
  bfloat16 network, the rotation and the pooled features up to the
  standardisation are in float32 here; theirs are rounded. For `lower_once` see
  `denoiser.Denoiser`.
  """

  config: ModelConfig
  lower_once: bool = False

  def setup(self):
    cfg = self.config.image_encoder
    W, D = cfg.embed_dim, self.config.embed_dim

    def declare(name, *shape):
      return parameters.declare(
        self, f'vision/{name}', shape, self.config.param_dtype
      )

    self.input_proj = declare('input_proj', 3 * cfg.patch_size**2, W)
    self.position_table = declare(
      'position_table', 2, cfg.position_table_size, W
    )
    layer = LayerLoweredOnce if self.lower_once else Layer
    rules = tuple(nn.get_logical_axis_rules())
    self.layers = [
      layer(self.config, rules, name=f'layer_{index:02d}')
      for index in range(cfg.num_layers)
    ]
    if cfg.standardize:
      self.std_bias = declare('std_bias', W)
      self.std_scale = declare('std_scale', W)
    self.projection = declare('projection', W, D)

  def __call__(
    self, patches_IMX: jax.Array, positions_IM2: jax.Array
  ) -> jax.Array:
    """Soft tokens [I, T, D] in the config's dtype, T = M / pooling_kernel^2.

    Args:
      patches_IMX: pixel values 0..1 of M patches, each in the order (row,
        column, channel), X = 3 * patch_size^2.
      positions_IM2: int32, the (x, y) of each patch in its image, both -1 at
        padding; an image is a full grid, with sides that are multiples of the
        kernel. Pixels of padding have no effect. A position outside of the
        table makes its image NaN.

    Returns:
      The tokens of each image in reading order, then zeros: see
      `num_soft_tokens`.

    Raises:
      ValueError: shapes that do not match the config.
    """
    cfg = self.config.image_encoder
    M, kernel = patches_IMX.shape[1], cfg.pooling_kernel
    if M % kernel**2 or patches_IMX.shape[2] != 3 * cfg.patch_size**2:
      raise ValueError(
        f'Patches are [images, a multiple of {kernel**2}, '
        f'{3 * cfg.patch_size**2}], not {patches_IMX.shape}.'
      )
    x_IMW = self.embed(patches_IMX, positions_IM2)
    for layer in self.layers:
      x_IMW = layer(x_IMW, positions_IM2)
    x_ITW = self.pool(x_IMW, positions_IM2)
    count_I = num_soft_tokens(positions_IM2, kernel)
    is_token_IT = jnp.arange(M // kernel**2)[None, :] < count_I[:, None]
    return jnp.where(is_token_IT[..., None], self.project(x_ITW), 0)

  def embed(self, patches_IMX: jax.Array, positions_IM2: jax.Array):
    """Pixels and positions, [I, M, W]; zeros at padding."""
    dtype = jnp.dtype(self.config.dtype)
    is_patch_IM1 = is_patch(positions_IM2)[..., None]
    # Selected before any product, so that no NaN in padding spreads, in the
    # backward pass neither.
    pixels = 2 * (patches_IMX.astype(jnp.float32) - 0.5)
    pixels = jnp.where(is_patch_IM1, pixels, 0).astype(dtype)
    x_IMW = jnp.einsum('imx,xw->imw', pixels, self.input_proj.astype(dtype))
    index_IM2 = jnp.maximum(positions_IM2, 0)
    x_position, y_position = (
      jnp.take(self.position_table[axis], index_IM2[..., axis], axis=0)
      for axis in range(2)
    )
    position_IMW = x_position.astype(dtype) + y_position.astype(dtype)
    return x_IMW + jnp.where(is_patch_IM1, position_IMW, 0)

  def pool(self, x_IMW: jax.Array, positions_IM2: jax.Array) -> jax.Array:
    """Pools, scales and standardises in float32, [I, T, W]."""
    cfg = self.config.image_encoder
    x_ITW = pool(x_IMW, positions_IM2, cfg.pooling_kernel)
    x_ITW = x_ITW * cfg.embed_dim**0.5
    if cfg.standardize:
      x_ITW = x_ITW - self.std_bias.astype(jnp.float32)
      x_ITW = x_ITW * self.std_scale.astype(jnp.float32)
    return x_ITW.astype(self.config.dtype)

  def project(self, x_ITW: jax.Array) -> jax.Array:
    """Projects to the width of the text, [I, T, D]."""
    x_ITW = ops.norms.rms_norm(x_ITW, self.config.image_encoder.norm_epsilon)
    projection = self.projection.astype(x_ITW.dtype)
    return jnp.einsum('itw,wd->itd', x_ITW, projection)
