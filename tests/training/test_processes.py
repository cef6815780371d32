"""Several devices and processes: going on elsewhere, and one that fails."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from diffusiongemma import config as configs
from diffusiongemma import processes
from diffusiongemma.training import workdir as workdirs

MICRO = str(pathlib.Path(__file__).parents[1] / 'micro_config.py')


STARTED = []


@pytest.fixture(autouse=True)
def nothing_left_running():
  """A process that a failed test has left would wait for its other half."""
  yield
  while STARTED:
    STARTED.pop().kill()


def start(workdir, devices, *arguments):
  """The command line in a process of its own, with so many CPU devices."""
  flags = os.environ.get('XLA_FLAGS', '')
  process = subprocess.Popen(
    [
      sys.executable,
      '-m',
      'diffusiongemma.main',
      f'--config={MICRO}',
      f'--workdir={workdir}',
      '--config.train.sample_prompt=',
      '--config.train.checkpoint_every=2',
      '--config.data.batch_size=8',
      *arguments,
    ],
    env={
      **os.environ,
      'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count={devices}',
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  STARTED.append(process)
  return process


def start_two(workdir, *arguments):
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


def digests(workdir, step):
  """Of all arrays of a step, as they were saved."""
  (path,) = (workdir / 'checkpoints' / str(step) / 'digests').iterdir()
  return json.loads(path.read_text())


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """Eight steps in two processes."""
  workdir = tmp_path_factory.mktemp('straight')
  first, second = finish(start_two(workdir, '--config.train.steps=8'), 0, 0)
  assert 'Done' in first and 'Done' not in second
  return workdir


def test_killed_and_gone_on_with_ends_bit_equal(straight, tmp_path):
  """One of two is killed: the other says so and ends; both go on."""
  started = start_two(
    tmp_path, '--config.train.steps=8', '--config.train.log_every=1'
  )
  # In the middle of steps: within a save, JAX's runtime has the last word.
  wait_for_line(tmp_path, 3, started)
  started[1].send_signal(signal.SIGKILL)
  first, _ = finish(started, 1, -signal.SIGKILL)
  assert 'Error in process 0' in first and 'another process' in first
  finish(start_two(tmp_path, '--config.train.steps=8'), 0, 0)
  assert digests(tmp_path, 8) == digests(straight, 8)


def test_sigterm_to_one_stops_both_after_a_save(tmp_path):
  started = start_two(tmp_path, '--config.train.steps=100000')
  wait_for_step(tmp_path, 2, started)
  started[1].send_signal(signal.SIGTERM)
  first, _ = finish(started, 143, 143)
  assert 'Stopped and saved' in first
  newest = max(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
  assert digests(tmp_path, newest)['params']


def test_as_many_processes_as_there_were(straight):
  """Each has its own place in the data."""
  (output,) = finish([start(straight, 8, '--config.train.steps=8')], 1)
  assert 'saved by 2 processes' in output


# Four steps on one mesh, stopped, and four on another, in one process.
MOVE = """
import dataclasses, os, signal, sys
import jax, numpy as np
from diffusiongemma import config as configs
from diffusiongemma.training import metrics, train, workdir

folder, micro = sys.argv[1:]
config = configs.load_config(micro)
for field, value in (
  ('train.steps', '8'), ('train.sample_prompt', ''), ('data.batch_size', '8')
):
  config = configs.override(config, field, value)


def on(name, *sizes):
  mesh = configs.MeshConfig(*sizes)
  place = os.path.join(folder, name)
  return train.train(dataclasses.replace(config, mesh=mesh), place)


assert on('plain', 8) == 0
advance = metrics.Progress.advance


def stop_at_four(self, step):
  advance(self, step)
  if step == 4:
    signal.raise_signal(signal.SIGTERM)


metrics.Progress.advance = stop_at_four
assert on('moved', 2, 4) == 143
metrics.Progress.advance = advance
assert on('moved', 1, 2, 2, 2) == 0
one, other = (workdir.load(os.path.join(folder, n)) for n in ('plain', 'moved'))
assert one.step == other.step == 8
for a, b in zip(
  jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True
):
  np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=3e-4)
print('equal')
"""


def test_a_run_goes_on_on_another_mesh(tmp_path):
  """Four steps here and four there are eight, but for rounding."""
  flags = os.environ.get('XLA_FLAGS', '')
  done = subprocess.run(
    [sys.executable, '-c', MOVE, str(tmp_path), MICRO],
    env={
      **os.environ,
      'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count=8',
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout.endswith('equal\n'), done.stdout + done.stderr[-3000:]
  # Eight devices have saved it; here is one.
  run = workdirs.load(str(tmp_path / 'moved'))
  assert run.step == 8
  assert {len(x.devices()) for x in jax.tree.leaves(run.params)} == {1}


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
