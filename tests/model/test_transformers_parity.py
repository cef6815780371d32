"""The network against its Hugging Face implementation, float32, CPU."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.model import denoiser

torch = pytest.importorskip(
  'torch', reason='torch is installed by the [test] extra'
)
transformers = pytest.importorskip(
  'transformers', reason='transformers is installed by the [test] extra'
)
modeling = pytest.importorskip(
  'transformers.models.diffusion_gemma.modeling_diffusion_gemma'
)

# (our leaf, their tensor, axes: how many of ours theirs has merged)
LAYER_TENSORS = {
  ('norm_in', 'scale'): 'input_layernorm.weight',
  ('norm_post_attn', 'scale'): 'post_attention_layernorm.weight',
  ('norm_pre_ffw', 'scale'): 'pre_feedforward_layernorm.weight',
  ('norm_post_ffw', 'scale'): 'post_feedforward_layernorm.weight',
  ('norm_post_ffw_1', 'scale'): 'post_feedforward_layernorm_1.weight',
  ('norm_pre_ffw_2', 'scale'): 'pre_feedforward_layernorm_2.weight',
  ('norm_post_ffw_2', 'scale'): 'post_feedforward_layernorm_2.weight',
  ('attention', 'q_norm', 'scale'): 'self_attn.q_norm.weight',
  ('attention', 'k_norm', 'scale'): 'self_attn.k_norm.weight',
  ('attention', 'q_proj'): 'self_attn.q_proj.weight',
  ('attention', 'k_proj'): 'self_attn.k_proj.weight',
  ('attention', 'v_proj'): 'self_attn.v_proj.weight',
  ('attention', 'o_proj'): 'self_attn.o_proj.weight',
  ('shared_mlp', 'gate'): 'mlp.gate_proj.weight',
  ('shared_mlp', 'up'): 'mlp.up_proj.weight',
  ('shared_mlp', 'down'): 'mlp.down_proj.weight',
  ('router', 'scale'): 'router.scale',
  ('router', 'proj'): 'router.proj.weight',
  ('router', 'per_expert_scale'): 'router.per_expert_scale',
  ('experts', 'gate_up'): 'experts.gate_up_proj',
  ('experts', 'down'): 'experts.down_proj',
  ('denoise_scalar',): 'layer_scalar',
}


def make_reference(config, canvas_length):
  """Their model, every tensor and buffer of it random."""
  kinds = {'local': 'sliding_attention', 'global': 'full_attention'}
  text_config = dict(
    vocab_size=config.vocab_size,
    hidden_size=config.embed_dim,
    intermediate_size=config.mlp_dim,
    num_hidden_layers=len(config.attention_pattern),
    layer_types=[kinds[kind] for kind in config.attention_pattern],
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    num_global_key_value_heads=config.num_global_kv_heads,
    global_head_dim=config.global_head_dim,
    sliding_window=config.sliding_window,
    num_experts=config.num_experts,
    top_k_experts=config.experts_per_token,
    moe_intermediate_size=config.expert_dim,
    final_logit_softcapping=config.logit_softcap,
    pad_token_id=0,
    attn_implementation='eager',
  )
  hf_config = transformers.models.diffusion_gemma.DiffusionGemmaConfig(
    text_config=text_config, vision_config=None, canvas_length=canvas_length
  )
  torch.manual_seed(0)
  model = modeling.DiffusionGemmaForBlockDiffusion(hf_config).float().eval()
  with torch.no_grad():
    for name, tensor in model.state_dict().items():
      if 'norm' in name or 'scal' in name:
        tensor.uniform_(0.6, 1.4)
      elif 'embed_tokens' in name:
        tensor.normal_(0, config.embed_dim**-0.5)
      else:
        tensor.normal_(0, tensor.shape[-1] ** -0.5)
  return model


def convert(model, config):
  """Their tensors in our tree."""
  state = {k: v.numpy() for k, v in model.state_dict().items()}
  shapes = denoiser_shapes(config)

  def reshape(ours, theirs, path):
    if path[0] != 'experts' and theirs.ndim == 2:
      theirs = theirs.T  # their linears are [out, in]
    return jnp.asarray(theirs.reshape(ours.shape))

  params = {
    'embedding': jnp.asarray(state['model.decoder.embed_tokens.weight']),
    'final_norm': {'scale': jnp.asarray(state['model.decoder.norm.weight'])},
    'self_conditioning': {
      'norm': {
        'scale': jnp.asarray(
          state['model.decoder.self_conditioning.pre_norm.weight']
        )
      },
      'mlp': {
        name: jnp.asarray(
          state[f'model.decoder.self_conditioning.{name}_proj.weight'].T
        )
        for name in ('gate', 'up', 'down')
      },
    },
  }
  for index in range(len(config.attention_pattern)):
    layer = f'layer_{index:02d}'
    params[layer] = {
      'prefill_scalar': jnp.asarray(
        state[f'model.encoder.language_model.layers.{index}.layer_scalar']
      )
    }
    for path, name in LAYER_TENSORS.items():
      ours = shapes[layer]
      for part in path:
        ours = ours.get(part) if ours is not None else None
      if ours is None:
        continue  # global layers have no v projection
      node = params[layer]
      for part in path[:-1]:
        node = node.setdefault(part, {})
      theirs = state[f'model.decoder.layers.{index}.{name}']
      node[path[-1]] = reshape(ours, theirs, path)
  return params


def denoiser_shapes(config):
  import jax

  model = denoiser.Denoiser(config)
  return jax.eval_shape(lambda: denoiser.init_params(model, jax.random.key(0)))


VARIANTS = {
  'short window': {},
  'window longer than the prompt': {'sliding_window': 64},
  'two global kv heads': {'num_global_kv_heads': 2, 'experts_per_token': 3},
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_equals_transformers(model_config, variant):
  config = dataclasses.replace(model_config, **VARIANTS[variant])
  L, P = 8, 13
  reference = make_reference(config, L)
  params = convert(reference, config)
  assert denoiser_shapes(config).keys() == params.keys()
  model = denoiser.Denoiser(config)
  rng = np.random.default_rng(0)
  prompt_BP = rng.integers(3, config.vocab_size, (2, P))
  canvas_BL = rng.integers(0, config.vocab_size, (2, L))
  previous_BLV = rng.normal(0, 3, (2, L, config.vocab_size)).astype('float32')

  with torch.no_grad():
    encoded = reference.model.encoder(input_ids=torch.tensor(prompt_BP))
    theirs = [
      reference(
        decoder_input_ids=torch.tensor(canvas_BL),
        past_key_values=encoded.past_key_values,
        self_conditioning_logits=previous,
      ).logits.numpy()
      for previous in (None, torch.tensor(previous_BLV))
    ]

  def apply(*arguments, method):
    return model.apply({'params': params}, *arguments, method=method)

  h_BPD, cache, _ = apply(
    jnp.asarray(prompt_BP), jnp.full((2,), P), method='prefill'
  )
  close(h_BPD, encoded.last_hidden_state.numpy(), 1e-5)
  for index, layer in enumerate(encoded.past_key_values.layers):
    # Their cache of a local layer keeps the last W - 1 tokens.
    keys = layer.keys.numpy().transpose(0, 2, 1, 3)
    values = layer.values.numpy().transpose(0, 2, 1, 3)
    close(cache.k[index][:, -keys.shape[1] :], keys, 1e-5)
    close(cache.v[index][:, -values.shape[1] :], values, 1e-5)

  probabilities = torch.tensor(previous_BLV).softmax(-1).numpy()
  conditioned = apply(jnp.asarray(probabilities), method='soft_embedding')
  for sc_BLD, logits_BLV in zip(
    (jnp.zeros_like(conditioned), conditioned), theirs, strict=True
  ):
    h_BLD = apply(jnp.asarray(canvas_BL), sc_BLD, cache, method='denoise')
    close(apply(h_BLD, method='logits'), logits_BLV, 3e-5)


def close(ours, theirs, tolerance):
  """Within `tolerance` of the largest value."""
  error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
  assert error < tolerance, error
