"""The network against `transformers`: the same random model, number by number.

  python tests/parity.py --output=experiments/parity/results.json

prints the worst difference of each quantity as a table; `test_parity.py`
asserts the limits. A difference is max |ours - theirs| / max |theirs|. Every
norm, scale, buffer and position table is random: Hugging Face starts them at
one, which hides half of all mistakes.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import joint_loss
import numpy as np
import optax
import torch
import transformers
from transformers.models.diffusion_gemma import DiffusionGemmaConfig
from transformers.models.diffusion_gemma import modeling_diffusion_gemma

from diffusiongemma import config as configs
from diffusiongemma.checkpoints import huggingface
from diffusiongemma.checkpoints import huggingface_config
from diffusiongemma.diffusion import loss as losses
from diffusiongemma.generation import network as network_lib
from diffusiongemma.model import denoiser
from diffusiongemma.model import masks

VISION = configs.VisionConfig(
  embed_dim=24,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=20,
  patch_size=4,
  pooling_kernel=3,
  position_table_size=32,
  soft_tokens_per_image=70,
  image_token_id=90,
  begin_image_token_id=91,
  end_image_token_id=92,
)
BASE = configs.ModelConfig(
  vocab_size=97,
  embed_dim=48,
  attention_pattern=(
    *('local', 'local', 'global', 'local'),
    *('local', 'local', 'global'),
  ),
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  num_global_kv_heads=1,
  global_head_dim=16,
  sliding_window=5,
  mlp_dim=40,
  num_experts=6,
  experts_per_token=2,
  expert_dim=24,
  context_length=256,
  vision=VISION,
  dtype='float32',
)
replace = dataclasses.replace
# Window shorter and longer than the prompt, 1 and 2 global heads, other
# experts, other canvases and other image encoders.
SHAPES = {
  'short window': (BASE, 8),
  'two global heads': (
    replace(
      BASE,
      num_global_kv_heads=2,
      sliding_window=64,
      num_experts=5,
      experts_per_token=3,
      vision=replace(VISION, pooling_kernel=2, standardize=False),
    ),
    12,
  ),
  'no grouping': (
    replace(
      BASE,
      num_kv_heads=4,
      num_global_kv_heads=4,
      global_rotary_fraction=0.5,
      sliding_window=3,
      num_experts=4,
      experts_per_token=4,
      vision=replace(VISION, num_kv_heads=4, num_layers=1, bidirectional=False),
    ),
    16,
  ),
}
PROMPT, IMAGE_PATCHES = 23, ((3, 2), (2, 4))


def make_reference(config: configs.ModelConfig, canvas_length: int, seed=0):
  """Their model with every tensor and buffer random, float32."""
  diffusion = configs.DiffusionConfig(
    canvas_length=canvas_length, stop_token_ids=(1,)
  )
  values = huggingface_config.to_config(config, diffusion, 'float32')
  hf_config = DiffusionGemmaConfig.from_dict(values)
  hf_config._attn_implementation = 'eager'
  torch.manual_seed(seed)
  model = modeling_diffusion_gemma.DiffusionGemmaForBlockDiffusion(hf_config)
  model = model.float().eval()
  with torch.no_grad():
    for name, tensor in model.state_dict().items():
      if 'norm' in name or 'scal' in name:
        tensor.uniform_(0.6, 1.4)
      elif 'embed_tokens' in name:
        tensor.normal_(0, config.embed_dim**-0.5)
      else:
        tensor.normal_(0, tensor.shape[-1] ** -0.5)
  return model


def convert(model, config: configs.ModelConfig) -> dict:
  """Their tensors as our parameters, by the table that converts files."""
  return huggingface.from_state_dict(config, model.state_dict())


def difference(ours, theirs) -> float:
  """Largest difference, as a part of the largest value."""
  theirs = np.asarray(theirs, np.float32)
  ours = np.asarray(ours, np.float32)
  assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def by_slot(theirs: torch.Tensor) -> np.ndarray:
  """Their [B, K, S, H] as our [B, S, K, H]."""
  return theirs.detach().float().numpy().transpose(0, 2, 1, 3)


class Pair:
  """Both models of a shape, and inputs for them."""

  def __init__(self, config: configs.ModelConfig, canvas_length: int):
    self.config, self.canvas_length = config, canvas_length
    self.theirs = make_reference(config, canvas_length)
    self.params = convert(self.theirs, config)
    rng = np.random.default_rng(1)
    V = config.vocab_size
    # 0 is their padding, whose embedding has no gradient.
    self.prompt_BP = rng.integers(3, 80, (2, PROMPT)).astype(np.int32)
    self.canvas_BL = rng.integers(3, V, (2, canvas_length)).astype(np.int32)
    self.previous_BLV = rng.normal(0, 3, (2, canvas_length, V)).astype('f')
    self.patches_IMX, self.positions_IM2 = self.make_images(rng)

  def make_images(self, rng):
    """Two images of different sizes, padded to one number of patches."""
    kernel = self.config.vision.pooling_kernel
    pixels = 3 * self.config.vision.patch_size**2
    M = 10 * kernel**2
    patches = np.zeros((2, M, pixels), np.float32)
    positions = np.full((2, M, 2), -1, np.int32)
    for i, (width, height) in enumerate(IMAGE_PATCHES):
      x, y = np.meshgrid(np.arange(width * kernel), np.arange(height * kernel))
      count = x.size
      positions[i, :count] = np.stack([x, y], -1).reshape(-1, 2)
      patches[i, :count] = rng.uniform(0, 1, (count, pixels))
    return patches, positions

  @functools.cached_property
  def apply(self):
    """The methods of our network, jitted."""
    model = denoiser.Denoiser(self.config)

    @functools.partial(jax.jit, static_argnames='method')
    def apply(params, *arguments, method):
      return model.apply({'params': params}, *arguments, method=method)

    return functools.partial(apply, self.params)

  def ours(self, tokens_BP, images=None, length_B=None):
    """(h, cache, logits without and with self-conditioning)."""
    B, P = tokens_BP.shape
    length_B = jnp.full((B,), P) if length_B is None else length_B
    h_BPD, cache, _ = self.apply(
      jnp.asarray(tokens_BP), length_B, None, images, method='prefill'
    )
    probabilities = jax.nn.softmax(jnp.asarray(self.previous_BLV), axis=-1)
    on_BLD = self.apply(probabilities, method='soft_embedding')
    logits = []
    for sc_BLD in (jnp.zeros_like(on_BLD), on_BLD):
      h_BLD = self.apply(
        jnp.asarray(self.canvas_BL), sc_BLD, cache, method='denoise'
      )
      logits.append(self.apply(h_BLD, method='logits'))
    return h_BPD, cache, logits

  @torch.no_grad()
  def reference(self, tokens_BP, images=None):
    """The same of theirs, with the inputs and outputs of every layer."""
    encoder = self.theirs.model.encoder
    seen = {'prefill': [], 'denoise': []}
    hooks = []
    for role, layers in (
      ('prefill', encoder.language_model.layers),
      ('denoise', self.theirs.model.decoder.layers),
    ):
      for layer in layers:
        hooks.append(
          layer.register_forward_hook(
            lambda _, args, out, role=role: seen[role].append(
              (args[0].float().numpy().copy(), out.float().numpy().copy())
            )
          )
        )
    tokens = torch.tensor(tokens_BP, dtype=torch.long)
    inputs = {'input_ids': tokens}
    if images is not None:
      # Their forward makes these masks and then drops them; `generate` hands
      # them in, and so do we.
      is_image = (tokens == self.config.vision.image_token_id).int()
      inputs |= images | {
        'attention_mask': encoder.create_masks_for_generate(
          config=self.theirs.config.text_config,
          inputs_embeds=torch.zeros(*tokens.shape, 1),
          attention_mask=None,
          cache=None,
          position_ids=None,
          mm_token_type_ids=is_image,
        )
      }
    encoded = encoder(**inputs)
    cache = encoded.cache
    logits = [
      self.theirs(
        decoder_input_ids=torch.tensor(self.canvas_BL, dtype=torch.long),
        cache=cache,
        self_conditioning_logits=previous,
      ).logits
      for previous in (None, torch.tensor(self.previous_BLV))
    ]
    for hook in hooks:
      hook.remove()
    return encoded.last_hidden_state, cache, logits, seen


def shallow(config: configs.ModelConfig, canvas_length: int) -> Pair:
  """A pair of only three layers."""
  pattern = ('local', 'local', 'global')
  return Pair(replace(config, attention_pattern=pattern), canvas_length)


def compare_stack(pair: Pair) -> dict[str, float]:
  """Seven layers on top of each other: a prompt of text."""
  h, cache, logits = pair.ours(pair.prompt_BP)
  their_h, their_cache, their_logits, _ = pair.reference(pair.prompt_BP)
  return {
    'prefill hidden states': difference(h, their_h),
    'keys and values, all layers': compare_caches(cache, their_cache),
    'logits, no self-conditioning': difference(logits[0], their_logits[0]),
    'logits, self-conditioning': difference(logits[1], their_logits[1]),
  }


def compare_caches(cache, theirs) -> float:
  """Their local layers hold the last W - 1 tokens only."""
  worst = 0.0
  for index, layer in enumerate(theirs.layers):
    keys, values = by_slot(layer.keys), by_slot(layer.values)
    held = keys.shape[1]
    worst = max(
      worst,
      difference(cache.k[index][:, -held:], keys),
      difference(cache.v[index][:, -held:], values),
    )
  return worst


def compare_layers(pair: Pair) -> dict[str, float]:
  """Each layer alone, fed what theirs was fed."""
  config, L = pair.config, pair.canvas_length
  _, cache, _, seen = pair.reference(pair.prompt_BP)
  length_B = jnp.full((2,), PROMPT)
  zero_B = jnp.zeros((2,), jnp.int32)
  none_BS = jnp.zeros((2, 0), jnp.int32)
  functions = {}
  for kind, window in (('local', config.sliding_window), ('global', None)):
    layer = denoiser.Layer(config, kind)
    for method in ('prefill', 'denoise'):
      functions[kind, method] = jax.jit(
        lambda params, *arguments, layer=layer, method=method: layer.apply(
          {'params': params}, *arguments, method=method
        )
      )
    functions[kind, 'mask'] = masks.prefill_mask(
      zero_B, none_BS, PROMPT, window
    )
  worst = {'prefill': 0.0, 'keys and values': 0.0, 'denoise': 0.0}

  def note(name, ours, theirs):
    worst[name] = max(worst[name], difference(ours, theirs))

  for index, kind in enumerate(config.attention_pattern):
    params = pair.params[f'layer_{index:02d}']
    their_k = by_slot(cache.layers[index].keys)
    their_v = by_slot(cache.layers[index].values)
    heads = jnp.zeros((2, 0, *their_k.shape[2:]))
    x_in, x_out = seen['prefill'][index]
    positions = jnp.broadcast_to(jnp.arange(PROMPT), (2, PROMPT))
    x, (k, v), _ = functions[kind, 'prefill'](
      params, x_in, positions, functions[kind, 'mask'], (heads, heads)
    )
    note('prefill', x, x_out)
    held = their_k.shape[1]
    note('keys and values', k[:, -held:], their_k)
    note('keys and values', v[:, -held:], their_v)
    window = config.sliding_window if kind == 'local' else None
    cached_BS = positions[:, -held:]
    mask = masks.denoise_mask(length_B[:, None], cached_BS, L, window)
    canvas_positions = PROMPT + jnp.broadcast_to(jnp.arange(L), (2, L))
    layers = len(config.attention_pattern)
    for x_in, x_out in (
      seen['denoise'][index],
      seen['denoise'][layers + index],
    ):
      x = functions[kind, 'denoise'](
        params, x_in, canvas_positions, mask, (their_k, their_v)
      )
      note('denoise', x, x_out)
  return {f'one layer: {name}': value for name, value in worst.items()}


def image_prompt(pair: Pair):
  """Tokens with two images in row 0 and text in row 1, and their index."""
  vision = pair.config.vision
  T = pair.patches_IMX.shape[1] // vision.pooling_kernel**2
  counts = [width * height for width, height in IMAGE_PATCHES]
  row, index = list(pair.prompt_BP[0, :4]), [-1] * 4
  for i, count in enumerate(counts):
    row += [vision.begin_image_token_id] + [vision.image_token_id] * count
    row += [vision.end_image_token_id, *pair.prompt_BP[0, 4:7]]
    index += [-1, *(i * T + np.arange(count)), -1, -1, -1, -1]
  text = np.resize(pair.prompt_BP[1], len(row))
  tokens_BP = np.stack([np.array(row), text]).astype(np.int32)
  index_BP = np.stack([np.array(index), np.full(len(row), -1)])
  return tokens_BP, jnp.asarray(index_BP, jnp.int32)


def compare_images(pair: Pair) -> dict[str, float]:
  """Features of two images, and a prompt that holds both."""
  soft_ITD = pair.apply(
    jnp.asarray(pair.patches_IMX),
    jnp.asarray(pair.positions_IM2),
    method='encode_images',
  )
  images = {
    'pixel_values': torch.tensor(pair.patches_IMX),
    'image_position_ids': torch.tensor(pair.positions_IM2, dtype=torch.long),
  }
  with torch.no_grad():
    features = pair.theirs.model.encoder.get_image_features(
      **images, return_dict=True
    ).pooler_output
  counts = [width * height for width, height in IMAGE_PATCHES]
  real = np.concatenate([soft_ITD[i, :n] for i, n in enumerate(counts)])
  tokens_BP, index_BP = image_prompt(pair)
  h, cache, logits = pair.ours(
    tokens_BP, denoiser.SoftTokens(soft_ITD, index_BP)
  )
  their_h, their_cache, their_logits, _ = pair.reference(tokens_BP, images)
  return {
    'vision features': difference(real, features),
    'image prompt: hidden states': difference(h, their_h),
    'image prompt: keys and values': compare_caches(cache, their_cache),
    'image prompt: logits': max(
      difference(a, b) for a, b in zip(logits, their_logits, strict=True)
    ),
  }


def compare_unequal(pair: Pair) -> dict[str, float]:
  """A padded batch of ours against theirs, each row alone."""
  lengths = (PROMPT - 9, PROMPT)
  _, _, logits = pair.ours(pair.prompt_BP, length_B=jnp.array(lengths))
  canvas_BL, previous_BLV = pair.canvas_BL, pair.previous_BLV
  worst = 0.0
  try:
    for b, length in enumerate(lengths):
      pair.canvas_BL = canvas_BL[b : b + 1]
      pair.previous_BLV = previous_BLV[b : b + 1]
      _, _, theirs, _ = pair.reference(pair.prompt_BP[b : b + 1, :length])
      for ours, alone in zip(logits, theirs, strict=True):
        worst = max(worst, difference(ours[b : b + 1], alone))
  finally:
    pair.canvas_BL, pair.previous_BLV = canvas_BL, previous_BLV
  return {'unequal prompts: logits': worst}


def compare_gradients(pair: Pair) -> dict[str, float]:
  """Of the training loss, in every parameter that theirs can train.

  In seven random layers the two passes magnify rounding a thousand times:
  there the measure is what one rounding of the weights does to theirs alone.
  """
  small = shallow(pair.config, pair.canvas_length)
  loss, grads = our_gradients(small)
  their_loss, their_grads = their_gradients(small)
  before = their_gradients(pair)[1]
  with torch.no_grad():
    for parameter in pair.theirs.parameters():
      parameter.mul_(1 + 2**-23 * torch.randint_like(parameter, -1, 2))
  rounded = their_gradients(pair)[1]
  pair.theirs = make_reference(pair.config, pair.canvas_length)
  return {
    'training loss, three layers': abs(loss / their_loss - 1),
    'gradients, three layers': worst_of(grads, their_grads),
    'gradients, seven layers': worst_of(our_gradients(pair)[1], before),
    'gradients, theirs after one rounding': worst_of(rounded, before),
  }


def worst_of(ours: dict, theirs: dict) -> float:
  return max(difference(ours[name], theirs[name]) for name in theirs)


TEXT_START = 6


def training_example(pair: Pair):
  """(batch, noise): row 0 is self-conditioned, row 1 is not."""
  C, V = pair.canvas_length, pair.config.vocab_size
  S = TEXT_START + 2 * C
  rng = np.random.default_rng(2)
  batch = {
    'tokens_BS': rng.integers(3, V, (2, S)).astype(np.int32),
    'length_B': np.full(2, S, np.int32),
    'first_BS': np.zeros((2, S), np.int32),
    'canvas_start_BK': np.array([[TEXT_START, TEXT_START + C]] * 2, np.int32),
    'target_mask_BS': rng.random((2, S)) < 0.7,
  }
  drawn = losses.Noise(
    start_BK=jnp.full((2, 1), TEXT_START + C),  # After a clean canvas.
    first_BK=jnp.zeros((2, 1), jnp.int32),
    valid_BK=jnp.ones((2, 1), bool),
    t_BK=jnp.full((2, 1), 0.5),
    canvas_BL=jnp.asarray(pair.canvas_BL),
    corrupted_BL=jnp.ones((2, C), bool),
    guesses_B=jnp.array([1, 0]),
  )
  return batch, drawn


def network_of(model: denoiser.Denoiser, params: dict) -> losses.Network:
  config = configs.Config(model=model.config)
  return network_lib.bind(config, params)


def our_gradients(pair: Pair) -> tuple[float, dict]:
  """(loss, {their name: gradient in our shape})."""
  batch, drawn = training_example(pair)
  model = denoiser.Denoiser(pair.config)

  @jax.jit
  @jax.value_and_grad
  def loss_and_grad(params):
    network = network_of(model, params)
    return joint_loss.joint_loss(network, batch, drawn, 0.7)[0]

  loss, grads = loss_and_grad(pair.params)
  table = huggingface.tensor_table(grads)
  return float(loss), {
    name: leaf_at(grads, e.path) for name, e in table.items()
  }


def leaf_at(tree: dict, path: tuple[str, ...]):
  for part in path:
    tree = tree[part]
  return tree


def their_gradients(pair: Pair) -> tuple[float, dict]:
  """The same of theirs, which reads the text twice, whole and up to the
  canvas: its cache forgets what local layers don't need."""
  theirs, C, V = pair.theirs, pair.canvas_length, pair.config.vocab_size
  batch, drawn = training_example(pair)
  begin = int(drawn.start_BK[0, 0])
  tokens = torch.tensor(batch['tokens_BS'], dtype=torch.long)
  canvas = torch.tensor(pair.canvas_BL, dtype=torch.long)
  theirs.zero_grad()
  encoder = theirs.model.encoder
  cross_entropy = functools.partial(
    torch.nn.functional.cross_entropy, reduction='none'
  )
  h = encoder(input_ids=tokens).last_hidden_state
  logits = capped_logits(pair, h)[:, :-1].reshape(-1, V)
  ar = cross_entropy(logits, tokens[:, 1:].flatten())
  mask = torch.tensor(batch['target_mask_BS'][:, 1:]).flatten()
  prefix = encoder(input_ids=tokens[:, :begin]).cache
  with torch.no_grad():
    first = theirs(decoder_input_ids=canvas, cache=prefix).logits
  # The whole first pass is constant, its product with the embedding too.
  conditioning = theirs.model.decoder.self_conditioning
  detach = conditioning.register_forward_pre_hook(
    lambda _, args: (args[0], args[1].detach())
  )
  second = theirs(
    decoder_input_ids=canvas,
    cache=prefix,
    self_conditioning_logits=first,
    self_conditioning_mask=torch.tensor([True, False]),
  ).logits
  detach.remove()
  targets = tokens[:, begin : begin + C].flatten()
  denoise = cross_entropy(second.reshape(-1, V), targets)
  loss = denoise.mean() + 0.7 * ar[mask].mean()
  loss.backward()
  parameters = dict(theirs.named_parameters(remove_duplicate=False))
  table = huggingface.tensor_table(denoiser.abstract_params(pair.config))
  grads = {
    name: entry.to_ours(parameters[name].grad.numpy().copy())
    for name, entry in table.items()
    # Not buffers, nor the image encoder, which has no part in this loss.
    if name in parameters and entry.path[0] != 'vision'
  }
  scalars = 2 * len(pair.config.attention_pattern)
  text = sum(entry.path[0] != 'vision' for entry in table.values())
  assert len(grads) == text - scalars
  return loss.item(), grads


