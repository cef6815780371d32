"""Notices printed at the start of a run: defaults in use, changed settings."""

from diffusiongemma.config import Config
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.training import corpus as corpora
from diffusiongemma.training import data
from diffusiongemma.training import new_tokenizer
from diffusiongemma.training import optimizer as optimizers


def at_start(config: Config) -> list[str]:
  """Lines about settings left empty, and what is used instead."""
  lines = []
  if not config.data.path:
    lines.append(
      'No config.data.path is given: training on the shipped Shakespeare.'
    )
  if config.lora.rank and not config.train.init_from:
    lines.append(
      'No config.train.init_from is given: the adapters are those of random '
      'weights, useful only as a test.'
    )
  if config.optimizer.freeze and not config.train.init_from:
    lines.append(
      'No config.train.init_from is given: the weights that '
      'config.optimizer.freeze names stay random.'
    )
  return lines


def of_tokenizer(config: Config, corpus: corpora.Corpus) -> list[str]:
  """A line about a tokenizer that was made of the text, or of another one."""
  num_bytes = sum(len(text.encode()) for text in corpus.heldout_texts)
  num_tokens = sum(len(example.targets) for example in corpus.heldout)
  rate = (
    f'{num_bytes / max(1, num_tokens):.1f} bytes per token of held-out text'
  )
  if new_tokenizer.is_wanted(config.data):
    return [f'The tokenizer is trained on this text: {rate}.']
  is_other = config.data.path and not config.data.tokenizer
  if is_other and not config.train.init_from:
    return [
      f'The tokenizer is the shipped one, of Shakespeare: {rate}. '
      '--config.data.tokenizer=new:2048 trains one on your text.'
    ]
  return []


def of_changes(before: Config, config: Config, step: int) -> list[str]:
  """Lines about fields whose values changed, and about the learning rate."""
  lines = [
    f'{name}: {old!r} before, {new!r} from here on.'
    for name, old, new in workdirs.differences(before, config)
  ]
  was, now = (
    float(optimizers.make_schedule(c.optimizer, c.train.steps)(step))
    for c in (before, config)
  )
  if was != now:
    lines.append(
      f'The learning rate goes on at {now:.3g}, where it would have been '
      f'{was:.3g}.'
    )
  return lines


def of_text(
  before: Config,
  config: Config,
  text_before: dict[str, data.Description] | None,
  text: dict[str, data.Description],
) -> list[str]:
  """Lines about the text of a resumed run, if its last checkpoint describes (or
  might describe) another text."""
  changed = [name for name, *_ in workdirs.differences(before, config)]
  if text_before is None:
    if any(name.startswith('config.data.') for name in changed):
      return [
        'The checkpoints do not say which examples they have learnt from: make '
        'sure that these are the same, in the same order.'
      ]
    return []
  was, now = text_before['heldout'], text['heldout']
  if was == now:
    return []
  return [
    f'The held-out text has changed: {was} before, {now} now. Losses on it '
    'cannot be compared with those before.'
  ]
