"""What a trace holds, that its text can do nothing, and where it may go."""

import base64
import errno
import hashlib
import html.parser
import io
import json
import os
import re
import sys

import numpy as np
import pytest

from diffusiongemma.commands import trace as traces
from diffusiongemma.diffusion import sampler
from diffusiongemma.text import tokenizer as tokenizers
from tests import disk

TOKENIZER = tokenizers.load_tokenizer()
HOSTILE = [
  '</script><script>alert(1)</script>',
  '<!--<script>',
  '<img src=x onerror=alert(1)>',
  '\'"`${1}&lt;\\',
  '\u2028\u2029\x00\x07\x1b\x7f\x9b\r\n',
  '\u202eright to left\u2066\u200f',
  '\ud800',
  '{{data}}{{script digest}}',
  'שלום 日本',
]


class HostileTokenizer:
  """Its pieces would like to be a program."""

  vocab_size = len(HOSTILE)

  def pieces(self, ids):
    return [HOSTILE[i] for i in ids]

  def decode(self, ids):
    return ''.join(self.pieces(ids))


def random_state(rng, step, vocab_size, L=16, accepted=0.5):
  """Two rows, of which the first is recorded."""
  integers = lambda: rng.integers(vocab_size, size=(2, L), dtype=np.int32)
  return sampler.SamplerState(
    canvas_BL=integers(),
    draft_BL=integers() if step else np.full((2, L), -1, np.int32),
    accepted_BL=rng.random((2, L)) < accepted * (step > 0),
    entropy_BL=rng.exponential(2, (2, L)).astype(np.float32) * (step > 0),
    sc_BLD=np.zeros((2, L, 1), np.float32),
    unchanged_B=np.zeros(2, np.int32),
    converged_B=np.zeros(2, bool),
    steps_B=np.full(2, step, np.int32),
    left_B=np.full(2, 48 - step, np.int32),
  )


def random_trace(tokenizer=TOKENIZER, prompt='To be', steps=5, **kwargs):
  """(a trace of two canvases, the states it was shown, what was kept)."""
  rng = np.random.default_rng(0)
  trace = traces.Trace(tokenizer, prompt, steps)
  canvases, kept = [], []
  for _ in range(2):
    states = []
    for step in range(steps + 1):
      state = random_state(rng, step, tokenizer.vocab_size, **kwargs)
      trace.on_step(step, state)
      states.append(state)
    canvases.append(states)
    kept.append(states[-1].draft_BL[0, :-2].tolist())
    trace.on_canvas(kept[-1])
  return trace, canvases, kept


class Elements(html.parser.HTMLParser):
  """The elements of a page, and what stands in those that hold scripts."""

  def __init__(self, page: bytes):
    super().__init__()
    self.tags, self.scripts, self.in_script = [], [], False
    self.feed(page.decode())
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, [a for a in attrs if a[0] != 'content']))
    self.in_script = tag == 'script'
    if self.in_script:
      self.scripts.append('')

  def handle_endtag(self, tag):
    self.in_script = False

  def handle_data(self, data):
    if self.in_script:
      self.scripts[-1] += data


def decoded(page: bytes):
  """(data of a page, its canvases as lists of `Step`), as the page reads it."""
  data = json.loads(Elements(page).scripts[0])
  ids, canvases = np.array(data['ids']), []
  for canvas in data['canvases']:
    tokens = draft = np.full(len(canvas['steps'][0]['accepted']), -1)
    steps = []
    for step in canvas['steps']:
      follow = lambda cells, before: np.where(
        np.array(cells), ids[np.array(cells) - 1], before
      )
      tokens = follow(step['canvas'], tokens)
      draft = follow(step['draft'], draft)
      accepted = np.array([bit == '1' for bit in step['accepted']])
      entropy = np.array(step['entropy'], float) / 1000
      steps.append(traces.Step(tokens, draft, accepted, entropy))
    canvases.append(steps)
  return data, canvases


