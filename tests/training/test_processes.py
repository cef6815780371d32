"""Several devices and processes: going on elsewhere, and one that fails."""

import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import many_devices
import numpy as np
import pytest

import diffusiongemma as dg
from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma.checkpoints import native
from diffusiongemma.devices import processes
from diffusiongemma.devices import sharding
from diffusiongemma.training import resume

MICRO = str(pathlib.Path(__file__).parents[1] / 'micro_config.py')


STARTED = []


@pytest.fixture(autouse=True)
def nothing_left_running():
  """A process that a failed test has left would wait for its other half."""
  yield
  while STARTED:
    STARTED.pop().kill()


def start(workdir, num_devices, *arguments, limit=None):
  """The command line in a process of its own, with so many CPU devices, which
  can write no file of more than `limit` blocks."""
  process = subprocess.Popen(
    [
      # In blocks of 512 bytes.
      *('sh', '-c', f'ulimit -f {limit or "unlimited"}; exec "$@"', 'sh'),
      sys.executable,
      '-m',
      'diffusiongemma.main',
      f'--config={MICRO}',
      f'--workdir={workdir}',
      # One layer: each process compiles all for itself.
      "--config.model.attention_pattern=('global',)",
      '--config.train.sample_prompt=',
      '--config.train.checkpoint_every=2',
      '--config.data.batch_size=8',
      *arguments,
    ],
    env=many_devices.environment(num_devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  STARTED.append(process)
  return process


def start_two(workdir, *arguments, limits=(None, None)):
  """Two processes of four devices each."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  return [
    start(
      workdir,
      4,
      f'--coordinator=127.0.0.1:{port}',
      '--num_processes=2',
      f'--process_id={index}',
      '--config.mesh.fsdp=4',
      *arguments,
      limit=limits[index],
    )
    for index in range(2)
  ]


def finish(started, *codes):
  """What they print, when they have ended with these codes."""
  outputs = [process.communicate(timeout=300)[0] for process in started]
  assert [process.returncode for process in started] == list(codes), outputs
  return outputs


def wait_for_step(workdir, step, started):
  limit = time.monotonic() + 240
  while not (workdir / 'checkpoints' / str(step)).exists():
    for process in started:
      assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < limit, f'step {step} did not come'
    time.sleep(0.01)


def wait_for_line(workdir, step, started):
  """Until the numbers of a step are written."""
  limit, path = time.monotonic() + 240, workdir / 'metrics.jsonl'
  while not (path.exists() and f'"step": {step},' in path.read_text()):
    for process in started:
      assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < limit, f'step {step} did not come'
    time.sleep(0.001)


def read_losses(workdir):
  """Of every step, in their order."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  records = map(json.loads, lines)
  return [record['loss'] for record in records if 'loss' in record]


def digests(workdir, step):
  """Of all arrays of a step, as they were saved."""
  folder = workdir / 'checkpoints' / str(step) / 'digests'
  texts = [path.read_text() for path in folder.iterdir() if path.is_file()]
  (found,) = [text for text in texts if '"params"' in text]
  return json.loads(found)


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """Eight steps in two processes."""
  workdir = tmp_path_factory.mktemp('straight')
  first, second = finish(
    start_two(workdir, '--config.train.steps=8', '--config.train.log_every=1'),
    *(0, 0),
  )
  assert 'Done' in first and 'Done' not in second
  return workdir


def test_killed_and_gone_on_with_ends_bit_equal(straight, tmp_path):
  """One of two is killed: the other ends; both go on."""
  started = start_two(
    tmp_path, '--config.train.steps=8', '--config.train.log_every=1'
  )
  # In the middle of steps: within a save, JAX's runtime has the last word.
  wait_for_line(tmp_path, 3, started)
  started[1].send_signal(signal.SIGKILL)
  started[0].communicate(timeout=300)
  # Itself, with a message, or by JAX's runtime.
  assert started[0].returncode in (1, -signal.SIGABRT)
  finish(start_two(tmp_path, '--config.train.steps=8'), 0, 0)
  assert digests(tmp_path, 8) == digests(straight, 8)
  (line,) = (tmp_path / 'history.jsonl').read_text().splitlines()
  assert json.loads(line)['field'] == 'config.train.log_every'


def test_sigterm_to_one_stops_both_after_a_save(tmp_path):
  """At a step, or at a batch of an evaluation."""
  started = start_two(
    tmp_path,
    '--config.train.steps=100000',
    '--config.train.evaluate_every=1',
    '--config.train.evaluate_batches=9',
  )
  wait_for_step(tmp_path, 2, started)
  started[1].send_signal(signal.SIGTERM)
  first, _ = finish(started, 143, 143)
  assert 'Stopped and saved' in first
  newest = max(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
  assert digests(tmp_path, newest)['params']


def test_a_save_that_fails_in_one_process_ends_both(tmp_path):
  """With a message; the other would wait for ever."""
  started = start_two(tmp_path, '--config.train.steps=8', limits=(None, 4))
  first, second = (process.communicate(timeout=300)[0] for process in started)
  assert started[1].returncode == 1, second
  assert 'Error in process 1: Step 2 could not be saved by this' in second
  # Itself, with a message, or by JAX's runtime.
  assert started[0].returncode in (1, -signal.SIGABRT), first
  assert not (tmp_path / 'checkpoints' / '2').exists()
  first, _ = finish(start_two(tmp_path, '--config.train.steps=8'), 0, 0)
  assert 'Done' in first


def test_a_run_goes_on_in_another_number_of_shares(straight, tmp_path):
  """Six steps in two processes and two in one are eight."""
  shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / 'checkpoints' / '8')
  arguments = ('--config.train.steps=8', '--config.train.log_every=1')
  (output,) = finish(
    [start(tmp_path, 8, '--config.mesh.fsdp=4', *arguments)], 0
  )
  assert 'Going on from step 6' in output
  losses, others = read_losses(tmp_path), read_losses(straight)
  assert len(losses) == 8
  np.testing.assert_allclose(losses, others, rtol=1e-5)
  batches = abs(np.diff(others[-3:])) / others[-1]
  assert (batches > 1e-4).all(), 'other batches have other losses'


def test_packed_rows_are_read_on_in_as_many_shares():
  """Each packs its own."""
  config = fields.override(configs.load_config(MICRO), 'data.packing', 'true')
  places = {'shares': [{'place': 0}, {'place': 1}]}
  restored = native.Restored(10, {}, data=places)
  for index in (0, 1):
    share = sharding.Share(index, 2)
    assert resume._own_place(config, restored, share) == {'place': index}
  for share in (sharding.WHOLE_BATCH, sharding.Share(1, 4)):
    with pytest.raises(native.CheckpointError, match='packed in 2 shares'):
      resume._own_place(config, restored, share)


# Heads, features and experts for eight devices.
WIDE = (
  '--config.mesh.fsdp=1',
  '--config.mesh.tensor=8',
  '--config.model.num_heads=8',
  '--config.model.num_experts=8',
  '--config.train.steps=4',
  '--config.train.log_every=1',
)


def test_heads_may_lie_in_two_processes(tmp_path):
  """Then both read the same rows: those that one process reads, which goes on
  with what they have saved."""
  finish(start_two(tmp_path, *WIDE), 0, 0)
  two = read_losses(tmp_path)
  assert len(two) == 4
  shutil.rmtree(tmp_path / 'checkpoints' / '4')
  finish([start(tmp_path, 8, *WIDE)], 0)
  np.testing.assert_allclose(read_losses(tmp_path)[-2:], two[2:], rtol=1e-5)


# Ten steps on one mesh, stopped, and ten on another.
MOVE = """
import dataclasses
import os
import signal
import sys

from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma.training import metrics
from diffusiongemma.training import train

folder, micro = sys.argv[1:]
config = configs.load_config(micro)
for field, value in (
  ('model.attention_pattern', "('global',)"),
  ('train.steps', '20'),
  ('train.log_every', '1'),
  ('train.sample_prompt', ''),
  ('data.batch_size', '8'),
):
  config = fields.override(config, field, value)


def on(name, *sizes):
  mesh = configs.MeshConfig(*sizes)
  place = os.path.join(folder, name)
  return train.train(dataclasses.replace(config, mesh=mesh), place)


def stop_at_ten(self, step):
  if step == 10:
    signal.raise_signal(signal.SIGTERM)


assert on('straight', 8) == 0
metrics.Progress.advance, advance = stop_at_ten, metrics.Progress.advance
assert on('moved', 2, 4) == 143
metrics.Progress.advance = advance
assert on('moved', 1, 2, 2, 2) == 0
"""


def test_a_run_goes_on_on_another_mesh(tmp_path):
  """Ten steps here and ten there are twenty, but for rounding; and one device
  reads what eight have saved."""
  many_devices.run(MOVE, tmp_path, MICRO, devices=8)
  straight, moved = (
    dg.load(str(tmp_path / name)) for name in ('straight', 'moved')
  )
  assert straight.step == moved.step == 20
  leaves = jax.tree_util.tree_leaves_with_path(moved.params)
  assert {len(x.devices()) for _, x in leaves} == {1}
  last = f'layer_{len(moved.config.model.attention_pattern) - 1:02d}'
  for (path, b), a in zip(
    leaves, jax.tree.leaves(straight.params), strict=True
  ):
    # The final norm undoes what scales the last layer: the gradient there is
    # rounding alone, of which Adam makes steps of full length.
    if path[0].key != last or not path[-1].key.endswith('_scalar'):
      np.testing.assert_allclose(b, a, atol=2e-4, err_msg=str(path))
  losses = [read_losses(tmp_path / name) for name in ('straight', 'moved')]
  assert len(losses[0]) == 20
  np.testing.assert_allclose(losses[1], losses[0], rtol=2e-6)


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ((None, 2, None), 'need --coordinator'),
    (('host:1', None, 0), 'needs --num_processes'),
    (('host:1', 2, None), 'needs --num_processes'),
  ],
)
def test_half_a_description_of_a_job_is_refused(given, message):
  with pytest.raises(configs.ConfigError, match=message):
    processes.start(*given)


def test_alone_every_question_has_an_answer():
  processes.start(None, None, None)
  processes.wait('nobody')
  assert processes.is_first() and not processes.is_preempted(3)
  assert processes.all_agree(True) and not processes.all_agree(False)
  assert processes.gather_json({'a': [1]}) == [{'a': [1]}]
