"""The loop: learning, stopping anywhere, and going on to the bit."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from diffusiongemma import config as configs
from diffusiongemma.checkpoints import digest as digest_lib
from diffusiongemma.checkpoints import native
from diffusiongemma.generation import engine
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.runs import learnt
from diffusiongemma.runs import lock
from diffusiongemma.training import evaluate
from diffusiongemma.training import metrics
from diffusiongemma.training import train
from diffusiongemma.training import train_state

MICRO = str(pathlib.Path(__file__).parents[1] / 'micro_config.py')
# Metrics that another run of the same steps has otherwise.
MEASURED = ('tokens_per_second', 'peak_memory_bytes')


def command(workdir, *arguments):
  """Trains one layer, which each process compiles, and writes no samples."""
  return [
    *(sys.executable, '-m', 'diffusiongemma.main', f'--config={MICRO}'),
    "--config.model.attention_pattern=('global',)",
    *(f'--workdir={workdir}', '--config.train.sample_prompt=', *arguments),
  ]


def start(workdir, *arguments):
  """The command line in a process of its own."""
  return subprocess.Popen(
    command(workdir, *arguments),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def wait_for(path, process):
  """Until the path is there; the process must not end before."""
  limit = time.monotonic() + 120
  while not path.exists():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < limit, f'{path} did not come'
    time.sleep(0.005)


def finish(process, code=0):
  output, _ = process.communicate(timeout=240)
  assert process.returncode == code, output
  return output


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """A run from start to end, which writes samples."""
  workdir = tmp_path_factory.mktemp('straight')
  output = finish(start(workdir, '--config.train.sample_prompt=ROMEO.'))
  return workdir, output


def read_state(workdir):
  config = workdirs.read_config(workdir)
  abstract = train_state.abstract_state(config)
  with contextlib.closing(
    native.open_checkpoints(workdirs.checkpoint_dir(workdir), keep=9)
  ) as manager:
    return native.restore_newest(manager, *train_state.to_items(abstract))


def read_losses(workdir):
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if k not in MEASURED}
    for line in lines
  ]


def assert_bit_equal(workdir, other):
  one, two = read_state(workdir), read_state(other)
  assert one.step == two.step and one.data == two.data
  for name in ('params', 'opt_state'):
    assert digest_lib.digests(getattr(one, name)) == digest_lib.digests(
      getattr(two, name)
    )


def test_killed_and_resumed_ends_bit_equal(straight, tmp_path):
  """SIGKILL twice in the middle, between and right after saves."""
  for step in (20, 40):
    process = start(tmp_path)
    wait_for(tmp_path / 'checkpoints' / str(step), process)
    process.kill()
    process.communicate()
    assert read_state(tmp_path).step < 60
  output = finish(start(tmp_path))
  assert 'Going on from step' in output
  assert_bit_equal(straight[0], tmp_path)
  # The mean of an interval that was interrupted lacks its first steps.
  ours, theirs = read_losses(tmp_path), read_losses(straight[0])
  assert [m['step'] for m in ours] == [m['step'] for m in theirs]
  assert ours[-1] == theirs[-1]


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_save_first(straight, tmp_path, number):
  process = start(tmp_path)
  wait_for(tmp_path / 'checkpoints' / '10', process)
  process.send_signal(number)
  output = finish(process, 128 + number)
  assert 'Stopped and saved' in output
  stopped_at = read_state(tmp_path).step
  assert 10 <= stopped_at < 60
  finish(start(tmp_path))
  assert_bit_equal(straight[0], tmp_path)


@pytest.fixture(scope='module')
def config():
  """That of `command`."""
  config = configs.load_config(MICRO)
  model = dataclasses.replace(config.model, attention_pattern=('global',))
  return dataclasses.replace(config, model=model)


@pytest.mark.parametrize(
  ('module', 'slow', 'calls'),
  [
    (evaluate, '_ar_nats', 2),
    (evaluate, '_denoise_sums', 3),
    (engine, 'denoise_step', 2),
  ],
)
def test_a_signal_ends_an_evaluation_at_once(
  config, tmp_path, monkeypatch, module, slow, calls
):
  """Of many batches or denoising steps, none is begun after it, and what is
  learnt is saved."""
  count, compute = 0, getattr(module, slow)

  def stop_here(*arguments):
    nonlocal count
    count += 1
    if count == calls:
      signal.raise_signal(signal.SIGTERM)
    return compute(*arguments)

  monkeypatch.setattr(module, slow, stop_here)
  train_config = dataclasses.replace(
    config.train, steps=4, evaluate_every=2, evaluate_batches=9, sample_every=2
  )
  config = dataclasses.replace(config, train=train_config)
  assert train.train(config, str(tmp_path)) == 128 + signal.SIGTERM
  assert count == calls
  assert learnt.restore(str(tmp_path)).step == 2


def test_damaged_newest_checkpoint_is_not_resumed_from(straight, tmp_path):
  process = start(tmp_path, '--config.train.checkpoint_every=20')
  wait_for(tmp_path / 'checkpoints' / '40', process)
  process.kill()
  process.communicate()
  newest = max(
    (tmp_path / 'checkpoints').glob('[0-9]*0'), key=lambda p: int(p.name)
  )
  files = [f for f in (newest / 'params').rglob('*') if f.is_file()]
  largest = max(files, key=lambda f: f.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(bytes(content))
  output = finish(start(tmp_path))
  assert f'Going on from step {int(newest.name) - 20}' in output
  assert f'Checkpoint {newest.name}' in output, 'the damage is told'
  assert_bit_equal(straight[0], tmp_path)


def test_what_a_run_leaves_and_says(straight):
  workdir, output = straight
  for text in (
    'step 5/60',
    'tokens/s',
    'left',
    'held out: AR',
    'sample:\nROMEO',
    'Done; the checkpoint is in',
    'Goodput',
  ):
    assert text in output
  assert 'Traceback' not in output and 'I1' not in output.split('step 5/60')[0]
  names = {path.name for path in workdir.iterdir()}
  assert {'config.json', 'tokenizer.model', 'metrics.jsonl'} <= names
  assert any(name.startswith('events.out.tfevents') for name in names)
  losses = read_losses(workdir)
  assert losses[-1]['step'] == 60 and 'heldout_loss_ar' in losses[-1]
  trained = [m for m in losses if 'loss' in m]
  assert [m['step'] for m in trained] == list(range(5, 61, 5))
  assert trained[-1]['loss'] < trained[0]['loss'] - 1
  for name in ('router_entropy', 'expert_load_max', 'gradient_norm'):
    assert np.isfinite(trained[-1][name])


def test_a_folder_in_which_another_trains_is_refused(straight):
  workdir, _ = straight
  with lock.held(str(workdir)):
    output = finish(
      start(workdir, '--config.train.sample_prompt=ROMEO.'), code=1
    )
  assert f"trains in {workdir} ('process {os.getpid()}')" in output
  assert 'Traceback' not in output


def test_a_sample_that_can_not_be_written_is_told_before_the_run(tmp_path):
  """And nothing is written."""
  workdir = tmp_path / 'run'
  prompt = 'my love is dead and gone ' * 10
  output = finish(
    start(workdir, f'--config.train.sample_prompt={prompt}'), code=2
  )
  assert 'config.train.sample_prompt: The prompt has' in output
  assert not workdir.exists()


def test_finished_run_is_left_alone(straight):
  before = read_state(straight[0])
  output = finish(start(straight[0], '--config.train.sample_prompt=ROMEO.'))
  assert 'Going on from step 60' in output
  assert read_state(straight[0]).step == before.step == 60


@pytest.mark.parametrize('stops', [False, True])
def test_full_disk_during_a_save(straight, tmp_path, stops):
  """A limit on the size of files stands in for the disk: small files pass,
  checkpoints don't. Training goes on or stops, the exit code tells."""
  del straight  # What it has compiled need not be written.
  stopping = f'--config.train.stops_when_unsaved={str(stops).lower()}'
  shell = 'ulimit -f 30; exec "$@"'
  result = subprocess.run(
    ['bash', '-c', shell, 'bash', *command(tmp_path, stopping)],
    capture_output=True,
    text=True,
    timeout=240,
    check=False,
  )
  output = result.stdout + result.stderr
  assert result.returncode == 1, output
  assert 'Step 10 could not be saved' in output
  assert ('Step 60 could not be saved' in output) == (not stops)
  assert ('Step 20 could not be saved' in output) == (not stops)
  assert 'the end of the run is not saved' in output
  assert 'Traceback' not in output
  # With room again, the same command starts over and finishes.
  if not stops:
    finish(start(tmp_path))
    assert read_state(tmp_path).step == 60


def test_a_run_of_bad_steps_stops_with_the_last_good_state(tmp_path):
  """A rate that ruins the parameters: the gradients after it are not finite."""
  output = finish(
    start(
      tmp_path,
      '--config.optimizer.peak_learning_rate=1e30',
      '--config.optimizer.clip_norm=1e30',
      '--config.train.max_bad_steps=3',
    ),
    1,
  )
  assert 'Error: 3 steps in a row were skipped' in output, output
  assert 'peak_learning_rate' in output and 'Traceback' not in output
  lines = (tmp_path / metrics.BAD_STEPS).read_text().splitlines()
  bad = [json.loads(line) for line in lines]
  steps = [record['step'] for record in bad]
  # The numbers of a step are read while the next one runs: it is left out too.
  assert steps == list(range(steps[0], steps[0] + 4))
  batch = bad[0]['last_row'] - bad[0]['first_row'] + 1
  assert [record['first_row'] for record in bad] == [
    (step - 1) * batch for step in steps
  ]
  saved = read_state(tmp_path)
  assert saved.step == steps[-1]
  for leaf in jax.tree.leaves(saved.params):
    assert np.isfinite(leaf).all()
