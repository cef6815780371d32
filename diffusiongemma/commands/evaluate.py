"""Measures a run, or a Hugging Face folder, on held-out text."""

import json
import sys

from diffusiongemma.commands import shared


def run(overrides: dict[str, str]) -> int:
  """Prints the measurements; returns the exit code."""
  from rich import console as rich_console

  from diffusiongemma.training import corpus as corpora
  from diffusiongemma.training import evaluate

  network = shared.load_run(overrides)
  config = network.config
  corpus = corpora.load_corpus(
    *(config.data, network.tokenizer, config.diffusion.canvas_length),
    network.chat_template,
  )
  for line in corpus.notes:
    print(line, file=sys.stderr)

  def tell(what):
    print(f'Measuring: {what}', file=sys.stderr)

  measured = evaluate.evaluate(config, network.params, corpus, tell)
  numbers = {'step': network.step, **measured}
  if shared.FORMAT.value == 'json':
    print(json.dumps(numbers))
    return 0
  table = evaluate.to_table(measured)
  folder = shared.HF_DIR.value or shared.workdir()
  table.title = f'{folder}, step {network.step}, {table.title}'
  rich_console.Console().print(table)
  return 0
