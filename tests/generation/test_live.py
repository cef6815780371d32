"""What the live canvas shows."""

import io
import sys
import types

import numpy as np
from rich import console as rich_console

import diffusiongemma as dg
from diffusiongemma.generation import live
from diffusiongemma.text import tokenizer as tokenizers

TOKENIZER = tokenizers.load_tokenizer()


def test_accepted_tokens_stand_out_and_noise_is_dim():
  ids = np.array(TOKENIZER.encode('To be,\nor not'))
  accepted = np.arange(len(ids)) >= len(ids) - 2
  text = live.canvas_text(TOKENIZER, ids, accepted)
  assert text.plain == 'To be,↵or not'
  styles = {text.plain[s.start : s.end]: s.style for s in text.spans}
  assert set(styles.values()) == {live.NOISE, live.ACCEPTED}
  steady = TOKENIZER.decode(ids[accepted])
  assert styles[steady] == live.ACCEPTED


def test_accepted_line_breaks_are_line_breaks():
  ids = np.array(TOKENIZER.encode('a\nb'))
  everything = np.ones(len(ids), bool)
  assert live.canvas_text(TOKENIZER, ids, everything).plain == 'a\nb'


def test_control_characters_never_reach_the_terminal():
  ids = np.array(TOKENIZER.encode('a\x1b[31mb\x07\r\x9b'))
  for accepted in (True, False):
    text = live.canvas_text(TOKENIZER, ids, np.full(len(ids), accepted))
    assert text.plain == 'a\ufffd[31mb\ufffd\ufffd\ufffd'


def test_only_the_prompt_is_bold():
  canvas = live.LiveCanvas(TOKENIZER, 'To be', 4)
  canvas.on_canvas(TOKENIZER.encode(' or not'))
  assert canvas._written.plain == 'To be or not'
  assert not canvas._written.style
  bold = [s for s in canvas._written.spans if s.style == live.PROMPT]
  assert [(s.start, s.end) for s in bold] == [(0, 5)]


def test_text_longer_than_the_screen_shows_its_end():
  canvas = live.LiveCanvas(TOKENIZER, 'line\n' * 100 + 'last', 4)
  canvas._console = rich_console.Console(
    file=io.StringIO(), width=40, height=12, force_terminal=True
  )
  shown = canvas._fit(canvas._written, live.rich_text.Text('\nstatus'))
  lines = shown.plain.split('\n')
  assert len(lines) <= 10 and lines[-1] == 'status' and lines[-2] == 'last'


class Output:
  """What a notebook shows in one output of a cell."""

  def __init__(self):
    self.shown = []

  def display(self, content, display_id):
    assert display_id
    self.shown.append(content)
    return self

  def update(self, content):
    self.shown[-1] = content


def test_a_notebook_has_one_output_without_noise_at_the_end(
  monkeypatch, chat_run, capsys
):
  output = Output()
  page = types.SimpleNamespace(HTML=str, display=output.display)
  monkeypatch.setitem(sys.modules, 'ipykernel', types.ModuleType('ipykernel'))
  notebook = types.SimpleNamespace(display=page)
  monkeypatch.setitem(sys.modules, 'IPython', notebook)
  seen = []
  monkeypatch.setattr(
    output, 'update', lambda x: (seen.append(x), Output.update(output, x))
  )
  written = dg.show(chat_run, 'what <is', max_new_tokens=8)
  assert len(output.shown) == 1 and len(seen) >= written.steps
  assert 'accepted</span>' in seen[0] and 'opacity' in seen[0]
  (last,) = output.shown
  assert 'opacity' not in last and 'accepted</span>' not in last
  assert 'font-weight: bold">what &lt;is</span>' in last
  assert not capsys.readouterr().out


def test_a_file_gets_the_text_alone(chat_run, capsys):
  written = dg.show(chat_run, 'what', max_new_tokens=8)
  assert capsys.readouterr().out == live.printable(f'what{written.text}\n')
  assert written == dg.generate(chat_run, 'what', max_new_tokens=8)
