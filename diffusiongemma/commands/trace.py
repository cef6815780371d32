"""A trace of the denoising steps of a text, as a page or a picture.

`.html` is one self-contained file: a slider through the steps, each token
coloured by its entropy. `.png` is a heat map, steps x positions. The page
contains its data as JSON:

  pieces, ids   the distinct tokens: their texts, and their ids
  canvases      for each its `text`, the number of tokens `kept`, its `steps`:
    canvas, draft  for each position i + 1 for the token `pieces[i]`, or 0 for
                   that of the step before (at step 0 there is no draft)
    entropy        in thousandths of a nat
    accepted       '1' where accepted, else '0'
"""

import base64
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import re
from typing import Any
from typing import NamedTuple
import warnings

import numpy as np

from diffusiongemma.diffusion import sampler
from diffusiongemma.errors import Error
from diffusiongemma.generation import live
from diffusiongemma.text import tokenizer as tokenizers

TEMPLATE = tokenizers.ASSETS / 'trace.html'
SUFFIXES = ('.html', '.png')

# Characters that could end the JSON's element, or reverse the text around it.
_ESCAPED = re.compile(
  '[<\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]'
)
# The colours of the page's light theme, oklch(.94 .035 200) to
# oklch(.5 .2 318).
_RAMP = ('#d1f3f4', '#93d1ef', '#77a5ee', '#816fdb', '#902cab')
_MARK = '#18202b'


class TraceError(Error, ValueError):
  """A trace that can't be written."""


class Step(NamedTuple):
  """Row 0 of the arrays of a `SamplerState`."""

  canvas_L: np.ndarray
  draft_L: np.ndarray
  accepted_L: np.ndarray
  entropy_L: np.ndarray


@dataclasses.dataclass
class Canvas:
  """The steps of a canvas, and after the last the tokens kept of it."""

  steps: list[Step] = dataclasses.field(default_factory=list)
  kept: list[int] | None = None


@dataclasses.dataclass
class Trace:
  """Records a generation; `on_step` and `on_canvas` are callbacks of
  `generate`."""

  tokenizer: tokenizers.Tokenizer
  prompt: str
  max_denoising_steps: int
  settings: tuple[str, ...] = ()  # Shown as they are: 'seed 0'.
  canvases: list[Canvas] = dataclasses.field(default_factory=list)

  def on_step(self, step: int, state: sampler.SamplerState) -> None:
    """Records the first row, except for steps where it was frozen."""
    if int(state.steps_B[0]) < step or (step == 0 and state.converged_B[0]):
      return
    if step == 0:
      self.canvases.append(Canvas())
    names = ('canvas_BL', 'draft_BL', 'accepted_BL', 'entropy_BL')
    arrays = [np.array(getattr(state, name)[0]) for name in names]
    self.canvases[-1].steps.append(Step(*arrays))

  def on_canvas(self, tokens: Sequence[int]) -> None:
    """Records the tokens kept of a finished canvas."""
    if self.canvases and self.canvases[-1].kept is None:
      self.canvases[-1].kept = [int(token) for token in tokens]


def check_path(path: str | os.PathLike[str]) -> None:
  """Raises `TraceError` unless a trace can be written to `path`."""
  path = pathlib.Path(path)
  if path.suffix.lower() not in SUFFIXES:
    raise TraceError(
      f'A trace is a page or a picture: {str(path)!r} must end in '
      f'{" or ".join(SUFFIXES)}.'
    )
  if os.path.isdir(path):  # Unlike pathlib, it accepts any name.
    raise TraceError(f'{str(path)!r} is a folder; name a file in it.')
  if not os.path.isdir(path.parent):
    raise TraceError(f'There is no folder {str(path.parent)!r} for the trace.')
  # Permissions prove nothing: root has all, even on a read-only disk.
  with _beside(path) as temporary:
    temporary.touch()
  if path.suffix.lower() == '.png':
    _import_matplotlib()


def write(trace: Trace, path: str | os.PathLike[str]) -> None:
  """Writes a trace; `path` is complete afterwards, or unchanged.

  Raises:
    TraceError: as in `check_path`, the disk is full, or nothing was recorded.
  """
  check_path(path)
  path = pathlib.Path(path)
  if not any(len(canvas.steps) > 1 for canvas in trace.canvases):
    raise TraceError('No denoising step was recorded for the trace.')
  is_page = path.suffix.lower() == '.html'
  content = page(trace) if is_page else picture(trace)
  with _beside(path) as temporary:
    temporary.write_bytes(content)
    os.replace(temporary, path)