def test_the_page_holds_what_was_recorded():
  trace, canvases, kept = random_trace()
  data, read = decoded(traces.page(trace))
  assert [len(steps) for steps in read] == [6, 6]
  for states, steps in zip(canvases, read, strict=True):
    for state, step in zip(states, steps, strict=True):
      np.testing.assert_array_equal(step.canvas_L, state.canvas_BL[0])
      np.testing.assert_array_equal(step.draft_L, state.draft_BL[0])
      np.testing.assert_array_equal(step.accepted_L, state.accepted_BL[0])
      np.testing.assert_allclose(
        step.entropy_L, state.entropy_BL[0], rtol=0, atol=5.01e-4
      )
  assert data['prompt'] == 'To be' and data['max_denoising_steps'] == 5
  assert data['pieces'] == TOKENIZER.pieces(data['ids'])
  assert [c['kept'] for c in data['canvases']] == [14, 14]
  texts = [c['text'] for c in data['canvases']]
  assert texts == [TOKENIZER.decode(tokens) for tokens in kept]


def test_what_is_recorded_is_a_copy():
  rng = np.random.default_rng(0)
  state, trace = random_state(rng, 0, 9), traces.Trace(TOKENIZER, 'To be', 4)
  before = state.canvas_BL[0].copy()
  trace.on_step(0, state)
  state.canvas_BL[:] = 0
  np.testing.assert_array_equal(trace.canvases[0].steps[0].canvas_L, before)


def test_a_frozen_row_has_no_more_steps():
  rng, trace = np.random.default_rng(0), traces.Trace(TOKENIZER, 'To be', 4)
  for step in range(5):
    state = random_state(rng, step, 9)
    state.steps_B[0] = min(step, 2)
    state.converged_B[0] = step >= 2
    trace.on_step(step, state)
  trace.on_canvas([1])
  # Done before the second canvas, which is another row's.
  for step in range(3):
    state = random_state(rng, step, 9)
    state.steps_B[0], state.converged_B[0] = 0, True
    trace.on_step(step, state)
  trace.on_canvas([])
  assert [len(canvas.steps) for canvas in trace.canvases] == [3]
  assert trace.canvases[0].kept == [1]


def test_an_entropy_that_is_no_number_is_none_in_the_page():
  trace, _, _ = random_trace()
  trace.canvases[0].steps[2].entropy_L[3] = np.nan
  _, read = decoded(traces.page(trace))
  assert np.flatnonzero(np.isnan(read[0][2].entropy_L)).tolist() == [3]


def test_hostile_text_is_inert():
  prompt = ''.join(HOSTILE)
  trace, _, kept = random_trace(HostileTokenizer(), prompt)
  page = traces.page(trace)
  elements = Elements(page)
  harmless = Elements(traces.page(random_trace()[0]))
  assert elements.tags == harmless.tags
  assert elements.scripts[1:] == harmless.scripts[1:]
  data = elements.scripts[0]
  assert '<' not in data
  # Neither control characters nor those that turn text, nor line separators.
  unseen = re.compile('[\x00-\x1f\x7f-\x9f\u200f\u2028-\u202e\u2066-\u2069]')
  assert not unseen.search(data)
  read, _ = decoded(page)
  assert read['prompt'] == prompt and sorted(read['pieces']) == sorted(HOSTILE)
  assert read['canvases'][0]['text'] == trace.tokenizer.decode(kept[0])


def test_only_the_pages_own_script_may_run_and_nothing_is_loaded():
  page = traces.page(random_trace()[0])
  (script,) = Elements(page).scripts[1:]
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  (policy,) = re.findall(r'Security-Policy" content="([^"]*)"', page.decode())
  assert "default-src 'none'" in policy
  assert f"script-src 'sha256-{digest}'" in policy
  addresses = re.findall(r'\w+://[^\'"\s]+', page.decode())
  assert addresses == ['http://www.w3.org/2000/svg']
  for way_in in (
    'innerHTML',
    'outerHTML',
    'insertAdjacent',
    'eval(',
    '@import',
  ):
    assert way_in not in page.decode()


def test_a_long_run_is_a_small_page():
  rng, trace = np.random.default_rng(0), traces.Trace(TOKENIZER, 'To be', 48)
  for _ in range(4):
    for step in range(49):
      state = random_state(rng, step, TOKENIZER.vocab_size, L=256)
      trace.on_step(step, state)
  assert len(traces.page(trace)) < 1e6  # All of it noise, the worst case.


@pytest.mark.parametrize(
  'name, reason',
  [
    ('trace', 'must end in .html or .png'),
    ('trace.svg', 'must end in .html or .png'),
    ('none/trace.html', "no folder '.*none'"),
    ('file/trace.html', "no folder '.*file'"),
    ('folder.html', 'is a folder'),
    ('x' * 300 + '.html', "Can't write .* too long"),
  ],
)
def test_paths_are_refused_before_anything_is_written(tmp_path, name, reason):
  (tmp_path / 'folder.html').mkdir()
  (tmp_path / 'file').touch()
  for act in (traces.check_path, lambda p: traces.write(random_trace()[0], p)):
    with pytest.raises(traces.TraceError, match=reason):
      act(tmp_path / name)
  assert sorted(os.listdir(tmp_path)) == ['file', 'folder.html']


