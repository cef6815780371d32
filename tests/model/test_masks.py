"""Every mask against the sentence that defines it, cell by cell."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.model import masks


@pytest.mark.parametrize('window', [None, 1, 3, 50])
def test_prefill_mask(window):
  start_B = np.array([0, 4, 7])
  mask = masks.prefill_mask(jnp.asarray(start_B), 5, 13, window)
  for b, start in enumerate(start_B):
    for query in range(5):
      for key in range(13):
        position = start + query
        seen = key <= position and (window is None or position - key < window)
        assert mask[b, query, key] == seen


@pytest.mark.parametrize('window', [None, 2, 4, 50])
def test_denoise_mask(window):
  """Local layers see W - 1 tokens of the prefix, whatever the query."""
  length_B = np.array([0, 3, 9])
  mask = masks.denoise_mask(jnp.asarray(length_B), 11, 4, window)
  assert mask.shape == (3, 1, 15)
  for b, length in enumerate(length_B):
    first = 0 if window is None else max(0, length - (window - 1))
    expected = [first <= key < length for key in range(11)] + [True] * 4
    assert mask[b, 0].tolist() == expected
