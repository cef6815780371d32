"""Going on: with other settings, with the text that there was."""

import json

import jax.numpy as jnp
import pytest

from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma.checkpoints import native
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.runs import learnt
from diffusiongemma.training import corpus as corpora
from diffusiongemma.training import quality
from diffusiongemma.training import step as steps
from diffusiongemma.training import train


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
  monkeypatch.setattr(quality, 'report_quality', lambda *unused: None)

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
  assert 'has changed' not in told
  before = files_of(folder)
  for numbers, message in (
    ((50, 70, 90), 'step 6 the run has learnt from 2 examples of .* 3 exam'),
    ((70, 50), 'tokens, not the same ones. Its position in the data'),
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
  assert 'The held-out text has changed: 1 example of' in told


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
  assert 'do not say which examples they have learnt from' in told
