"""The command line as a person meets it: results, mistakes, exit codes."""

import contextlib
import io
import json
import pathlib
import signal
import subprocess
import sys

from absl.testing import flagsaver
import pytest

import diffusiongemma
from diffusiongemma import main
from diffusiongemma.devices import memory
from diffusiongemma.training import evaluate as evaluation

MICRO = str(pathlib.Path(__file__).parent / 'micro_config.py')


def run(*arguments):
  """(exit code, stdout, stderr) of the command line, in this process."""
  output, errors = io.StringIO(), io.StringIO()
  with (
    flagsaver.flagsaver(),
    contextlib.redirect_stdout(output),
    contextlib.redirect_stderr(errors),
    pytest.raises(SystemExit) as stopped,
  ):
    main.main(main.parse_flags(['main', *arguments]))
  return stopped.value.code, output.getvalue(), errors.getvalue()


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run of a few steps."""
  path = str(tmp_path_factory.mktemp('run'))
  code, _, errors = run(
    f'--config={MICRO}', f'--workdir={path}', '--config.train.steps=10'
  )
  assert code == 0, errors
  return path


def sample(workdir, *arguments):
  return run('--mode=sample', f'--workdir={workdir}', *arguments)


def test_nothing_but_the_text_is_printed(workdir):
  """At absl's default verbosity, Orbax tells every file."""
  arguments = ['--mode=sample', f'--workdir={workdir}', '--prompt=To be or']
  arguments += ['--max_new_tokens=10']
  done = subprocess.run(
    [sys.executable, '-m', 'diffusiongemma.main', *arguments],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.startswith('To be or') and not done.stderr


def test_sample_as_text(workdir):
  code, output, _ = sample(workdir, '--prompt=To be or', '--max_new_tokens=10')
  assert code == 0 and output.startswith('To be or')


def test_sample_on_a_terminal_that_lacks_the_signs(workdir):
  """Nothing of the text is lost, and of what can't be used it is told."""
  output = io.TextIOWrapper(io.BytesIO(), 'ascii')
  with (
    flagsaver.flagsaver(),
    contextlib.redirect_stdout(output),
    pytest.raises(SystemExit) as stopped,
  ):
    prompt = ['--prompt=日本 to be', '--max_new_tokens=4', '--nochat']
    arguments = ['main', '--mode=sample', f'--workdir={workdir}', *prompt]
    main.main(main.parse_flags(arguments))
  output.flush()
  assert stopped.value.code == 0
  assert output.buffer.getvalue().startswith(rb'\u65e5\u672c to be')
  code, _, errors = sample(workdir, '--prompt=\udce6 to be')
  assert code == 1 and 'is no Unicode character' in errors


def test_sample_as_json_follows_the_seed(workdir):
  arguments = ('--prompt=To be', '--max_new_tokens=12', '--format=json')
  results = []
  for seed in (0, 0, 1):
    code, output, _ = sample(workdir, *arguments, f'--seed={seed}')
    assert code == 0
    results.append(json.loads(output))
  assert results[0] == results[1] != results[2]
  result = results[0]
  assert set(result) == {
    'text',
    'tokens',
    'steps',
    'tokens_per_forward',
    'stopped_by',
  }
  assert result['stopped_by'] in ('stop_token', 'max_new_tokens')
  assert len(result['tokens']) <= 12 and 1 <= result['steps'] <= 8
  ratio = len(result['tokens']) / result['steps']
  assert result['tokens_per_forward'] == ratio


def test_sample_from_a_hugging_face_folder(workdir, tmp_path):
  """Says what the run says that was exported there."""
  folder = str(tmp_path / 'exported')
  code, _, errors = run(
    '--mode=export', f'--workdir={workdir}', f'--hf_dir={folder}'
  )
  assert code == 0, errors
  arguments = ('--prompt=To be', '--max_new_tokens=12', '--format=json')
  theirs = run('--mode=sample', f'--hf_dir={folder}', *arguments)
  assert theirs == sample(workdir, *arguments) and theirs[0] == 0
  code, _, errors = sample(workdir, f'--hf_dir={folder}', *arguments)
  assert code == 2 and 'not both' in errors


def test_evaluate(workdir, monkeypatch):
  code, output, _ = run(
    '--mode=evaluate',
    f'--workdir={workdir}',
    '--format=json',
    '--config.data.path=',  # The shipped plays.
    '--config.data.batch_size=64',
  )
  numbers = json.loads(output)
  assert code == 0 and numbers['step'] == 10
  # Facts of the held-out plays that no run can change.
  assert numbers['heldout_bytes'] == 316357
  assert round(numbers['bzip2_9_bits_per_byte'], 2) == 2.67
  assert round(numbers['xz_9e_bits_per_byte'], 2) == 3.0
  assert round(numbers['gzip_9_bits_per_byte'], 2) == 3.26
  assert 8 < numbers['unigram_bits_per_token'] < 9.5
  # Untrained: no better than single tokens, no worse than guessing.
  assert 2.5 < numbers['ar_bits_per_byte'] < 4.5
  monkeypatch.setattr(evaluation, 'evaluate', lambda *given: numbers)
  code, table, _ = run('--mode=evaluate', f'--workdir={workdir}')
  assert code == 0 and f'{numbers["ar_bits_per_byte"]:.3f}' in table


MISTAKES = {
  'no config': ([], 'Say what to train'),
  'no such config': (['--config=none.py'], 'No config file at'),
  'misspelt config': (['--config=tinny'], "Did you mean 'tiny'?"),
  'misspelt field': (
    [f'--config={MICRO}', '--config.train.step=1'],
    "Did you mean 'config.train.steps'?",
  ),
  'wrong type': (
    [f'--config={MICRO}', '--config.train.steps=many'],
    'config.train.steps must be a whole number',
  ),
  'field without value': (
    [f'--config={MICRO}', '--config.train.steps'],
    'needs a value',
  ),
  'misspelt flag': (
    [f'--config={MICRO}', '--wrokdir=x'],
    "Did you mean '--workdir'?",
  ),
  'stray word': ([f'--config={MICRO}', 'train'], "'train' stands alone"),
  'unknown mode': (['--mode=dance'], 'mode'),
  'sample without workdir': (['--mode=sample'], 'Name the run'),
  'weights of another kind': (
    [f'--config={MICRO}', '--hf_dir=hf'],
    '--config.train.init_from=FOLDER',
  ),
  'more context than there is': (
    ['--mode=plan', f'--config={MICRO}', '--context=100000'],
    'more than config.model.context_length',
  ),
  'a machine that is compiled for': (
    ['--mode=plan', '--machine=h100', '--topology=h100'],
    '--topology is for a program that is compiled',
  ),
  'unknown machine': (['--mode=plan', '--machine='], 'There is no machine'),
}


def test_version():
  code, output, errors = run('--version')
  assert code == 0 and not errors
  assert output.startswith(f'diffusiongemma {diffusiongemma.__version__}, jax ')


@pytest.mark.parametrize('name', MISTAKES)
def test_wrong_usage(name):
  arguments, message = MISTAKES[name]
  code, output, errors = run(*arguments)
  assert code == 2 and message in errors and not output
  assert 'Traceback' not in errors


@pytest.mark.parametrize(
  'argument, message',
  [
    ('--config.model.embed_dim=32', 'config.model cannot be changed'),
    ('--seed=99999999999999999999', 'seed'),
    ('--seed=-1', 'seed'),
    ('--think', '--think is for a chat'),
    ('--chat', 'knows no turns'),
    ('--infill=no hole', 'needs a hole'),
    ('--grid=1x8', '--grid is for --mode=benchmark, not for sample'),
    ('--tools=none.json', 'none.json cannot be read'),
    ('--config.diffusion.strategy=best', "'entropy_bound' or 'confidence'"),
    ('--config.diffusion.max_denoising_steps=0', 'must be positive'),
    ('--config.diffusion.t_min=-1', 't_min must be'),
  ],
)
def test_wrong_usage_of_sample(workdir, argument, message):
  code, output, errors = sample(workdir, '--prompt=x', argument)
  assert code == 2 and message in errors and not output


def test_damaged_config_of_a_run(tmp_path):
  (tmp_path / 'config.json').write_text('{"model": 3}')
  code, _, errors = sample(tmp_path, '--prompt=x')
  assert code == 1 and 'config.model must be a group of fields' in errors


def test_another_kind_of_folder(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text('{"model_type": "diffusion_gemma"}')
  code, _, errors = sample(tmp_path, '--prompt=x')
  assert code == 1 and 'give it as --hf_dir' in errors
  code, _, errors = run(f'--config={MICRO}', f'--workdir={path}')
  assert code == 1 and 'is a file' in errors and path.read_text()


def test_no_run_there(tmp_path):
  code, _, errors = sample(tmp_path / 'none', '--prompt=x')
  assert code == 1 and 'holds no run' in errors
  assert 'Traceback' not in errors


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], 'The prompt is empty'),
    (['--prompt='], 'The prompt is empty'),
    (['--prompt=' + 'word ' * 70], 'more than the context of 64'),
    (['--prompt=x', '--max_new_tokens=900'], 'ask for at most'),
    (['--prompt=x', '--max_new_tokens=0'], 'must be positive'),
    (['--prompt=x', '--image=a.png'], 'reads text only'),
    (['--prompt=x', '--trace=a.gif'], 'must end in .html or .png'),
    (['--infill=' + 'word ' * 70 + '___'], 'more than the context of 64'),
  ],
)
def test_prompts_that_cannot_be_continued(workdir, arguments, message):
  code, output, errors = sample(workdir, *arguments)
  assert code == 2 and message in errors and not output
  assert 'Traceback' not in errors


