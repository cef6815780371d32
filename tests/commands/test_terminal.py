"""What the live canvas shows."""

import io

import numpy as np
from rich import console as rich_console

from diffusiongemma.commands import streams
from diffusiongemma.commands import terminal
from diffusiongemma.text import tokenizer as tokenizers

TOKENIZER = tokenizers.load_tokenizer()


def test_accepted_tokens_stand_out_and_noise_is_dim():
  ids = np.array(TOKENIZER.encode('To be,\nor not'))
  accepted = np.arange(len(ids)) >= len(ids) - 2
  text = terminal.canvas_text(TOKENIZER, ids, accepted)
  assert text.plain == 'To be,↵or not'
  styles = {text.plain[s.start : s.end]: s.style for s in text.spans}
  assert set(styles.values()) == {terminal.NOISE, terminal.ACCEPTED}
  steady = TOKENIZER.decode(ids[accepted])
  assert styles[steady] == terminal.ACCEPTED


def test_accepted_line_breaks_are_line_breaks():
  ids = np.array(TOKENIZER.encode('a\nb'))
  everything = np.ones(len(ids), bool)
  assert terminal.canvas_text(TOKENIZER, ids, everything).plain == 'a\nb'


def test_control_characters_never_reach_the_terminal():
  ids = np.array(TOKENIZER.encode('a\x1b[31mb\x07\r\x9b'))
  for accepted in (True, False):
    text = terminal.canvas_text(TOKENIZER, ids, np.full(len(ids), accepted))
    assert text.plain == 'a\ufffd[31mb\ufffd\ufffd\ufffd'


def test_any_text_can_be_printed_and_read(monkeypatch):
  """Also where the terminal's encoding lacks its signs."""
  bytes_in = io.BytesIO('日\n'.encode())
  files = {
    'stdin': io.TextIOWrapper(bytes_in, 'ascii'),
    'stdout': io.TextIOWrapper(io.BytesIO(), 'ascii'),
    'stderr': io.TextIOWrapper(io.BytesIO(), 'latin-1'),
  }
  for name, stream in files.items():
    monkeypatch.setattr(f'sys.{name}', stream)
  streams.print_anything()
  print('a 日本 \udce6')
  print('é 日', file=files['stderr'])
  console = rich_console.Console(file=files['stdout'])
  console.print(terminal.rich_text.Text('↵'))
  written = {}
  for name in ('stdout', 'stderr'):
    files[name].flush()
    written[name] = files[name].buffer.getvalue()
  assert written['stdout'] == b'a \\u65e5\\u672c \\udce6\n\\u21b5\n'
  assert written['stderr'] == b'\xe9 \\u65e5\n'
  assert input() == '\udce6\udc97\udca5'
  monkeypatch.setattr('sys.stdout', io.StringIO())
  streams.print_anything()  # No file: nothing to change.


def test_only_the_prompt_is_bold():
  canvas = terminal.LiveCanvas(TOKENIZER, 'To be', 4)
  canvas.on_canvas(TOKENIZER.encode(' or not'))
  assert canvas._written.plain == 'To be or not'
  assert not canvas._written.style
  bold = [s for s in canvas._written.spans if s.style == terminal.PROMPT]
  assert [(s.start, s.end) for s in bold] == [(0, 5)]


def test_text_longer_than_the_screen_shows_its_end():
  canvas = terminal.LiveCanvas(TOKENIZER, 'line\n' * 100 + 'last', 4)
  canvas._console = rich_console.Console(
    file=io.StringIO(), width=40, height=12, force_terminal=True
  )
  shown = canvas._fit(canvas._written, terminal.rich_text.Text('\nstatus'))
  lines = shown.plain.split('\n')
  assert len(lines) <= 10 and lines[-1] == 'status' and lines[-2] == 'last'
