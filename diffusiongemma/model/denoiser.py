"""The network: one stack of layers in two roles, prefill and denoise.

  h = x + norm_post_attn(attn(norm_in(x)))
  f = norm_post_ffw(  norm_post_ffw_1(shared_mlp(norm_pre_ffw(h)))
                    + norm_post_ffw_2(moe(norm_pre_ffw_2(h), route_on=h)) )
  x = (h + f) * layer_scalar[role]
  embed(t) = E[t] * sqrt(D),   logits = 30 * tanh(norm(x) E^T / 30)
  self-conditioning  z = bare_norm(embed(t) + mlp_sc(RMSNorm(s)))

The roles share all weights except `layer_scalar`. There is no time input: the
network infers the noise level from the canvas.
"""

import functools
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusiongemma import ops
from diffusiongemma.config import Config
from diffusiongemma.config import ModelConfig
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import heads
from diffusiongemma.model import layers
from diffusiongemma.model import masks
from diffusiongemma.model import moe
from diffusiongemma.model import parameters
from diffusiongemma.model import vision
from diffusiongemma.ops.weights import Params

# Checkpoint policies by the value of `remat`, in order of recomputation.
KEPT = {
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


class Layer(nn.Module):
  """Attention, then shared MLP and experts in parallel.

  Nothing reads `rules`, Flax's logical axis rules: a trace depends on them, and
  so they are part of its cache key.
  """

  config: ModelConfig
  kind: str
  rules: tuple[Any, ...] = ()

  def setup(self):
    cfg = self.config
    norm = functools.partial(layers.RMSNorm, cfg.embed_dim, cfg.norm_epsilon)
    self.norm_in = norm()
    self.attention = heads.Heads(cfg, self.kind)
    self.norm_post_attn = norm()
    self.norm_pre_ffw = norm()
    self.shared_mlp = layers.GatedMLP(
      cfg.embed_dim, cfg.mlp_dim, cfg.param_dtype
    )
    self.norm_post_ffw_1 = norm()
    self.norm_pre_ffw_2 = norm()
    self.router = moe.Router(cfg)
    self.experts = moe.Experts(cfg)
    self.norm_post_ffw_2 = norm()
    self.norm_post_ffw = norm()
    self.prefill_scalar = parameters.declare(self, 'prefill_scalar', (1,))
    self.denoise_scalar = parameters.declare(self, 'denoise_scalar', (1,))

  def prefill(self, x_BPD, positions_BP, mask, cached):
    """One layer over new tokens: (x, their (k, v), routing).

    `cached` is the layer's (k, v) of the text before.
    """
    out, new = self.attend(x_BPD, positions_BP, mask, cached)
    x_BPD, routing = self.finish(x_BPD, out, self.prefill_scalar)
    return x_BPD, new, routing

  def denoise(self, x_BLD, positions_BL, mask, cached):
    """One layer over the canvas, whose mask includes the canvas itself."""
    out, _ = self.attend(x_BLD, positions_BL, mask, cached)
    x_BLD, _ = self.finish(x_BLD, out, self.denoise_scalar)
    return x_BLD

  def attend(self, x_BLD, positions_BL, mask, cached):
    """Attention over the cached keys, then those of x: (out, (k, v) of x)."""
    q, k, v = self.attention.project(self.norm_in(x_BLD), positions_BL)
    old_k, old_v = cached[0].astype(k.dtype), cached[1].astype(v.dtype)
    keys_and_values = ((old_k, old_v), (k, v))
    out_BLNH = ops.attention.attend(
      *(q, keys_and_values, mask.seen_BLS),
      window=mask.window,
      filled_B=mask.filled_B,
    )
    return out_BLNH, (k, v)

  def finish(self, x_BLD, attended_BLNH, scalar):
    """Residuals and both feed-forward branches."""
    attended_BLD = self.attention.output(attended_BLNH)
    dtype = attended_BLD.dtype
    h_BLD, (for_router, for_shared, for_experts) = ops.norms.add_and_norm(
      *(x_BLD, attended_BLD, self.norm_post_attn.scale),
      (self.router.scale, self.norm_pre_ffw.scale, self.norm_pre_ffw_2.scale),
      (jnp.float32, dtype, dtype),
      self.config.norm_epsilon,
    )
    routing = self.router(for_router)
    shared = self.norm_post_ffw_1(self.shared_mlp(for_shared))
    routed = self.norm_post_ffw_2(self.experts(for_experts, routing))
    h_BLD = h_BLD + self.norm_post_ffw(shared + routed)
    h_BLD = h_BLD * scalar.astype(h_BLD.dtype).reshape(1, 1, 1)
    return ops.parallel.constrain(h_BLD, 'batch', 'length', None), routing


LayerLoweredOnce = nn.jit(Layer, methods=['prefill', 'denoise'])


class SelfConditioning(nn.Module):
  """Mixes the previous step's soft embedding into the canvas embedding."""

  config: ModelConfig

  def setup(self):
    cfg = self.config
    self.norm = layers.RMSNorm(cfg.embed_dim, cfg.norm_epsilon)
    self.mlp = layers.GatedMLP(cfg.embed_dim, cfg.mlp_dim, cfg.param_dtype)

  def __call__(self, x_BLD: jax.Array, sc_BLD: jax.Array | None) -> jax.Array:
    """None is off; `sc_BLD` = 0 is bit-equal to it: bare_RMSNorm(x)."""
    if sc_BLD is not None:
      x_BLD = x_BLD + self.mlp(self.norm(sc_BLD.astype(x_BLD.dtype)))
    return ops.norms.rms_norm(x_BLD, self.config.norm_epsilon)


class SoftTokens(flax.struct.PyTreeNode):
  """Encoded images and their positions in the tokens of a prefill.

  Attributes:
    soft_ITD: I images of up to T soft tokens.
    index_BP: int32, index of the soft token (of I*T) at each position, -1 for
      text. An image is never split over two calls.
  """

  soft_ITD: jax.Array
  index_BP: jax.Array


class Denoiser(nn.Module):
  """DiffusionGemma's network, pure: parameters in, arrays out.

  >>> model = Denoiser(config.model)
  >>> params = init_params(model, jax.random.key(0))
  >>> h_BPD, cache, _ = model.apply(
  ...     {'params': params}, tokens_BP, length_B, method='prefill')

  `remat` is what a backward pass recomputes, see `config.TrainConfig`. With
  `lower_once`, layers that differ only in their weights are traced and lowered
  once, so that programs start in a fraction of the time. Such layers have the
  name of the first one in profiles, and Flax's interceptors and
  `capture_intermediates` see nothing in them, or stale values.
  """

  config: ModelConfig
  remat: str = 'none'
  lower_once: bool = False

  def setup(self):
    cfg = self.config
    shape = (cfg.vocab_size, cfg.embed_dim)
    self.embedding = parameters.declare(
      self, 'embedding', shape, cfg.param_dtype
    )
    layer = LayerLoweredOnce if self.lower_once else Layer
    rules = tuple(nn.get_logical_axis_rules())
    if self.remat != 'none':
      layer = nn.remat(
        layer, policy=KEPT[self.remat], methods=['prefill', 'denoise']
      )
    self.layers = [
      layer(cfg, kind, rules, name=f'layer_{index:02d}')
      for index, kind in enumerate(cfg.attention_pattern)
    ]
    self.final_norm = layers.RMSNorm(cfg.embed_dim, cfg.norm_epsilon)
    self.self_conditioning = SelfConditioning(cfg)
    if cfg.vision:
      self.vision = vision.VisionEncoder(cfg, self.lower_once)

  def __call__(self) -> None:
    """Creates all parameters and computes nothing, for `init_params`. The
    forward passes are `prefill` and `denoise`."""
    _set_up(self)

  def prefill(
    self,
    tokens_BP: jax.Array,
    length_B: jax.Array,
    cache: kv_cache.KVCache | None = None,
    images: SoftTokens | None = None,
    first_BP: jax.Array | None = None,
  ) -> tuple[jax.Array, kv_cache.KVCache, tuple[moe.Routing, ...]]:
    """Causal pass that reads text, and images, and writes the cache.

    Args:
      tokens_BP: int32, new tokens, padded on the right.
      length_B: int32, tokens of each row without padding.
      cache: the text before them; None starts with a new cache of exactly these
        P slots in every layer. Row b continues at position `cache.length_B[b]`,
        and is `kv_cache.OVERFLOWED` afterwards if there is no room.
      images: soft tokens that replace image tokens.
      first_BP: int32, the first position that each token may see, for rows of
        several documents.

    Returns:
      (h_BPD after the final norm, the longer cache, routing of each layer).
    """
    B, P = tokens_BP.shape
    is_fresh = cache is None
    past = cache or kv_cache.init_cache(self.config, B, 0)
    start_B = past.length_B
    positions_BP = start_B[:, None] + jnp.arange(P)[None, :]
    x_BPD, image_BP = self.embed(tokens_BP), None
    if images is not None:
      x_BPD, image_BP = self.place(x_BPD, images)
    mask_of_kind = self.per_kind(
      past,
      lambda cached_BS, window: masks.prefill_mask(
        start_B, cached_BS, P, window, image_BP, first_BP
      ),
    )
    keys, values, routings = [], [], []
    for layer, *cached in zip(self.layers, past.k, past.v, strict=True):
      x_BPD, new, routing = layer.prefill(
        x_BPD, positions_BP, mask_of_kind[layer.kind], cached
      )
      if not is_fresh:
        new = [
          kv_cache.write(old, entries, start_B, length_B)
          for old, entries in zip(cached, new, strict=True)
        ]
      keys.append(new[0])
      values.append(new[1])
      routings.append(routing)
    longer_B = length_B
    if not is_fresh:
      longer_B = kv_cache.advance(self.config, past, length_B)
    longer = kv_cache.KVCache(tuple(keys), tuple(values), longer_B)
    return self.final_norm(x_BPD), longer, tuple(routings)

  def denoise(
    self,
    tokens_BL: jax.Array,
    sc_BLD: jax.Array | None,
    cache: kv_cache.KVCache,
    start_BK: jax.Array | None = None,
    first_BK: jax.Array | None = None,
  ) -> jax.Array:
    """Bidirectional pass over noisy canvases, each after the text before it.

    Args:
      tokens_BL: int32, one canvas, or K concatenated: L = K * C.
      sc_BLD: soft embedding of the previous step; at the first, zeros or None.
      cache: the text; a canvas sees its tokens before the start of the canvas.
      start_BK: int32, start of each canvas; None is one canvas after the text.
      first_BK: int32, the first position that each canvas may see, for rows of
        several documents.

    Returns:
      h_BLD after the final norm.
    """
    if start_BK is None:
      start_BK = cache.length_B[:, None]
    (B, L), K = tokens_BL.shape, start_BK.shape[1]
    positions_BKC = start_BK[:, :, None] + jnp.arange(L // K)[None, None, :]
    positions_BL = positions_BKC.reshape(B, L)
    mask_of_kind = self.per_kind(
      cache,
      lambda cached_BS, window: masks.denoise_mask(
        start_BK, cached_BS, L // K, window, first_BK
      ),
    )
    x_BLD = self.self_conditioning(self.embed(tokens_BL), sc_BLD)
    for layer, *cached in zip(self.layers, cache.k, cache.v, strict=True):
      x_BLD = layer.denoise(
        x_BLD, positions_BL, mask_of_kind[layer.kind], cached
      )
    return self.final_norm(x_BLD)

  def per_kind(self, cache: kv_cache.KVCache, make_mask) -> dict[str, Any]:
    """`make_mask(positions of the slots, window)` for each kind of layer."""
    windows = {'local': self.config.sliding_window, 'global': None}
    result: dict[str, Any] = {}
    for kind, k in zip(self.config.attention_pattern, cache.k, strict=True):
      if kind not in result:
        cached_BS = kv_cache.slot_positions(cache.length_B, k.shape[1])
        result[kind] = make_mask(cached_BS, windows[kind])
    return result

  def encode_images(
    self, patches_IMX: jax.Array, positions_IM2: jax.Array
  ) -> jax.Array:
    """Soft tokens of images, [I, T, D]; see `vision.VisionEncoder`."""
    return self.vision(patches_IMX, positions_IM2)

  def place(self, x_BPD: jax.Array, images: SoftTokens):
    """Inserts soft tokens: (x_BPD, the image index of each position)."""
    T = images.soft_ITD.shape[1]
    soft_MD = images.soft_ITD.reshape(-1, x_BPD.shape[-1]).astype(x_BPD.dtype)
    soft_BPD = soft_MD[jnp.maximum(images.index_BP, 0)]
    is_image_BP = images.index_BP >= 0
    x_BPD = jnp.where(is_image_BP[:, :, None], soft_BPD, x_BPD)
    if not self.config.image_encoder.bidirectional:
      return x_BPD, None
    return x_BPD, jnp.where(is_image_BP, images.index_BP // T, -1)

  def embed(self, tokens_BL: jax.Array) -> jax.Array:
    """Embeddings times sqrt(D), the factor rounded to their type."""
    dtype = jnp.dtype(self.config.dtype)
    factor = jnp.asarray(self.config.embed_dim**0.5, dtype)
    x = ops.parallel.look_up(self.embedding, tokens_BL, dtype) * factor
    return ops.parallel.constrain(x, 'batch', 'length', None)

  def logits(self, h: jax.Array) -> jax.Array:
    """Softcapped logits of hidden states, [..., V] in float32."""
    rest = (None,) * (h.ndim - 2)
    # Resharded from its batch axes to those beside the vocabulary, and its
    # gradient back.
    h = ops.parallel.constrain(h, 'batch', *rest, None)
    logits = ops.linear.multiply(
      ops.parallel.constrain(h, 'rows', *rest, None),
      self.embedding.astype(h.dtype),
      axis=1,
      dtype=jnp.float32,
    )
    logits = ops.parallel.constrain(logits, 'rows', *rest, 'vocab')
    cap = self.config.logit_softcap
    return cap * jnp.tanh(logits / cap) if cap else logits

  def soft_embedding(self, probabilities: jax.Array) -> jax.Array:
    """Mean embedding under [..., V] probabilities, times sqrt(D)."""
    dtype = jnp.dtype(self.config.dtype)
    factor = jnp.asarray(self.config.embed_dim**0.5, dtype)
    table_VD = self.embedding.astype(dtype)
    soft = (probabilities.astype(dtype) @ table_VD) * factor
    rest = (None,) * (soft.ndim - 1)
    # First sharded as the rows of the probabilities, which else were gathered.
    soft = ops.parallel.constrain(soft, 'rows', *rest)
    return ops.parallel.constrain(soft, 'batch', *rest)

  def mean_embedding(self, h_BLD: jax.Array) -> jax.Array:
    """The soft embedding of the predictions of hidden states, [B, L, D]."""
    if ops.parallel.is_active():  # Every device has its shard of the logits.
      return self.soft_embedding(jax.nn.softmax(self.logits(h_BLD), axis=-1))
    B, L, D = h_BLD.shape
    table_VD = self.embedding.astype(h_BLD.dtype)
    U = ops.vocabulary.num_halvings(self.config.vocab_size)
    no_draw_RU = jnp.zeros((B * L, U), jnp.float32)
    summary = self._summarize(h_BLD.reshape(-1, D), table_VD, 1.0, no_draw_RU)
    return summary.mean_RD.reshape(B, L, D)

  def summarize(
    self,
    h_RD: jax.Array,
    temperature: jax.Array,
    uniforms_RU: jax.Array,
    with_mean: jax.Array | None = None,
  ) -> ops.vocabulary.Summary:
    """Statistics of the logits for the sampler, without all logits in memory:
    see `vocabulary.summarize`; the mean is the soft embedding."""
    return self._summarize(
      h_RD, self.embedding, temperature, uniforms_RU, with_mean
    )

  def _summarize(
    self, h_RD, table_VD, temperature, uniforms_RU, with_mean=None
  ):
    summary = ops.vocabulary.summarize(
      *(h_RD, table_VD, temperature, uniforms_RU),
      softcap=self.config.logit_softcap,
      with_mean=with_mean,
    )
    factor = jnp.asarray(self.config.embed_dim**0.5, h_RD.dtype)
    return summary.replace(mean_RD=summary.mean_RD.astype(h_RD.dtype) * factor)


def init_params(model: Denoiser, key: jax.Array) -> Params:
  """Random parameters, a nested dict of plain arrays, computed under `jit`."""
  return jax.jit(lambda key: model.init(key)['params'])(key)


def abstract_params(config: ModelConfig) -> Params:
  """Shapes and types of random parameters."""
  model = Denoiser(config)
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def fresh_params(config: Config) -> Params:
  """Random parameters of a run's network; the same seed gives the same."""
  return init_params(Denoiser(config.model), jax.random.key(config.train.seed))


def with_configured_types(config: ModelConfig, params: Params) -> Params:
  """Loaded parameters cast to the types of the config, except for quantised
  ones."""
  return ops.weights.with_types(params, abstract_params(config))


def _set_up(module: nn.Module) -> None:
  """Creates the parameters of a module and its submodules, all of them in
  `setup`: Flax calls that before it lists the attributes of a module."""
  dir(module)
  is_module = lambda x: isinstance(x, nn.Module)
  for part in jax.tree.leaves(list(vars(module).values()), is_leaf=is_module):
    if is_module(part):
      _set_up(part)
