"""What is printed and read, whatever the terminal."""

import io
import sys


def print_anything() -> None:
  """From now on any text can be printed and read, whatever the terminal's
  encoding: signs that it lacks are printed by their numbers, bytes that it does
  not know are read as halves of surrogate pairs, as those of arguments are."""
  for stream, errors in (
    (sys.stdout, 'backslashreplace'),
    (sys.stderr, 'backslashreplace'),
    (sys.stdin, 'surrogateescape'),
  ):
    # A stream of standard input that was read from can't be changed any more.
    if isinstance(stream, io.TextIOWrapper) and stream.errors != errors:
      stream.reconfigure(errors=errors)
