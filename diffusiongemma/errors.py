"""The base class of all errors that a user can fix."""


class Error(Exception):
  """An error that the user can fix; the message says how.

  Attributes:
    exit_code: of the command line: 2 for wrong usage, 1 for any other failure.
  """

  exit_code = 1