def capped_logits(pair: Pair, h: torch.Tensor) -> torch.Tensor:
  cap = pair.config.logit_softcap
  return torch.tanh(pair.theirs.lm_head(h).float() / cap) * cap


def compare_bfloat16(pair: Pair) -> dict[str, float]:
  """Both in bfloat16, with weights that have learnt eight texts by heart: in
  a random network the first two tokens are too close for any such type."""
  pair = shallow(pair.config, pair.canvas_length)
  C, V = pair.canvas_length, pair.config.vocab_size
  S = TEXT_START + 3 * C
  rng = np.random.default_rng(3)
  tokens_BS = rng.integers(3, V, (8, S)).astype(np.int32)
  params = memorise(pair, tokens_BS)
  canvas_BL = tokens_BS[:, -C:].copy()
  noisy = rng.random(canvas_BL.shape) < 0.3
  canvas_BL[noisy] = rng.integers(3, V, noisy.sum())
  state = pair.theirs.state_dict()
  with torch.no_grad():
    for name, entry in huggingface.tensor_table(params).items():
      array = entry.to_theirs(np.asarray(leaf_at(params, entry.path)))
      state[name].copy_(torch.tensor(array))

  @functools.partial(jax.jit, static_argnums=1)
  def ours(params, dtype):
    model = denoiser.Denoiser(replace(pair.config, dtype=dtype))
    apply = functools.partial(model.apply, {'params': params})
    length_B = jnp.full((8,), S - C)
    h, cache, _ = apply(tokens_BS[:, :-C], length_B, method='prefill')
    sc_BLD = jnp.zeros((8, C, pair.config.embed_dim))
    h_BLD = apply(canvas_BL, sc_BLD, cache, method='denoise')
    h = jnp.concatenate([h, h_BLD], axis=1)
    return apply(h, method='logits')

  @torch.no_grad()
  def theirs():
    tokens = torch.tensor(tokens_BS[:, :-C], dtype=torch.long)
    read = pair.theirs.model.encoder(input_ids=tokens)
    denoised = pair.theirs(
      decoder_input_ids=torch.tensor(canvas_BL, dtype=torch.long),
      cache=read.cache,
    ).logits
    logits = capped_logits(pair, read.last_hidden_state)
    return torch.cat([logits, denoised], dim=1).float().numpy()

  exact = theirs()
  float32 = ours(params, 'float32')
  halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  half = np.asarray(ours(halved, 'bfloat16'))
  pair.theirs.bfloat16()
  their_half = theirs()
  same = half.argmax(-1) == their_half.argmax(-1)
  return {
    'learnt network, float32 logits': difference(float32, exact),
    'bfloat16 logits from float32, ours': difference(half, exact),
    'bfloat16 logits from float32, theirs': difference(their_half, exact),
    'bfloat16: positions with another top-1': float(1 - same.mean()),
  }


