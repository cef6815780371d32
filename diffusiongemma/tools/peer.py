"""The peer of the benchmark: `transformers` with the same weights.

It samples with its own `generate`, eager and, if that works, compiled by torch
with a cache of fixed size.
"""

from collections.abc import Callable
import copy
import functools
from typing import Any

import numpy as np

from diffusiongemma.checkpoints import huggingface
from diffusiongemma.checkpoints import huggingface_config
from diffusiongemma.config import Config
from diffusiongemma.runs import huggingface_folder

# Modes of `transformers`: name -> (whether compiled, title of its column).
WAYS = {
  'peer': (False, 'transformers'),
  'compiled_peer': (True, 'compiled'),
}
# Tokens of a prompt that `transformers` reads at a time; each piece sees all
# text before it.
PIECE = 1024


class Transformers:
  """The network in `transformers`, eager or compiled by torch, in float32, with
  random weights; `params` are the same weights in our form."""

  def __init__(self, config: Config):
    import torch
    import transformers
    from transformers.models import diffusion_gemma

    self.torch, self.version = torch, transformers.__version__
    self.generation = diffusion_gemma.generation_diffusion_gemma
    self.caches = transformers.cache_utils
    network = huggingface_folder.with_smallest_vision(config)
    values = huggingface_config.to_config(network, config.diffusion, 'float32')
    own = diffusion_gemma.DiffusionGemmaConfig.from_dict(values)
    torch.manual_seed(0)
    self.model = diffusion_gemma.DiffusionGemmaForBlockDiffusion(own)
    self.model = self.model.float().eval()
    self.optimizer: Any = None
    self.params = huggingface.from_state_dict(
      config.model, self.model.state_dict()
    )

  def read_prompt(
    self, config: Config, tokens_BP: np.ndarray, compiled: bool
  ) -> Any:
    """Its cache of these tokens, with room for a canvas: of fixed size,
    required for compilation, or growing."""
    text = self.model.config.get_text_config(decoder=True)
    P = tokens_BP.shape[1]
    cache: Any
    if compiled:
      room = P + 1 + config.diffusion.canvas_length
      cache = self.caches.StaticCache(config=text, max_cache_len=room)
    else:
      cache = self.caches.DynamicCache(config=text)
    with self.torch.no_grad():
      for start in range(0, P, PIECE):
        end = min(start + PIECE, P)
        self.model.model.encoder(
          input_ids=self.torch.tensor(tokens_BP[:, start:end]).long(),
          position_ids=self.torch.arange(start, end)[None],
          cache=cache,
        )
    return cache

  def write(
    self, config: Config, last_B1: np.ndarray, cache: Any, steps: int
  ) -> None:
    """Writes a canvas with `steps` steps, after the last token of a prompt
    whose other tokens are in the cache (of which it uses a copy). It is
    compiled if the cache has a fixed size."""
    diffusion, module = config.diffusion, self.generation
    self.model.generate(
      self.torch.tensor(last_B1).long(),
      cache=copy.deepcopy(cache),
      generation_config=module.DiffusionGemmaGenerationConfig(
        max_new_tokens=diffusion.canvas_length,
        max_denoising_steps=steps,
        sampler_config=module.EntropyBoundSamplerConfig(
          diffusion.entropy_bound
        ),
        t_min=diffusion.t_min,
        t_max=diffusion.t_max,
        confidence_threshold=1e-9,
        eos_token_id=[10**6],  # Which is never written.
        pad_token_id=diffusion.pad_token_id,
      ),
    )

  def writers(
    self, config: Config, tokens_BP: np.ndarray
  ) -> tuple[dict[str, Callable[[int], None]], str | None]:
    """({mode: steps -> `write`}, warmed up; the reason if it can't be compiled,
    else None)."""
    writers_of_mode: dict[str, Callable[[int], None]] = {}
    for name, (compiled, _) in WAYS.items():
      try:
        cache = self.read_prompt(config, tokens_BP[:, :-1], compiled)
        write = functools.partial(self.write, config, tokens_BP[:, -1:], cache)
        write(1)
      except Exception as error:  # Compilers can raise anything.
        if not compiled:
          raise
        return writers_of_mode, f'{type(error).__name__}: {error}'.splitlines()[
          0
        ]
      writers_of_mode[name] = write
    return writers_of_mode, None

  def learn(self, config: Config, batch: dict[str, np.ndarray]) -> float:
    """A training step with our losses, on the first canvas of each row; returns
    the loss.

    Its cache drops tokens that local layers don't need, so the text before the
    canvas is read a second time.
    """
    torch, train, C = self.torch, config.train, config.diffusion.canvas_length
    if self.optimizer is None:
      self.model.requires_grad_(True)
      self.optimizer = torch.optim.AdamW(self.model.parameters())
    encoder, V = self.model.model.encoder, config.model.vocab_size
    tokens_BS = torch.tensor(batch['tokens_BS'], dtype=torch.long)
    start, rows = int(batch['canvas_start_BK'][0, 0]), len(tokens_BS)
    clean_BC = tokens_BS[:, start : start + C]
    is_noise_BC = torch.rand(clean_BC.shape) < torch.rand(rows, 1)
    noise_BC = torch.randint(V, clean_BC.shape)
    canvas_BC = torch.where(is_noise_BC, noise_BC, clean_BC)

    def cross_entropy(logits, targets):
      return torch.nn.functional.cross_entropy(
        logits.reshape(-1, V), targets.flatten()
      )

    h_BSD = encoder(input_ids=tokens_BS).last_hidden_state
    mask_BS = torch.tensor(batch['target_mask_BS'])[:, 1:]
    cap = config.model.logit_softcap
    logits_MV = self.model.lm_head(h_BSD[:, :-1][mask_BS])
    logits_MV = torch.tanh(logits_MV / cap) * cap
    loss_ar = cross_entropy(logits_MV, tokens_BS[:, 1:][mask_BS])
    cache = encoder(input_ids=tokens_BS[:, :start]).cache
    inputs = {'decoder_input_ids': canvas_BC, 'cache': cache}
    with torch.no_grad():
      first_BCV = self.model(**inputs).logits
    logits_BCV = self.model(
      **inputs,
      self_conditioning_logits=first_BCV,
      self_conditioning_mask=torch.rand(rows)
      < train.self_conditioning_probability,
    ).logits
    loss = cross_entropy(logits_BCV, clean_BC) + train.ar_loss_weight * loss_ar
    self.optimizer.zero_grad()
    loss.backward()
    self.optimizer.step()
    return loss.item()
