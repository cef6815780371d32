"""Configs: every name and type is checked, and the nearest name is offered."""

import dataclasses
import json
import pathlib

import pytest

from diffusiongemma import config as configs
from diffusiongemma import fields

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / 'configs').glob('*.py'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
  config = configs.load_config(str(path))
  configs.validate(config)
  assert 'Hardware:' in path.read_text() and 'Command:' in path.read_text()


@pytest.mark.parametrize(
  'field, text, value',
  [
    ('train.steps', '7', 7),
    ('optimizer.peak_learning_rate', '1e-3', 1e-3),
    ('optimizer.clip_norm', '2', 2.0),
    ('model.dtype', 'bfloat16', 'bfloat16'),
    ('data.path', '17', '17'),
    ('model.attention_pattern', 'local,global', ('local', 'global')),
    ('model.attention_pattern', "('global',)", ('global',)),
    ('diffusion.stop_token_ids', '1', (1,)),
    ('diffusion.stop_token_ids', '1,106,50', (1, 106, 50)),
  ],
)
def test_override(field, text, value):
  config = fields.override(configs.Config(), field, text)
  assert fields.flatten(config)[f'config.{field}'] == value
  configs.validate(config)


@pytest.mark.parametrize(
  'field, text, message',
  [
    ('train.step', '7', r"Did you mean 'config\.train\.steps'"),
    ('steps', '7', r"Did you mean 'config\.train\.steps'"),
    ('trian.steps', '7', r"Did you mean 'config\.train"),
    ('model.batch_size', '7', r"Did you mean 'config\.data\.batch_size'"),
    ('train.steps', 'many', 'train.steps must be a whole number'),
    ('train.steps', '1.5', 'train.steps must be a whole number'),
    ('train.steps', 'True', 'train.steps must be a whole number'),
    ('optimizer.b1', 'x', 'optimizer.b1 must be a number'),
    ('model.dtype', 'float16', "must be 'float32' or 'bfloat16'"),
    ('diffusion.stop_token_ids', 'a,b', 'must be a tuple of int'),
    ('train', '7', 'is a group of fields; set one of them: steps'),
    ('train.steps.x', '7', 'config.train.steps is a value'),
  ],
)
def test_bad_override(field, text, message):
  with pytest.raises(configs.ConfigError, match=message):
    fields.override(configs.Config(), field, text)


@pytest.mark.parametrize(
  'group, changes, message',
  [
    ('train', {'steps': 0}, 'config.train.steps must be positive'),
    ('train', {'seed': -1}, 'config.train.seed must be zero or more'),
    ('data', {'seed': 2**63}, r'config.data.seed must be below 2\^63'),
    ('train', {'steps': '9'}, 'config.train.steps must be a whole number'),
    ('optimizer', {'peak_learning_rate': float('nan')}, 'must be positive'),
    ('model', {'attention_pattern': ()}, 'names no layer'),
    ('model', {'attention_pattern': ('lokal',)}, 'neither local nor global'),
    ('model', {'num_kv_heads': 3}, 'must divide config.model.num_heads'),
    ('model', {'head_dim': 7}, 'must be even'),
    ('model', {'experts_per_token': 200}, 'is more than'),
    ('model', {'vocab_size': 60}, 'stop_token_ids: 106 is outside'),
    ('diffusion', {'t_min': 0.9}, 't_min is above'),
    ('data', {'sequence_length': 256}, 'must be longer than'),
    ('train', {'self_conditioning_probability': 1.5}, 'at most 1'),
    ('train', {'spike_factor': 0.5}, r'above 1, or 0 \(off\), it is 0.5'),
    ('train', {'ema_decay': 1.0}, 'must be below 1, it is 1.0'),
    ('train', {'log_every': 2**31}, 'at most 2147483647'),
    ('optimizer', {'clip_norm': float('inf')}, r'at most 1e\+30'),
    (
      'mesh',
      {'tensor': 0},
      r'positive, or -1 \(the remaining devices\), it is 0',
    ),
    ('mesh', {'tensor': -1}, 'only one axis can be -1'),
  ],
)
def test_invalid_values(group, changes, message):
  config = configs.Config()
  part = dataclasses.replace(getattr(config, group), **changes)
  with pytest.raises(configs.ConfigError, match=message):
    configs.validate(dataclasses.replace(config, **{group: part}))


def test_images_have_limits_too():
  for change, message in (
    ({'head_dim': 10}, r'a multiple of 4 \(rotary pairs of two axes\)'),
    ({'num_kv_heads': 3}, 'must divide config.model.vision.num_heads = 16'),
    ({'patch_size': 0}, 'config.model.vision.patch_size must be positive'),
  ):
    vision = configs.VisionConfig(**change)
    config = configs.Config(model=configs.ModelConfig(vision=vision))
    with pytest.raises(configs.ConfigError, match=message):
      configs.validate(config)


ALL_FIELDS = list(fields.leaves(configs.Config()))


def test_every_field_has_its_help():
  helps = [leaf.about.help for leaf in ALL_FIELDS]
  assert len(helps) > 100 and all(helps)
  groups = [
    fields.about(item).help for item in dataclasses.fields(configs.Config)
  ]
  assert all(groups)


def test_every_field_may_change_or_not_for_one_reason():
  for leaf in ALL_FIELDS:
    reason = fields.why_fixed(configs.Config, leaf.name)
    assert bool(reason) != leaf.about.free, leaf.name
  assert fields.why_fixed(configs.Config, 'config.model.vision')
  assert not fields.why_fixed(configs.Config, 'config.train.steps')


@pytest.mark.parametrize(
  'leaf',
  [x for x in ALL_FIELDS if type(x.default) in (int, float)],
  ids=lambda x: x.name,
)
def test_every_number_has_limits(leaf):
  """Its default, and its special values, are within them; NaN or a number of a
  thousand digits never is."""
  kind = dataclasses.make_dataclass(
    'Part',
    [
      (
        'x',
        type(leaf.default),
        dataclasses.field(metadata={'about': leaf.about}),
      )
    ],
  )
  for value in (leaf.default, *leaf.about.special):
    fields.check(kind(value))
  for value in (float('nan'), -2, 10**1000):
    with pytest.raises(configs.ConfigError, match='config.x must be'):
      fields.check(kind(value))


def test_json_round_trip():
  config = configs.load_config(str(CONFIGS[0]))
  text = json.dumps(dataclasses.asdict(config))
  again = fields.from_dict(json.loads(text), configs.Config)
  assert again == config and hash(again) == hash(config)
  with pytest.raises(configs.ConfigError, match=r"mean 'steps'|config\.train"):
    fields.from_dict({'train': {'stepz': 1}}, configs.Config)


@pytest.mark.parametrize(
  'source, message',
  [
    ('TrainConfig(step=3)', r"Did you mean 'config\.train\.steps'"),
    ('TrainConfg()', 'TrainConf'),
    ('Config(', 'was never closed|invalid syntax'),
    ('TrainConfig()', 'returned a TrainConfig, not a Config'),
    ('Config() if 1 / 0 else 0', 'ZeroDivisionError: division by zero'),
  ],
)
def test_config_files_with_mistakes(tmp_path, source, message):
  path = tmp_path / 'mine.py'
  path.write_text(
    'from diffusiongemma import config\n\n'
    f'def get_config():\n  return config.{source}\n'
  )
  with pytest.raises(configs.ConfigError, match=message):
    configs.load_config(str(path))


def test_config_file_without_get_config(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('x = 1')
  with pytest.raises(configs.ConfigError, match=r'has no get_config\(\)'):
    configs.load_config(str(path))


@pytest.mark.parametrize(
  'name, message',
  [
    ('configs/none.py', "No config file at 'configs/none.py'.*tiny"),
    ('tini', "ones are 26b_a4b, .*, tiny. Did you mean 'tiny'"),
    ('conf/tiny.py', "Did you mean 'tiny'"),
    ('', 'No config file at'),
  ],
)
def test_config_file_that_is_not_there(tmp_path, monkeypatch, name, message):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(configs.ConfigError, match=message):
    configs.load_config(name)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_have_names(tmp_path, monkeypatch, path):
  """Wherever one stands, and whatever folders are there."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / path.stem).mkdir()
  assert configs.load_config(path.stem) == configs.load_config(str(path))