def memorise(pair: Pair, tokens_BS: np.ndarray) -> dict:
  """Parameters trained on these rows until they are known."""
  B, S = tokens_BS.shape
  start_K = np.arange(
    TEXT_START, S - pair.canvas_length + 1, pair.canvas_length
  )
  batch = {
    'tokens_BS': tokens_BS,
    'length_B': np.full(B, S, np.int32),
    'first_BS': np.zeros((B, S), np.int32),
    'canvas_start_BK': np.tile(start_K.astype(np.int32), (B, 1)),
    'target_mask_BS': np.ones((B, S), bool),
  }
  model = denoiser.Denoiser(pair.config)
  optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, STEPS))

  @jax.jit
  def train(params):
    def step(carry, key):
      params, state = carry
      drawn = losses.draw_noise(
        key, batch, pair.canvas_length, pair.config.vocab_size, 0.5
      )
      grads = jax.grad(
        lambda p: joint_loss.joint_loss(
          network_of(model, p), batch, drawn, 1.0
        )[0]
      )(params)
      updates, state = optimizer.update(grads, state)
      return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), STEPS)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return params

  fresh = denoiser.init_params(model, jax.random.key(0))
  return train(fresh)


STEPS = 300


COMPARISONS = (
  compare_layers,
  compare_stack,
  compare_images,
  compare_unequal,
  compare_gradients,
  compare_bfloat16,
)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--output', help='JSON to write.')
  arguments = parser.parse_args()
  results = {}
  for name, shape in SHAPES.items():
    pair = Pair(*shape)
    results[name] = {}
    for compare in COMPARISONS:
      results[name] |= compare(pair)
  quantities = list(results['short window'])
  print('| quantity | ' + ' | '.join(SHAPES) + ' |')
  print('|---|' + '---|' * len(SHAPES))
  for quantity in quantities:
    cells = [f'{results[name][quantity]:.1e}' for name in SHAPES]
    print(f'| {quantity} | ' + ' | '.join(cells) + ' |')
  if arguments.output:
    versions = {
      'python': platform.python_version(),
      'jax': jax.__version__,
      'torch': torch.__version__,
      'transformers': transformers.__version__,
      'machine': platform.machine(),
    }
    os.makedirs(os.path.dirname(arguments.output), exist_ok=True)
    with open(arguments.output, 'w') as file:
      json.dump({'versions': versions, 'differences': results}, file, indent=2)
      file.write('\n')


if __name__ == '__main__':
  main()
