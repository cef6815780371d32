"""What stands in an optimised HLO module, as XLA prints it."""

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
# What starts nothing.
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
  """What devices exchange in one way, in a program; loops count once.

  Attributes:
    count: how many there are.
    bytes: of their results, together.
    largest: bytes of the largest array among them; one may have several.
  """

  count: int
  bytes: int
  largest: int


def collectives(text: str) -> dict[str, Collective]:
  """The collectives of an optimised HLO module, by kind."""
  found, chains = collections.defaultdict(list), set()
  pattern = re.compile(
    r'= (.+?) (' + '|'.join(_COLLECTIVES) + r')(-start)?\('
    r'(?:.*chain_id="(\d+)")?'
  )
  for result, kind, started, chain in pattern.findall(text):
    # On a TPU one that runs beside several other things stands in each.
    if chain and chain in chains:
      continue
    chains.add(chain)
    shapes = re.findall(r'(\w+)\[([\d,]*)\]', result)
    # What starts and ends later has its operands beside its results.
    if started and kind == 'all-gather':
      shapes = shapes[len(shapes) // 2 :]
    elif started and kind == 'collective-permute':
      shapes = shapes[1:2]
    found[kind].append([_bytes_of(*shape) for shape in shapes])
  return {
    kind: Collective(len(many), sum(map(sum, many)), max(map(max, many)))
    for kind, many in sorted(found.items())
  }


def count_kernels(text: str) -> int:
  """Kernels in the computation that starts most of them, of an optimised HLO
  module: the loop of a sampler, or all of a step of training."""
  counts = []
  inside = re.compile(r'  (?:ROOT )?%[\w.\-]+ = .+? ([\w\-]+)\(')
  for line in text.splitlines():
    if not line.startswith(' '):
      counts.append(0)
    elif (found := inside.match(line)) and found[1] not in _NO_KERNEL:
      counts[-1] += 1
  return max(counts, default=0)


def _bytes_of(dtype: str, dims: str) -> int:
  """Of an array as HLO writes its type: 'bf16', '4,8'."""
  count = math.prod(int(d) for d in dims.split(',') if d)
  return count * _TYPE_BYTES.get(dtype, 4)
