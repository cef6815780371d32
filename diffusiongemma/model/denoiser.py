"""The network: one stack of layers in two roles, prefill and denoise.

  h = x + norm_post_attn(attn(norm_in(x)))
  f = norm_post_ffw(  norm_post_ffw_1(shared_mlp(norm_pre_ffw(h)))
                    + norm_post_ffw_2(moe(norm_pre_ffw_2(h), route_on=h)) )
  x = (h + f) * layer_scalar[role]
  embed(t) = E[t] * sqrt(D),   logits = 30 * tanh(norm(x) E^T / 30)
  self-conditioning  z = bare_norm(embed(t) + mlp_sc(RMSNorm(s)))

All weights are shared between the roles but `layer_scalar`. There is no time
input: how noisy a canvas is, the network reads off the canvas.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusiongemma.config import ModelConfig
from diffusiongemma.model import attention
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import layers
from diffusiongemma.model import masks
from diffusiongemma.model import moe


class Layer(nn.Module):
  """Attention, then shared MLP and experts side by side."""

  config: ModelConfig
  kind: str

  def setup(self):
    cfg = self.config
    norm = functools.partial(layers.RMSNorm, cfg.embed_dim, cfg.norm_epsilon)
    self.norm_in = norm()
    self.attention = attention.Attention(cfg, self.kind)
    self.norm_post_attn = norm()
    self.norm_pre_ffw = norm()
    self.shared_mlp = layers.GatedMLP(cfg)
    self.norm_post_ffw_1 = norm()
    self.norm_pre_ffw_2 = norm()
    self.router = moe.Router(cfg)
    self.experts = moe.Experts(cfg)
    self.norm_post_ffw_2 = norm()
    self.norm_post_ffw = norm()
    ones = nn.initializers.ones
    self.prefill_scalar = self.param('prefill_scalar', ones, (1,), jnp.float32)
    self.denoise_scalar = self.param('denoise_scalar', ones, (1,), jnp.float32)

  @property
  def window(self) -> int | None:
    """Keys seen by a query of a local layer."""
    return self.config.sliding_window if self.kind == 'local' else None

  def prefill(self, x_BPD, positions_BP, start_B, slots):
    """One layer over new tokens: (x, (k, v), routing).

    `slots` is the layer's (k, v) of the cache to write into; None keeps the
    new keys and values themselves as the cache (start_B must be 0).
    """
    q, k, v = self.attention.project(self.norm_in(x_BPD), positions_BP)
    if slots is not None:
      k = kv_cache.write(slots[0], k, start_B)
      v = kv_cache.write(slots[1], v, start_B)
    mask_BPS = masks.prefill_mask(
      start_B, x_BPD.shape[1], k.shape[1], self.window
    )
    out = attention.attend(q, k, v, mask_BPS)
    x, routing = self.finish(x_BPD, out, self.prefill_scalar)
    return x, (k, v), routing

  def denoise(self, x_BLD, positions_BL, length_B, slots):
    """One layer over the canvas; reads the cache, writes nothing."""
    q, k, v = self.attention.project(self.norm_in(x_BLD), positions_BL)
    mask = masks.denoise_mask(
      length_B, slots[0].shape[1], x_BLD.shape[1], self.window
    )
    k = jnp.concatenate([slots[0].astype(k.dtype), k], axis=1)
    v = jnp.concatenate([slots[1].astype(v.dtype), v], axis=1)
    out = attention.attend(q, k, v, mask)
    x, _ = self.finish(x_BLD, out, self.denoise_scalar)
    return x

  def finish(self, x_BLD, attended_BLNH, scalar):
    """Residuals and both feed-forward branches."""
    attended_BLD = self.attention.output(attended_BLNH)
    h_BLD = x_BLD + self.norm_post_attn(attended_BLD)
    B, L, D = h_BLD.shape
    routing = self.router(h_BLD.reshape(B * L, D))
    shared = self.norm_post_ffw_1(self.shared_mlp(self.norm_pre_ffw(h_BLD)))
    routed_MD = self.experts(
      self.norm_pre_ffw_2(h_BLD).reshape(B * L, D), routing
    )
    routed = self.norm_post_ffw_2(routed_MD.reshape(B, L, D))
    h_BLD = h_BLD + self.norm_post_ffw(shared + routed)
    return h_BLD * scalar.astype(h_BLD.dtype), routing


class SelfConditioning(nn.Module):
  """Mixes the previous step's soft embedding into the canvas embedding."""

  config: ModelConfig

  def setup(self):
    cfg = self.config
    self.norm = layers.RMSNorm(cfg.embed_dim, cfg.norm_epsilon)
    self.mlp = layers.GatedMLP(cfg)

  def __call__(self, x_BLD: jax.Array, sc_BLD: jax.Array) -> jax.Array:
    """`sc_BLD` = 0 is "off": the result is bare_RMSNorm(x) to the bit."""
    signal = self.mlp(self.norm(sc_BLD.astype(x_BLD.dtype)))
    return layers.rms_norm(x_BLD + signal, self.config.norm_epsilon)


