"""Between Hugging Face's folders and ours: convert, export, quantize, load.

  convert   HF/*.safetensors          ->  WORKDIR/checkpoints/0
  export    WORKDIR/checkpoints/<n>   ->  HF/model-0000i-of-0000n.safetensors

One array at a time, bit for bit; a host never holds the model. What lies
beside the weights, tokenizer and chat template and all, travels along in
WORKDIR/huggingface. A folder appears under its name when it is complete.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import json
import math
import os

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma import config as configs
from diffusiongemma import paths
from diffusiongemma.checkpoints import CheckpointError
from diffusiongemma.checkpoints import files
from diffusiongemma.checkpoints import folder as folders
from diffusiongemma.checkpoints import foreign
from diffusiongemma.checkpoints import huggingface
from diffusiongemma.checkpoints import huggingface_config
from diffusiongemma.checkpoints import native
from diffusiongemma.checkpoints import safetensors_writer
from diffusiongemma.config import Config
from diffusiongemma.config import QuantizationConfig
from diffusiongemma.model import denoiser
from diffusiongemma.model import lora
from diffusiongemma.model import parameters
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.training import train_state

CONFIG, GENERATION_CONFIG = 'config.json', 'generation_config.json'


def read_config(hf_dir: str) -> Config:
  """The config of a Hugging Face folder; fields it says nothing of have their
  defaults.

  Raises:
    CheckpointError: it has no config.json, or not that of this network.
  """
  path = os.path.join(hf_dir, CONFIG)
  if not os.path.lexists(path):
    message = os.path.isdir(hf_dir) and foreign.describe_folder(hf_dir)
    raise CheckpointError(
      message
      or f'There is no {path!r}: give the folder that has {CONFIG} beside its '
      'safetensors.'
    )
  values = files.read_json(hf_dir, CONFIG)
  model = huggingface_config.model_config(values, path)
  generation = {}
  if os.path.lexists(os.path.join(hf_dir, GENERATION_CONFIG)):
    generation = files.read_json(hf_dir, GENERATION_CONFIG)
  diffusion = huggingface_config.diffusion_config(
    values, generation, model.vocab_size, hf_dir
  )
  if model.context_length <= diffusion.canvas_length:
    raise CheckpointError(
      f'{path}: max_position_embeddings = {model.context_length} leaves no '
      f'room beside a canvas of {diffusion.canvas_length}.'
    )
  length = max(configs.DataConfig.sequence_length, 4 * diffusion.canvas_length)
  length = min(length, model.context_length)
  config = Config(
    model=model,
    diffusion=diffusion,
    data=configs.DataConfig(sequence_length=length),
  )
  try:
    configs.validate(config)
  except configs.ConfigError as error:
    raise CheckpointError(f'{path}: {error}') from error
  return config


def from_state_dict(
  config: configs.ModelConfig, state: Mapping[str, np.ndarray]
) -> dict:
  """Our parameters from a `transformers` model's tensors, by their names."""
  table = huggingface.tensor_table(denoiser.abstract_params(config))
  return traverse_util.unflatten_dict(
    {
      entry.path: jnp.asarray(entry.to_ours(np.asarray(state[name])))
      for name, entry in table.items()
    }
  )


def convert(hf_dir: str, workdir: str) -> Config:
  """Makes a Hugging Face folder a working directory, `workdir`.

  Raises:
    ConfigError: a path is not local.
    CheckpointError: `hf_dir` holds something else or is damaged, `workdir`
      exists, or there is no room. No `workdir` is left behind.
  """
  hf_dir, workdir = paths.local(hf_dir), paths.local(workdir)
  config = read_config(hf_dir)
  arrays, num_bytes = _arrays_of_folder(hf_dir, config)
  _make_run(workdir, config, hf_dir, arrays, num_bytes, 'convert')
  return config


