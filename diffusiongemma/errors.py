"""The base of all errors that a person can mend."""


class Error(Exception):
  """Something that the user can mend; the message says how.

  Attributes:
    exit_code: what the command line ends with: 2 for wrong usage, 1 for what
      failed although it was asked for rightly.
  """

  exit_code = 1
