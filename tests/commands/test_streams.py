"""Any text on any terminal."""

import io

from rich import console as rich_console
from rich import text as rich_text

from diffusiongemma.commands import streams


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
  console.print(rich_text.Text('↵'))
  written = {}
  for name in ('stdout', 'stderr'):
    files[name].flush()
    written[name] = files[name].buffer.getvalue()
  assert written['stdout'] == b'a \\u65e5\\u672c \\udce6\n\\u21b5\n'
  assert written['stderr'] == b'\xe9 \\u65e5\n'
  assert input() == '\udce6\udc97\udca5'
  monkeypatch.setattr('sys.stdout', io.StringIO())
  streams.print_anything()  # No file: nothing to change.