def quantize(
  source: str, workdir: str, quantization: QuantizationConfig
) -> Config:
  """Makes a run, or a Hugging Face folder, a working directory with parameters
  of few bits, for sampling.

  Adapters are merged with what they adapt first, for which all of the network
  is held in memory; without, it is one array at a time.

  Raises:
    ConfigError: nothing is to be quantised, or can't be in such groups.
    WorkdirError, CheckpointError: `source` is neither, or is damaged; `workdir`
      exists, or there is no room. No `workdir` is left behind.
  """
  source, workdir = paths.local(source), paths.local(workdir)
  if quantization == QuantizationConfig(group_size=quantization.group_size):
    raise configs.ConfigError(
      'config.quantization leaves everything as it is: say '
      '--config.quantization.experts=int4, .linears=int8 or .embedding=int8.'
    )
  if is_huggingface(source):
    config = read_config(source)
    arrays, _ = _arrays_of_folder(source, config)
  else:
    config = workdirs.read_config(source)
    _check_not_quantized(config, source)
    arrays = _arrays_of_run(source, config)
  config = dataclasses.replace(
    config,
    quantization=quantization,
    lora=configs.LoraConfig(),
    train=dataclasses.replace(config.train, init_from=''),
  )
  abstract = parameters.abstract_quantized(
    quantization, denoiser.abstract_params(config.model)
  )
  # On disk 4 bits take a byte, before they are compressed.
  num_bytes = sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(abstract)
  )

  def few_bits():
    for path, array in arrays:
      w = parameters.quantize_array(quantization, path, jnp.asarray(array))
      for stored_path, x in parameters.stored_arrays(path, w):
        yield stored_path, np.asarray(x)

  _make_run(workdir, config, source, few_bits(), num_bytes, 'quantize')
  return config


def _arrays_of_folder(
  hf_dir: str, config: Config
) -> tuple[Iterator[tuple[tuple[str, ...], np.ndarray]], int]:
  """(path, array) of a Hugging Face folder, one by one, and their bytes.

  Raises `CheckpointError`, before anything is read, where its tensors are not
  those of the config.
  """
  table = huggingface.tensor_table(denoiser.abstract_params(config.model))
  are_tied = huggingface_config.is_tied(
    files.read_json(hf_dir, CONFIG), os.path.join(hf_dir, CONFIG)
  )
  tensors = huggingface.find_tensors(hf_dir, table, are_tied)
  arrays = (
    (entry.path, array)
    for entry, array in huggingface.read_arrays(table, tensors)
  )
  return arrays, sum(first.nbytes for first, *_ in tensors.values())


