"""Rounds sizes to powers of two: similar shapes share one compiled program."""


def largest_power_of_two(most: int) -> int:
  """The largest power of two <= `most`; `most` >= 1."""
  return 1 << (most.bit_length() - 1)


def smallest_power_of_two(least: int) -> int:
  """The smallest power of two >= `least`; `least` >= 1."""
  return 1 << (least - 1).bit_length()
