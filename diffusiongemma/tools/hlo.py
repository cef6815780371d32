"""Reads collectives and kernels from the text of an optimised HLO module."""

import collections
import dataclasses
import math
import re

_COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
_TYPE_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2}
# Operations that launch no kernel.
_NO_KERNEL = {
  'after-all',
  'bitcast',
  'constant',
  'get-tuple-element',
  'parameter',
  'tuple',
}


@dataclasses.dataclass(frozen=True)
class Collective:
  """The collectives of one kind in a program; loops count once.

  Attributes:
    count: their number.
    bytes: total bytes of their results.
    largest: bytes of the largest array; a collective may have several.
  """

  count: int
  bytes: int
  largest: int


def collectives(text: str) -> dict[str, Collective]:
  """The collectives of an optimised HLO module, by kind."""
  by_kind, chains = collections.defaultdict(list), set()
  pattern = re.compile(
    r'= (.+?) (' + '|'.join(_COLLECTIVES) + r')(-start)?\('
    r'(?:.*chain_id="(\d+)")?'
  )
  for result, kind, started, chain in pattern.findall(text):
    # On a TPU, a collective that overlaps with several operations is in the
    # text of each.
    if chain and chain in chains:
      continue
    chains.add(chain)
    shapes = re.findall(r'(\w+)\[([\d,]*)\]', result)
    # The result of an asynchronous start also has its operands.
    if started and kind == 'all-gather':
      shapes = shapes[len(shapes) // 2 :]
    elif started and kind == 'collective-permute':
      shapes = shapes[1:2]
    by_kind[kind].append([_bytes_of(*shape) for shape in shapes])
  return {
    kind: Collective(len(many), sum(map(sum, many)), max(map(max, many)))
    for kind, many in sorted(by_kind.items())
  }


def count_kernels(text: str) -> int:
  """Kernels of the computation with most kernels in an optimised HLO module:
  the loop of a sampler, or a whole training step."""
  counts = []
  inside = re.compile(r'  (?:ROOT )?%[\w.\-]+ = .+? ([\w\-]+)\(')
  for line in text.splitlines():
    if not line.startswith(' '):
      counts.append(0)
    elif (operation := inside.match(line)) and operation[1] not in _NO_KERNEL:
      counts[-1] += 1
  return max(counts, default=0)


def _bytes_of(dtype: str, dims: str) -> int:
  """Bytes of an array, from its type in HLO text: 'bf16', '4,8'."""
  count = math.prod(int(d) for d in dims.split(',') if d)
  return count * _TYPE_BYTES.get(dtype, 4)
