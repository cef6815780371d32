"""The live canvas: the denoising of a text step by step, on a terminal or in a
notebook.

Accepted tokens are in full colour, noise is dimmed; the prompt and finished
canvases stay above.
"""

from collections.abc import Callable
from collections.abc import Iterator
import html
import sys
import unicodedata

import numpy as np
from rich import console as rich_console
from rich import live as rich_live
from rich import text as rich_text

from diffusiongemma.diffusion import sampler
from diffusiongemma.text.tokenizer import Tokenizer

PROMPT, ACCEPTED, NOISE, STATUS = 'bold', 'default', 'bright_black', 'cyan'


def canvas_text(
  tokenizer: Tokenizer, tokens_L: np.ndarray, accepted_L: np.ndarray
) -> rich_text.Text:
  """A canvas with accepted tokens and noise in two styles.

  Line breaks in the noise are shown as `↵`, so that the picture does not jump;
  accepted ones are line breaks. Other control characters, which noise may
  contain, never reach the terminal.
  """
  text = rich_text.Text()
  start = 0
  while start < len(tokens_L):
    end = start
    while end < len(tokens_L) and accepted_L[end] == accepted_L[start]:
      end += 1
    piece = printable(tokenizer.decode(tokens_L[start:end].tolist()))
    if accepted_L[start]:
      text.append(piece, ACCEPTED)
    else:
      text.append(piece.replace('\n', '↵'), NOISE)
    start = end
  return text


def printable(text: str) -> str:
  """`text` with a replacement character for control characters other than line
  breaks."""
  return ''.join(
    '\ufffd' if unicodedata.category(c) == 'Cc' and c != '\n' else c
    for c in text
  )


class LiveCanvas:
  """Shows a generation live; `on_step` and `on_canvas` are callbacks of
  `generate`.

  A context manager. On a terminal it leaves nothing on the screen; in a
  notebook, which has one output that is replaced, the text without noise.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: str, max_steps: int):
    self._tokenizer = tokenizer
    self._max_steps = max_steps
    self._written = rich_text.Text().append(printable(prompt), PROMPT)
    self._notebook: Callable[[rich_text.Text], None] | None = None
    self._console = rich_console.Console(
      file=sys.stdout, highlight=False, force_jupyter=False
    )
    self._live = rich_live.Live(
      console=self._console,
      auto_refresh=False,
      vertical_overflow='crop',
      transient=True,
    )

  @property
  def is_seen(self) -> bool:
    """Whether the output is a terminal or a notebook."""
    return self.in_notebook or self._console.file.isatty()

  @property
  def in_notebook(self) -> bool:
    """Whether the output is that of a notebook's cell."""
    return 'ipykernel' in sys.modules

  def __enter__(self):
    if self.in_notebook:
      self._notebook = _output_of_cell()
    else:
      self._live.start()
    return self

  def __exit__(self, *unused):
    if self._notebook is None:
      self._live.stop()
    else:
      self._notebook(self._written)

  def on_step(self, step: int, state: sampler.SamplerState) -> None:
    """Redraws the canvas after a denoising step."""
    accepted_L = np.asarray(state.accepted_BL[0])
    converged = bool(state.converged_B[0])
    tokens_L = state.draft_BL[0] if converged else state.canvas_BL[0]
    shown = canvas_text(
      self._tokenizer, np.asarray(tokens_L), accepted_L | converged
    )
    status = rich_text.Text(
      f'\n\nstep {step} of at most {self._max_steps}, '
      f'{accepted_L.sum()} of {accepted_L.size} accepted',
      STATUS,
    )
    if self._notebook is None:
      self._live.update(self._fit(self._written + shown, status), refresh=True)
    else:
      self._notebook(self._written + shown + status)

  def on_canvas(self, tokens: list[int]) -> None:
    """Appends the text of a finished canvas."""
    self._written.append(printable(self._tokenizer.decode(tokens)), ACCEPTED)

  def _fit(self, body: rich_text.Text, status: rich_text.Text):
    """The last lines of the text that fit the terminal, and the status."""
    lines = body.wrap(self._console, self._console.width)
    room = max(1, self._console.height - 4)
    return rich_text.Text('\n').join(lines[-room:]) + status


def _output_of_cell() -> Callable[[rich_text.Text], None]:
  """A function that replaces an output of this notebook cell by a text."""
  from IPython import display

  output = display.display(display.HTML(''), display_id=True)
  return lambda text: output.update(display.HTML(to_html(text)))


def to_html(text: rich_text.Text) -> str:
  """A text as HTML whose colours suit light and dark pages."""
  pieces = []
  for start, end, style in _pieces(text):
    css = _STYLES.get(style, '')
    pieces.append(
      f'<span style="{css}">{html.escape(text.plain[start:end])}</span>'
    )
  return f'<pre style="white-space: pre-wrap">{"".join(pieces)}</pre>'


_STYLES = {
  PROMPT: 'font-weight: bold',
  NOISE: 'opacity: 0.45',
  STATUS: 'color: #0891b2',
}


def _pieces(text: rich_text.Text) -> Iterator[tuple[int, int, str]]:
  """(start, end, style) of the pieces of a text whose spans do not overlap; ''
  without a style."""
  end = 0
  for span in sorted(text.spans):
    if span.start > end:
      yield end, span.start, ''
    yield span.start, span.end, str(span.style)
    end = span.end
  if end < len(text.plain):
    yield end, len(text.plain), ''
