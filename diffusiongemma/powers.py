"""Rounds sizes to powers of two: similar shapes share one compiled program."""


def largest_power_of_two(most: int) -> int:
  """The largest up to `most`, which is 1 or more."""
  return 1 << (most.bit_length() - 1)


def smallest_power_of_two(least: int) -> int:
  """The smallest from `least` on, which is 1 or more."""
  return 1 << (least - 1).bit_length()