def test_ctrl_c_is_no_stack_trace(tmp_path):
  """Whatever it comes upon: here, a config that is being read."""
  path = tmp_path / 'mine.py'
  path.write_text(
    'import os, signal\n\n\n'
    'def get_config():\n  os.kill(os.getpid(), signal.SIGINT)\n'
  )
  # Other modes have their own handler, which stays in this process.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    code, output, errors = run(f'--config={path}', f'--workdir={tmp_path}/run')
  finally:
    signal.signal(signal.SIGINT, before)
  assert (code, output, errors) == (130, '', 'Stopped.\n')


def test_bad_data_leaves_nothing_behind(tmp_path):
  (tmp_path / 'text').mkdir()
  (tmp_path / 'text' / 'latin.txt').write_bytes(b'caf\xe9 ' * 500)
  workdir = tmp_path / 'run'
  code, _, errors = run(
    f'--config={MICRO}',
    f'--workdir={workdir}',
    f'--config.data.path={tmp_path / "text"}',
  )
  assert code == 1 and 'latin.txt is not UTF-8: byte 3' in errors
  assert 'Traceback' not in errors and not workdir.exists()


def test_another_config_is_refused_and_nothing_changes(workdir):
  path = pathlib.Path(workdir) / 'config.json'
  before = path.read_bytes()
  code, _, errors = run(
    f'--config={MICRO}',
    f'--workdir={workdir}',
    '--config.train.steps=11',
    '--config.train.seed=3',
  )
  assert code == 1
  assert 'config.train.seed: 0 there, 3 here (it says what is' in errors
  assert path.read_bytes() == before


