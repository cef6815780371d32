"""Standard streams that accept any text, whatever the terminal's encoding."""

import io
import sys


def print_anything() -> None:
  """Makes standard streams accept any text: characters outside the encoding are
  printed as escapes, undecodable bytes are read as lone surrogates, like those
  of arguments."""
  for stream, errors in (
    (sys.stdout, 'backslashreplace'),
    (sys.stderr, 'backslashreplace'),
    (sys.stdin, 'surrogateescape'),
  ):
    # Standard input can't be reconfigured after it was read from.
    if isinstance(stream, io.TextIOWrapper) and stream.errors != errors:
      stream.reconfigure(errors=errors)
