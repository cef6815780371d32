"""Digests: the same wherever an array lies, another for any other array."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.checkpoints import digest


@pytest.mark.parametrize(
  'dtype', ['float32', 'bfloat16', 'int32', 'uint8', 'bool', 'float16']
)
@pytest.mark.parametrize('shape', [(), (1,), (3, 5, 7), (300, 11), (0, 4)])
def test_host_and_device_agree(dtype, shape):
  values = np.random.default_rng(0).normal(size=shape) * 50
  array = jnp.asarray(values).astype(dtype)
  on_device = np.asarray(digest._sums_of_array(array))
  on_host = digest._sums_of_host_array(np.asarray(array))
  assert on_device.tolist() == on_host.tolist()


def test_pieces_add_up(monkeypatch):
  array = np.arange(5000, dtype=np.float32)
  whole = digest.digest(array)
  monkeypatch.setattr(digest, '_MOST_WORDS', 512)
  assert digest.digest(array) == whole


def test_any_flipped_bit_is_seen():
  array = np.random.default_rng(1).normal(size=(8, 9)).astype(np.float32)
  seen = {digest.digest(array)}
  for bit in range(32):
    for place in (0, 17, 71):
      other = array.copy()
      other.reshape(-1).view(np.uint32)[place] ^= np.uint32(1 << bit)
      seen.add(digest.digest(other))
  assert len(seen) == 1 + 3 * 32


def test_what_cancels_in_a_plain_sum_is_seen():
  """Two signs turned, two values exchanged, zeros moved."""
  array = np.array([1.0, 2.0, 0.0, 0.0, 3.0, 4.0], np.float32)
  others = [
    array * np.array([-1, 1, 1, 1, 1, -1], np.float32),
    array[[1, 0, 2, 3, 4, 5]],
    array[[2, 3, 0, 1, 4, 5]],
    np.zeros_like(array),
  ]
  assert len({digest.digest(x) for x in [array, *others]}) == 5


def test_eight_byte_numbers_are_read_whole():
  array = np.arange(10)
  other = array + (1 << 40)
  assert array.dtype.itemsize == 8
  assert digest.digest(array) != digest.digest(other)


def test_digests_names_arrays_by_their_path():
  tree = {'a': {'b': jnp.zeros(3)}, 'c': jnp.ones(2)}
  found = digest.digests(tree)
  assert set(found) == {"['a']['b']", "['c']"}
  assert found["['c']"] == digest.digest(tree['c'])