@contextlib.contextmanager
def _beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A temporary file beside `path`. Raises `TraceError` for an `OSError`."""
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    yield temporary
  except OSError as error:
    reason = error.strerror or error
    raise TraceError(f"Can't write {str(path)!r}: {reason}.") from error
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()


def page(trace: Trace) -> bytes:
  """The trace as HTML."""
  content = json.dumps(
    as_json(trace), ensure_ascii=False, separators=(',', ':')
  )
  content = _ESCAPED.sub(lambda c: f'\\u{ord(c.group()):04x}', content)
  template = TEMPLATE.read_text('utf-8')
  # Only this script may run, even if a browser found another one in the data.
  script = template.rpartition('<script>')[2].rpartition('</script>')[0]
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  template = template.replace('{{script digest}}', f'sha256-{digest}')
  return template.replace('{{data}}', content).encode()


def as_json(trace: Trace) -> dict[str, Any]:
  """The data of the page; see the module docstring."""
  steps = [step for canvas in trace.canvases for step in canvas.steps]
  ids = np.unique([(step.canvas_L, step.draft_L) for step in steps])
  ids = ids[ids >= 0]
  return {
    'prompt': trace.prompt,
    'max_denoising_steps': trace.max_denoising_steps,
    'settings': list(trace.settings),
    'ids': ids.tolist(),
    'pieces': trace.tokenizer.pieces(ids.tolist()),
    'canvases': [
      {
        'text': None if c.kept is None else trace.tokenizer.decode(c.kept),
        'kept': None if c.kept is None else len(c.kept),
        'steps': [
          _step_as_json(step, before, ids)
          for before, step in zip([None, *c.steps], c.steps, strict=False)
        ],
      }
      for c in trace.canvases
    ],
  }


def _step_as_json(
  step: Step, before: Step | None, ids: np.ndarray
) -> dict[str, Any]:
  changes = {}
  for name in ('canvas', 'draft'):
    tokens_L = getattr(step, f'{name}_L')
    before_L = getattr(before, f'{name}_L') if before else -1
    indices_L = np.searchsorted(ids, tokens_L)
    same_L = tokens_L == before_L
    changes[name] = np.where(same_L, 0, indices_L + 1).tolist()
  return {
    **changes,
    'entropy': [
      round(1000 * nats) if math.isfinite(nats) else None
      for nats in step.entropy_L.tolist()
    ],
    'accepted': ''.join('01'[bit] for bit in step.accepted_L.tolist()),
  }


def picture(trace: Trace) -> bytes:
  """The trace as PNG: a heat map for each canvas, a dot where accepted."""
  matplotlib = _import_matplotlib()
  canvases = [c.steps[1:] for c in trace.canvases if len(c.steps) > 1]
  heights = [len(steps) for steps in canvases]
  length = canvases[0][0].entropy_L.size
  highest = np.nanmax([s.entropy_L for c in canvases for s in c], initial=1e-3)
  cell = min(max(10 / length, 0.03), 0.15)  # Inches, as far as there is room.
  dot = 72 * cell * 0.34  # Points.
  height = min(cell * sum(heights) + 0.35 * len(heights) + 1.4, 100)
  figure = matplotlib.figure.Figure(
    (max(cell * length + 1.8, 7), height), dpi=150, layout='constrained'
  )
  axes = figure.subplots(
    len(canvases), sharex=True, squeeze=False, height_ratios=heights
  )[:, 0]
  ramp = matplotlib.colors.LinearSegmentedColormap.from_list('trace', _RAMP)
  norm = matplotlib.colors.PowerNorm(0.5, 0, highest)
  for number, (axis, steps) in enumerate(zip(axes, canvases, strict=True), 1):
    image = axis.imshow(
      [step.entropy_L for step in steps],
      cmap=ramp,
      norm=norm,
      aspect='auto',
      interpolation='none',
      extent=(-0.5, length - 0.5, len(steps) + 0.5, 0.5),
    )
    rows, columns = np.nonzero([step.accepted_L for step in steps])
    dots = axis.scatter(columns, rows + 1, dot**2, _MARK, linewidths=0)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel(f'canvas {number}\nstep' if len(axes) > 1 else 'step')
  axes[-1].set_xlabel('position on the canvas')
  figure.colorbar(image, ax=axes, label='entropy in nats', aspect=40)
  figure.legend(
    [dots],
    ['accepted'],
    loc='outside upper right',
    markerscale=4 / dot,
    frameon=False,
  )
  title = live.printable(' '.join(trace.prompt.split()))
  title = title if len(title) <= 60 else title[:59] + '…'
  # A `$` in a prompt is no formula; glyphs that the font lacks become boxes.
  figure.suptitle(f'“{title}”', x=0.01, ha='left', parse_math=False)
  file = io.BytesIO()
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Glyph', UserWarning)
    figure.savefig(file, format='png')
  return file.getvalue()


def _import_matplotlib():
  """Imports matplotlib, which only a picture needs. Without pyplot, which has
  global state and may open windows.

  Raises:
    TraceError: it is not installed.
  """
  try:
    import matplotlib.colors
    import matplotlib.figure
  except ImportError as error:
    raise TraceError(
      'A trace as .png needs matplotlib: pip install matplotlib.'
    ) from error
  return matplotlib
