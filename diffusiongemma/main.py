"""The command line.

  python -m diffusiongemma.main --config=configs/tiny.py
  python -m diffusiongemma.main --mode=sample --workdir=runs/tiny \\
      --prompt="ROMEO."
  python -m diffusiongemma.main --mode=sample --hf_dir=IN
  python -m diffusiongemma.main --mode=convert --hf_dir=IN --workdir=OUT

`--mode=train` trains, and goes on with a run that was stopped; `evaluate`
measures a run on held-out text; `sample` chats, or goes on from a text;
`convert` makes a Hugging Face folder a run, `export` a run a Hugging Face
folder; `quantize` makes either a run of few bits, for sampling; `plan` compiles
for devices that are not there and says what it would take; `benchmark` measures
speed. Single fields of the config: `--config.train.steps=100`.

Exit codes: 0 done, 1 failed (the message says why), 2 wrong usage, 128 + n
stopped by signal n after saving (130 Ctrl-C, 143 SIGTERM).
"""

import functools
import json
import os
import pathlib
import shlex
import signal
import sys
import traceback

from absl import app
from absl import flags
from absl import logging
import jax
from rich import console as rich_console

from diffusiongemma import checkpoints
from diffusiongemma import config as configs
from diffusiongemma import paths
from diffusiongemma.commands import sample
from diffusiongemma.commands import terminal
from diffusiongemma.devices import processes
from diffusiongemma.devices import runtime
from diffusiongemma.generation import chat
from diffusiongemma.generation import prompt as prompt_lib
from diffusiongemma.runs import convert as conversion
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.runs import load as load_lib
from diffusiongemma.runs import overrides as overrides_lib
from diffusiongemma.runs import source as sources
from diffusiongemma.tools import benchmark
from diffusiongemma.tools import plan
from diffusiongemma.training import corpus as corpora
from diffusiongemma.training import evaluate as evaluation
from diffusiongemma.training import train

_CONFIG = flags.DEFINE_string(
  'config', None, 'Python file with get_config(); see configs/.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run. Default: runs/<name of the config>.'
)
_MODE = flags.DEFINE_enum(
  'mode',
  'train',
  [
    'train',
    'evaluate',
    'sample',
    'convert',
    'export',
    'quantize',
    'plan',
    'benchmark',
  ],
  'What to do.',
)
_HF_DIR = flags.DEFINE_string(
  'hf_dir',
  None,
  'convert, sample, evaluate: the Hugging Face folder to read; export: to '
  'make.',
)
_SOURCE = flags.DEFINE_string(
  'source', None, 'quantize: the run, or the Hugging Face folder, to read.'
)
_PROMPT = flags.DEFINE_string(
  'prompt', None, 'sample: the message, or the text to go on from.'
)
_SYSTEM = flags.DEFINE_string(
  'system', '', 'sample: what the model is told before the first message.'
)
_IMAGE = flags.DEFINE_multi_string(
  'image', [], 'sample: a picture for the first message; may be repeated.'
)
_THINK = flags.DEFINE_bool(
  'think', False, 'sample: let the model think before it answers.'
)
_TOOLS = flags.DEFINE_string(
  'tools', None, 'sample: JSON file, a list of functions it may call.'
)
_INFILL = flags.DEFINE_string(
  'infill', None, 'sample: a text with holes, ___, an underscore a token.'
)
_CHAT = flags.DEFINE_bool(
  'chat', None, 'sample: prompts are messages. Default: if there are turns.'
)
_TRACE = flags.DEFINE_string(
  'trace', '', 'sample: .html or .png to draw the denoising steps in.'
)
_SEED = flags.DEFINE_integer(
  'seed', 0, 'sample: the random seed.', lower_bound=0, upper_bound=2**63 - 1
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  'max_new_tokens',
  None,
  'sample: most tokens of a text or reply. Default: four canvases.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'HOST:PORT of process 0, where several train together; "auto" asks the '
  'cluster.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many processes train together.', lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of them this is, from 0 on.', lower_bound=0
)
_TOPOLOGY = flags.DEFINE_string(
  'topology',
  'local',
  'plan: v5e:4x4, v5p:4x4x4, v6e:8x8, tpu7x:4x4x4, h100, h200, h100x8, h100x16 '
  'or local.',
)
_PROGRAM = flags.DEFINE_enum(
  'program', 'train', ['train', 'sample'], 'plan: what to compile.'
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 1, 'plan: texts that are sampled together.', lower_bound=1
)
_CONTEXT = flags.DEFINE_integer(
  'context',
  None,
  'plan: tokens that sampling has room for. Default: 8192, or what the network '
  'has.',
  lower_bound=1,
)
_GRID = flags.DEFINE_list(
  'grid',
  ['1x256'],
  'benchmark: batches and contexts to sample with: 1x256,1x4096,8x256.',
)
_PEER = flags.DEFINE_bool(
  'peer', True, 'benchmark: beside transformers, where that is installed.'
)
_FORMAT = flags.DEFINE_enum(
  'format',
  'text',
  ['text', 'json'],
  'sample, evaluate, plan, benchmark: what to print.',
)