def test_own_text(tmp_path):
  """Any folder of text, from the command line alone."""
  folder = tmp_path / 'text'
  folder.mkdir()
  for name in 'abc':
    (folder / f'{name}.txt').write_text(f'{name} sentence of its own. ' * 60)
  code, output, errors = run(
    f'--config={MICRO}',
    f'--workdir={tmp_path / "run"}',
    f'--config.data.path={folder}',
    '--config.train.steps=10',
  )
  assert code == 0, errors
  assert 'step 10/10' in output


def test_a_plan_as_json():
  code, output, errors = run(
    '--mode=plan',
    f'--config={MICRO}',
    '--format=json',
    '--program=sample',
    '--context=32',
  )
  assert code == 0, errors
  made = json.loads(output)
  assert made['fits'] and made['devices'] == 1 and made['nearest_fit'] is None
  assert made['peak_bytes'] > sum(made['array_bytes'].values()) > 0


def test_a_plan_for_devices_that_nobody_knows():
  code, _, errors = run(
    '--mode=plan', f'--config={MICRO}', '--topology=v5q:2x2'
  )
  assert code == 2 and 'v5p:4x4x4' in errors


def test_what_does_not_fit_stops_before_anything_is_written(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(memory, 'available', lambda device: 10_000)
  code, _, errors = run(f'--config={MICRO}', f'--workdir={tmp_path / "run"}')
  assert code == 2
  assert 'parameters and optimiser' in errors and '--mode=plan' in errors
  assert not (tmp_path / 'run').exists()


def test_samples_are_written_by_one_process(workdir):
  code, _, errors = sample(workdir, '--coordinator=host:1')
  assert code == 2 and '--coordinator is for --mode=train' in errors


def test_a_mesh_of_more_devices_than_there_are(workdir):
  code, _, errors = sample(workdir, '--prompt=a', '--config.mesh.tensor=2')
  assert code == 2 and 'there are 1' in errors


def test_few_bits(workdir, tmp_path):
  few = tmp_path / 'few'
  arguments = (f'--source={workdir}', f'--workdir={few}')
  kinds = (
    '--config.quantization.experts=int4',
    '--config.quantization.group_size=8',
  )
  code, output, errors = run('--mode=quantize', *arguments, *kinds)
  assert code == 0, errors
  assert f'--workdir={few}' in output
  code, output, errors = sample(few, '--prompt=So', '--max_new_tokens=8')
  assert code == 0 and output.startswith('So'), errors
  for mode, more, message in (
    (
      'sample',
      '--config.quantization.linears=int8',
      'already stored as its config says',
    ),
    ('quantize', '--config.train.steps=3', 'takes only --config.quantization'),
  ):
    given = arguments if mode == 'quantize' else (f'--workdir={few}',)
    code, _, errors = run(f'--mode={mode}', *given, more)
    assert code == 2 and message in errors, errors


def test_few_bits_are_not_trained(tmp_path):
  code, _, errors = run(
    f'--config={MICRO}',
    f'--workdir={tmp_path / "run"}',
    '--config.quantization.experts=int8',
  )
  assert code == 2 and 'is for sampling' in errors
  assert not (tmp_path / 'run').exists()


def test_a_benchmark_as_json():
  code, output, errors = run(
    '--mode=benchmark',
    f'--config={MICRO}',
    '--grid=1x8',
    '--nopeer',
    '--format=json',
  )
  assert code == 0, errors
  (row,) = json.loads(output.splitlines()[-1])['sampling']
  assert row['batch'] == 1 and row['step_seconds'] > 0
  code, _, errors = run('--mode=benchmark', f'--config={MICRO}', '--grid=8')
  assert code == 2 and 'BATCHxCONTEXT' in errors


def test_lines_that_are_left_out_are_told(tmp_path):
  """By training and by evaluation, which both read them."""
  text = 'To be, or not to be: that is the question. ' * 9
  lines = [json.dumps({'text': text, 'mood': 'x'})] * 6
  lines[3] = 'damaged'
  data = tmp_path / 'a.jsonl'
  data.write_text('\n'.join(lines))
  train = [f'--config={MICRO}', f'--workdir={tmp_path / "run"}']
  train += [f'--config.data.path={data}', '--config.train.steps=1']
  code, _, errors = run(*train)
  assert code and 'a.jsonl, line 4 is not JSON' in errors
  assert not (tmp_path / 'run').exists()
  code, output, errors = run(*train, '--config.data.on_error=skip')
  assert code == 0
  evaluate = ['--mode=evaluate', train[1], '--format=json']
  code, numbers, evaluated = run(*evaluate)
  assert code == 0 and json.loads(numbers)['step'] == 1
  for told in (output + errors, evaluated):
    told = ' '.join(told.split())
    assert 'Left out (config.data.on_error=skip): 1.' in told
    assert 'line 4 is not JSON' in told
    assert "Not read: the key 'mood' (5 of 5; the first is" in told
