"""The loop: learning, stopping anywhere, and going on to the bit."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import disk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma.checkpoints import digest as digest_lib
from diffusiongemma.checkpoints import native
from diffusiongemma.diffusion import loss
from diffusiongemma.generation import generate
from diffusiongemma.runs import companions
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.runs import history
from diffusiongemma.runs import learnt
from diffusiongemma.runs import lock
from diffusiongemma.training import corpus as corpora
from diffusiongemma.training import evaluate
from diffusiongemma.training import metrics
from diffusiongemma.training import optimizer as optimizers
from diffusiongemma.training import step as steps
from diffusiongemma.training import train
from diffusiongemma.training import train_state

MICRO = str(pathlib.Path(__file__).parents[1] / 'micro_config.py')


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
    {k: v for k, v in json.loads(line).items() if k != 'tokens_per_second'}
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


@pytest.mark.parametrize(
  ('module', 'slow', 'calls'),
  [
    (evaluate, '_ar_nats', 2),
    (evaluate, '_denoise_sums', 3),
    (generate, 'write_step', 2),
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


def test_a_lock_that_leads_elsewhere_is_none(tmp_path, caplog):
  """What a link names is not touched."""
  victim = tmp_path / 'victim'
  victim.write_text('dear')
  (tmp_path / 'lock').symlink_to(victim)
  with lock.held(str(tmp_path)):
    pass
  assert victim.read_text() == 'dear' and 'is not locked' in caplog.text


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


@pytest.fixture(scope='module')
def micro():
  return configs.load_config(MICRO)


@pytest.fixture(scope='module')
def config(micro):
  """That of `command`."""
  model = dataclasses.replace(micro.model, attention_pattern=('global',))
  return dataclasses.replace(micro, model=model)


def test_workdir_of_another_config_is_refused(config, straight):
  tokenizer = companions.load_tokenizer(config)
  free = dataclasses.replace(config.train, log_every=1, keep_checkpoints=9)
  same = dataclasses.replace(config, train=free)
  workdirs.claim(straight[0], same, tokenizer)
  other = fields.override(config, 'data.batch_size', '4')
  other = fields.override(other, 'train.seed', '3')
  with pytest.raises(workdirs.WorkdirError) as caught:
    workdirs.claim(straight[0], other, tokenizer)
  assert 'config.data.batch_size: 2 there, 4 here' in str(caught.value)
  assert 'config.train.seed: 0 there, 3 here' in str(caught.value)
  assert str(caught.value).count(' here') == 2
  seeing = dataclasses.replace(config.model, vision=configs.VisionConfig())
  other = dataclasses.replace(config, model=seeing)
  with pytest.raises(workdirs.WorkdirError, match='config.model.vision'):
    workdirs.claim(straight[0], other, tokenizer)


def test_what_may_not_change_is_refused_with_its_reason(config, straight):
  tokenizer = companions.load_tokenizer(config)
  for name, value, reason in (
    ('model.num_experts', '8', 'the parameters are those of this network'),
    ('data.packing', 'true', 'the order of the data follows from it'),
    ('optimizer.kind', 'muon', "the optimiser's state follows from it"),
    ('train.objective', 'ar', 'it says what is learnt, or from what on'),
    ('diffusion.canvas_length', '4', 'the network has learnt with it'),
    ('lora.rank', '2', 'the adapters are of this form'),
    ('quantization.experts', 'int8', 'the parameters are stored so'),
  ):
    with pytest.raises(workdirs.WorkdirError) as caught:
      other = fields.override(config, name, value)
      workdirs.claim(straight[0], other, tokenizer)
    assert f'config.{name}: ' in str(caught.value)
    assert f'here ({reason})' in str(caught.value)
    assert f'config.train.init_from={straight[0]}' in str(caught.value)


def test_every_field_may_change_or_not_for_one_reason():
  names = fields.flatten(configs.Config())
  assert set(workdirs.FREE_FIELDS) <= set(names)
  for name in set(names) - set(workdirs.FREE_FIELDS):
    begins = [k for k in workdirs.FIXED_FIELDS if name.startswith(k)]
    assert len(begins) == 1, name


@pytest.fixture
def quickly(config, tmp_path, monkeypatch, capsys):
  """Runs `steps` steps that learn nothing, in a folder of their own; gives what
  is printed."""

  def step(state, batch, base):
    del batch, base
    names = ('loss', 'loss_denoise', 'loss_ar', 'gradient_norm')
    counts = {'bad_in_row': jnp.int32(0), 'bad_steps': jnp.int32(0)}
    metrics = dict.fromkeys(names, jnp.float32(1.0))
    return state.replace(step=state.step + 1), {**metrics, **counts}

  monkeypatch.setattr(steps, 'compile_step', lambda *unused: step)
  monkeypatch.setattr(train, 'report_quality', lambda *unused: None)

  def run(**changes):
    other = config
    for name, value in changes.items():
      other = fields.override(other, name.replace('__', '.'), str(value))
    assert train.train(other, str(tmp_path / 'run')) == 0
    return capsys.readouterr().out

  return run


def files_of(folder):
  """{name: content} of what lies in a run's folder beside its checkpoints."""
  return {
    path.name: path.read_bytes()
    for path in folder.iterdir()
    if path.is_file() and path.name != 'lock'
  }