class Denoiser(nn.Module):
  """DiffusionGemma's text network, pure: parameters in, arrays out.

  >>> model = Denoiser(config.model)
  >>> params = init_params(model, jax.random.key(0))
  >>> h_BPD, cache, _ = model.apply(
  ...     {'params': params}, tokens_BP, length_B, method='prefill')
  """

  config: ModelConfig

  def setup(self):
    cfg = self.config
    init = nn.initializers.normal(cfg.embed_dim**-0.5)
    shape = (cfg.vocab_size, cfg.embed_dim)
    self.embedding = self.param(
      'embedding', init, shape, jnp.dtype(cfg.param_dtype)
    )
    self.layers = [
      Layer(cfg, kind, name=f'layer_{index:02d}')
      for index, kind in enumerate(cfg.attention_pattern)
    ]
    self.final_norm = layers.RMSNorm(cfg.embed_dim, cfg.norm_epsilon)
    self.self_conditioning = SelfConditioning(cfg)

  def __call__(self, tokens_BP: jax.Array) -> jax.Array:
    """Touches every parameter once; what `init_params` runs."""
    length_B = jnp.full(tokens_BP.shape[:1], tokens_BP.shape[1], jnp.int32)
    _, cache, _ = self.prefill(tokens_BP, length_B)
    sc_BLD = jnp.zeros((*tokens_BP.shape, self.config.embed_dim))
    return self.logits(self.denoise(tokens_BP, sc_BLD, cache))

  def prefill(
    self,
    tokens_BP: jax.Array,
    length_B: jax.Array,
    cache: kv_cache.KVCache | None = None,
  ) -> tuple[jax.Array, kv_cache.KVCache, tuple[moe.Routing, ...]]:
    """Causal pass that reads text and writes the cache.

    Args:
      tokens_BP: int32, new tokens, padded on the right.
      length_B: int32, how many of them are real.
      cache: the text before them; None starts afresh with a cache that holds
        exactly these P slots. Row b is written at slots `cache.length_B[b]`
        onwards, so its capacity must be at least that plus P.

    Returns:
      (h_BPD after the final norm, the longer cache, routing of each layer).
    """
    if cache is None:
      start_B = jnp.zeros_like(length_B)
    else:
      start_B = cache.length_B
    positions_BP = start_B[:, None] + jnp.arange(tokens_BP.shape[1])
    x_BPD = self.embed(tokens_BP)
    keys, values, routings = [], [], []
    for index, layer in enumerate(self.layers):
      slots = None if cache is None else (cache.k[index], cache.v[index])
      x_BPD, (k, v), routing = layer.prefill(
        x_BPD, positions_BP, start_B, slots
      )
      keys.append(k)
      values.append(v)
      routings.append(routing)
    longer = kv_cache.KVCache(tuple(keys), tuple(values), start_B + length_B)
    return self.final_norm(x_BPD), longer, tuple(routings)

  def denoise(
    self, tokens_BL: jax.Array, sc_BLD: jax.Array, cache: kv_cache.KVCache
  ) -> jax.Array:
    """Bidirectional pass over a noisy canvas that follows the cached text.

    Args:
      tokens_BL: int32, the canvas.
      sc_BLD: soft embedding of the previous step; zeros at the first.
      cache: the text before; only its first `length_B` slots are seen.

    Returns:
      h_BLD after the final norm.
    """
    length_B = cache.length_B
    positions_BL = length_B[:, None] + jnp.arange(tokens_BL.shape[1])
    x_BLD = self.self_conditioning(self.embed(tokens_BL), sc_BLD)
    for layer, k, v in zip(self.layers, cache.k, cache.v, strict=True):
      x_BLD = layer.denoise(x_BLD, positions_BL, length_B, (k, v))
    return self.final_norm(x_BLD)

  def embed(self, tokens: jax.Array) -> jax.Array:
    """Embeddings times sqrt(D), the factor rounded to their type."""
    dtype = jnp.dtype(self.config.dtype)
    factor = jnp.asarray(self.config.embed_dim**0.5, dtype)
    return self.embedding[tokens].astype(dtype) * factor

  def logits(self, h: jax.Array) -> jax.Array:
    """Softcapped logits of hidden states, [..., V] in float32."""
    logits = jnp.einsum(
      '...d,vd->...v',
      h,
      self.embedding.astype(h.dtype),
      preferred_element_type=jnp.float32,
    )
    cap = self.config.logit_softcap
    return cap * jnp.tanh(logits / cap) if cap else logits

  def soft_embedding(self, probabilities: jax.Array) -> jax.Array:
    """Mean embedding under [..., V] probabilities, times sqrt(D)."""
    dtype = jnp.dtype(self.config.dtype)
    factor = jnp.asarray(self.config.embed_dim**0.5, dtype)
    table_VD = self.embedding.astype(dtype)
    return (probabilities.astype(dtype) @ table_VD) * factor


def init_params(model: Denoiser, key: jax.Array) -> dict:
  """Fresh parameters, a nested dict of plain arrays, made under `jit`."""
  tokens_BP = jnp.zeros((1, 8), jnp.int32)
  return jax.jit(lambda key: model.init(key, tokens_BP)['params'])(key)
