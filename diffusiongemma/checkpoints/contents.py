"""Finds the arrays of each parameter among the tensors of another tool.

A matrix is one tensor, or the few of a quantised one (`formats`); the matrices
of all experts are one tensor, or a tensor per expert, with gate and up apart.
Encoder and decoder share all weights of the text layers, and the head is the
embedding: each may be there under several names, with the same bits, or under
any one of them. Only headers are read; arrays when they are asked for.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from typing import NamedTuple

from absl import logging
import jax.numpy as jnp
import numpy as np

from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import foreign
from diffusiongemma.checkpoints import formats
from diffusiongemma.checkpoints import huggingface
from diffusiongemma.checkpoints import safetensors
from diffusiongemma.checkpoints.formats import Array
from diffusiongemma.checkpoints.formats import bitsandbytes
from diffusiongemma.checkpoints.formats import compressed_tensors
from diffusiongemma.checkpoints.formats import ggml
from diffusiongemma.checkpoints.formats import gptq
from diffusiongemma.checkpoints.formats import mlx
from diffusiongemma.checkpoints.huggingface import Entry
from diffusiongemma.model import parameters
from diffusiongemma.ops import blocks

# A new format is one more row.
SCHEMES: tuple[formats.Find, ...] = (
  compressed_tensors.find,
  ggml.find,
  mlx.find,
  gptq.find,
  bitsandbytes.find,
)
_IGNORED = compressed_tensors.IGNORED
# Buffers that follow from the config; some versions store a few of them.
_DERIVED = ('inv_freq', 'position_ids', 'embed_scale')
_ONE_WEIGHT = (
  'this network has one weight for both roles, encoder and decoder, and for '
  'embedding and head'
)
_WEIGHT = '.weight'
_SWITCH = 'switch_glu.'  # Between the experts and their matrices, in MLX.

Path = tuple[str, ...]


class _Module(NamedTuple):
  """A place where a matrix, or a part of one, may be.

  Attributes:
    entry: the name of its entry.
    home: its name in the decoder, or wherever it is written.
    copy: which of the names of the entry it belongs to.
  """

  entry: str
  home: str
  copy: int


def find(
  folder: str,
  tensors: Mapping[str, Array],
  table: Mapping[str, Entry],
  are_tied: bool = True,
) -> dict[Path, Array]:
  """The arrays of every parameter in our layout.

  Args:
    folder: of the tensors, for messages.
    tensors: by the names of Hugging Face, or of a tool that changes them.
    table: see `huggingface.tensor_table`.
    are_tied: whether one copy of a tied tensor is enough.

  Returns:
    `{path: array}` of every parameter, in the order of the table; a quantised
    one is several arrays, see `parameters.few_bits`. Reading one raises
    `CheckpointError` if copies of a tied tensor differ, or a file changes
    meanwhile.

  Raises:
    CheckpointError: names are missing or unknown, or a shape or type is wrong.
  """
  modules = _modules(table.values())
  found, unknown, derived = _sort(tensors, modules)
  copies = {(m.entry, m.copy) for m in found}
  by_home: dict[str, dict[str, list[Array]]] = {}
  for module in sorted(found, key=lambda module: module.copy):
    of_home = by_home.setdefault(module.home, {})
    for suffix, arrays in found[module].items():
      of_home.setdefault(suffix, []).extend(arrays)
  stored = {
    home: {suffix: _compared(copies) for suffix, copies in of_home.items()}
    for home, of_home in by_home.items()
  }
  parts, missing = {}, []
  for entry in table.values():
    of_entry = _parts(entry, stored)
    if of_entry is None:
      missing.append(entry.name)
    else:
      parts[entry.name] = of_entry
  missing = _fill_scalars(parts, missing, folder)
  _check_names(folder, missing, unknown)
  if not are_tied:
    names = {
      name: (entry.name, copy)
      for entry in table.values()
      for copy, name in enumerate((entry.name, *entry.copies))
    }
    _check_untied(folder, [x for x, key in names.items() if key not in copies])
  if derived:
    logging.warning(
      '%s: %s are not read; they follow from config.json.',
      *(folder, files.listed(derived)),
    )
  ours: dict[Path, Array] = {}
  for entry in table.values():
    ours |= _to_ours(entry, parts[entry.name])
  return ours


def _modules(entries: Iterable[Entry]) -> dict[str, _Module]:
  """`{name of a module: what it is}` for all that may be in a folder."""
  modules = {}
  for entry in entries:
    home = entry.name.removesuffix(_WEIGHT)
    for copy, name in enumerate((entry.name, *entry.copies)):
      name = name.removesuffix(_WEIGHT)
      modules[name] = _Module(entry.name, home, copy)
      for ours, theirs in zip(
        _apart(entry, home), _apart(entry, name), strict=True
      ):
        modules[theirs] = _Module(entry.name, ours, copy)
  return modules


def _apart(entry: Entry, name: str) -> list[str]:
  """Names of the modules of experts that are stored apart, those of MLX's
  halves first; gate before up."""
  experts, _, own = name.rpartition('.')
  if len(entry.shape) != 3 or not experts.endswith('experts'):
    return []
  halves = _halves(own)
  names = [f'{experts}.{_SWITCH}{half}' for half in halves]
  for expert in range(entry.shape[0]):
    names += [f'{experts}.{expert}.{half}' for half in halves]
  return names


def _halves(own: str) -> list[str]:
  return ['gate_proj', 'up_proj'] if own == 'gate_up_proj' else [own]


def _sort(
  tensors: Mapping[str, Array], modules: Mapping[str, _Module]
) -> tuple[dict[_Module, dict[str, list[Array]]], list[str], list[str]]:
  """({module: {suffix: copies}}, unknown names, names of derived buffers)."""
  found: dict[_Module, dict[str, list[Array]]] = {}
  unknown: list[str] = []
  derived: list[str] = []
  for name, tensor in tensors.items():
    place = _place(name, modules)
    if name.endswith(_DERIVED):
      derived.append(name)
    elif place is None:
      unknown.append(name)
    elif place[1] not in _IGNORED:
      module, suffix = place
      found.setdefault(module, {}).setdefault(suffix, []).append(tensor)
  return found, unknown, derived


def _place(
  name: str, modules: Mapping[str, _Module]
) -> tuple[_Module, str] | None:
  """(module, rest of the name) of a tensor; the inner model, saved alone, lacks
  a prefix."""
  for full in (name, f'model.{name}', name.removeprefix('model.')):
    module, suffix = full, ''
    while module:
      if module in modules:
        return modules[module], suffix
      module, _, last = module.rpartition('.')
      suffix = f'{last}.{suffix}' if suffix else last
  return None


def _compared(copies: list[Array]) -> Array:
  """A tensor, compared with its copies when it is read."""
  first, *others = copies
  for copy in others:
    if copy.shape != first.shape:
      raise copy.error(
        f'has the shape {list(copy.shape)}, and {first.name}, in {first.path}, '
        f'{list(first.shape)}, but {_ONE_WEIGHT}'
      )
  if not others:
    return first

  def read():
    array = first.read()
    for copy in others:
      if copy.has_bits is None or not copy.has_bits(array):
        raise copy.error(
          f'differs from {first.name} in {first.path}, but {_ONE_WEIGHT}'
        )
    return array

  return first._replace(read=read)


def _parts(
  entry: Entry, stored: Mapping[str, Mapping[str, Array]]
) -> formats.Parts | None:
  """The arrays of an entry, None without any."""
  home = entry.name.removesuffix(_WEIGHT)
  apart = [name for name in _apart(entry, home) if name in stored]
  if home in stored and not apart:
    return _matrix(entry, stored[home], entry.their_shape)
  if not apart:
    return None
  experts, *rest = entry.their_shape
  num_halves = len(_halves(home.rpartition('.')[2]))
  rest[0] //= num_halves
  is_switch = any(_SWITCH in name for name in apart)
  ways = {_SWITCH in name for name in apart}
  if home in stored or len(ways) > 1:
    array = next(iter(stored[apart[0]].values()))
    raise array.error(f'is a part of {entry.name}, which is there as well')
  expected = num_halves if is_switch else num_halves * experts
  if len(apart) != expected:
    lost = [
      name
      for name in _apart(entry, home)
      if (_SWITCH in name) == is_switch and name not in stored
    ]
    array = next(iter(stored[apart[0]].values()))
    raise CheckpointError(
      f'Experts are missing beside {array.name} in {array.path}: '
      f'{files.listed(lost)}.'
    )
  shape = (experts, *rest) if is_switch else tuple(rest)
  matrices = [_matrix(entry, stored[name], shape) for name in apart]
  return _together(entry, matrices, num_halves, is_switch)


def _matrix(
  entry: Entry, arrays: Mapping[str, Array], shape: tuple[int, ...]
) -> formats.Parts:
  """The arrays of a matrix, or of a part of one."""
  if len(arrays) == 1 and (plain := arrays.get('') or arrays.get('weight')):
    formats.check_shape(plain, shape)
    if plain.dtype not in safetensors.DTYPE_NAMES:
      raise plain.error(
        f'has the type {plain.dtype}; supported are '
        f'{", ".join(x.name for x in safetensors.DTYPE_NAMES)}, or those of '
        'quantised weights together with their scales'
      )
    return {'': plain}
  ordered = {name: arrays[name] for name in sorted(arrays)}
  for scheme in SCHEMES if len(shape) > 1 else ():
    if parts := scheme(ordered, shape):
      return parts
  first = next(iter(ordered.values()))
  raise CheckpointError(
    f'{entry.name} in {first.path} is stored as {files.listed(list(ordered))}, '
    'which is no format that is read: an array is missing, or one too many.'
  )


def _together(
  entry: Entry,
  matrices: list[formats.Parts],
  num_halves: int,
  is_switch: bool,
) -> formats.Parts:
  """One set of arrays of those of all experts, gate rows first."""
  first = matrices[0]
  for parts in matrices:
    for name in parts.keys() | first.keys():
      both = [x[name] for x in (first, parts) if name in x]
      if len({(x.dtype, x.shape) for x in both}) != 1 or len(both) != 2:
        raise both[-1].error(
          f'is not quantised as other matrices of {entry.name}: all experts of '
          'a layer must be alike'
        )

  def join(name):
    arrays = [parts[name] for parts in matrices]
    *experts, outputs, width = arrays[0].shape
    shape = (
      *(experts or [len(arrays) // num_halves]),
      num_halves * outputs,
      width,
    )

    def read():
      whole = np.empty(shape, arrays[0].dtype)
      for index, array in enumerate(arrays):
        expert, half = divmod(index, num_halves)
        which = slice(None) if is_switch else expert
        rows = slice(half * outputs, (half + 1) * outputs)
        whole[which, rows] = array.read()
      return whole

    return arrays[0]._replace(name=entry.name, shape=shape, read=read)

  return {name: join(name) for name in first}


def _to_ours(entry: Entry, parts: formats.Parts) -> dict[Path, Array]:
  """The arrays of a parameter in our layout, by their paths."""
  if parts.keys() == {''}:
    return {entry.path: parts[''].to(entry.to_ours, entry.shape)}
  if parameters.row_of(entry.path).part is None:
    return {entry.path: _dequantised(entry, parts)}
  arrays = {}
  for name, array in parts.items():
    if name == 'values':
      array = array.to(entry.to_ours, entry.shape)
    else:
      shape = parameters.stored_shape(entry.path, entry.shape, array.shape[-1])
      array = array.to(
        lambda x: parameters.to_groups(entry.path, entry.shape, x), shape
      )
    arrays[*entry.path, name] = array
  return arrays


def _dequantised(entry: Entry, parts: formats.Parts) -> Array:
  """A parameter that is never quantised here, such as the router: bfloat16."""
  first = next(iter(parts.values()))

  def read():
    arrays = {name: jnp.asarray(x.read()) for name, x in parts.items()}
    w = blocks.of_arrays(arrays).astype(jnp.bfloat16)
    return entry.to_ours(np.asarray(w))

  dtype = np.dtype(jnp.bfloat16)
  return first._replace(shape=entry.shape, dtype=dtype, read=read)


def _fill_scalars(
  parts: dict[str, formats.Parts], missing: list[str], folder: str
) -> list[str]:
  """If all scalars of a role (encoder, decoder) are missing, uses those of the
  other: some tools drop the encoder's, and the released ones are equal. Returns
  what is still missing."""
  roles = huggingface.TEXT_ENCODER, huggingface.DECODER
  scalar = huggingface.SCALAR

  def scalars(names, role):
    return [x for x in names if x.startswith(role) and x.endswith(scalar)]

  for role, other in roles, roles[::-1]:
    names = scalars(missing, role)
    stand_ins = [other + name.removeprefix(role) for name in names]
    has_own = bool(scalars(parts, role))
    if has_own or not names or not all(x in parts for x in stand_ins):
      continue
    parts |= {n: parts[x] for n, x in zip(names, stand_ins, strict=True)}
    missing = [name for name in missing if name not in names]
    logging.warning(
      '%s has no %s.layers.*.%s: those of %s are used instead.',
      *(folder, role, scalar, other),
    )
  return missing


def _check_names(folder: str, missing: list[str], unknown: list[str]) -> None:
  problems = [
    f'{what}: {files.listed(names)}'
    for what, names in (('missing', missing), ('unknown', unknown))
    if names
  ]
  if problems:
    raise CheckpointError(
      f'The tensors in {folder} are not those of its config.json; '
      f'{"; ".join(problems)}{foreign.describe_names(unknown)}.'
    )


def _check_untied(folder: str, lost: list[str]) -> None:
  """Raises `CheckpointError` if untied weights lack a copy of their own."""
  if lost:
    raise CheckpointError(
      f'The config.json in {folder} unties weights (tie_word_embeddings is '
      f'false), and {files.listed(lost)} are missing, but {_ONE_WEIGHT}. If '
      'they are tied, set it to true.'
    )
