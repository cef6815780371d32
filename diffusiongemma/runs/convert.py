"""Between other tools' networks and runs: convert, export, quantize.

  convert   HF/*.safetensors, *.gguf  ->  WORKDIR/checkpoints/0
  export    WORKDIR/checkpoints/<n>   ->  HF/model-0000i-of-0000n.safetensors
  quantize  either                    ->  WORKDIR/checkpoints/<n>, quantised

One array at a time; the host never holds the whole model. Bits stay as they are
where quantisation is not the purpose. The
files beside the weights (tokenizer, chat template and so on) are copied to
WORKDIR/huggingface. A folder gets its name only when it is complete.
"""

from collections.abc import Iterable
from collections.abc import Iterator
import dataclasses
import json
import math
import os

from flax import traverse_util
import jax.numpy as jnp
import numpy as np

from diffusiongemma import config as configs
from diffusiongemma import paths
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import folder as folders
from diffusiongemma.checkpoints import huggingface
from diffusiongemma.checkpoints import huggingface_config
from diffusiongemma.checkpoints import native
from diffusiongemma.checkpoints import safetensors_writer
from diffusiongemma.config import Config
from diffusiongemma.config import QuantizationConfig
from diffusiongemma.model import denoiser
from diffusiongemma.model import parameters
from diffusiongemma.runs import companions
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.runs import huggingface_folder
from diffusiongemma.runs import source as sources


def convert(hf_dir: str, workdir: str) -> Config:
  """Converts a Hugging Face folder to a working directory, `workdir`.

  Raises:
    ConfigError: a path is not local.
    CheckpointError: `hf_dir` is not such a folder or is damaged, `workdir`
      exists, or the disk is full. No `workdir` is left behind.
  """
  hf_dir, workdir = paths.local(hf_dir), paths.local(workdir)
  source = sources.open_huggingface(sources.locate(hf_dir))
  arrays = source.arrays()
  each = ((path, arrays.read(path)) for path in arrays.types)
  _make_run(
    *(workdir, source.config, source, arrays.step, each),
    *(arrays.num_bytes, 'convert'),
  )
  return source.config


def quantize(
  source: str, workdir: str, quantization: QuantizationConfig
) -> Config:
  """Writes the quantised parameters of a run or a Hugging Face folder, for
  sampling, to a new working directory.

  Adapters are merged first.

  Raises:
    ConfigError: nothing is to be quantised, or the groups do not divide an
      axis.
    WorkdirError, CheckpointError: `source` is neither, or is damaged; `workdir`
      exists, or the disk is full. No `workdir` is left behind.
  """
  source, workdir = paths.local(source), paths.local(workdir)
  parameters.check_not_stored(quantization)
  if quantization == QuantizationConfig(group_size=quantization.group_size):
    raise configs.ConfigError(
      'config.quantization leaves everything as it is: say '
      '--config.quantization.experts=int4, .linears=int8 or .embedding=int8.'
    )
  opened = sources.open_source(source)
  sources.check_not_quantized(opened)
  arrays = opened.arrays()
  # What another tool has quantised stays so where nothing is said.
  theirs = opened.config.quantization
  quantization = parameters.with_stored(
    quantization,
    [
      part
      for part in ('experts', 'linears', 'embedding')
      if getattr(quantization, part) == 'none'
      and getattr(theirs, part) == parameters.STORED
    ],
  )
  config = dataclasses.replace(
    opened.config,
    quantization=quantization,
    lora=configs.LoraConfig(),
    train=dataclasses.replace(opened.config.train, init_from=''),
  )
  abstract = parameters.abstract_quantized(
    quantization,
    parameters.from_stored(traverse_util.unflatten_dict(arrays.types)),
  )

  def few_bits():
    for path, w in sources.read_weights(arrays):
      w = parameters.quantize_array(quantization, path, w)
      for stored_path, x in parameters.stored_arrays(path, w):
        yield stored_path, np.asarray(x)

  num_bytes = sources.count_bytes(abstract)
  _make_run(
    *(workdir, config, opened, arrays.step, few_bits(), num_bytes, 'quantize')
  )
  return config


def _make_run(
  workdir: str,
  config: Config,
  source: sources.Source,
  step: int,
  arrays: Iterable[tuple[tuple[str, ...], np.ndarray]],
  num_bytes: int,
  what: str,
) -> None:
  """Writes a working directory with one checkpoint, from arrays that arrive one
  by one, and the companion files of `source`."""
  companion_files = list(source.companions())
  with (
    folders.appearing(workdir) as folder,
    folders.progress(what, num_bytes) as bar,
  ):

    def watched():
      for path, array in arrays:
        yield path, array
        bar(array.nbytes)

    os.mkdir(os.path.join(folder, companions.COMPANIONS_DIR))
    for name, content in companion_files:
      folders.write_file(os.path.join(folder, name), content)
    folders.write_file(
      os.path.join(folder, workdirs.CONFIG), workdirs.encode_config(config)
    )
    native.save_arrays(
      workdirs.checkpoint_dir(folder), step, watched(), num_bytes, config
    )


