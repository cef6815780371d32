"""DiffusionGemma in JAX/Flax: text by discrete diffusion.

Every array's name ends in its axes:

  B batch   L canvas   P prompt   S keys or a whole sequence   D model width
  F hidden width of an MLP   N query heads   K kv heads   G = N / K   H head
  E experts   V vocabulary   M tokens in a row   R routed rows   T tile rows
  k experts of a token   C canvas length   U uniforms of a draw

Public names: `Config` and its parts, `Denoiser` and `init_params` (the
network), `init_cache`, `prefill`, `read_prompt` (long ones), `encode_images`
and `SoftTokens` (images in a prompt), `make_denoise_fn` (a network that has
read a text, as the sampler sees it), `sample_canvas` (the sampler, for use
inside `jax.jit`) with `pin` and `Pinned` and the module `strategies`,
`generate` (prompts to tokens), `load` (a `Run`: trained here, or of Hugging
Face),
`arrange` (parameters as this device writes with them fastest), `convert` and
`export` (one into the other), `quantize` (either, to few bits).
"""

from diffusiongemma.config import Config
from diffusiongemma.config import DiffusionConfig
from diffusiongemma.config import ModelConfig
from diffusiongemma.config import QuantizationConfig
from diffusiongemma.config import VisionConfig
from diffusiongemma.diffusion import strategies
from diffusiongemma.diffusion.sampler import Pinned
from diffusiongemma.diffusion.sampler import Prediction
from diffusiongemma.diffusion.sampler import pin
from diffusiongemma.diffusion.sampler import sample_canvas
from diffusiongemma.generation.generate import generate
from diffusiongemma.generation.generate import make_denoise_fn
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
from diffusiongemma.runs.load import Run
from diffusiongemma.runs.load import load
from diffusiongemma.text.tokenizer import Tokenizer
from diffusiongemma.version import __version__

__all__ = [
  'Config',
  'Denoiser',
  'DiffusionConfig',
  'KVCache',
  'ModelConfig',
  'Pinned',
  'Prediction',
  'QuantizationConfig',
  'Run',
  'SoftTokens',
  'Tokenizer',
  'VisionConfig',
  '__version__',
  'arrange',
  'convert',
  'encode_images',
  'export',
  'generate',
  'init_cache',
  'init_params',
  'load',
  'make_denoise_fn',
  'pin',
  'prefill',
  'quantize',
  'read_prompt',
  'sample_canvas',
  'strategies',
]