def read_history(folder):
  lines = (folder / 'history.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_a_finished_run_goes_on(quickly, tmp_path):
  """With more steps and another rate: told, and written into its folder."""
  folder = tmp_path / 'run'
  quickly(train__steps=20)
  assert not (folder / 'history.jsonl').exists()
  told = quickly(train__steps=30, optimizer__peak_learning_rate=0.5)
  for line in (
    'Going on from step 20.',
    'config.train.steps: 20 before, 30 from here on.',
    'config.optimizer.peak_learning_rate: 0.01 before, 0.5 from here on.',
    'The learning rate goes on at 0.205, where it would have been 0.001.',
  ):
    assert line in told
  assert learnt.restore(str(folder)).step == 30
  told = quickly(
    train__steps=30, optimizer__peak_learning_rate=0.5, train__log_every=1
  )
  assert 'learning rate' not in told
  records = read_history(folder)
  assert [(r['step'], r['field'], r['old'], r['new']) for r in records] == [
    (20, 'config.optimizer.peak_learning_rate', 0.01, 0.5),
    (20, 'config.train.steps', 20, 30),
    (30, 'config.train.log_every', 5, 1),
  ]
  assert all('T' in record['time'] for record in records)
  own = workdirs.read_config(str(folder))
  assert own.train.steps == 30 and own.train.log_every == 1
  assert own.optimizer.peak_learning_rate == 0.5
  before = files_of(folder)
  with pytest.raises(configs.ConfigError, match='has done 30 steps already'):
    quickly(train__steps=20)
  assert files_of(folder) == before


def write_text(path, *numbers):
  """So many words in the document of each line."""
  texts = ['of it all ' * number for number in numbers]
  path.write_text('\n'.join(json.dumps({'text': text}) for text in texts))
  return path


def test_a_run_goes_on_with_the_text_it_had_alone(quickly, tmp_path):
  """Wherever it lies; another one is refused, and nothing is written."""
  folder = tmp_path / 'run'
  text = write_text(tmp_path / 'a.jsonl', 50, 70)
  quickly(train__steps=4, data__path=text)
  moved = text.rename(tmp_path / 'b.jsonl')
  told = quickly(train__steps=6, data__path=moved)
  assert f"config.data.path: '{text}' before, '{moved}' from here on." in told
  assert 'another one' not in told
  before = files_of(folder)
  for numbers, message in (
    ((50, 70, 90), 'step 6 the run has learnt from 2 examples of .* 3 exam'),
    ((70, 50), 'tokens, not the same ones. Its place in the order'),
  ):
    write_text(moved, *numbers)
    with pytest.raises(corpora.DataError, match=message):
      quickly(train__steps=8, data__path=moved)
    assert files_of(folder) == before
  write_text(moved, 50, 70)
  assert 'Going on from step 6' in quickly(train__steps=8, data__path=moved)


def test_other_held_out_text_is_told(quickly, tmp_path):
  text = write_text(tmp_path / 'text.jsonl', 50)
  heldout = write_text(tmp_path / 'heldout.jsonl', 20)
  quickly(train__steps=2, data__path=text, data__heldout_path=heldout)
  write_text(heldout, 20, 20)
  told = quickly(train__steps=4, data__path=text, data__heldout_path=heldout)
  assert 'The held-out text is another one: 1 example of' in told


def test_a_run_of_checkpoints_that_describe_no_text_goes_on(
  quickly, tmp_path, monkeypatch
):
  """Those of older versions. What can't be known is told where it matters."""
  text = write_text(tmp_path / 'a.jsonl', 50)
  save = native.save

  def without_text(*arguments):
    *before, place, config = arguments
    save(*before, {'shares': place['shares']}, config)

  with monkeypatch.context() as patch:
    patch.setattr(native, 'save', without_text)
    quickly(train__steps=2, data__path=text)
    told = quickly(train__steps=4, data__path=text)
  assert 'Going on from step 2' in told and 'do not say' not in told
  moved = text.rename(tmp_path / 'b.jsonl')
  told = quickly(train__steps=6, data__path=moved)
  assert 'do not say what examples they have learnt from' in told


def test_settings_that_can_not_be_noted_leave_all_as_it_was(quickly, tmp_path):
  folder = tmp_path / 'run'
  quickly(train__steps=2)
  before = files_of(folder)
  config = workdirs.read_config(str(folder))
  other = fields.override(config, 'train.steps', '9')
  failure = pytest.raises(workdirs.WorkdirError, match='that have changed')
  with disk.full_disk(10), failure:
    history.go_on(str(folder), other, 2)
  assert files_of(folder) == before


def test_what_killed_processes_left_half_written_is_removed(tmp_path):
  """By who holds the folder; what others have put there stays."""
  (tmp_path / 'huggingface').mkdir()
  left = [
    'config.json.12.tmp',
    'metrics.jsonl.7.tmp',
    'huggingface/LICENSE.9.tmp',
  ]
  kept = [
    'notes.12.tmp',
    'config.json.tmp',
    'config.json.old.tmp',
    'config.json',
  ]
  for name in (*left, *kept):
    (tmp_path / name).write_text('half')
  with lock.held(str(tmp_path)):
    there = lambda names: [name for name in names if (tmp_path / name).exists()]
    assert not there(left) and there(kept) == kept
    (tmp_path / left[0]).touch()
    second = pytest.raises(workdirs.WorkdirError, match='Another run trains')
    with second, lock.held(str(tmp_path)):
      pass
    assert there(left) == left[:1], 'it is being written'


def test_tokenizer_must_fit_the_network(micro):
  for field, value in (
    ('model.vocab_size', '2000'),
    ('diffusion.pad_token_id', '3'),
    ('diffusion.stop_token_ids', '50'),
  ):
    with pytest.raises(configs.ConfigError, match=field.replace('.', r'\.')):
      companions.load_tokenizer(fields.override(micro, field, value))


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
  assert 'Error: 3 steps in a row were left out' in output, output
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


def test_step_donates_its_state_and_draws_anew(config):
  state, step = train_state.init_train_state(config), step_of(config)
  batch = {
    'tokens_BS': np.full((2, 32), 9, np.int32),
    'length_B': np.full(2, 32, np.int32),
    'first_BS': np.zeros((2, 32), np.int32),
    'canvas_start_BK': np.array([[4, 12, 20]] * 2, np.int32),
    'target_mask_BS': np.ones((2, 32), bool),
  }
  old = state.params['embedding']
  state, first = step(state, batch)
  assert old.is_deleted()
  # The rate of the very first step is zero: only the noise can differ.
  state, second = step(state, batch)
  assert int(state.step) == 2
  assert first['loss_ar'] == second['loss_ar']
  assert first['loss_denoise'] != second['loss_denoise']


@pytest.fixture(scope='module')
def rows(config):
  """A batch of eight rows of random tokens, some shorter."""
  rng = np.random.default_rng(0)
  length_B = rng.integers(25, 33, 8).astype(np.int32)
  position = np.arange(32)
  tokens_BS = rng.integers(3, 2048, (8, 32)).astype(np.int32)
  start_BK = rng.integers(1, 9, (8, 1)) + 8 * np.arange(3)
  return {
    'tokens_BS': tokens_BS,
    'length_B': length_B,
    'first_BS': np.zeros((8, 32), np.int32),
    'canvas_start_BK': np.where(
      start_BK + 8 <= length_B[:, None], start_BK, -1
    ).astype(np.int32),
    'target_mask_BS': (position > 0) & (position < length_B[:, None]),
  }


def changed(config, **changes):
  """The config with other settings of training or of the optimiser."""
  for name, value in changes.items():
    group = 'train' if hasattr(config.train, name) else 'optimizer'
    part = dataclasses.replace(getattr(config, group), **{name: value})
    config = dataclasses.replace(config, **{group: part})
  return config


step_of = functools.cache(steps.make_train_step)


def take_steps(config, batch, count=1):
  """The state after `count` steps, and the numbers of each."""
  state, numbers = train_state.init_train_state(config), []
  for _ in range(count):
    state, of_step = step_of(config)(state, batch)
    numbers.append(of_step)
  return state, numbers


@functools.cache
def gradient_function(config):
  """(params, batch) -> gradients and metrics; the same noise every time."""

  @jax.jit
  def compute(params, batch):
    drawn = loss.draw_noise(
      jax.random.key(3),
      batch,
      config.diffusion.canvas_length,
      2048,
      0.5,
      config.train.canvases,
    )
    return steps.compute_gradients(config, params, batch, drawn)

  return compute


def gradients(config, batch):
  """Those of a fresh network, and metrics."""
  params = train_state.init_train_state(config).params
  return gradient_function(config)(params, batch)


def assert_close(one, other, rtol):
  """Relative to the largest gradient: some are zero up to rounding alone."""
  largest = max(np.abs(b).max() for b in jax.tree.leaves(other))
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * largest)


