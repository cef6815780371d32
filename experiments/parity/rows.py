"""How many tokens of a row differ when others are written beside it.

  python -m experiments.parity.rows

A random network, sharpened so that it prefers some tokens as a trained one
does; each prompt is continued alone and in a batch of eight, with the same key.
"""

import dataclasses
import json

import jax
import numpy as np

import diffusiongemma as dg

PROMPT_LENGTHS = (4, 9, 17, 30, 5, 12, 23, 64)
C = 64


def count_different(dtype: str, steps: int, seed: int = 0) -> int:
  """Tokens that differ between rows alone and in a batch, of 8 C."""
  model = dg.ModelConfig(
    vocab_size=4096,
    embed_dim=128,
    attention_pattern=('local', 'local', 'global'),
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    num_global_kv_heads=1,
    global_head_dim=64,
    sliding_window=32,
    mlp_dim=128,
    num_experts=8,
    experts_per_token=2,
    expert_dim=64,
    context_length=512,
    dtype=dtype,
    param_dtype=dtype,
  )
  diffusion = dg.DiffusionConfig(
    canvas_length=C, max_denoising_steps=steps, stop_token_ids=()
  )
  config = dg.Config(model=model, diffusion=diffusion)
  in_float32 = dataclasses.replace(model, param_dtype='float32')
  params = dg.init_params(dg.Denoiser(in_float32), jax.random.key(seed))
  params['final_norm']['scale'] *= 4.0
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  rng = np.random.default_rng(seed)
  prompts = [
    [2, *rng.integers(3, 4096, length).tolist()] for length in PROMPT_LENGTHS
  ]
  keys_B = jax.random.split(jax.random.key(seed), len(prompts))
  together = dg.generate(config, params, prompts, keys_B, C).rows
  different = 0
  for row, prompt in enumerate(prompts):
    (alone,) = dg.generate(
      config, params, [prompt], keys_B[row : row + 1], C
    ).rows
    different += sum(
      a != b for a, b in zip(alone.tokens, together[row].tokens, strict=True)
    )
  return different


def main():
  counted = {
    dtype: {str(steps): count_different(dtype, steps) for steps in (1, 4, 16)}
    for dtype in ('float32', 'bfloat16')
  }
  tokens = len(PROMPT_LENGTHS) * C
  print(json.dumps({'tokens': tokens, 'different_after_steps': counted}))


if __name__ == '__main__':
  main()