def export(
  workdir: str,
  hf_dir: str,
  max_shard_bytes: int = safetensors_writer.MAX_SHARD_BYTES,
) -> None:
  """Writes the newest checkpoint of `workdir` as a Hugging Face folder.

  Adapters are merged. What another tool has quantised is written in bfloat16. A
  network without a vision encoder gets the smallest one
  that transformers can build, of zeros: its class always has one.

  Raises:
    ConfigError: a path is not local.
    WorkdirError: there is no run, or it has no checkpoint.
    CheckpointError: the run is damaged, `hf_dir` exists, the disk is full, or
      transformers has no such network. No `hf_dir` is left behind.
  """
  workdir, hf_dir = paths.local(workdir), paths.local(hf_dir)
  source = sources.open_run(sources.locate(workdir))
  sources.check_not_quantized(source)
  config, zeros = source.config, {}
  if config.model.vision is None:
    model = huggingface_folder.with_smallest_vision(config)
    config = dataclasses.replace(config, model=model)
    zeros = denoiser.abstract_params(model)['vision']
  table = huggingface.tensor_table(denoiser.abstract_params(config.model))
  arrays = source.arrays()
  dtype_of = {parameters.owner(p): x.dtype for p, x in arrays.types.items()}
  few_bits = {
    owner for p in arrays.types if (owner := parameters.owner(p)) != p
  }
  dtype_of |= dict.fromkeys(few_bits, np.dtype(jnp.bfloat16))
  missing = [
    '/'.join(entry.path)
    for entry in table.values()
    if entry.path not in dtype_of and not (zeros and entry.path[0] == 'vision')
  ]
  if missing:
    raise CheckpointError(
      f'The checkpoint in {workdir} lacks {", ".join(missing[:4])}.'
    )
  dtypes = {
    name: dtype_of.get(entry.path, np.dtype(np.float32))
    for name, entry in table.items()
  }
  shapes = {n: (e.their_shape, dtypes[n]) for n, e in table.items()}
  num_bytes = sum(
    math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values()
  )

  def read(name):
    entry = table[name]
    if entry.path not in dtype_of:
      return np.zeros(entry.their_shape, dtypes[name])
    if entry.path in few_bits:
      w = sources.read_weight(arrays, entry.path).astype(jnp.bfloat16)
      return entry.to_theirs(np.asarray(w))
    return entry.to_theirs(arrays.read(entry.path))

  with (
    folders.appearing(hf_dir) as folder,
    folders.progress('export', num_bytes) as bar,
  ):
    dtype = dtypes['model.decoder.embed_tokens.weight'].name
    for name, content in _companions_of(workdir, config, dtype):
      folders.write_file(os.path.join(folder, name), content)
    safetensors_writer.write_folder(
      folder, shapes, read, max_shard_bytes, on_bytes=bar
    )


def _companions_of(
  workdir: str, config: Config, dtype: str
) -> Iterator[tuple[str, bytes]]:
  """(name, content) of the files beside the exported weights.

  The configs that came with a converted checkpoint are exported unchanged if
  they still match the run's config.
  """
  copied = os.path.join(workdir, companions.COMPANIONS_DIR)
  unchanged = False
  if os.path.isdir(copied):
    if os.path.lexists(os.path.join(copied, huggingface_folder.CONFIG)):
      theirs = huggingface_folder.read_config(copied)
      unchanged = (theirs.model, theirs.diffusion) == (
        config.model,
        config.diffusion,
      )
      # The exported tensors are not those that it describes.
      unchanged &= not huggingface_folder.names_quantization(copied)
    for name, content in companions.read_companions(copied):
      if unchanged or name not in (
        huggingface_folder.CONFIG,
        huggingface_folder.GENERATION_CONFIG,
      ):
        yield name, content
  else:
    for name in companions.TOKENIZERS:
      if os.path.lexists(os.path.join(workdir, name)):
        yield name, files.read_file(workdir, name, companions.MAX_TEXT_BYTES)
  if not unchanged:
    for name, values in (
      (
        huggingface_folder.CONFIG,
        huggingface_config.to_config(config.model, config.diffusion, dtype),
      ),
      (
        huggingface_folder.GENERATION_CONFIG,
        huggingface_config.to_generation_config(config.diffusion),
      ),
    ):
      text = json.dumps(values, indent=2, sort_keys=True) + '\n'
      yield name, text.encode()