@pytest.mark.parametrize('canvases', ['one', 'all'])
def test_parts_of_a_batch_add_up_to_it(config, rows, canvases):
  """Though they have other numbers of targets and of canvases."""
  config = changed(config, canvases=canvases)
  whole, numbers = gradients(config, rows)
  parts, of_parts = gradients(changed(config, accumulate_steps=4), rows)
  assert_close(parts, whole, 2e-5)
  for name in ('loss', 'loss_ar', 'loss_denoise'):
    np.testing.assert_allclose(of_parts[name], numbers[name], rtol=1e-5)


@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_computing_layers_again_changes_nothing(config, rows, remat):
  plain, numbers = gradients(config, rows)
  again, of_again = gradients(changed(config, remat=remat), rows)
  assert_close(again, plain, 1e-5)
  np.testing.assert_allclose(of_again['loss'], numbers['loss'], rtol=1e-6)
  params = train_state.init_train_state(config).params
  traced = gradient_function(changed(config, remat=remat)).trace(params, rows)
  assert 'checkpoint' in str(traced.jaxpr) or 'remat' in str(traced.jaxpr)


def test_frozen_parameters_stay(config, rows):
  config = changed(
    config, freeze=('*/router/*', 'embedding'), peak_learning_rate=0.1
  )
  before = train_state.init_train_state(config).params
  state, _ = take_steps(config, rows, 3)
  for keys, leaf in jax.tree_util.tree_leaves_with_path(state.params):
    path = '/'.join(key.key for key in keys)
    old = before
    for key in keys:
      old = old[key.key]
    frozen = '/router/' in path or path == 'embedding'
    assert frozen == bool((leaf == old).all()), path
  sizes = [x.size for x in jax.tree.leaves(state.opt_state)]
  assert state.params['embedding'].size not in sizes, 'no state for it'
  gradient, _ = gradients(config, rows)
  assert not gradient['embedding'].any()
  with pytest.raises(configs.ConfigError, match="'layer_99/.' names no param"):
    take_steps(changed(config, freeze=('layer_99/*',)), rows)


