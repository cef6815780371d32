"""The command line: a mode is a file with its flags and `run(overrides)`.

The first line of the file says what the mode does, for `--help`. What `run`
needs it imports itself: the flags of all modes are listed in a moment, and a
mode loads nothing of another one.
"""