def test_a_folder_that_takes_no_file_is_refused(tmp_path, monkeypatch):
  def touch(path):
    raise OSError(errno.EROFS, 'Read-only file system')

  monkeypatch.setattr('pathlib.Path.touch', touch)
  with pytest.raises(traces.TraceError, match='Read-only file system'):
    traces.check_path(tmp_path / 'trace.html')


def test_a_good_path_is_left_as_it_is(tmp_path):
  path = tmp_path / 'trace.HTML'
  traces.check_path(path)
  assert not os.listdir(tmp_path)
  path.write_text('old')
  traces.check_path(str(path))
  assert os.listdir(tmp_path) == [path.name] and path.read_text() == 'old'


def test_a_picture_without_matplotlib_is_refused(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  traces.check_path(tmp_path / 'trace.html')
  with pytest.raises(traces.TraceError, match='pip install matplotlib'):
    traces.check_path(tmp_path / 'trace.png')


def test_a_trace_without_a_step_is_refused(tmp_path):
  trace = traces.Trace(TOKENIZER, 'To be', 4)
  with pytest.raises(traces.TraceError, match='No denoising step'):
    traces.write(trace, tmp_path / 'trace.html')
  trace.on_step(0, random_state(np.random.default_rng(0), 0, 9))
  with pytest.raises(traces.TraceError, match='No denoising step'):
    traces.write(trace, tmp_path / 'trace.html')


def test_a_full_disk_leaves_the_old_page(tmp_path):
  path = tmp_path / 'trace.html'
  path.write_text('old')
  with (
    disk.full_disk(room=1000),
    pytest.raises(traces.TraceError, match="Can't write .*: File too large"),
  ):
    traces.write(random_trace()[0], path)
  assert os.listdir(tmp_path) == [path.name] and path.read_text() == 'old'


def test_the_page_takes_its_place_whole(tmp_path, monkeypatch):
  path, trace, replace = tmp_path / 'trace.html', random_trace()[0], os.replace
  path.write_text('old')
  seen = []

  def watched(source, target):
    with open(source, 'rb') as new, open(target, 'rb') as old:
      seen.append((os.path.dirname(source), new.read(), old.read()))
    replace(source, target)

  monkeypatch.setattr(os, 'replace', watched)
  traces.write(trace, path)
  assert seen == [(str(tmp_path), traces.page(trace), b'old')]
  assert os.listdir(tmp_path) == [path.name]
  assert path.read_bytes() == traces.page(trace)


def test_an_unfinished_canvas_has_no_text():
  trace, _, _ = random_trace()
  trace.canvases[-1].kept = None
  data, read = decoded(traces.page(trace))
  assert data['canvases'][-1]['text'] is None and len(read[-1]) == 6
  assert data['canvases'][0]['text'] is not None


def test_the_picture_shows_entropies_and_what_was_accepted(tmp_path):
  pytest.importorskip('matplotlib', reason='matplotlib is not installed')
  image = pytest.importorskip('PIL.Image', reason='Pillow is not installed')
  mark = tuple(bytes.fromhex(traces._MARK[1:]))
  marked = {}
  for accepted in (0.0, 0.5):
    # No formula, and no letters of the font; neither fails nor warns.
    trace, canvases, _ = random_trace(
      prompt='$\\frac{ 日本 \x1b', accepted=accepted
    )
    traces.write(trace, tmp_path / 'trace.png')
    content = (tmp_path / 'trace.png').read_bytes()
    assert content.startswith(b'\x89PNG\r\n\x1a\n')
    pixels = np.asarray(image.open(io.BytesIO(content)).convert('RGB'))
    assert min(pixels.shape[:2]) > 300 and max(pixels.shape[:2]) < 4000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    marked[accepted] = int((pixels == mark).all(axis=-1).sum())
  # 5 pixels across are about 12 that are wholly inside of the dot.
  dots = sum(s.accepted_BL[0].sum() for states in canvases for s in states)
  assert marked[0.5] - marked[0.0] > 4 * dots > 0
