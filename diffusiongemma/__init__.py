"""DiffusionGemma in JAX/Flax: text by discrete diffusion.

Every array's name ends in its axes:

  B batch   L canvas   P prompt   S keys or a whole sequence   D model width
  F hidden width of an MLP   N query heads   K kv heads   G = N / K   H head
  E experts   V vocabulary   M tokens in a row   R routed rows   T tile rows
  k experts of a token   C canvas length   U uniforms of a draw

With a run: `load` (a trained run or a Hugging Face folder), `generate`,
`stream`, `chat`, `log_likelihood`. Pure functions for research code: `Denoiser`
and `init_params` (the network), `init_cache`, `prefill`, `read_prompt` (long
prompts), `encode_images` and `SoftTokens` (images in a prompt),
`make_denoise_fn` (a network that has read a text, as the sampler sees it),
`sample_canvas` (the sampler, for use inside `jax.jit`) with `Sampling`, `pin`
and the module `strategies`, `generate_tokens` (prompts to tokens), `loss` (the
training loss). Between folders: `convert`, `export`, `quantize`. Settings:
`Config` and its parts.
"""

from diffusiongemma.api import Likelihood
from diffusiongemma.api import Written
from diffusiongemma.api import chat
from diffusiongemma.api import generate
from diffusiongemma.api import load
from diffusiongemma.api import log_likelihood
from diffusiongemma.api import loss
from diffusiongemma.api import stream
from diffusiongemma.config import Config
from diffusiongemma.config import DiffusionConfig
from diffusiongemma.config import ModelConfig
from diffusiongemma.config import QuantizationConfig
from diffusiongemma.config import VisionConfig
from diffusiongemma.diffusion import strategies
from diffusiongemma.diffusion.sampler import Prediction
from diffusiongemma.diffusion.sampler import sample_canvas
from diffusiongemma.diffusion.sampling import Pinned
from diffusiongemma.diffusion.sampling import Sampling
from diffusiongemma.diffusion.sampling import pin
from diffusiongemma.generation.engine import make_denoise_fn
from diffusiongemma.generation.generate import generate_tokens
from diffusiongemma.generation.prompt import encode_images
from diffusiongemma.generation.prompt import prefill
from diffusiongemma.generation.prompt import read_prompt
from diffusiongemma.model.cache import KVCache
from diffusiongemma.model.cache import init_cache
from diffusiongemma.model.denoiser import Denoiser
from diffusiongemma.model.denoiser import SoftTokens
from diffusiongemma.model.denoiser import init_params
from diffusiongemma.ops.weights import arrange
from diffusiongemma.runs.convert import convert
from diffusiongemma.runs.convert import export
from diffusiongemma.runs.convert import quantize
from diffusiongemma.text.tokenizer import Tokenizer
from diffusiongemma.version import __version__

__all__ = [
  'Config',
  'Denoiser',
  'DiffusionConfig',
  'KVCache',
  'Likelihood',
  'ModelConfig',
  'Pinned',
  'Prediction',
  'QuantizationConfig',
  'Sampling',
  'SoftTokens',
  'Tokenizer',
  'VisionConfig',
  'Written',
  '__version__',
  'arrange',
  'chat',
  'convert',
  'encode_images',
  'export',
  'generate',
  'generate_tokens',
  'init_cache',
  'init_params',
  'load',
  'log_likelihood',
  'loss',
  'make_denoise_fn',
  'pin',
  'prefill',
  'quantize',
  'read_prompt',
  'sample_canvas',
  'strategies',
  'stream',
]
