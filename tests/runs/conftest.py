"""A Hugging Face folder, and the run that it was converted to."""

import hf_folder
import pytest

import diffusiongemma


@pytest.fixture(scope='module')
def hf_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('huggingface') / 'checkpoint'
  hf_folder.make_folder(folder)
  return folder


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, hf_dir):
  folder = tmp_path_factory.mktemp('run') / 'converted'
  diffusiongemma.convert(str(hf_dir), str(folder))
  return folder
