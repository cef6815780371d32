"""What a machine can do with the released network, by arithmetic."""

import json
import pathlib
import shlex

from absl import flags
import pytest

from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma import main
from diffusiongemma.tools import machines

RELEASED = configs.load_config('26b_a4b')
EXPERIMENTS = pathlib.Path(__file__).parents[2] / 'experiments'


def values(name):
  return machines.to_json(RELEASED, machines.find(name))


def test_sizes_are_those_of_compiled_plans():
  compiled = json.loads((EXPERIMENTS / 'scale/results.json').read_text())
  int4 = next(s for s in values('h100')['sampling'] if s['name'] == 'int4')
  arrays = compiled['h100-26b-sample-int4']['array_bytes']
  text = sum(size for part, size in arrays.items() if part != 'cache')
  vision = 1.14e9  # Not in that plan: no sampling step reads it.
  assert int4['weights'] == pytest.approx(text + vision, rel=2e-3)
  learnt, *_ = values('h100')['training']
  peak = compiled['h100-26b-lora']['peak_bytes']
  assert learnt['name'] == 'LoRA'
  assert learnt['need'] == pytest.approx(peak, rel=0.03)


def test_what_fits():
  fits = {
    name: [s['name'] for s in values(name)['sampling'] if s['context']]
    for name in ('h100', 'a100-40', 'rtx4090', 'v6e')
  }
  every = list(machines.WEIGHTS)
  assert fits['h100'] == every and fits['a100-40'] == every[1:]
  assert fits['rtx4090'] == every[2:] and fits['v6e'] == every[1:]
  assert values('v5e-8')['sampling'][0]['context'] == 262144
  assert not values('rtx4090')['training'][0]['fits']


def test_more_devices_and_fewer_bits_are_faster():
  one, eight = values('h100'), values('h100-8')
  speeds = [s['tokens_per_second'] for s in one['sampling']]
  assert speeds == sorted(speeds)
  faster = eight['sampling'][0]['tokens_per_second'] / speeds[0]
  assert 5 < faster < 8  # The heads of global keys and values are not divided.


def test_shards_are_those_of_the_mesh_in_the_commands():
  eight = values('v5e-8')
  whole = values('v5e')['sampling'][0]['weights']
  assert whole / 8 < eight['sampling'][0]['weights'] < whole / 6
  assert '--config.mesh.tensor=8' in eight['commands'][-2]
  more = machines.find('v5e-32').mesh
  assert dict(more.shape) == {'data': 1, 'fsdp': 1, 'tensor': 8, 'expert': 4}
  with pytest.raises(configs.ConfigError, match='cannot be divided'):
    values('v5e-3')


def test_measured_speeds_are_those_of_the_results():
  measured = json.loads(
    (EXPERIMENTS / 'benchmarks/h200_hopper.json').read_text()
  )
  for bits in ('int4', 'int8'):
    (row,) = measured[f'{bits}.json']['sampling']
    speed = machines.MEASURED['h200', bits]
    assert speed == round(row['tokens_per_second'])


@pytest.mark.parametrize('name', ['h100', 'rtx4090', 'v5e-8'])
def test_commands_are_real(name):
  """Modes, flags and fields that there are."""
  for command in values(name)['commands']:
    words = shlex.split(command)
    if words[0] != 'python':
      assert words[0] in ('pip', 'hf')
      continue
    for word in words[3:]:
      flag, _, value = word.removeprefix('--').partition('=')
      if flag.startswith('config.'):
        fields.override(configs.Config(), flag.removeprefix('config.'), value)
      elif flag == 'mode':
        assert value in main.MODES
      else:
        assert flag in flags.FLAGS
        if flag == 'config':
          configs.load_config(value)


def test_a_page_for_a_person():
  page = machines.to_text(RELEASED, machines.find('h200'))
  assert 'measured 1,157' in page and 'hf download' in page
  page = machines.to_text(RELEASED, machines.find('l4'))
  assert 'no room' in page and '--config.train.init_from=INT4' in page


def test_adapters_of_quantised_weights_where_the_others_do_not_fit():
  tune = {
    name: [c for c in values(name)['commands'] if '--config=lora' in c]
    for name in ('h100', 'a100-40', 'rtx4090')
  }
  assert 'init_from=IN' in tune['h100'][0]
  assert 'init_from=INT4' in tune['rtx4090'][0]
  # What is sampled from is what is fine-tuned.
  assert 'init_from=INT8' in tune['a100-40'][0]
  commands = values('a100-40')['commands']
  assert len([c for c in commands if '--mode=quantize' in c]) == 1


def test_unknown_machines():
  for name in ('h900', 'h100-0', 'l4-'):
    with pytest.raises(configs.ConfigError, match='There is no machine'):
      machines.find(name)
