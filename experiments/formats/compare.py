r"""Quantised matrices as the tools themselves write and dequantise them.

  pip install compressed-tensors==0.20.1 mlx==0.32.4 mlx-cpu==0.32.4
  python -m experiments.formats.compare

A random matrix is quantised by each tool, read by `checkpoints.formats`, and
compared with the tool's own dequantisation: the largest difference, relative to
the largest element, and how many elements differ in the tool's type. The tools
are not installed for the tests, where the formulas are checked.
"""

import json
import pathlib
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from diffusiongemma.checkpoints import contents
from diffusiongemma.checkpoints import formats
from diffusiongemma.ops import blocks

FOLDER = pathlib.Path(__file__).parent
SHAPE = (192, 320)
MLX = (
  *(
    ('affine', bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64)
  ),
  ('mxfp4', 4, 32),
  ('mxfp8', 8, 32),
  ('nvfp4', 4, 16),
)
COMPRESSED = (
  *('FP8_DYNAMIC', 'FP8_BLOCK', 'W8A16', 'W4A16', 'W4A16_ASYM'),
  *('NVFP4A16', 'MXFP4A16'),
)


def difference(tensors, theirs) -> dict[str, float]:
  """Of what is read and what the tool dequantises, bfloat16."""
  arrays = {
    name: formats.Array(name, 'here', x.dtype, x.shape, lambda x=x: x)
    for name, x in sorted(tensors.items())
  }
  found = (scheme(arrays, SHAPE) for scheme in contents.SCHEMES)
  parts = next(parts for parts in found if parts)
  w = blocks.of_arrays({k: jnp.asarray(x.read()) for k, x in parts.items()})
  ours = np.asarray(w.astype(jnp.bfloat16)).astype(np.float32)
  return {
    'relative': float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
    'differ': int((ours != theirs).sum()),
  }


def compare_mlx():
  """(name, difference) of each mode of MLX."""
  import mlx.core as mx

  def to_numpy(x):
    if x.dtype == mx.bfloat16:
      return np.asarray(x.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.asarray(x)

  mx.random.seed(0)
  w = mx.random.normal(SHAPE).astype(mx.bfloat16)
  for mode, bits, group in MLX:
    how = dict(group_size=group, bits=bits, mode=mode)
    names = ('weight', 'scales', 'biases')
    few = dict(zip(names, mx.quantize(w, **how), strict=False))
    theirs = mx.dequantize(
      few['weight'], few['scales'], few.get('biases'), **how
    ).astype(mx.bfloat16)
    tensors = {name: to_numpy(x) for name, x in few.items()}
    yield (
      f'mlx {mode} {bits} bits, groups of {group}',
      difference(tensors, np.float32(to_numpy(theirs))),
    )


def compare_compressed_tensors():
  """(name, difference) of each preset of compressed-tensors."""
  from compressed_tensors import compressors
  from compressed_tensors import quantization
  import torch

  torch.manual_seed(0)
  classes = {
    'FP8': compressors.FloatQuantizationCompressor,
    'NVFP4': compressors.NVFP4PackedCompressor,
    'MXFP4': compressors.MXFP4PackedCompressor,
  }
  rows, columns = SHAPE
  for name in COMPRESSED:
    scheme = quantization.preset_name_to_scheme(name, ['Linear'])
    how = scheme.weights
    if how.group_size == 128:  # Which does not divide the columns.
      how = how.model_copy(update={'group_size': 64})
      scheme = scheme.model_copy(update={'weights': how})
    groups = columns // how.group_size if how.group_size else 1
    shape = (2, 3) if 'BLOCK' in name else (rows, groups)
    scale = (torch.rand(shape) * 0.05 + 0.01).bfloat16()
    state = {'weight': torch.randn(SHAPE).bfloat16(), 'weight_scale': scale}
    if not how.symmetric:
      zeros = torch.randint(-8, 8, shape)
      state['weight_zero_point'] = zeros.to(torch.int8)
    if name.startswith('NVFP4'):
      scale = (torch.rand(shape) * 60 + 1).to(torch.float8_e4m3fn)
      state['weight_scale'] = scale.float()
      state['weight_global_scale'] = torch.tensor([123.4])
    if name.startswith('MXFP4'):
      state['weight_scale'] = 2.0 ** torch.randint(-6, -1, shape).float()
    compressor = classes.get(
      name.partition('A')[0].partition('_')[0],
      compressors.PackedQuantizationCompressor,
    )
    few = compressor.compress(state, scheme)
    theirs = compressor.decompress(dict(few), scheme)['weight']
    tensors = {key: _to_numpy(x) for key, x in few.items()}
    yield (
      f'compressed-tensors {name}',
      difference(tensors, theirs.bfloat16().float().numpy()),
    )


def _to_numpy(x) -> np.ndarray:
  """A torch tensor, of the types that NumPy lacks too."""
  import torch

  for kind, bits, dtype in (
    (torch.bfloat16, torch.int16, ml_dtypes.bfloat16),
    (torch.float8_e4m3fn, torch.uint8, ml_dtypes.float8_e4m3fn),
  ):
    if x.dtype == kind:
      return x.view(bits).numpy().view(dtype)
  return x.numpy()


def main() -> None:
  results = dict([*compare_mlx(), *compare_compressed_tensors()])
  for name, numbers in results.items():
    print(f'{name:36} {numbers["differ"]:6} {numbers["relative"]:.2e}')
  text = json.dumps({'results': results}, indent=2)
  (FOLDER / 'compare.json').write_text(text + '\n')


if __name__ == '__main__':
  sys.exit(main())
