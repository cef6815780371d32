"""Runs that start from the weights of another, whole or with adapters."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import diffusiongemma as dg
from diffusiongemma import config as configs
from diffusiongemma import fields
from diffusiongemma import ops
from diffusiongemma.checkpoints import native
from diffusiongemma.model import denoiser
from diffusiongemma.model import lora
from diffusiongemma.runs import companions
from diffusiongemma.runs import folder as workdirs
from diffusiongemma.runs import learnt
from diffusiongemma.runs import load
from diffusiongemma.training import corpus as corpora
from diffusiongemma.training import notices
from diffusiongemma.training import quality
from diffusiongemma.training import train

MICRO = str(pathlib.Path(__file__).parents[1] / 'micro_config.py')
LORA = configs.LoraConfig(rank=2)
FEW_BITS = configs.QuantizationConfig('int4', 'int8', 'int8', group_size=8)


@pytest.fixture(autouse=True, scope='module')
def little_to_do(tmp_path_factory):
  """A short text; held-out losses and samples are tested elsewhere."""
  text = tmp_path_factory.mktemp('text') / 'a.txt'
  text.write_text('Shall I compare thee to a summer day? ' * 50)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(quality, 'report_quality', lambda *args: None)
    patch.setattr(corpora, 'SHIPPED_CORPUS', text)
    yield


def make_config(steps, workdir='', **changes):
  """A run of few steps; `changes` are fields of training or other groups.

  The rate does not depend on the number of steps, so that all runs of a kind
  share one compiled program.
  """
  config = configs.load_config(MICRO)
  groups = {k: v for k, v in changes.items() if hasattr(config, k)}
  fields = {k: v for k, v in changes.items() if k not in groups}
  config = dataclasses.replace(
    config,
    train=dataclasses.replace(
      config.train,
      steps=steps,
      checkpoint_every=steps,
      **fields,
    ),
    optimizer=dataclasses.replace(
      config.optimizer, schedule='constant', warmup_steps=1
    ),
    model=dataclasses.replace(config.model, attention_pattern=('global',)),
  )
  config = dataclasses.replace(config, **groups)
  if config.train.init_from:
    config = load.adopt(config, workdir)
  configs.validate(config)
  return config


def run(config, workdir):
  load_base = functools.partial(load.load_base, config)
  start = load_base if config.train.init_from else None
  assert train.train(config, str(workdir), start) == 0
  return str(workdir)


def assert_same(one, other):
  assert jax.tree.all(
    jax.tree.map(lambda a, b: a.dtype == b.dtype and (a == b).all(), one, other)
  )


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  return run(make_config(2), tmp_path_factory.mktemp('base'))


@pytest.fixture(scope='module')
def adapted(base, tmp_path_factory):
  """Adapters of the base, after steps that moved them."""
  config = make_config(3, init_from=base, lora=LORA)
  return run(config, tmp_path_factory.mktemp('adapted'))


@pytest.fixture(scope='module')
def few_bits(base, tmp_path_factory):
  folder = str(tmp_path_factory.mktemp('few') / 'bits')
  dg.quantize(base, folder, FEW_BITS)
  return folder


@pytest.fixture(scope='module')
def adapted_few_bits(few_bits, tmp_path_factory):
  """Adapters of the quantised base, after steps that moved them."""
  config = make_config(3, init_from=few_bits, lora=LORA)
  return run(config, tmp_path_factory.mktemp('adapted'))


def test_the_first_step_has_the_weights_it_starts_from(base, tmp_path):
  """The rate of the first step is zero."""
  tuned = run(make_config(1, init_from=base), tmp_path)
  assert_same(dg.load(tuned).params, dg.load(base).params)
  more = run(make_config(2, init_from=base), tmp_path / 'more')
  moved = jax.tree.map(
    lambda a, b: bool((a != b).any()),
    dg.load(more).params,
    dg.load(base).params,
  )
  assert moved['embedding'] and moved['final_norm']['scale']


def test_network_and_sampler_are_those_of_the_weights(base):
  config = make_config(
    1,
    init_from=base,
    model=configs.ModelConfig(dtype='float32'),
    diffusion=configs.DiffusionConfig(),
  )
  theirs = workdirs.read_config(base)
  assert (config.model, config.diffusion) == (theirs.model, theirs.diffusion)
  with pytest.raises(workdirs.WorkdirError, match='init_from: /nowhere is'):
    make_config(1, init_from='/nowhere')


def test_adapters_are_all_that_is_learnt_and_saved(base, adapted):
  before = dg.load(base)
  run_ = dg.load(adapted)
  changed = jax.tree.map(
    lambda a, b: bool((a != b).any()), run_.params, before.params
  )
  layer = changed['layer_00']
  assert all(layer['attention'][f'{x}_proj'] for x in 'qko')
  assert all(layer['shared_mlp'].values())
  assert not any(layer['experts'].values()) and not changed['embedding']
  assert not any(jax.tree.leaves(layer['router']))
  saved = learnt.restore(adapted).params
  assert set(saved) == {'layer_00'}
  assert set(saved['layer_00']) == {'attention', 'shared_mlp'}
  assert_same(dg.load(base).params, before.params)


def test_a_run_of_adapters_goes_on(base, adapted, tmp_path):
  """Straight through and in two goes: bit-equal adapters."""
  config = make_config(3, init_from=base, lora=LORA)
  half = dataclasses.replace(
    config, train=dataclasses.replace(config.train, checkpoint_every=1)
  )
  stopped = []

  def stop(step, params):
    stopped.append(step)
    raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(quality, 'report_quality', lambda *args: stop(*args[-2:]))
    with pytest.raises(KeyboardInterrupt):
      run(half, tmp_path)
  assert stopped == [1] and learnt.restore(str(tmp_path)).step == 1
  run(half, tmp_path)
  assert_same(
    learnt.restore(str(tmp_path)).params, learnt.restore(adapted).params
  )


def test_a_run_that_ended_before_its_base_was_noted_goes_on(base, tmp_path):
  """Its folder is claimed by then."""
  config = make_config(3, init_from=base, lora=LORA)

  def fail(sharding):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    train.train(config, str(tmp_path), fail)
  assert workdirs.is_claimed(str(tmp_path))
  run(config, tmp_path)


def test_adapters_refuse_other_weights(base, adapted, tmp_path):
  """The run they start from has gone on since, or is gone."""
  moved, folder = tmp_path / 'base', tmp_path / 'adapted'
  shutil.copytree(base, moved)
  shutil.copytree(adapted, folder)
  config = fields.override(
    workdirs.read_config(str(folder)), 'train.init_from', str(moved)
  )
  text = json.dumps(dataclasses.asdict(config))
  (folder / 'config.json').write_text(text)
  assert_same(dg.load(str(folder)).params, dg.load(adapted).params)
  directory = workdirs.checkpoint_dir(str(moved))
  params = jax.tree.map(lambda x: x + 1, dg.load(base).params)
  with contextlib.closing(native.open_checkpoints(directory, 9)) as manager:
    native.save(manager, 3, params, {'none': np.zeros(1)}, {}, config)
  for use in (lambda: dg.load(str(folder)), lambda: run(config, folder)):
    with pytest.raises(workdirs.WorkdirError, match='trained on other weights'):
      use()
  shutil.rmtree(moved)
  with pytest.raises(workdirs.WorkdirError, match='adapters of the weights in'):
    dg.load(str(folder))


def test_a_run_goes_on_without_what_it_started_from(base, tmp_path):
  """Tokenizer, network and checkpoint are its own by then."""
  moved, folder = tmp_path / 'base', str(tmp_path / 'tuned')
  shutil.copytree(base, moved)
  run(make_config(1, init_from=str(moved)), folder)
  shutil.rmtree(moved)
  again = make_config(1, folder, init_from=str(moved))
  assert train.train(again, folder, lambda: 1 / 0) == 0


def test_mistakes_leave_nothing_behind(base, tmp_path):
  for changes in (
    {'optimizer': configs.OptimizerConfig(freeze=('nothing/*',))},
    {'lora': configs.LoraConfig(rank=2, targets=('nothing/*',))},
  ):
    config = make_config(1, init_from=base, **changes)
    with pytest.raises(configs.ConfigError, match="'nothing/.' names no"):
      run(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_adapters_are_exported_merged(base, adapted, tmp_path):
  folder = str(tmp_path / 'hf')
  dg.export(adapted, folder)
  exported, merged = dg.load(folder).params, dg.load(adapted).params
  exported.pop('vision')  # Which transformers always has.
  assert_same(exported, merged)


def test_a_hugging_face_folder_lends_tokenizer_and_template(base, tmp_path):
  """They travel along, so that what was trained can be used anywhere."""
  folder = tmp_path / 'hf'
  dg.export(base, str(folder))
  (folder / 'chat_template.jinja').write_text('{{ bos_token }}own')
  tuned = run(make_config(1, init_from=str(folder)), tmp_path / 'tuned')
  exported = dg.load(str(folder))
  loaded = dg.load(tuned)
  assert_same(loaded.params, exported.params)
  assert loaded.chat_template == '{{ bos_token }}own'
  assert loaded.tokenizer.model == exported.tokenizer.model
  travelled = pathlib.Path(tuned) / 'huggingface'
  assert {p.name for p in travelled.iterdir()} >= {
    'config.json',
    'tokenizer.model',
    'chat_template.jinja',
  }
  # And a run of what was trained would take them further.
  third = make_config(1, init_from=tuned)
  assert companions.load_tokenizer(third, tuned).model
  further = dict(companions.files_beside(tuned))
  assert further['huggingface/chat_template.jinja'] == b'{{ bos_token }}own'


def test_a_converted_folder_is_no_run_to_go_on_with(base, tmp_path):
  folder, converted = str(tmp_path / 'hf'), str(tmp_path / 'converted')
  dg.export(base, folder)
  dg.convert(folder, converted)
  with pytest.raises(workdirs.WorkdirError, match='config.train.init_from='):
    run(make_config(1), converted)
  assert make_config(1, init_from=converted).model == (
    workdirs.read_config(converted).model
  )


def test_random_adapters_of_random_weights_can_be_read_again(tmp_path, capsys):
  config = make_config(2, lora=LORA)
  data = dataclasses.replace(config.data, path='')
  folder = run(dataclasses.replace(config, data=data), tmp_path)
  output = capsys.readouterr().out
  assert 'No config.train.init_from is given' in output
  assert 'training on the shipped Shakespeare' in output
  assert 'Goodput' in output and 'checkpoints' in output
  merged = dg.load(folder).params
  base = denoiser.fresh_params(workdirs.read_config(folder))
  adapters = learnt.restore(folder).params
  apart = lora.attach(LORA, base, adapters)
  of_apart = apart['layer_00']['attention']['q_proj']
  update = np.tensordot(of_apart.a, of_apart.b, axes=1) * of_apart.scale
  np.testing.assert_allclose(
    merged['layer_00']['attention']['q_proj'],
    of_apart.weight + update,
    rtol=1e-6,
  )
  with open(pathlib.Path(folder) / 'config.json') as file:
    assert json.load(file)['lora']['rank'] == 2


@pytest.mark.parametrize(
  ('freeze', 'start', 'told'),
  [(('*/router/*',), '', True), (('*/router/*',), 'a', False), ((), '', False)],
)
def test_it_is_told_when_what_is_frozen_is_random(freeze, start, told):
  config = configs.Config(
    data=configs.DataConfig(path='a.txt'),
    optimizer=configs.OptimizerConfig(freeze=freeze),
    train=configs.TrainConfig(init_from=start),
  )
  said = ' '.join(notices.at_start(config))
  assert ('stay random' in said) == told


def test_adapters_of_quantised_weights_are_sampled_unmerged(
  few_bits, adapted_few_bits
):
  """The quantised arrays are those of the base, to the bit; the text is that of
  base and adapters."""
  base, tuned = dg.load(few_bits), dg.load(adapted_few_bits)
  assert tuned.config.quantization == FEW_BITS
  w = tuned.params['layer_00']['attention']['q_proj']
  assert isinstance(w, ops.weights.LowRank) and w.b.any()
  assert_same(w.weight, base.params['layer_00']['attention']['q_proj'])
  assert_same(
    tuned.params['layer_00']['experts'], base.params['layer_00']['experts']
  )
  assert dg.generate(tuned, 'Shall I', max_new_tokens=8).tokens


def test_adapters_of_quantised_weights_are_merged_when_exported(
  adapted_few_bits, tmp_path
):
  dg.export(adapted_few_bits, tmp_path / 'out')
  whole, tuned = dg.load(tmp_path / 'out'), dg.load(adapted_few_bits)
  for params in (whole.params, tuned.params):
    params.pop('vision', None)
  is_leaf = lambda x: isinstance(x, ops.weights.Leaf)
  jax.tree.map(
    lambda w, merged: np.testing.assert_array_equal(
      np.asarray(w.astype(merged.dtype)), merged
    ),
    *(tuned.params, whole.params),
    is_leaf=is_leaf,
  )
  text = 'Shall I compare thee'
  assert dg.log_likelihood(whole, text).log_p == pytest.approx(
    dg.log_likelihood(tuned, text).log_p, rel=1e-4
  )
  few = str(tmp_path / 'few')
  dg.quantize(adapted_few_bits, few, FEW_BITS)
  assert dg.load(few).config.lora.rank == 0


def test_a_resumed_run_of_adapters_of_quantised_weights_is_the_same(
  few_bits, adapted_few_bits, tmp_path
):
  run(make_config(1, init_from=few_bits, lora=LORA), tmp_path)
  config = make_config(3, str(tmp_path), init_from=few_bits, lora=LORA)
  assert_same(
    learnt.restore(run(config, tmp_path)).params,
    learnt.restore(adapted_few_bits).params,
  )


def test_quantised_weights_are_adapted_alone(
  few_bits, adapted_few_bits, tmp_path
):
  with pytest.raises(workdirs.WorkdirError, match='train adapters of them'):
    make_config(1, init_from=few_bits)
  with pytest.raises(workdirs.WorkdirError, match='mode=export'):
    make_config(1, init_from=adapted_few_bits, lora=LORA)
  shutil.copytree(few_bits, tmp_path / 'other')
  config = make_config(1, init_from=str(tmp_path / 'other'), lora=LORA)
  folder = run(config, tmp_path / 'adapted')
  shutil.rmtree(tmp_path / 'other')
  with pytest.raises(workdirs.WorkdirError, match='which are not there'):
    dg.load(folder)
