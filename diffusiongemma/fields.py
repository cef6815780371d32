"""Fields of nested frozen dataclasses by their dotted names, `config.a.b`.

They are set from text, and read from plain values. Every name, type and limit
is checked; the error for an unknown name suggests the nearest one. A field
carries its help, its limits, and whether a run may be resumed with another
value (`About`).
"""

import ast
from collections.abc import Iterator
import dataclasses
import difflib
import types
import typing
from typing import Any
from typing import Literal
from typing import NamedTuple
from typing import TypeVar

from diffusiongemma.errors import Error

T = TypeVar('T')
# Largest values: of an int32, and of a float32 with room for sums and products.
_LARGEST = types.MappingProxyType({int: 2**31 - 1, float: 1e30})


class ConfigError(Error, ValueError):
  """An invalid configuration; the message says what to change."""

  exit_code = 2


class About(NamedTuple):
  """Metadata of a field.

  Attributes:
    help: what the field is.
    above, at_least: lower limit of a number; by default it must be positive.
    below, at_most: upper limit; by default that of its type.
    multiple_of: (divisor, reason).
    special: allowed values outside the limits, and their meanings.
    is_path: whether the field names a file or a folder.
    free: whether a run may be resumed with another value.
    fixed: why it may not; of a group, for all its fields that are not free.
  """

  help: str = ''
  above: float | None = None
  at_least: float | None = None
  below: float | None = None
  at_most: float | None = None
  multiple_of: tuple[int, str] | None = None
  special: types.MappingProxyType[int, str] = types.MappingProxyType({})
  is_path: bool = False
  free: bool = False
  fixed: str = ''

  @property
  def lower_limit(self) -> str:
    """'positive', 'zero or more', 'above 1, or 0 (off)'."""
    if self.at_least is not None:
      limit = f'at least {self.at_least}' if self.at_least else 'zero or more'
    else:
      limit = f'above {self.above}' if self.above else 'positive'
    return limit + ''.join(
      f', or {value} ({meaning})' for value, meaning in self.special.items()
    )


class Leaf(NamedTuple):
  """A field that is not a group.

  Attributes:
    name: dotted, `config.train.steps`.
    default: its value in the config passed to `leaves`.
    choices: the allowed values of a `Literal`, else empty.
    about: its metadata.
  """

  name: str
  default: Any
  choices: tuple[str, ...]
  about: About


def field(
  default: T, help: str, special: dict[int, str] | None = None, **more: Any
) -> T:
  """A dataclass field whose metadata is an `About` with these arguments."""
  names = types.MappingProxyType(special or {})
  return dataclasses.field(
    default=default,
    metadata={'about': About(help, special=names, **more)},
  )


def about(field: dataclasses.Field[Any]) -> About:
  """Metadata of a field; the default `About` if it has none."""
  return field.metadata.get('about', About())


def leaves(config: Any, prefix: str = 'config') -> Iterator[Leaf]:
  """All fields that are not groups; those of an absent group have their
  defaults."""
  hints = typing.get_type_hints(type(config))
  for item in dataclasses.fields(config):
    name, value = f'{prefix}.{item.name}', getattr(config, item.name)
    if group := _group(hints[item.name]):
      yield from leaves(group() if value is None else value, name)
    else:
      yield Leaf(name, value, _choices(hints[item.name]), about(item))


def paths(config: Any) -> dict[str, str]:
  """Values of the fields that name a file or a folder, by dotted name."""
  return {x.name: x.default for x in leaves(config) if x.about.is_path}


def why_fixed(kind: type, name: str) -> str:
  """Why a run may not be resumed with another value of a field of `kind`; '' if
  it may."""
  reason, group = '', kind
  for part in name.split('.')[1:]:
    (item,) = (f for f in dataclasses.fields(group) if f.name == part)
    if about(item).free:
      return ''
    reason = about(item).fixed or reason
    group = _group(typing.get_type_hints(group)[part]) or group
  return reason


def override(config: Any, field: str, text: str) -> Any:
  """The config with the dotted `field` set to the value parsed from `text`."""

  def replace(node, names, prefix):
    name, rest = names[0], names[1:]
    if node is None:
      raise ConfigError(f'{prefix} is not part of this config.')
    if not dataclasses.is_dataclass(node):
      raise ConfigError(f'{prefix} is a value, it has no field {name!r}.')
    hints = typing.get_type_hints(type(node))
    if name not in hints:
      raise ConfigError(unknown_name(f'{prefix}.{name}', field_names(config)))
    old = getattr(node, name)
    if rest:
      new = replace(old, rest, f'{prefix}.{name}')
    elif group := _group(hints[name]):
      raise ConfigError(
        f'{prefix}.{name} is a group of fields; set one of them: '
        f'{", ".join(f.name for f in dataclasses.fields(group))}.'
      )
    else:
      new = _parse(text, hints[name], f'{prefix}.{name}')
    return dataclasses.replace(node, **{name: new})

  return replace(config, field.split('.'), 'config')


def from_dict(
  values: dict[str, Any], kind: type, prefix: str = 'config'
) -> Any:
  """A `kind` from the dict of `dataclasses.asdict`; unknown fields are errors,
  missing ones take their defaults."""
  if not isinstance(values, dict):
    raise ConfigError(f'{prefix} must be a group of fields, it is {values!r}.')
  hints = typing.get_type_hints(kind)
  arguments = {}
  for name, value in values.items():
    if name not in hints:
      raise ConfigError(unknown_name(f'{prefix}.{name}', list(hints)))
    group = _group(hints[name])
    if group and value is not None:
      value = from_dict(value, group, f'{prefix}.{name}')
    elif isinstance(value, list):
      value = tuple(value)
    arguments[name] = value
  config = kind(**arguments)
  check_types(config, prefix)
  return config


