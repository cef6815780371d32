"""The command line: a mode is a file with its flags and `run(overrides)`.

The first line of the file is the help of the mode. `run` imports what it needs
itself, so that `--help` is fast and a mode loads nothing of another one.
"""
