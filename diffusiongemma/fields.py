"""Fields of nested frozen dataclasses by their dotted names, `config.a.b`.

They are set from text, and read from plain values. Every name and every type is
checked, and a wrong name is answered with the nearest right one.
"""

import ast
import dataclasses
import difflib
import types
import typing
from typing import Any
from typing import Literal


class ConfigError(ValueError):
  """A configuration that can't be used; the message says what to change."""


def override(config: Any, field: str, text: str) -> Any:
  """The config with the dotted `field` set to what `text` spells."""

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
  """The inverse of `dataclasses.asdict`, a `kind`; unknown fields are errors,
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
  """'No field x. Did you mean y?'; compares the last parts when the whole
  names are not alike."""
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
  """The value that `text` spells for a field of type `hint`."""
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
    if dataclasses.is_dataclass(kind):
      return kind
  return None


def check_types(config: Any, prefix: str) -> None:
  """Raises `ConfigError` naming the first field of another type."""
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
  elif origin is tuple:
    item = typing.get_args(hint)[0]
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
