"""Powers of two, which blocks of kernels have as sizes."""


def largest_power_of_two(most: int) -> int:
  """The largest up to `most`, which is 1 or more."""
  return 1 << (most.bit_length() - 1)
