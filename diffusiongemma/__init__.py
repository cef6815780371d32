"""DiffusionGemma in JAX/Flax: text by discrete diffusion.

Every array's name ends in its axes:

  B batch   L canvas   P prompt   S keys or a whole sequence   D model width
  F hidden width of an MLP   N query heads   K kv heads   G = N / K   H head
  E experts   V vocabulary   M tokens in a row   R routed rows   T tile rows
  k experts of a token   C canvas length   U uniforms of a draw

With a run: `load` (a trained run or a Hugging Face folder), `generate`,
`stream`, `show` (live), `chat`, `log_likelihood`. Pure functions for research
code: `Denoiser`
and `init_params` (the network), `init_cache`, `prefill`, `read_prompt` (long
prompts), `encode_images` and `SoftTokens` (images in a prompt),
`make_denoise_fn` (a network that has read a text, as the sampler sees it),
`sample_canvas` (the sampler, for use inside `jax.jit`) with `Sampling`, `pin`
and the module `strategies`, `generate_tokens` (prompts to tokens), `loss` (the
training loss). Between folders: `convert`, `export`, `quantize`. Settings:
`Config` and its parts. `Error` is the base of all errors that a user can mend.
"""

import importlib
from typing import TYPE_CHECKING
from typing import Any

from diffusiongemma.version import __version__

if TYPE_CHECKING:
  from diffusiongemma.api import Likelihood as Likelihood
  from diffusiongemma.api import Written as Written
  from diffusiongemma.api import chat as chat
  from diffusiongemma.api import generate as generate
  from diffusiongemma.api import log_likelihood as log_likelihood
  from diffusiongemma.api import loss as loss
  from diffusiongemma.api import show as show
  from diffusiongemma.api import stream as stream
  from diffusiongemma.config import Config as Config
  from diffusiongemma.config import DiffusionConfig as DiffusionConfig
  from diffusiongemma.config import ModelConfig as ModelConfig
  from diffusiongemma.config import QuantizationConfig as QuantizationConfig
  from diffusiongemma.config import VisionConfig as VisionConfig
  from diffusiongemma.diffusion import strategies as strategies
  from diffusiongemma.diffusion.sampler import Prediction as Prediction
  from diffusiongemma.diffusion.sampler import sample_canvas as sample_canvas
  from diffusiongemma.diffusion.sampling import Pinned as Pinned
  from diffusiongemma.diffusion.sampling import Sampling as Sampling
  from diffusiongemma.diffusion.sampling import pin as pin
  from diffusiongemma.errors import Error as Error
  from diffusiongemma.generation.engine import (
    make_denoise_fn as make_denoise_fn,
  )
  from diffusiongemma.generation.generate import (
    generate_tokens as generate_tokens,
  )
  from diffusiongemma.generation.prompt import encode_images as encode_images
  from diffusiongemma.generation.prompt import prefill as prefill
  from diffusiongemma.generation.prompt import read_prompt as read_prompt
  from diffusiongemma.model.cache import KVCache as KVCache
  from diffusiongemma.model.cache import init_cache as init_cache
  from diffusiongemma.model.denoiser import Denoiser as Denoiser
  from diffusiongemma.model.denoiser import SoftTokens as SoftTokens
  from diffusiongemma.model.denoiser import init_params as init_params
  from diffusiongemma.ops.weights import arrange as arrange
  from diffusiongemma.runs.convert import convert as convert
  from diffusiongemma.runs.convert import export as export
  from diffusiongemma.runs.convert import quantize as quantize
  from diffusiongemma.runs.load import Run as Run
  from diffusiongemma.runs.load import load as load
  from diffusiongemma.text.tokenizer import Tokenizer as Tokenizer

# The module of each public name, imported at first access: research code waits
# only for the modules that it uses.
_HOME = {
  'Likelihood': 'diffusiongemma.api',
  'Written': 'diffusiongemma.api',
  'chat': 'diffusiongemma.api',
  'generate': 'diffusiongemma.api',
  'log_likelihood': 'diffusiongemma.api',
  'loss': 'diffusiongemma.api',
  'show': 'diffusiongemma.api',
  'stream': 'diffusiongemma.api',
  'Config': 'diffusiongemma.config',
  'DiffusionConfig': 'diffusiongemma.config',
  'ModelConfig': 'diffusiongemma.config',
  'QuantizationConfig': 'diffusiongemma.config',
  'VisionConfig': 'diffusiongemma.config',
  'strategies': 'diffusiongemma.diffusion.strategies',
  'Prediction': 'diffusiongemma.diffusion.sampler',
  'sample_canvas': 'diffusiongemma.diffusion.sampler',
  'Pinned': 'diffusiongemma.diffusion.sampling',
  'Sampling': 'diffusiongemma.diffusion.sampling',
  'pin': 'diffusiongemma.diffusion.sampling',
  'Error': 'diffusiongemma.errors',
  'make_denoise_fn': 'diffusiongemma.generation.engine',
  'generate_tokens': 'diffusiongemma.generation.generate',
  'encode_images': 'diffusiongemma.generation.prompt',
  'prefill': 'diffusiongemma.generation.prompt',
  'read_prompt': 'diffusiongemma.generation.prompt',
  'KVCache': 'diffusiongemma.model.cache',
  'init_cache': 'diffusiongemma.model.cache',
  'Denoiser': 'diffusiongemma.model.denoiser',
  'SoftTokens': 'diffusiongemma.model.denoiser',
  'init_params': 'diffusiongemma.model.denoiser',
  'arrange': 'diffusiongemma.ops.weights',
  'convert': 'diffusiongemma.runs.convert',
  'export': 'diffusiongemma.runs.convert',
  'quantize': 'diffusiongemma.runs.convert',
  'Run': 'diffusiongemma.runs.load',
  'load': 'diffusiongemma.runs.load',
  'Tokenizer': 'diffusiongemma.text.tokenizer',
}
__all__ = [*_HOME, '__version__']


def __getattr__(name: str) -> Any:
  if name not in _HOME:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  home = importlib.import_module(_HOME[name])
  value = home if name == 'strategies' else getattr(home, name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *_HOME})
