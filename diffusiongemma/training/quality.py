"""Quality of a run during training: held-out losses, and a sample."""

from collections.abc import Callable

import jax

from diffusiongemma import config as configs
from diffusiongemma.config import Config
from diffusiongemma.generation import generate
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.ops.weights import Params
from diffusiongemma.text.tokenizer import Tokenizer
from diffusiongemma.text.tokenizer import TokenizerError
from diffusiongemma.training import corpus as corpora
from diffusiongemma.training import evaluate
from diffusiongemma.training import metrics as metrics_lib

EVALUATION_NOISE = 0.3


class _StoppedError(Exception):
  """A signal arrived during an evaluation."""


# Tokens of a held-out text that are the prompt of samples.
PROMPT_TOKENS = 8


def has_foreign_prompt(config: Config) -> bool:
  """Whether `config.train.sample_prompt` is the default, which is for the
  shipped text, and the run has another text."""
  is_default = config.train.sample_prompt == configs.TrainConfig.sample_prompt
  return is_default and bool(config.data.path)


def sample_prompt(
  config: Config, corpus: corpora.Corpus, tokenizer: Tokenizer
) -> list[int]:
  """The tokens of the prompt of samples, [] for no samples.

  It is `config.train.sample_prompt`; where that is foreign, the beginning of
  the first held-out text or the prompt of the first held-out response.

  Raises:
    ConfigError: a sample from it would fail during the run.
  """
  text = config.train.sample_prompt
  if not text:
    return []
  room = config.model.context_length - config.diffusion.canvas_length
  if has_foreign_prompt(config):
    first = corpus.heldout[0]
    length = first.prompt_length
    tokens = first.tokens[: PROMPT_TOKENS if length is None else length]
    return [tokenizer.bos_id, *map(int, tokens[: room - 1])]
  try:
    prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
    prompt_lib.check(config, prompt, config.diffusion.canvas_length)
  except (prompt_lib.PromptError, TokenizerError) as error:
    raise configs.ConfigError(f'config.train.sample_prompt: {error}') from error
  return prompt


def report_quality(
  config: Config,
  corpus: corpora.Corpus,
  tokenizer: Tokenizer,
  prompt: list[int],
  writer: metrics_lib.MetricsWriter,
  progress: metrics_lib.Progress,
  must_stop: Callable[[], bool],
  step: int,
  params: Params,
) -> None:
  """Writes held-out losses and a sample after the steps where they are due;
  stops early when a signal arrives.

  Args:
    config: of the run.
    corpus: its held-out text is evaluated.
    tokenizer: of the run.
    prompt: of the samples, see `sample_prompt`.
    writer, progress: outputs of the numbers.
    must_stop: whether a signal has arrived; see `stopping.stop_signals`.
    step: steps done.
    params: of the network.
  """

  def stop_if_asked(*unused):
    if must_stop():
      raise _StoppedError

  train = config.train
  is_last = step == train.steps
  try:
    if step % train.evaluate_every == 0 or is_last:
      with progress.doing('evaluating'):
        line = _report_losses(
          config, corpus, writer, step, params, stop_if_asked
        )
      progress.print(f'step {step}/{train.steps}  {line}')
    if prompt and (step % train.sample_every == 0 or is_last):
      with progress.doing('writing a sample'):
        text = _write_sample(config, tokenizer, prompt, params, stop_if_asked)
      writer.write_text(step, text)
      progress.print(f'step {step}/{train.steps}  sample:\n{text}\n')
  except _StoppedError:
    progress.print(
      f'The evaluation of step {step} is incomplete; --mode=evaluate measures '
      'the run.'
    )


def _report_losses(config, corpus, writer, step, params, stop_if_asked) -> str:
  """Records held-out losses; returns a line about them."""
  numbers = evaluate.quick(
    config,
    params,
    corpus,
    config.train.evaluate_batches,
    EVALUATION_NOISE,
    stop_if_asked,
  )
  writer.write(step, numbers)
  line = f'held out: AR {numbers["heldout_loss_ar"]:.3f} nats per token'
  if 'heldout_loss_corrupted' in numbers:
    line += (
      f', denoising at t = {EVALUATION_NOISE} '
      f'{numbers["heldout_loss_corrupted"]:.3f} on corrupted positions'
    )
  return line


def _write_sample(config, tokenizer, prompt, params, stop_if_asked) -> str:
  """The text of the prompt and one generated canvas."""
  (written,), *_ = generate.generate_tokens(
    config,
    params,
    [prompt],
    jax.random.key(config.train.seed),
    config.diffusion.canvas_length,
    # Several processes compute the whole (short) canvas in one program.
    on_step=stop_if_asked if jax.process_count() == 1 else None,
  )
  return tokenizer.decode([*prompt, *written.tokens])