def test_adafactor_learns(config, rows):
  adafactor = changed(config, kind='adafactor', peak_learning_rate=1e-2)
  _, numbers = take_steps(adafactor, rows, 40)
  assert numbers[-1]['loss_ar'] < numbers[0]['loss_ar'] - 0.5


def test_adafactor_keeps_no_second_moments_of_large_matrices():
  rule = configs.OptimizerConfig(kind='adafactor')
  optimizer = optimizers.make_optimizer(configs.Config(optimizer=rule))
  params = {'large': jnp.zeros((128, 256)), 'small': jnp.zeros((100, 4))}
  state = jax.eval_shape(optimizer.init, params)
  elements = sum(x.size for x in jax.tree.leaves(state))
  assert 400 + 128 + 256 <= elements < 400 + 128 + 256 + 10


def test_muon_makes_orthogonal_steps_of_matrices(config, rows):
  """All singular values of a step are about the same, those of experts one by
  one; embedding, router and vectors move as with Adam."""
  muon = changed(config, kind='muon', warmup_steps=0)
  before = train_state.init_train_state(muon).params
  state, _ = take_steps(muon, rows)
  moved = jax.tree.map(lambda a, b: np.asarray(a - b), state.params, before)
  D = config.model.embed_dim
  layer = moved['layer_00']
  for matrix in (
    layer['attention']['q_proj'].reshape(D, -1),
    layer['attention']['o_proj'].reshape(-1, D),
    layer['shared_mlp']['up'],
    layer['experts']['down'][0],
  ):
    values = np.linalg.svd(matrix, compute_uv=False)
    assert values.min() > 0.5 * values.max() > 0
  embedding = np.linalg.svd(moved['embedding'], compute_uv=False)
  assert embedding.min() < 0.5 * embedding.max()
  _, numbers = take_steps(muon, rows, 40)
  assert numbers[-1]['loss'] < 0.8 * numbers[0]['loss']