def _arrays_of_run(
  workdir: str, config: Config
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
  """(path, array) of the newest checkpoint, one by one."""
  with _stored_arrays(workdir, config) as (stored, read_array):
    for path in stored:
      yield path, read_array(path)


def _check_not_quantized(config: Config, folder: str) -> None:
  """Raises `WorkdirError` for a run whose bits are gone."""
  if config.quantization != QuantizationConfig():
    raise workdirs.WorkdirError(
      f'The parameters in {folder} are quantised, which is for sampling: give '
      'the run that they were made from.'
    )


def _make_run(
  workdir: str,
  config: Config,
  source: str,
  arrays: Iterable[tuple[tuple[str, ...], np.ndarray]],
  num_bytes: int,
  what: str,
) -> None:
  """A working directory with one checkpoint, of arrays that arrive one by one,
  and what lies beside the weights in `source`."""
  beside = list(workdirs.files_beside(source))
  with (
    folders.appearing(workdir) as folder,
    folders.progress(what, num_bytes) as bar,
  ):

    def watched():
      for path, array in arrays:
        yield path, array
        bar(array.nbytes)

    os.mkdir(os.path.join(folder, workdirs.COMPANIONS_DIR))
    for name, content in beside:
      folders.write_file(os.path.join(folder, name), content)
    folders.write_file(
      os.path.join(folder, workdirs.CONFIG), workdirs.encode_config(config)
    )
    native.save_arrays(
      workdirs.checkpoint_dir(folder), 0, watched(), num_bytes, config
    )


def export(
  workdir: str,
  hf_dir: str,
  max_shard_bytes: int = safetensors_writer.MAX_SHARD_BYTES,
) -> None:
  """Writes the newest checkpoint of `workdir` as a Hugging Face folder.

  Adapters are merged with what they adapt, for which all of the network is
  held in memory; without, it is one array at a time. A network without a
  vision encoder gets the smallest one that transformers can build, of zeros:
  its class always has one.

  Raises:
    ConfigError: a path is not local.
    WorkdirError: there is no run, or no checkpoint of it.
    CheckpointError: it is damaged, `hf_dir` exists, there is no room, or
      transformers has no such network. No `hf_dir` is left behind.
  """
  workdir, hf_dir = paths.local(workdir), paths.local(hf_dir)
  config = workdirs.read_config(workdir)
  _check_not_quantized(config, workdir)
  zeros = {}
  if config.model.vision is None:
    config = dataclasses.replace(config, model=with_smallest_vision(config))
    zeros = denoiser.abstract_params(config.model)['vision']
  table = huggingface.tensor_table(denoiser.abstract_params(config.model))
  with _stored_arrays(workdir, config) as (stored, read_array):
    dtypes = {
      name: np.dtype(stored.get(entry.path, np.float32))
      for name, entry in table.items()
    }
    missing = [
      '/'.join(entry.path)
      for entry in table.values()
      if entry.path not in stored and not (zeros and entry.path[0] == 'vision')
    ]
    if missing:
      raise CheckpointError(
        f'The checkpoint in {workdir} lacks {", ".join(missing[:4])}.'
      )
    shapes = {n: (e.their_shape, dtypes[n]) for n, e in table.items()}
    num_bytes = sum(
      math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values()
    )

    def read(name):
      entry = table[name]
      if entry.path not in stored:
        return np.zeros(entry.their_shape, dtypes[name])
      return entry.to_theirs(read_array(entry.path))

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


@contextlib.contextmanager
def _stored_arrays(workdir: str, config: Config) -> Iterator[tuple]:
  """({path: type}, a function path -> array) of the newest checkpoint."""
  if config.lora.rank:
    params = traverse_util.flatten_dict(load(workdir).params)
    yield (
      {path: np.dtype(array.dtype) for path, array in params.items()},
      lambda path: np.asarray(params[path]),
    )
    return
  with contextlib.closing(workdirs.open_checkpoints(workdir)) as manager:
    step = manager.latest_step()
    yield native.stored_types(manager, step), native.array_reader(manager, step)


def adopt(config: Config, workdir: str) -> Config:
  """The config of a run in `workdir` that starts from the weights in
  `config.train.init_from`: network and sampler are theirs, but for the types.
  A run that has started has them itself.

  Raises:
    WorkdirError, CheckpointError: there is no network.
  """
  folder = paths.local(config.train.init_from, 'config.train.init_from')
  folder = os.path.abspath(folder)
  if workdirs.is_claimed(workdir):
    theirs = workdirs.read_config(workdir)
  elif is_huggingface(folder):
    theirs = read_config(folder)
  elif workdirs.is_claimed(folder):
    theirs = workdirs.read_config(folder)
    _check_not_quantized(theirs, folder)
  else:
    raise workdirs.WorkdirError(
      f'config.train.init_from: {folder} is neither a run nor a Hugging Face '
      'folder.'
    )
  model = dataclasses.replace(
    theirs.model,
    dtype=config.model.dtype,
    param_dtype=config.model.param_dtype,
  )
  train = dataclasses.replace(config.train, init_from=folder)
  return dataclasses.replace(
    config, model=model, diffusion=theirs.diffusion, train=train
  )


def load_base(config: Config, sharding: native.ShardingOf) -> dict:
  """The parameters that a run starts from, as they are stored; see `load`."""
  return load(config.train.init_from, sharding=sharding).params


def load(
  path: str,
  config: Config | None = None,
  sharding: native.ShardingOf | None = None,
  verify: bool = True,
) -> workdirs.Run:
  """Reads a run, or a Hugging Face folder.

  The adapters of a run with `config.lora` are added to what they adapt, which
  is loaded too.

  Args:
    path: what training or conversion had as `--workdir`, or a folder with
      Hugging Face's config.json and safetensors.
    config: settings to use instead of its own, for another sampler.
    sharding: where each array goes; without, to the first device.
    verify: compares the digests of a run's arrays, so that a flipped bit is
      an error. Hugging Face's files have none.

  Raises:
    ConfigError: the path is not local.
    WorkdirError: there is nothing to load, or adapters were trained on other
      weights.
    CheckpointError: what is there is damaged or of another kind.
  """
  path = paths.local(path)
  if not is_huggingface(path):
    config = config or workdirs.read_config(path)
    if not config.lora.rank:
      return workdirs.load(path, config, sharding, verify)
    run = workdirs.load(path, config, None, verify)
    adapters = jax.tree.map(np.asarray, run.params)  # For any sharding.
    if not config.train.init_from:
      base = train_state.fresh_params(config)
    elif os.path.isdir(config.train.init_from):
      base = load(config.train.init_from, None, sharding, verify).params
    else:
      raise workdirs.WorkdirError(
        f'{path} holds adapters of the weights in {config.train.init_from}, '
        'which are not there. Put them back, or say where they are: '
        '--config.train.init_from=...'
      )
    workdirs.check_base(path, base)
    base = train_state.with_configured_types(config, base)
    return run._replace(params=lora.merge(config.lora, base, adapters))
  config = config or read_config(path)
  arrays, _ = _arrays_of_folder(path, config)
  params = traverse_util.unflatten_dict(
    {
      name: parameters.quantize_array(
        config.quantization, name, _to_device(array, name, sharding)
      )
      for name, array in arrays
    }
  )
  tokenizer = workdirs.find_tokenizer(config, path)
  template = workdirs.find_chat_template(path)
  return workdirs.Run(config, tokenizer, 0, params, template)


def is_huggingface(path: str) -> bool:
  """Whether the config.json there is one of Hugging Face's, or there are only
  weights, of which `read_config` says what they are."""
  if not os.path.isfile(os.path.join(path, CONFIG)):
    return os.path.isdir(path) and foreign.has_weights(path)
  return huggingface_config.is_theirs(files.read_json(path, CONFIG))


def _to_device(
  array: np.ndarray, path: tuple[str, ...], sharding: native.ShardingOf | None
) -> jax.Array:
  """On its devices, each of which gets its own part and no more."""
  if sharding is None:
    return jnp.asarray(array)
  where = sharding(path, array.shape)
  return jax.make_array_from_callback(array.shape, where, lambda i: array[i])


def _companions_of(
  workdir: str, config: Config, dtype: str
) -> Iterator[tuple[str, bytes]]:
  """What an exported folder has beside the weights.

  Configs that came with a converted checkpoint go back as they came while
  they still say what the run's config says.
  """
  travelled = os.path.join(workdir, workdirs.COMPANIONS_DIR)
  unchanged = False
  if os.path.isdir(travelled):
    theirs = read_config(travelled)
    unchanged = (theirs.model, theirs.diffusion) == (
      config.model,
      config.diffusion,
    )
    for name, content in workdirs.read_companions(travelled):
      if unchanged or name not in (CONFIG, GENERATION_CONFIG):
        yield name, content
  else:
    for name in workdirs.TOKENIZERS:
      if os.path.lexists(os.path.join(workdir, name)):
        yield name, files.read_file(workdir, name, workdirs.MAX_TEXT_BYTES)
  if not unchanged:
    for name, values in (
      (
        CONFIG,
        huggingface_config.to_config(config.model, config.diffusion, dtype),
      ),
      (
        GENERATION_CONFIG,
        huggingface_config.to_generation_config(config.diffusion),
      ),
    ):
      text = json.dumps(values, indent=2, sort_keys=True) + '\n'
      yield name, text.encode()


def with_smallest_vision(config: Config) -> configs.ModelConfig:
  """The network with a vision encoder of no layers that sees one pixel."""
  no_token = config.diffusion.pad_token_id
  vision = configs.VisionConfig(
    embed_dim=4,
    num_layers=0,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=4,
    patch_size=1,
    pooling_kernel=1,
    position_table_size=1,
    standardize=False,
    image_token_id=no_token,
    begin_image_token_id=no_token,
    end_image_token_id=no_token,
  )
  return dataclasses.replace(config.model, vision=vision)
