"""A network in a folder, opened but not yet read.

  source = open_source('runs/tiny')   a run, adapters, a Hugging Face folder,
                                      or the name of a network, see `locate`
  source.restore(sharding, verify)    all parameters at once, on their devices
  source.arrays().read(path)          one array at a time, on the host

Only the config is read at once, everything else on demand. Another kind of
source is one more function that returns a `Source`.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import math
import os
from typing import Any
from typing import Literal
from typing import NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma import paths
from diffusiongemma.checkpoints import contents
from diffusiongemma.checkpoints import digest as digest_lib
from diffusiongemma.checkpoints import huggingface
from diffusiongemma.checkpoints import native
from diffusiongemma.config import Config
from diffusiongemma.config import QuantizationConfig
from diffusiongemma.model import denoiser
from diffusiongemma.model import lora
from diffusiongemma.model import parameters
from diffusiongemma.ops.weights import Weight
from diffusiongemma.runs import WorkdirError
from diffusiongemma.runs import companions
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.runs import hub
from diffusiongemma.runs import huggingface_folder
from diffusiongemma.runs import learnt as learnt_lib
from diffusiongemma.runs import shipped
from diffusiongemma.text import tokenizer as tokenizers

Path = tuple[str, ...]


class Arrays(NamedTuple):
  """The parameters of a source as stored, to read one at a time.

  Attributes:
    step: training steps done.
    types: {path: shape and type} in the order of the tree; a quantised
      parameter is several arrays, such as `values` and `scales`.
    read: path -> array on the host, the stored bits. Raises `CheckpointError`
      if they can't be read, or differ from those that a run saved.
  """

  step: int
  types: dict[Path, jax.ShapeDtypeStruct]
  read: Callable[[Path], np.ndarray]

  @property
  def num_bytes(self) -> int:
    """Bytes of all arrays together."""
    return count_bytes(self.types)


class Source(NamedTuple):
  """A network in a folder.

  Attributes:
    path: the folder.
    kind: what is in it.
    config: its settings, or those to use instead.
    arrays: () -> its newest parameters, one by one, adapters merged, those of
      quantised weights into the dequantised ones. Raises
      `WorkdirError` if there are none, or adapters were trained on other
      weights; `CheckpointError` if they are damaged.
    restore: (sharding or None, whether to verify) -> all parameters on their
      devices, in a nested dict; see `load.load`. A run is restored from its
      newest intact checkpoint. Adapters of quantised weights are not merged.
    tokenizer: () -> the tokenizer it was trained with, None without one.
    chat_template: () -> Jinja, None without one.
    companions: () -> (name in a run's folder, content) of the files beside the
      weights.
  """

  path: str
  kind: Literal['run', 'adapters', 'huggingface']
  config: Config
  arrays: Callable[[], Arrays]
  restore: Callable[[native.ShardingOf | None, bool], native.Restored]
  tokenizer: Callable[[], tokenizers.Tokenizer | None]
  chat_template: Callable[[], str | None]
  companions: Callable[[], Iterator[tuple[str, bytes]]]


def open_source(
  path: str | os.PathLike[str], config: Config | None = None
) -> Source:
  """Opens a run or a Hugging Face folder.

  Args:
    path: the folder, or a name, see `locate`.
    config: settings to use instead of its own; `train.init_from` is the folder
      of the base weights of adapters.

  Raises:
    ConfigError: the path is not local.
    WorkdirError: it is neither.
    CheckpointError: its config can't be read, or is that of another network.
  """
  path = locate(paths.local(path))
  if huggingface_folder.is_huggingface(path):
    return open_huggingface(path, config)
  return open_run(path, config)


def locate(path: str) -> str:
  """The folder that a path stands for: itself; of the name of a network that
  comes with the package (`shipped`), its folder; of the name of one on the
  Hugging Face Hub, `org/name` or `org/name@revision`, where it is downloaded
  to. What exists here counts more than a name.

  Raises:
    WorkdirError: it can't be downloaded.
  """
  if hub.is_name(path):
    return hub.download(path)
  return shipped.find(path)


def open_run(path: str, config: Config | None = None) -> Source:
  """Opens a run, possibly of adapters. Arguments and errors as
  `open_source`."""
  config = config or workdirs.read_config(path)
  if config.lora.rank:
    return _open_adapters(path, config)

  def arrays():
    with contextlib.closing(workdirs.open_checkpoints(path)) as manager:
      step = manager.latest_step()
      return Arrays(
        step,
        native.stored_types(manager, step),
        native.array_reader(manager, step),
      )

  restore = functools.partial(learnt_lib.restore, path, config)
  return _make_source(path, 'run', config, arrays, restore)


def open_huggingface(path: str, config: Config | None = None) -> Source:
  """Opens a Hugging Face folder or GGUF files; `config` may have the parameters
  quantised, or dequantised, while they are restored. Arguments and errors as
  `open_source`."""
  network = huggingface_folder.open_network(path)
  own = config or network.config

  @functools.cache
  def arrays():
    table = huggingface.tensor_table(denoiser.abstract_params(own.model))
    found = contents.find(path, network.tensors, table, network.is_tied)
    types = {
      name: jax.ShapeDtypeStruct(array.shape, array.dtype)
      for name, array in found.items()
    }
    return Arrays(0, types, lambda name: found[name].read())

  if config is None:
    quantization = _quantization_of(arrays().types)
    own = dataclasses.replace(own, quantization=quantization)

  def restore(sharding=None, verify=True):
    del verify  # There is nothing to compare with.
    flat = {
      name: parameters.quantize_array(own.quantization, name, w)
      for name, w in read_weights(arrays(), sharding)
    }
    return native.Restored(0, traverse_util.unflatten_dict(flat))

  source = _make_source(network.folder, 'huggingface', own, arrays, restore)
  return _with_files(source, network.inside or {}, path)


def _with_files(source: Source, inside: dict[str, bytes], path: str) -> Source:
  """The source, with files that are inside of that of the weights at `path`
  where none is beside it."""

  def tokenizer():
    found = source.tokenizer()
    if found is None and 'tokenizer.json' in inside:
      found = tokenizers.make_tokenizer(
        inside['tokenizer.json'], f'{path}.json'
      )
      companions.check_tokenizer(source.config, found, path)
    return found

  def chat_template():
    template = inside.get('chat_template.jinja')
    return source.chat_template() or (template and template.decode())

  def all_companions():
    yield from source.companions()
    for name, content in inside.items():
      is_tokenizer = name in companions.TOKENIZERS
      beside = source.tokenizer if is_tokenizer else source.chat_template
      if beside() is None:
        yield os.path.join(companions.COMPANIONS_DIR, name), content

  return source._replace(
    tokenizer=tokenizer,
    chat_template=chat_template,
    companions=all_companions,
  )


def _quantization_of(types: Iterable[Path]) -> QuantizationConfig:
  """What is quantised among the arrays of another tool."""
  quantized = {parameters.owner(x) for x in types if parameters.owner(x) != x}
  parts = {parameters.row_of(path).part for path in quantized}
  return parameters.with_stored(QuantizationConfig(), parts)


def _open_adapters(path: str, config: Config) -> Source:
  """Opens adapters, to be combined with the base weights as these are read."""

  def open_base():
    if not config.train.init_from:
      return _random_source(config)
    start = locate(config.train.init_from)
    if os.path.exists(start):
      return open_source(start)
    raise WorkdirError(
      f'{path} holds adapters of the weights in {start}, which are not there. '
      'Put them back, or say where they are: --config.train.init_from=...'
    )

  def read_adapters(verify=True):
    learnt = learnt_lib.restore(path, config, verify=verify)
    as_numpy = jax.tree.map(np.asarray, learnt.params)  # For any sharding.
    return learnt._replace(params=as_numpy)

  def arrays():
    learnt, base = read_adapters(), open_base().arrays()
    # Read once to compare and once to merge, so that only one array is held.
    digests = {
      digest_lib.name_of(name): digest_lib.digest(base.read(name))
      for name in base.types
    }
    workdirs.check_base(path, digests)
    abstract = denoiser.abstract_params(config.model)
    types = traverse_util.flatten_dict(abstract)

    def read(name):
      w = read_weight(base, name)
      w = w.astype(types[name].dtype)
      return np.asarray(lora.merge_array(config.lora, name, w, learnt.params))

    return Arrays(learnt.step, types, read)

  def restore(sharding=None, verify=True):
    learnt = read_adapters(verify)
    base = open_base().restore(sharding, verify).params
    stored = parameters.to_stored(base)
    workdirs.check_base(path, digest_lib.digests(stored))
    base = denoiser.with_configured_types(config.model, base)
    combine = lora.attach if _is_quantized(config) else lora.merge
    return learnt._replace(params=combine(config.lora, base, learnt.params))

  return _make_source(path, 'adapters', config, arrays, restore)


def read_weights(
  arrays: Arrays, sharding: native.ShardingOf | None = None
) -> Iterator[tuple[Path, Weight]]:
  """(path, parameter) one by one, of one or several stored arrays each."""
  names: dict[Path, list[Path]] = {}
  for name in arrays.types:
    names.setdefault(parameters.owner(name), []).append(name)
  for path in names:
    yield path, read_weight(arrays, path, names[path], sharding)


def read_weight(
  arrays: Arrays,
  path: Path,
  names: Iterable[Path] | None = None,
  sharding: native.ShardingOf | None = None,
) -> Weight:
  """The parameter at `path`, of the arrays with these names; by default all
  that belong to it. Raises `CheckpointError` as `arrays.read`."""
  if names is None:
    names = [x for x in arrays.types if parameters.owner(x) == path]
  stored = {x: _to_device(arrays.read(x), x, sharding) for x in names}
  if path in stored:
    return stored[path]
  return parameters.few_bits(
    path, {x[-1]: array for x, array in stored.items()}
  )


def _random_source(config: Config) -> Source:
  """The random network that adapters without `init_from` adapt."""

  def arrays():
    params = traverse_util.flatten_dict(denoiser.fresh_params(config))
    types = {
      path: jax.ShapeDtypeStruct(w.shape, w.dtype) for path, w in params.items()
    }
    return Arrays(0, types, lambda path: np.asarray(params[path]))

  def restore(sharding=None, verify=True):
    del sharding, verify
    return native.Restored(0, denoiser.fresh_params(config))

  nothing = lambda: None
  return Source(
    '', 'run', config, arrays, restore, nothing, nothing, lambda: iter(())
  )


def _make_source(path, kind, config, arrays, restore) -> Source:
  """A source whose tokenizer, template and companions are those in `path`."""
  return Source(
    path,
    kind,
    config,
    arrays,
    restore,
    tokenizer=lambda: companions.find_tokenizer(config, path),
    chat_template=lambda: companions.find_chat_template(path),
    companions=lambda: companions.files_beside(path),
  )


def check_not_quantized(source: Source) -> None:
  """Raises `WorkdirError` if the arrays of a source are quantised."""
  quantization = source.config.quantization
  if parameters.has_stored(quantization):
    return  # By another tool: they are quantised anew.
  if source.kind == 'run' and _is_quantized(source.config):
    raise WorkdirError(
      f'The parameters in {source.path} are quantised, which is for sampling: '
      'give the run that they were made from.'
    )


def check_trainable(source: Source, as_adapters: bool) -> None:
  """Raises `WorkdirError` if a run can't start from a source, of which it
  learns adapters or all weights."""
  if not _is_quantized(source.config):
    return
  if source.kind == 'adapters':
    raise WorkdirError(
      f'{source.path} holds adapters of quantised weights. To start from it, '
      'make whole weights of it: --mode=export.'
    )
  if not as_adapters:
    raise WorkdirError(
      f'The parameters in {source.path} are quantised: train adapters of them, '
      '--config.lora.rank=16, or give the run that they were made from.'
    )


def _is_quantized(config: Config) -> bool:
  return config.quantization != QuantizationConfig()


def count_bytes(types: Any) -> int:
  """Bytes on disk of a tree of arrays, before compression; 4-bit values take a
  byte each."""
  leaves = jax.tree.leaves(types)
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def _to_device(
  array: np.ndarray, path: Path, sharding: native.ShardingOf | None
) -> jax.Array:
  """The array on its devices; each device gets only its own shard."""
  if sharding is None:
    return jnp.asarray(array)
  where = sharding(path, array.shape)
  return jax.make_array_from_callback(array.shape, where, lambda i: array[i])
