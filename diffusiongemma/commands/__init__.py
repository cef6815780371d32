"""The command line: a file for each mode, with its flags."""