def test_muon_is_not_for_adapters(config):
  config = fields.override(config, 'optimizer.kind', 'muon')
  configs.validate(config)
  with pytest.raises(configs.ConfigError, match='whole matrices'):
    configs.validate(fields.override(config, 'lora.rank', '2'))


def test_the_running_mean_is_what_is_sampled_from(config, rows):
  config = changed(config, ema_decay=0.9, peak_learning_rate=0.1)
  state, step = train_state.init_train_state(config), step_of(config)
  mean = jax.tree.map(np.asarray, state.params)
  for _ in range(3):
    state, _ = step(state, rows)
    mean = jax.tree.map(lambda m, p: 0.9 * m + 0.1 * p, mean, state.params)
  assert_close(state.ema, mean, 1e-6)
  params, rest = train_state.to_items(state)
  assert params is state.ema
  again = train_state.from_items(3, params, rest)
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), again, state))


def poisoned(rows, state):
  """A state whose parameters make every loss NaN."""
  params = dict(state.params, embedding=state.params['embedding'] * np.nan)
  return state.replace(params=params)


def test_a_bad_step_changes_nothing_but_the_counts(config, rows):
  state, step = train_state.init_train_state(config), step_of(config)
  for _ in range(2):
    state, _ = step(state, rows)
  state = poisoned(rows, state)
  before = jax.tree.map(np.asarray, state)
  state, numbers = step(state, rows)
  assert np.isnan(numbers['loss']) and numbers['bad_in_row'] == 1
  expected = before.replace(
    step=before.step + 1,
    health=before.health.replace(bad_in_row=1, bad=1),
  )
  for a, b in zip(
    jax.tree.leaves(state), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_a_spike_is_left_out_when_asked_for(config, rows):
  """The scale of one step's gradient is that of its AR loss's weight."""
  for factor, bad in ((0.0, 0), (10.0, 1)):
    calm = changed(config, spike_factor=factor, peak_learning_rate=1e-5)
    state, _ = take_steps(calm, rows, 3)
    wild = changed(calm, ar_loss_weight=1e4)
    before = jax.tree.map(np.asarray, state.params)
    state, numbers = step_of(wild)(state, rows)
    assert numbers['bad_steps'] == bad
    same = jax.tree.map(lambda a, b: (a == b).all(), state.params, before)
    assert jax.tree.all(same) == bool(bad)
    state, numbers = step_of(calm)(state, rows)
    assert numbers['bad_in_row'] == 0 and numbers['bad_steps'] == bad


def test_overfits_one_batch_and_samples_it_back(model_config):
  """Both halves of the network: what is learnt is what is written."""
  C, length = 8, 20
  text = np.random.default_rng(0).integers(3, 97, length)
  row = np.concatenate([[2], text]).astype(np.int32)
  batch = {
    'tokens_BS': np.stack([row] * 8),
    'length_B': np.full(8, len(row), np.int32),
    'first_BS': np.zeros((8, len(row)), np.int32),
    'canvas_start_BK': np.array([[5, 13]] * 8, np.int32),
    'target_mask_BS': np.ones((8, len(row)), bool),
  }
  config = configs.Config(
    model=model_config,
    diffusion=configs.DiffusionConfig(canvas_length=C, stop_token_ids=(1,)),
    data=configs.DataConfig(sequence_length=32, batch_size=8),
    optimizer=configs.OptimizerConfig(
      peak_learning_rate=1e-2, warmup_steps=10, weight_decay=0.0
    ),
    train=configs.TrainConfig(steps=250),
  )
  state, step = train_state.init_train_state(config), step_of(config)
  for _ in range(250):
    state, numbers = step(state, batch)
  assert numbers['loss_ar'] < 0.02 and numbers['loss_denoise'] < 0.05
  (written,), *_ = generate.generate(
    config, state.params, [row[:5]], jax.random.key(0), 2 * C
  )
  assert written.tokens == row[5 : 5 + 2 * C].tolist()
  assert written.steps < 30, 'a sure network stops early'


def test_schedules():
  config = configs.OptimizerConfig(
    peak_learning_rate=1.0, warmup_steps=10, final_rate_fraction=0.1
  )
  cosine = optimizers.make_schedule(config, 110)
  assert cosine(0) == 0 and cosine(5) == 0.5 and cosine(10) == 1
  np.testing.assert_allclose(cosine(60), 0.55, rtol=1e-5)
  np.testing.assert_allclose(cosine(110), 0.1, rtol=1e-5)
  constant = optimizers.make_schedule(
    dataclasses.replace(config, schedule='constant'), 110
  )
  assert constant(5) == 0.5 and constant(10) == constant(500) == 1


def steps_of(kind, params, gradients, number=1, **changes):
  """What the last of some updates with the same gradients adds to the
  parameters."""
  given = {'kind': kind, 'warmup_steps': 0, 'schedule': 'constant', **changes}
  rule = configs.OptimizerConfig(**given)
  optimizer = optimizers.make_optimizer(configs.Config(optimizer=rule))
  update, state = jax.jit(optimizer.update), optimizer.init(params)
  for _ in range(number):
    updates, state = update(gradients, state, params)
  return updates


KINDS = pytest.mark.parametrize('kind', ['adam', 'adafactor', 'muon'])


@KINDS
def test_only_matrices_decay(kind):
  """By the rate times `weight_decay`; the embedding too."""
  params = {
    name: jnp.ones(shape)
    for name, shape in (('w', (2, 2)), ('embedding', (3, 2)), ('scale', (2,)))
  }
  zero = jax.tree.map(jnp.zeros_like, params)
  updates = steps_of(
    kind, params, zero, peak_learning_rate=0.5, weight_decay=0.1
  )
  for name in ('w', 'embedding'):
    np.testing.assert_allclose(updates[name], -0.05, rtol=1e-6)
  np.testing.assert_array_equal(updates['scale'], 0.0)


@KINDS
@pytest.mark.parametrize('size', [1e-3, 1e-6])
def test_steps_are_as_long_as_the_rate_whatever_the_gradient(kind, size):
  """Of an embedding, where Muon is Adam, with as many rows as Adafactor wants
  to keep no second moments; an epsilon is one of a gradient. Muon's momentum
  looks ahead, which is more at first."""
  params = {'embedding': jnp.ones((128, 128))}
  gradients = {'embedding': jnp.full((128, 128), size)}
  updates = steps_of(
    kind, params, gradients, 60, peak_learning_rate=0.5, weight_decay=0.0
  )
  np.testing.assert_allclose(updates['embedding'], -0.5, rtol=0.03)


def test_adam_is_that_of_its_numbers():
  """Two steps by the formula: its two rates of forgetting, its epsilon."""
  given = {'b1': 0.7, 'b2': 0.9, 'epsilon': 0.01, 'schedule': 'constant'}
  adam = configs.OptimizerConfig(
    **given, peak_learning_rate=1.0, warmup_steps=0, weight_decay=0.0
  )
  optimizer = optimizers.make_optimizer(configs.Config(optimizer=adam))
  params = {'w': jnp.zeros(1)}
  state = optimizer.init(params)
  for gradient in (0.5, -0.2):
    updates, state = optimizer.update(
      {'w': jnp.array([gradient])}, state, params
    )
  mean = (0.7 * 0.3 * 0.5 - 0.3 * 0.2) / (1 - 0.7**2)
  square = (0.9 * 0.1 * 0.5**2 + 0.1 * 0.2**2) / (1 - 0.9**2)
  wanted = -mean / (square**0.5 + 0.01)
  np.testing.assert_allclose(updates['w'], wanted, rtol=1e-5)


def test_gradients_are_clipped_all_together():
  """To a norm of 1: the second of two steps remembers how long the first was,
  as Adam does not."""
  params = {'a': jnp.zeros(1), 'b': jnp.zeros(1)}
  rule = configs.OptimizerConfig(
    b1=0.5, b2=0.5, warmup_steps=0, schedule='constant', weight_decay=0.0
  )
  optimizer = optimizers.make_optimizer(configs.Config(optimizer=rule))

  def second_step(long):
    state = optimizer.init(params)
    for a, b in (long, (0.1, 0.2)):
      gradients = {'a': jnp.array([a]), 'b': jnp.array([b])}
      updates, state = optimizer.update(gradients, state, params)
    return [float(x[0]) for x in jax.tree.leaves(updates)]

  clipped = second_step((0.6, 0.8))
  np.testing.assert_allclose(second_step((60.0, 80.0)), clipped, rtol=1e-5)
  assert abs(second_step((0.3, 0.4))[0] / clipped[0] - 1) > 0.05


HALF = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.bfloat16))