_MODES_OF_FLAG = {
  'config': ('train', 'evaluate', 'sample', 'plan', 'benchmark'),
  'hf_dir': ('evaluate', 'sample', 'convert', 'export'),
  'source': ('quantize',),
  **dict.fromkeys(
    (
      *('prompt', 'system', 'image', 'think', 'tools', 'infill', 'chat'),
      *('trace', 'seed', 'max_new_tokens'),
    ),
    ('sample',),
  ),
  **dict.fromkeys(('coordinator', 'num_processes', 'process_id'), ('train',)),
  **dict.fromkeys(('topology', 'program', 'batch_size', 'context'), ('plan',)),
  **dict.fromkeys(('grid', 'peer'), ('benchmark',)),
  'format': ('sample', 'evaluate', 'plan', 'benchmark'),
}

# Errors that are the user's to mend: a message, no stack trace.
EXPECTED_ERRORS = (
  configs.ConfigError,
  corpora.DataError,
  checkpoints.CheckpointError,
  *sample.EXPECTED_ERRORS,
  plan.PlanError,
  train.TrainingError,
  workdirs.WorkdirError,
)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses known flags; `--config.field=value` and leftovers stay in argv."""
  terminal.print_anything()
  try:
    rest = flags.FLAGS(argv, known_only=True)
  except flags.Error as error:
    sys.exit(_fail(str(error), 2))
  if flags.FLAGS['verbosity'].using_default_value:
    flags.FLAGS.verbosity = logging.WARNING  # At INFO, Orbax tells every file.
  return rest


def main(argv: list[str]) -> None:
  """Runs one mode and exits with its code; expected errors are one message."""
  runtime.reuse_memory()
  runtime.keep_compilations()
  try:
    overrides = overrides_lib.parse(argv[1:], list(flags.FLAGS))
    _check_flags()
    _find_paths()
    processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    run = {
      'train': _train,
      'evaluate': _evaluate,
      'sample': _sample,
      'convert': _convert,
      'export': _export,
      'quantize': _quantize,
      'plan': _plan,
      'benchmark': _benchmark,
    }
    code = run[_MODE.value](overrides)
  except (
    configs.ConfigError,
    sample.SampleError,
    chat.ToolsError,
    prompt_lib.PromptError,
  ) as error:
    code = _fail(str(error), 2)
  except EXPECTED_ERRORS as error:
    code = _fail(str(error), 1)
  except KeyboardInterrupt:
    print('Stopped.', file=sys.stderr)
    code = 128 + signal.SIGINT
    if jax.distributed.is_initialized():
      processes.leave(code)
  except Exception:
    if not jax.distributed.is_initialized():
      raise
    code = _fail(
      f'{traceback.format_exc()}If another process has ended, this one cannot '
      'go on without it. The same commands go on from the newest checkpoint.',
      1,
    )
  sys.exit(code)


def _check_flags() -> None:
  """Raises `ConfigError` for a flag that the mode would not look at."""
  for name, modes in _MODES_OF_FLAG.items():
    if flags.FLAGS[name].present and _MODE.value not in modes:
      remedy = ''
      if (name, _MODE.value) == ('hf_dir', 'train'):
        remedy = ' To train its weights: --config.train.init_from=FOLDER.'
      raise configs.ConfigError(
        f'--{name} is for --mode={", ".join(modes)}, not for '
        f'{_MODE.value}.{remedy}'
      )


def _find_paths() -> None:
  """Makes flags that are paths local ones. Raises `ConfigError`."""
  for name in ('config', 'workdir', 'hf_dir', 'source', 'tools', 'trace'):
    if flags.FLAGS[name].value:
      path = paths.local(flags.FLAGS[name].value, f'--{name}')
      flags.FLAGS[name].value = path
  images = flags.FLAGS['image']
  images.value = [paths.local(path, '--image') for path in images.value]


def _fail(message: str, code: int) -> int:
  """Says what is wrong; of several processes, each says who it is and ends,
  for the others would wait for it."""
  if not jax.distributed.is_initialized():
    print(f'Error: {message}', file=sys.stderr)
    return code
  print(f'Error in process {jax.process_index()}: {message}', file=sys.stderr)
  sys.stderr.flush()
  processes.leave(code)
  return code


def _load_config(overrides: dict[str, str]) -> configs.Config:
  if not _CONFIG.value:
    raise configs.ConfigError(
      'Say what to train: --config=configs/tiny.py, or another config file.'
    )
  return overrides_lib.load_config(_CONFIG.value, _workdir(), overrides)


def _workdir() -> str:
  if _WORKDIR.value:
    return _WORKDIR.value
  if not _CONFIG.value:
    raise configs.ConfigError('Name the run: --workdir=runs/tiny.')
  return os.path.join('runs', pathlib.Path(_CONFIG.value).stem)


def _load_run(overrides: dict[str, str]) -> load_lib.Run:
  if _HF_DIR.value and _WORKDIR.value:
    raise configs.ConfigError('Give --workdir or --hf_dir, not both.')
  if _HF_DIR.value:
    folder = _HF_DIR.value
    own = sources.open_huggingface(folder).config
  else:
    folder, own = _workdir(), workdirs.read_config(_workdir())
  return overrides_lib.load_run(folder, own, overrides)


def _train(overrides: dict[str, str]) -> int:
  config = _load_config(overrides)
  if config.quantization != configs.QuantizationConfig():
    raise configs.ConfigError(
      'config.quantization is for sampling; train without it, then '
      '--mode=quantize.'
    )
  workdir = _workdir()
  load_base = functools.partial(load_lib.load_base, config)
  code = train.train(
    config, workdir, load_base if config.train.init_from else None
  )
  if not processes.is_first():
    return code
  if code == 0:
    prompt = shlex.quote(config.train.sample_prompt.strip() or '...')
    print(
      f'Done; the checkpoint is in {workdir}. Write with it:\n'
      f'  python -m diffusiongemma.main --mode=sample --workdir={workdir} '
      f'--prompt={prompt}'
    )
  elif code > 128:
    print(f'Stopped and saved in {workdir}; the same command goes on.')
  else:
    print(
      f'Error: the end of the run is not saved in {workdir}. The same command '
      'goes on from the newest checkpoint there, or starts again without one.',
      file=sys.stderr,
    )
  return code


def _convert(overrides: dict[str, str]) -> int:
  hf_dir, workdir = _both_folders(overrides)
  config = conversion.convert(hf_dir, workdir)
  layers = len(config.model.attention_pattern)
  print(
    f'{workdir} holds the {layers} layers of {hf_dir}. Write with it:\n'
    f'  python -m diffusiongemma.main --mode=sample --workdir={workdir} '
    f'--prompt="..."'
  )
  return 0


def _export(overrides: dict[str, str]) -> int:
  hf_dir, workdir = _both_folders(overrides)
  conversion.export(workdir, hf_dir)
  print(
    f'{hf_dir} is for transformers:\n'
    '  DiffusionGemmaForBlockDiffusion.from_pretrained(...)'
  )
  return 0


def _quantize(overrides: dict[str, str]) -> int:
  for flag, value in (
    ('source', _SOURCE.value),
    ('workdir', _WORKDIR.value),
  ):
    if not value:
      raise configs.ConfigError(
        f'--mode=quantize needs --{flag}: --source is the run or Hugging Face '
        'folder to read, --workdir the new one.'
      )
  others = [f for f in overrides if not f.startswith('quantization.')]
  if others:
    raise configs.ConfigError(
      '--mode=quantize takes --config.quantization.* alone; the rest is as it '
      'is in --source.'
    )
  config = overrides_lib.apply(overrides, configs.Config())
  configs.validate(config)
  _end_on_signals()
  conversion.quantize(_SOURCE.value, _WORKDIR.value, config.quantization)
  print(
    f'{_WORKDIR.value} is for sampling:\n'
    f'  python -m diffusiongemma.main --mode=sample --workdir={_WORKDIR.value} '
    f'--prompt="..."'
  )
  return 0


def _end_on_signals() -> None:
  """So that what a stopped conversion has written is removed."""
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: sys.exit(128 + number))


def _both_folders(overrides: dict[str, str]) -> tuple[str, str]:
  """(hf_dir, workdir) of a conversion, which changes no field of a config."""
  for flag, value in (('hf_dir', _HF_DIR.value), ('workdir', _WORKDIR.value)):
    if not value:
      raise configs.ConfigError(
        f'--mode={_MODE.value} needs --{flag}: --hf_dir is the Hugging Face '
        'folder, --workdir ours.'
      )
  if overrides:
    raise configs.ConfigError(
      f'--mode={_MODE.value} takes no --config; the checkpoint has its own.'
    )
  _end_on_signals()
  return _HF_DIR.value, _WORKDIR.value


def _plan(overrides: dict[str, str]) -> int:
  config = _load_config(overrides)
  most = config.model.context_length
  context = _CONTEXT.value or min(8192, most)
  if context > most:
    raise configs.ConfigError(
      f'--context={context} is more than config.model.context_length = {most}.'
    )
  what = (config, _TOPOLOGY.value, _PROGRAM.value)
  try:
    made = plan.plan(*what, batch_size=_BATCH_SIZE.value, context=context)
  except plan.TooLarge as error:
    change = plan.nearest_fit(*what)
    if _FORMAT.value == 'json':
      print(
        json.dumps({'fits': False, 'reason': str(error), 'nearest_fit': change})
      )
      return 0
    print(error)
    _print_change(change)
    return 0
  change = None if made.fits is not False else plan.nearest_fit(*what)
  if _FORMAT.value == 'json':
    print(json.dumps({**plan.to_json(made), 'nearest_fit': change}))
    return 0
  print(plan.to_text(made))
  if made.fits is False:
    _print_change(change)
  return 0


def _benchmark(overrides: dict[str, str]) -> int:
  config = _load_config(overrides)
  grid = benchmark.parse_grid(config, _GRID.value)
  made = benchmark.run(config, grid, _PEER.value)
  if _FORMAT.value == 'json':
    print(json.dumps(made))
  else:
    print(benchmark.to_text(made))
  return 0


def _print_change(change: str | None) -> None:
  """What would make a program fit."""
  print(
    f'  It would fit with {change}.'
    if change
    else '  No small change makes it fit.'
  )


def _evaluate(overrides: dict[str, str]) -> int:
  config, tokenizer, step, params, template = _load_run(overrides)
  corpus = corpora.load_corpus(
    config.data, tokenizer, config.diffusion.canvas_length, template
  )
  for line in corpus.notes:
    print(line, file=sys.stderr)

  def tell(what):
    print(f'Measuring: {what}', file=sys.stderr)

  measured = evaluation.evaluate(config, params, corpus, tell)
  numbers = {'step': step, **measured}
  if _FORMAT.value == 'json':
    print(json.dumps(numbers))
    return 0
  table = evaluation.to_table(measured)
  table.title = f'{_HF_DIR.value or _workdir()}, step {step}, {table.title}'
  rich_console.Console().print(table)
  return 0


def _sample(overrides: dict[str, str]) -> int:
  tools = ()
  if _TOOLS.value:
    try:
      tools = chat.read_tools(pathlib.Path(_TOOLS.value).read_text('utf-8'))
    except (OSError, UnicodeDecodeError) as error:
      raise chat.ToolsError(f'{_TOOLS.value} cannot be read: {error}') from None
  request = sample.Request(
    prompt=_PROMPT.value,
    system=_SYSTEM.value,
    images=tuple(_IMAGE.value),
    thinking=_THINK.value,
    tools=tools,
    infill=_INFILL.value,
    chat=_CHAT.value,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    seed=_SEED.value,
    trace=_TRACE.value,
    as_json=_FORMAT.value == 'json',
  )
  return sample.sample(_load_run(overrides), request)


if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