def flatten(config: Any, prefix: str = 'config') -> dict[str, Any]:
  """`{'config.train.steps': 1000, ...}`, for messages and comparisons."""
  flat = {}
  for field in dataclasses.fields(config):
    name, value = f'{prefix}.{field.name}', getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      flat.update(flatten(value, name))
    else:
      flat[name] = value
  return flat


def field_names(config: Any) -> list[str]:
  """All dotted names, groups first."""
  groups = [f'config.{f.name}' for f in dataclasses.fields(config)]
  return groups + list(flatten(config))


def unknown_name(name: str, known: list[str]) -> str:
  """'There is no x. Did you mean y?'; compares the last components when the
  whole names are not similar."""
  nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
  last = name.rsplit('.', 1)[-1]
  same_last = [k for k in known if k.rsplit('.', 1)[-1] == last]
  nearest = same_last[:1] or nearest
  if not nearest:
    lasts = {k.rsplit('.', 1)[-1]: k for k in known}
    nearest = [
      lasts[k] for k in difflib.get_close_matches(last, lasts, n=1, cutoff=0.5)
    ]
  hint = f' Did you mean {nearest[0]!r}?' if nearest else ''
  return f'There is no {name!r}.{hint}'


def _parse(text: str, hint: Any, name: str) -> Any:
  """Parses `text` as the value of a field of type `hint`."""
  value: Any
  if hint is str or typing.get_origin(hint) is Literal:
    value = text
  elif hint is bool:
    value = {'true': True, 'false': False}.get(text.lower(), text)
  else:
    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      value = text
    if typing.get_origin(hint) is tuple:
      if isinstance(value, list):
        value = tuple(value)
      elif not isinstance(value, tuple):
        # a,b,c without quotes, or a single element
        value = tuple(value.split(',')) if isinstance(value, str) else (value,)
  if hint is float and type(value) is int:
    value = float(value)
  _check_type(value, hint, name)
  return value


def _group(hint: Any) -> type | None:
  """The dataclass in the hint of a field that is a group, `X` or `X | None`."""
  for kind in (hint, *typing.get_args(hint)):
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
      return kind
  return None


def _choices(hint: Any) -> tuple[str, ...]:
  """The values of a `Literal`, or of a tuple of them."""
  if typing.get_origin(hint) is tuple:
    hint = typing.get_args(hint)[0]
  return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def check(config: Any, prefix: str = 'config') -> None:
  """Raises `ConfigError` that names the first field of a wrong type or outside
  its limits."""
  check_types(config, prefix)
  _check_limits(config, prefix)


def _check_limits(config: Any, prefix: str) -> None:
  for item in dataclasses.fields(config):
    name, value = f'{prefix}.{item.name}', getattr(config, item.name)
    if dataclasses.is_dataclass(value):
      _check_limits(value, name)
    elif type(value) in _LARGEST and value not in about(item).special:
      _check_number(value, about(item), name)


def spell(limit: float) -> str:
  """A limit in readable form."""
  return '2^63' if limit == 2**63 else f'{limit:.10g}'


def _check_number(value: float, limits: About, name: str) -> None:
  # Each comparison is written so that NaN fails it.
  if limits.at_least is not None:
    high_enough = value >= limits.at_least
  else:
    high_enough = value > (limits.above or 0)
  most = limits.at_most
  if most is None and limits.below is None:
    most = _LARGEST[type(value)]
  if not high_enough:
    wanted = limits.lower_limit
  elif most is not None and not value <= most:
    wanted = f'at most {spell(most)}'
  elif limits.below is not None and not value < limits.below:
    wanted = f'below {spell(limits.below)}'
  elif limits.multiple_of and value % limits.multiple_of[0]:
    divisor, reason = limits.multiple_of
    multiple = 'even' if divisor == 2 else f'a multiple of {divisor}'
    wanted = f'{multiple} ({reason})'
  else:
    return
  raise ConfigError(f'{name} must be {wanted}, it is {value}.')


def check_types(config: Any, prefix: str) -> None:
  """Raises `ConfigError` that names the first field of a wrong type."""
  for name, hint in typing.get_type_hints(type(config)).items():
    value = getattr(config, name)
    group = _group(hint)
    if group:
      if value is None and hint is not group:
        continue
      if not isinstance(value, group):
        raise ConfigError(
          f'{prefix}.{name} must be a {group.__name__}, it is {value!r}.'
        )
      check_types(value, f'{prefix}.{name}')
    else:
      _check_type(value, hint, f'{prefix}.{name}')


def _check_type(value: Any, hint: Any, name: str) -> None:
  origin = typing.get_origin(hint)
  if origin is Literal:
    allowed = typing.get_args(hint)
    good, wanted = value in allowed, ' or '.join(map(repr, allowed))
  elif origin is tuple and _choices(hint) and isinstance(value, tuple):
    for item in value:
      if item not in _choices(hint):
        neither = ' nor '.join(_choices(hint))
        raise ConfigError(f'{name}: {item!r} is neither {neither}.')
    return
  elif origin is tuple:
    item = str if _choices(hint) else typing.get_args(hint)[0]
    good = isinstance(value, tuple) and all(type(v) is item for v in value)
    wanted = f'a tuple of {item.__name__}'
  else:
    accepted = (int, float) if hint is float else (hint,)
    good, wanted = type(value) in accepted, _ARTICLE[hint]
  if not good:
    raise ConfigError(f'{name} must be {wanted}, it is {value!r}.')


_ARTICLE = types.MappingProxyType(
  {
    int: 'a whole number',
    float: 'a number',
    bool: 'true or false',
    str: 'a text',
  }
)