@KINDS
def test_steps_of_bfloat16_parameters_are_those_of_float32(kind):
  """Also long after the gradients became a hundred times smaller, which a
  second moment in bfloat16 never notices: it is changed by less than a half of
  its last bit."""
  rng = np.random.default_rng(0)
  params = HALF({'w': rng.normal(size=(4, 6)), 'scale': rng.normal(size=3)})
  rule = configs.OptimizerConfig(
    kind=kind, b2=0.999, warmup_steps=0, schedule='constant', clip_norm=1e9
  )
  optimizer = optimizers.make_optimizer(configs.Config(optimizer=rule))
  update = jax.jit(optimizer.update)

  gradients = HALF(jax.tree.map(lambda x: 1 + x, params))
  small = HALF(jax.tree.map(lambda x: 0.01 * (1 + x), params))

  def run(params):
    state = optimizer.init(params)
    as_parameters = lambda tree: optax.tree.cast_like(tree, params)
    for these, count in ((gradients, 100), (small, 300)):
      for _ in range(count):
        updates, state = update(as_parameters(these), state, params)
    return updates, state

  got, wanted = run(params), run(optimizers.to_float32(params))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert a.dtype == b.dtype != jnp.bfloat16
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_norm_grows_over_many_leaves_in_bfloat16():
  """That which is told and that by which gradients are clipped: a sum of
  squares in bfloat16 stops at 256 times the smallest."""
  params = {f'leaf_{i}': jnp.ones(1, jnp.bfloat16) for i in range(300)}
  config = configs.Config(optimizer=configs.OptimizerConfig(b1=0.5))
  optimizer = optimizers.make_optimizer(config)
  state = train_state.TrainState(
    params,
    optimizer.init(params),
    train_state.Health(*(jnp.zeros(()) for _ in range(3))),
    jnp.zeros((), jnp.int32),
  )
  step = jax.jit(train_state.apply_gradients, static_argnums=(0, 1))
  state, norm = step(config, optimizer, state, params, jnp.zeros(()))
  np.testing.assert_allclose(norm, 300**0.5, rtol=1e-6)
  (mean, *_) = (x for x in jax.tree.leaves(state.opt_state) if x.shape == (1,))
  np.testing.assert_allclose(mean, 0.5 * 300**-0.5, rtol=1e-6)
  kept = {leaf.dtype for leaf in jax.tree.leaves(state.params)}
  assert kept == {jnp.dtype('bfloat16')}


