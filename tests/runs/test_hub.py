"""Networks by their names on the Hugging Face Hub: a server here speaks its
protocol."""

import functools
import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import urllib.parse

import hf_folder
import pytest

from diffusiongemma.runs import hub

COMMIT = 'c0ffee' + '0' * 34
ROOT = pathlib.Path(__file__).parents[2]


class Hub(http.server.BaseHTTPRequestHandler):
  """One repository, org/small; another is gated, all others are not there."""

  def __init__(self, files, log, *args):
    self.files, self.log = files, log
    super().__init__(*args)

  def log_message(self, *args):
    pass

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    path = urllib.parse.urlsplit(self.path).path.strip('/')
    self.log.append((self.command, path))
    if 'org/gated' in path:
      self.answer(403, b'', **{'X-Error-Code': 'GatedRepo'})
    elif 'org/small' not in path:
      self.answer(404, b'', **{'X-Error-Code': 'RepoNotFound'})
    elif path.startswith('api/models/org/small/tree/'):
      self.answer(200, json.dumps(self.tree()).encode())
    elif path.startswith('api/'):
      revision = path.rpartition('/revision/')[2]
      if revision not in ('main', 'v1', COMMIT):
        self.answer(404, b'', **{'X-Error-Code': 'RevisionNotFound'})
      else:
        self.answer(200, json.dumps(self.info()).encode())
    else:
      self.send(path.partition('/resolve/')[2].partition('/')[2])

  def info(self):
    siblings = [{'rfilename': name} for name in self.files]
    return {'id': 'org/small', 'sha': COMMIT, 'siblings': siblings}

  def tree(self):
    return [
      {
        'type': 'file',
        'path': name,
        'size': len(content),
        'oid': hashlib.sha1(content).hexdigest(),
      }
      for name, content in self.files.items()
    ]

  def send(self, name):
    content = self.files.get(name)
    if content is None:
      self.answer(404, b'', **{'X-Error-Code': 'EntryNotFound'})
      return
    headers = {
      'ETag': f'"{hashlib.sha1(content).hexdigest()}"',
      'X-Repo-Commit': COMMIT,
    }
    self.answer(200, content, **headers)

  def answer(self, status, content, **headers):
    self.send_response(status)
    headers = {'Content-Type': 'application/json', **headers}
    for name, value in {**headers, 'Content-Length': len(content)}.items():
      self.send_header(name, str(value))
    self.end_headers()
    if self.command == 'GET':
      self.wfile.write(content)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """The files of a repository: a small network, and some that are not read."""
  folder = tmp_path_factory.mktemp('repository') / 'small'
  hf_folder.make_folder(folder)
  found = {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }
  return {**found, 'model.gguf': b'large', 'modeling.py': b'import os'}


@pytest.fixture
def server(files):
  """(its address, what it was asked for)."""
  log = []
  handler = functools.partial(Hub, files, log)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as it:
    threading.Thread(target=it.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{it.server_port}', log
    it.shutdown()


def run(code, cwd, address, **environment):
  """(standard output and error) of a process that asks this hub."""
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=cwd,
    env={
      **os.environ,
      'PYTHONPATH': str(ROOT),
      'HF_ENDPOINT': address,
      'HF_HOME': str(cwd / 'cache'),
      'HF_HUB_OFFLINE': '0',
      'HF_HUB_DISABLE_PROGRESS_BARS': '1',
      **environment,
    },
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout, done.stderr


DOWNLOAD = """
from diffusiongemma.runs import WorkdirError
from diffusiongemma.runs import hub

try:
  print(hub.download({name!r}))
except WorkdirError as error:
  print('Error:', error)
"""
LOAD = """
import diffusiongemma as dg

run = dg.load('org/small@v1')
print(run.config.model.vocab_size, len(run.params))
dg.convert('org/small', 'run')
print(dg.load('run').config == run.config)
"""


def test_a_name_is_loaded_and_converted(server, tmp_path, files):
  address, log = server
  output, errors = run(LOAD, tmp_path, address)
  assert output.split()[0] == '61' and output.split()[-1] == 'True'
  (line,) = [x for x in errors.splitlines() if 'downloading' in x]
  assert line.startswith('org/small@v1: downloading')
  assert line.endswith(str(tmp_path / 'cache' / 'hub'))
  fetched = [path for command, path in log if command == 'GET']
  names = {path.rpartition('/')[2] for path in fetched if 'resolve' in path}
  assert 'model.safetensors' in names and 'config.json' in names
  assert not names & {'model.gguf', 'modeling.py'}
  # The second time nothing is downloaded.
  assert sum('resolve' in path for path in fetched) == len(names)


def test_what_was_downloaded_is_there_without_a_network(server, tmp_path):
  address, log = server
  code = DOWNLOAD.format(name='org/small')
  folder = run(code, tmp_path, address)[0]
  assert folder.strip().endswith(COMMIT)
  count = len(log)
  assert run(code, tmp_path, address, HF_HUB_OFFLINE='1')[0] == folder
  assert len(log) == count


def test_a_download_goes_on_after_the_files_that_were_finished(
  server, tmp_path
):
  address, log = server
  first = (
    'import huggingface_hub\n'
    'huggingface_hub.hf_hub_download("org/small", "model.safetensors")\n'
  )
  run(first + DOWNLOAD.format(name='org/small'), tmp_path, address)
  fetched = [path for command, path in log if command == 'GET']
  for name in ('model.safetensors', 'config.json'):
    assert sum(path.endswith(f'/{name}') for path in fetched) == 1


@pytest.mark.parametrize(
  'name, message',
  [
    ('org/none', 'no folder .* and no repository .*hf auth login'),
    ('org/gated', 'accept its terms at http.*/org/gated'),
    ('org/small@v9', "has no revision 'v9'"),
  ],
)
def test_what_can_not_be_had_is_told(name, message, server, tmp_path):
  output, _ = run(DOWNLOAD.format(name=name), tmp_path, server[0])
  assert re.search(message, output), output


def test_without_a_network(tmp_path):
  nowhere = 'http://127.0.0.1:9'
  code = DOWNLOAD.format(name='org/small')
  output, _ = run(code, tmp_path, nowhere)
  assert 'does not have it' in output and 'cannot be reached.' in output
  output, _ = run(code, tmp_path, nowhere, HF_HUB_OFFLINE='1')
  assert 'cannot be reached (HF_HUB_OFFLINE is set)' in output


def test_paths_are_no_names(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert hub.is_name('org/small') and hub.is_name('org/small@refs/pr/1')
  paths = ('org', '/org/small', './org/small', 'a/b/c', '~/x', 'org/', '')
  for path in (*paths, 'runs/tiny'):
    assert not hub.is_name(path)
  (tmp_path / 'org').mkdir()
  assert not hub.is_name('org/small')


def test_a_full_disk_is_told_before(monkeypatch, tmp_path):
  class File:
    will_download, file_size = True, 10**15

  with pytest.raises(hub.WorkdirError, match='needs 1000000.0 GB, and .* room'):
    hub._tell('org/small', [File()], str(tmp_path / 'not' / 'there'))
