"""Texts of `--help`: flags of the modes, fields of the config.

python -m diffusiongemma.commands.help BUILD.md   writes its table of fields
"""

from collections.abc import Iterator
import dataclasses
import itertools
import pathlib
import sys
import textwrap
from types import ModuleType

from absl import flags

from diffusiongemma import config as configs
from diffusiongemma import fields

BEGIN, END = '<!-- fields -->', '<!-- /fields -->'
WIDTH = 80


def flags_text(title: str, module: ModuleType) -> str:
  """The flags that a file defines, with their help."""
  text = flags.FLAGS.module_help(module).partition('\n')[2].strip('\n')
  _, _, text = text.partition('\n')
  return f'{title}:\n{text}\n' if text else ''


def fields_text() -> str:
  """All fields of the config with their defaults, group by group."""
  blocks = []
  for group, about, leaves in _groups():
    blocks.append(f'\n--{group}.*: {about}')
    for leaf in leaves:
      head = f'  {leaf.name.removeprefix(group + ".")}={_default(leaf)}'
      wrapped = textwrap.wrap(
        _what(leaf), WIDTH, initial_indent=' ' * 6, subsequent_indent=' ' * 6
      )
      blocks.append('\n'.join([head, *wrapped]))
  return '\n'.join(blocks).lstrip('\n')


def fields_table() -> str:
  """All fields of the config as a Markdown table."""
  lines = [
    '| field of `config` | default | what | may change |',
    '|---|---|---|---|',
  ]
  for group, about, leaves in _groups():
    lines.append(f'| **{group.removeprefix("config.")}** | | {about} | |')
    for leaf in leaves:
      name, free = leaf.name.removeprefix('config.'), leaf.about.free
      what = _what(leaf).replace('*', r'\*').replace('|', r'\|')
      default = f'`{_default(leaf)}`'
      lines.append(
        f'| `{name}` | {default} | {what} | {"yes" if free else ""} |'
      )
  return '\n'.join(lines)


def with_table(page: str) -> str:
  """`page` with the table inserted between `BEGIN` and `END`."""
  before, _, rest = page.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not end:
    raise ValueError(f'There is no {BEGIN!r} with an {END!r} after it.')
  return f'{before}{BEGIN}\n{fields_table()}\n{END}{after}'


def _groups() -> Iterator[tuple[str, str, list[fields.Leaf]]]:
  """(dotted name, help, fields) of each group."""
  groups = {
    f'config.{item.name}': fields.about(item).help
    for item in dataclasses.fields(configs.Config)
  } | {
    f'config.model.{item.name}': fields.about(item).help
    for item in dataclasses.fields(configs.ModelConfig)
  }
  leaves = sorted(
    fields.leaves(configs.Config()),
    key=lambda leaf: _group(leaf).count('.') > 1,
  )
  for group, members in itertools.groupby(leaves, _group):
    yield group, groups[group], list(members)


def _group(leaf: fields.Leaf) -> str:
  return leaf.name.rpartition('.')[0]


def _default(leaf: fields.Leaf) -> str:
  """The default as written on the command line."""
  value = leaf.default
  if isinstance(value, tuple) and len(value) > 4:
    return f'({len(value)} values)'
  if isinstance(value, tuple):
    return ','.join(map(str, value)) or '()'
  if isinstance(value, bool):
    return str(value).lower()
  return (
    repr(value) if isinstance(value, str) and not leaf.choices else str(value)
  )


def _what(leaf: fields.Leaf) -> str:
  """Help, choices and limits of a field."""
  clauses = [leaf.about.help]
  if leaf.choices:
    *others, last = leaf.choices
    clauses.append(f'{", ".join(others)} or {last}')
  about = leaf.about
  if type(leaf.default) in (int, float):
    limits = [] if about.lower_limit == 'positive' else [about.lower_limit]
    if about.at_most is not None:
      limits.append(f'at most {about.at_most}')
    if about.below is not None:
      limits.append(f'below {fields.spell(about.below)}')
    if limits:
      clauses.append(', '.join(limits))
  return '; '.join(clauses)


if __name__ == '__main__':
  path = pathlib.Path(sys.argv[1])
  path.write_text(with_table(path.read_text('utf-8')), 'utf-8')
