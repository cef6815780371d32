"""Hashes of the programs that sampling and training lower to.

A change of layout alone leaves every hash as it was:

  python experiments/sameness/hashes.py --out=/tmp/before.json
  ...
  python experiments/sameness/hashes.py --out=/tmp/after.json \\
      --against=/tmp/before.json

A hash is of `lowered.as_text()`, which has no names of files; what kernels
carry inside of it is lowered without tracebacks, so that it has none either.
Topologies whose plugin is not installed are left out, and named. Nothing is
compiled, and no array of the released network is made.

Hardware: any CPU; 2 minutes, 3 GB.
"""

import hashlib
import json
import pathlib

from absl import app
from absl import flags
import jax
import jax.numpy as jnp

from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma import ops
from diffusiongemma.devices import sharding
from diffusiongemma.generation import engine
from diffusiongemma.generation import prompt
from diffusiongemma.model import cache as kv_cache
from diffusiongemma.model import denoiser
from diffusiongemma.tools import plan

_OUT = flags.DEFINE_string('out', None, 'JSON file to write.', required=True)
_AGAINST = flags.DEFINE_string('against', None, 'JSON file of earlier hashes.')
_TEXTS = flags.DEFINE_string('texts', None, 'Folder for the texts themselves.')

ROOT = pathlib.Path(__file__).resolve().parents[2]
NETWORKS = {
  'micro': ROOT / 'tests' / 'micro_config.py',
  '26b': ROOT / 'configs' / '26b_a4b.py',
}
INT4 = {'quantization.experts': 'int4', 'quantization.linears': 'int8'}
INT8 = {'quantization.experts': 'int8', 'quantization.linears': 'int8'}
WHOLE = {'quantization.embedding': 'int8'}
LORA = {'lora.rank': '4', 'lora.targets': '*/q_proj,*/experts/*'}
MESH = {'mesh.data': '-1', 'mesh.fsdp': '2', 'data.batch_size': '8'}
# (program, variant, fields)
PROGRAMS = (
  ('sample', 'plain', {}),
  ('sample', 'int8', {**INT8, **WHOLE}),
  ('sample', 'int4', INT4),
  ('sample', 'mesh', MESH),
  ('sample', 'mesh int4', {**MESH, **INT4}),
  ('train', 'plain', {}),
  ('train', 'lora', LORA),
  ('train', 'muon', {'optimizer.kind': 'muon'}),
  ('train', 'mesh', MESH),
)
TOPOLOGIES = ('local', 'v5e:2x2', 'h100', 'h100x4')


def lower(config, mesh, program):
  """The training step, or the loop over a canvas, lowered for a mesh."""
  with plan.lowering_for(mesh):
    if program == 'train':
      lowered, _ = plan._lower_training(config, mesh)
    else:
      context = min(config.model.context_length, 8192)
      lowered, _ = plan._lower_sampling(config, 2, context, mesh)
  return lowered.as_text()


def hashes_of(network, config, topology):
  """(name, text) of each program on a topology."""
  _, devices = plan._devices(topology)
  for program, variant, changes in PROGRAMS:
    on_mesh = 'mesh' in variant
    if on_mesh and len(devices) < 4:
      continue
    changed = config
    for field, value in changes.items():
      changed = fields.override(changed, field, value)
    try:
      few = devices if on_mesh else devices[:1]
      mesh = sharding.make_mesh(changed.mesh, few[:4])
      yield (
        f'{network} {topology} {program} {variant}',
        lower(changed, mesh, program),
      )
    except configs.ConfigError as error:
      print(f'left out: {network} {topology} {program} {variant}: {error}')


def research_programs(config):
  """The functions that research code calls, with real parameters."""
  model = denoiser.Denoiser(config.model)
  params = denoiser.init_params(model, jax.random.key(0))
  cache = kv_cache.init_cache(config.model, 2, 32)
  keys_B = jax.random.split(jax.random.key(1), 2)
  done_B = jnp.zeros((2,), jnp.bool_)
  tokens_BP = jnp.zeros((2, 16), jnp.int32)
  length_B = jnp.full((2,), 16, jnp.int32)
  yield (
    'micro research canvas arranged',
    engine.denoise_canvas.lower(
      config, ops.weights.arrange(params), cache, keys_B, done_B
    ).as_text(),
  )
  yield (
    'micro research prefill',
    prompt.read_tokens.lower(
      config.model, params, tokens_BP, length_B, cache
    ).as_text(),
  )


def all_texts():
  for network, path in NETWORKS.items():
    config = configs.load_config(str(path))
    if network == '26b':
      config = fields.override(config, 'data.sequence_length', '1024')
    else:
      config = fields.override(config, 'quantization.group_size', '8')
      yield from research_programs(config)
    for topology in TOPOLOGIES:
      try:
        yield from hashes_of(network, config, topology)
      except plan.PlanError as error:
        print(f'left out: {network} {topology}: {str(error).splitlines()[0]}')


def main(_) -> None:
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 4)
  jax.config.update('jax_include_full_tracebacks_in_locations', False)
  jax.config.update('jax_traceback_in_locations_limit', 0)
  before = {}
  if _AGAINST.value:
    before = json.loads(pathlib.Path(_AGAINST.value).read_text())
  found, changed = {}, []
  for name, text in all_texts():
    found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    verdict = ''
    if name in before:
      verdict = 'same' if before[name] == found[name] else 'CHANGED'
      if verdict == 'CHANGED':
        changed.append(name)
    print(f'{found[name]}  {name}  {verdict}', flush=True)
    if _TEXTS.value:
      folder = pathlib.Path(_TEXTS.value)
      folder.mkdir(parents=True, exist_ok=True)
      file = name.replace(' ', '_').replace(':', '-') + '.txt'
      (folder / file).write_text(text)
  pathlib.Path(_OUT.value).write_text(json.dumps(found, indent=1) + '\n')
  missing = sorted(set(before) - set(found))
  if missing:
    print(f'No longer there: {", ".join(missing)}')
  if before:
    print(f'{len(set(before) & set(found))} compared, {len(changed)} changed.')


if __name__ == '__main__':
  app.run(main)
