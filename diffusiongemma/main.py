"""The command line.

  python -m diffusiongemma.main --config=tiny
  python -m diffusiongemma.main --mode=sample --workdir=runs/tiny \\
      --prompt="ROMEO."
  python -m diffusiongemma.main --mode=sample --hf_dir=IN
  python -m diffusiongemma.main --mode=convert --hf_dir=IN --workdir=OUT

Where the package is installed, `diffusiongemma` is short for
`python -m diffusiongemma.main`. Single fields of the config:
`--config.train.steps=100`.

Exit codes: 0 done, 1 failed (the message says why), 2 wrong usage, 128 + n
stopped by signal n after saving (130 Ctrl-C, 143 SIGTERM).
"""

import importlib
from importlib import metadata
import signal
import sys
import traceback

from absl import app
from absl import flags
from absl import logging

from diffusiongemma.commands import help as help_lib
from diffusiongemma.commands import shared
from diffusiongemma.commands import streams
from diffusiongemma.config import ConfigError
from diffusiongemma.errors import Error
from diffusiongemma.version import __version__

# A mode is a file of `commands/`, with its flags and run().
MODES = (
  'train',
  'evaluate',
  'sample',
  'convert',
  'export',
  'quantize',
  'plan',
  'benchmark',
)
_COMMANDS = {
  mode: importlib.import_module(f'diffusiongemma.commands.{mode}')
  for mode in MODES
}
_MODE = flags.DEFINE_enum('mode', 'train', MODES, 'What to do.')


def parse_flags(argv: list[str]) -> list[str]:
  """Parses known flags; `--config.field=value` and leftovers stay in argv."""
  streams.print_anything()
  wishes = {argument.lstrip('-') for argument in argv if argument[:1] == '-'}
  if wishes & {'h', 'help', 'helpshort', 'helpfull'}:
    print(help_text(full='helpfull' in wishes))
    sys.exit(0)
  if 'version' in wishes:
    print(f'diffusiongemma {__version__}, jax {metadata.version("jax")}')
    sys.exit(0)
  try:
    rest = flags.FLAGS(argv, known_only=True)
  except flags.Error as error:
    sys.exit(_fail(str(error), 2))
  if flags.FLAGS['verbosity'].using_default_value:
    # At INFO, Orbax logs every file.
    flags.FLAGS.verbosity = logging.WARNING  # type: ignore[assignment]
  return rest


def main(argv: list[str]) -> None:
  """Runs one mode and exits with its code; expected errors are one message."""
  try:
    from diffusiongemma.devices import runtime
    from diffusiongemma.runs import overrides as overrides_lib

    runtime.reuse_memory()
    runtime.keep_compilations()
    overrides = overrides_lib.parse(argv[1:], list(flags.FLAGS))
    _check_flags()
    shared.find_paths()
    code = _COMMANDS[_MODE.value].run(overrides)
  except Error as error:
    code = _fail(str(error), error.exit_code)
  except KeyboardInterrupt:
    print('Stopped.', file=sys.stderr)
    code = 128 + signal.SIGINT
    if _is_one_of_several():
      _leave(code)
  except Exception:
    if not _is_one_of_several():
      raise
    code = _fail(
      f'{traceback.format_exc()}If another process has ended, this one cannot '
      'go on without it. The same commands go on from the newest checkpoint.',
      1,
    )
  sys.exit(code)


def run() -> None:
  """Entry point of the console script `diffusiongemma`."""
  app.run(main, flags_parser=parse_flags)


def help_text(full: bool = False) -> str:
  """Text of `--help`; with `full`, the config fields too."""
  lines = [__doc__, 'Modes:']
  for mode, command in _COMMANDS.items():
    default = ' The default.' if mode == _MODE.default else ''
    summary = (command.__doc__ or '').partition('\n')[0]
    lines.append(f'  --mode={mode:<9} {summary}{default}')
  lines += ['', help_lib.flags_text('Flags of several modes', shared)]
  for mode, command in _COMMANDS.items():
    if text := help_lib.flags_text(f'Flags of --mode={mode}', command):
      lines.append(text)
  text = '\n'.join(lines)
  if full:
    return f'{text}\n{help_lib.fields_text()}'
  return f'{text}\n--helpfull lists the fields of the config too.'


def _check_flags() -> None:
  """Raises `ConfigError` for a flag that the mode does not use."""
  for name in flags.FLAGS:
    modes = _modes_of(name)
    if flags.FLAGS[name].present and _MODE.value not in modes:
      remedy = ''
      if (name, _MODE.value) == ('hf_dir', 'train'):
        remedy = ' To train its weights: --config.train.init_from=FOLDER.'
      raise ConfigError(
        f'--{name} is for --mode={", ".join(modes)}, not for '
        f'{_MODE.value}.{remedy}'
      )


def _modes_of(flag: str) -> tuple[str, ...]:
  """The modes that take a flag: the mode whose file defines it, or the modes
  listed in `shared.TAKEN_BY`."""
  home = flags.FLAGS.find_module_defining_flag(flag)
  for mode, command in _COMMANDS.items():
    if home == command.__name__:
      return (mode,)
  return shared.TAKEN_BY.get(flag, MODES)


def _fail(message: str, code: int) -> int:
  """Prints an error and returns the exit code; one of several processes names
  itself and exits at once, since the others would wait for it."""
  if not _is_one_of_several():
    print(f'Error: {message}', file=sys.stderr)
    return code
  index = sys.modules['jax'].process_index()
  print(f'Error in process {index}: {message}', file=sys.stderr)
  sys.stderr.flush()
  _leave(code)
  return code


def _is_one_of_several() -> bool:
  """Whether this process belongs to a multi-process job; before JAX is imported
  it does not."""
  jax = sys.modules.get('jax')
  return jax is not None and jax.distributed.is_initialized()


def _leave(code: int) -> None:
  from diffusiongemma.devices import processes

  processes.leave(code)


if __name__ == '__main__':
  run()
