r"""Experts on several devices: gather the tokens, or send each to its experts?

  python -m experiments.scale.exchange --out=experiments/scale/exchange.json

Both ways give the same mixture, with no row dropped, whatever the routing is:
  gather      every device gets all tokens, applies its experts to those that
              chose them, and the results are added where the tokens came from
  all-to-all  a token goes to the devices that have its experts, its results
              come back; buffers have room for all tokens to go to one device
The layer is that of the 26B in miniature: as many experts, as many choices.
Times are medians of a layer on CPU devices that share the machine's cores, so
that they compare what the ways compute and copy, not a network. `sent` is the
share of a device's tokens that another device needs, counted: what an
all-to-all of ragged rows, which XLA has for TPUs and GPUs alone, would move of
what both ways move here.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from diffusiongemma import ops
from diffusiongemma.tools import hlo
from experiments import machine

DEVICES = 8
E, k, D, F = 128, 8, 256, 64
TOKENS = 1024  # Of all devices.
REPEATS = 9
AXIS = 'expert'


def gather(x_MD, weights_Mk, experts_Mk, gate_up_EFD, down_EDF):
  """As the network does it."""
  x_MD, weights_Mk, experts_Mk = (
    ops.parallel.gather(a, [AXIS], 0) for a in (x_MD, weights_Mk, experts_Mk)
  )
  own = len(down_EDF)
  local_Mk = experts_Mk - jax.lax.axis_index(AXIS) * own
  local_Mk = jnp.where((local_Mk >= 0) & (local_Mk < own), local_Mk, own)
  y_MD = ops.experts.mix(x_MD, weights_Mk, local_Mk, gate_up_EFD, down_EDF, E)
  return ops.parallel.sum_and_scatter(y_MD, (AXIS,), [AXIS])


def all_to_all(x_MD, weights_Mk, experts_Mk, gate_up_EFD, down_EDF):
  """Tokens to the devices of their experts, and their results back."""
  devices, own, M = jax.lax.axis_size(AXIS), len(down_EDF), len(x_MD)
  of_device_nMk = experts_Mk - own * jnp.arange(devices)[:, None, None]
  here_nMk = (of_device_nMk >= 0) & (of_device_nMk < own)
  goes_nM = jnp.any(here_nMk, axis=2)
  # The tokens that go to a device first; the rest are of no expert there.
  order_nM = jnp.argsort(~goes_nM, axis=1, stable=True)
  local_nMk = jnp.where(here_nMk, of_device_nMk, own)
  local_nMk = jnp.take_along_axis(local_nMk, order_nM[:, :, None], axis=1)
  send = functools.partial(
    jax.lax.all_to_all,
    axis_name=AXIS,
    split_axis=0,
    concat_axis=0,
    tiled=True,
  )
  flat = functools.partial(jnp.reshape, shape=(devices * M, -1))
  rows = (x_MD[order_nM], weights_Mk[order_nM], local_nMk)
  rows = [send(flat(a)) for a in rows]
  y_nMD = send(ops.experts.mix(*rows, gate_up_EFD, down_EDF, E))
  y_nMD = y_nMD.reshape(devices, M, -1)
  place_nM = jnp.argsort(order_nM, axis=1)
  return jnp.sum(jnp.take_along_axis(y_nMD, place_nM[:, :, None], axis=1), 0)


def make_layer(rng: np.random.Generator) -> list[jax.Array]:
  """Tokens, their routing, and the matrices of all experts."""
  x_MD = rng.normal(size=(TOKENS, D))
  experts_Mk = np.argsort(rng.random((TOKENS, E)), axis=1)[:, :k]
  weights_Mk = rng.dirichlet(np.ones(k), TOKENS)
  gate_up_EFD = rng.normal(size=(E, 2 * F, D)) / D**0.5
  down_EDF = rng.normal(size=(E, D, F)) / F**0.5
  given = (x_MD, weights_Mk, experts_Mk, gate_up_EFD, down_EDF)
  kinds = (np.float32, np.float32, np.int32, np.float32, np.float32)
  return [jnp.asarray(a, kind) for a, kind in zip(given, kinds, strict=True)]


def measure(devices: int, layer: list[jax.Array]) -> dict:
  """Both ways among so many devices; they take turns."""
  mesh = jax.make_mesh((devices,), (AXIS,), devices=jax.devices()[:devices])
  where = jax.sharding.PartitionSpec(AXIS)
  given = jax.device_put(layer, jax.sharding.NamedSharding(mesh, where))
  programs, results, took = {}, {}, {}
  for way in (gather, all_to_all):
    one_device = jax.shard_map(
      way, mesh=mesh, in_specs=where, out_specs=where, check_vma=False
    )
    name = way.__name__
    programs[name] = jax.jit(one_device).lower(*given).compile()
    results[name] = np.asarray(programs[name](*given))
    took[name] = []
  np.testing.assert_allclose(*results.values(), rtol=1e-4, atol=1e-4)
  for _ in range(REPEATS):
    for name, program in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(program(*given))
      took[name].append(time.perf_counter() - start)
  home_M = np.arange(TOKENS) // (TOKENS // devices)
  goes_Mn = np.zeros((TOKENS, devices), bool)
  of_device_Mk = np.asarray(layer[2]) // (E // devices)
  np.put_along_axis(goes_Mn, of_device_Mk, True, axis=1)
  goes_Mn[np.arange(TOKENS), home_M] = False
  return {
    'devices': devices,
    'sent': float(goes_Mn.sum() / (TOKENS * (devices - 1))),
    **{f'{name}_seconds': statistics.median(took[name]) for name in took},
    'gather_times_as_fast': statistics.median(
      b / a for a, b in zip(*took.values(), strict=True)
    ),
    'bytes': {
      name: exchanged(program.as_text(), devices)
      for name, program in programs.items()
    },
  }


def exchanged(text: str, devices: int) -> dict[str, int]:
  """Bytes that a device takes part in exchanging, by kind of collective: what
  it gets, but what it gives to a sum of which it keeps its part."""
  return {
    kind: found.bytes * (devices if kind == 'reduce-scatter' else 1)
    for kind, found in hlo.collectives(text).items()
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', required=True, help='JSON file to write')
  given = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', DEVICES)
  layer = make_layer(np.random.default_rng(0))
  rows = []
  for devices in (2, 4, 8):
    rows.append(measure(devices, layer))
    print(rows[-1], flush=True)
  results = {
    'tokens': TOKENS,
    'experts': E,
    'choices': k,
    'tile': ops.routing.default_tile(TOKENS * k, E),
    'rows': rows,
    **machine.describe(),
    'command': machine.command('experiments.scale.exchange'),
  }
  machine.write(results, given.out)


if __name__ == '__main__':
  main()