def test_a_running_mean_of_bfloat16_parameters_is_exact():
  """What is added at each step is not rounded to their type."""
  params = {'w': jnp.full(3, 1 + 2**-7, jnp.bfloat16)}
  config = changed(configs.Config(), ema_decay=0.99)
  still = optax.set_to_zero()
  state = train_state.TrainState(
    params,
    still.init(params),
    train_state.Health(*(jnp.zeros(()) for _ in range(3))),
    jnp.zeros((), jnp.int32),
    {'w': jnp.zeros(3)},
  )
  step = jax.jit(train_state.apply_gradients, static_argnums=(0, 1))
  for _ in range(100):
    state, _ = step(config, still, state, params, jnp.zeros(()))
  wanted = (1 + 2**-7) * (1 - 0.99**100)
  np.testing.assert_allclose(state.ema['w'], wanted, rtol=1e-5)


def test_gradients_of_bfloat16_parameters_add_up_in_float32(config, rows):
  """Those of the parts of a batch: a sum in bfloat16 loses the later ones."""
  half = fields.override(config, 'model.param_dtype', 'bfloat16')
  whole, _ = gradients(half, rows)
  parts, _ = gradients(changed(half, accumulate_steps=8), rows)
  for leaf in jax.tree.leaves(parts):
    assert leaf.dtype == jnp.float32
  assert_close(parts, optimizers.to_float32(whole), 0.02)


def test_metrics_without_room_cost_no_run(tmp_path, caplog):
  """Nor does what is left of them go."""
  path = tmp_path / 'metrics.jsonl'
  line = json.dumps({'step': 5, 'loss': 1.0}) + '\n'
  path.write_text(line * 100)
  with disk.full_disk(1000):
    writer = metrics.MetricsWriter(str(tmp_path), 10)
    writer.write(15, {'loss': np.float32(2.0)})
    writer.write_text(15, 'text')
    writer.close()
  assert 'Metrics are not recorded: File too large' in caplog.text.replace(
    '[Errno 27] ', ''
  )
  assert path.read_text() == line * 100 and len(os.listdir(tmp_path)) == 1


def test_metrics_of_unsaved_steps_are_dropped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(
    ''.join(json.dumps({'step': s, 'loss': 1.0}) + '\n' for s in (5, 10, 15))
    + '{"step": 20, "lo'
  )
  writer = metrics.MetricsWriter(str(tmp_path), 10)
  writer.write(15, {'loss': np.float32(2.0)})
  writer.close()
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line['step'] for line in lines] == [5, 10, 15]
  assert lines[-1]['loss'] == 2.0
