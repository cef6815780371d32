"""Every mask against the sentence that defines it, cell by cell."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.model import masks

# Positions in the slots of a cache, as a ring leaves them: row 0 is empty.
START_B = np.array([0, 3, 7])
CACHED_BS = np.array([[-4, -3, -2, -1], [0, 1, 2, -1], [4, 5, 6, 3]])


@pytest.mark.parametrize('window', [None, 1, 3, 50])
def test_prefill_mask(window):
  image_BP = np.array([[-1, 0, 0, 0, -1], [2, 2, 3, 3, -1], [-1] * 5])
  mask_BPS = masks.prefill_mask(
    jnp.asarray(START_B), jnp.asarray(CACHED_BS), 5, window, image_BP
  ).seen_BLS
  assert mask_BPS.shape == (3, 5, 9)
  for b, start in enumerate(START_B):
    keys = [*CACHED_BS[b], *(start + np.arange(5))]
    image = [-1] * 4 + list(image_BP[b])
    for i in range(5):
      query = start + i
      for s, key in enumerate(keys):
        near = window is None or query - key < window
        seen = 0 <= key <= query and near
        same_image = image[s] >= 0 and image[s] == image[4 + i]
        assert mask_BPS[b, i, s] == (seen or same_image)


@pytest.mark.parametrize('window', [None, 2])
def test_how_many_slots_hold_something(window):
  start_B, cached_BS = jnp.asarray(START_B), jnp.asarray(CACHED_BS)
  for mask in (
    masks.prefill_mask(start_B, cached_BS, 5, window),
    masks.denoise_mask(start_B[:, None], cached_BS, 2, window),
    masks.denoise_mask(start_B[:, None] + jnp.arange(2), cached_BS, 2, window),
  ):
    np.testing.assert_array_equal(mask.filled_B, [0, 3, 4])
  none_BS = jnp.zeros((3, 0), jnp.int32)
  assert masks.prefill_mask(start_B, none_BS, 5, window).filled_B is None


@pytest.mark.parametrize('window', [None, 3])
def test_masks_of_packed_documents(window):
  """Nothing before the document is seen; the rest is as it was."""
  start_B, none_BS = jnp.zeros(1, jnp.int32), jnp.zeros((1, 0), jnp.int32)
  first = np.array([0, 0, 2, 2, 2, 5])
  mask = masks.prefill_mask(start_B, none_BS, 6, window, None, first[None])
  plain = masks.prefill_mask(start_B, none_BS, 6, window)
  assert mask.window == plain.window == (window or 6)
  for i in range(6):
    for s in range(6):
      assert mask.seen_BLS[0, i, s] == (
        plain.seen_BLS[0, i, s] and s >= first[i]
      )
  start_BK, cached_BS = jnp.array([[1, 4]]), jnp.arange(6)[None]
  mask = masks.denoise_mask(start_BK, cached_BS, 2, window, jnp.array([[0, 2]]))
  plain = masks.denoise_mask(start_BK, cached_BS, 2, window)
  for i in range(4):
    for s in range(10):
      before = s < 6 and s < (0, 2)[i // 2]
      assert mask.seen_BLS[0, i, s] == (plain.seen_BLS[0, i, s] and not before)


def test_only_text_read_afresh_is_known_to_stay_within_the_window():
  start_B, none_BS = jnp.zeros(1, jnp.int32), jnp.zeros((1, 0), jnp.int32)
  image_BP = jnp.array([[-1, 0, 0, 0, 0, -1]])
  assert masks.prefill_mask(start_B, none_BS, 6, 2).window == 2
  assert masks.prefill_mask(start_B, none_BS, 6, 2, image_BP).window is None
  assert masks.prefill_mask(start_B, none_BS, 6, None).window == 6
  cached_BS = jnp.array([[0, 1]])
  assert masks.prefill_mask(start_B + 2, cached_BS, 6, 2).window is None
  assert masks.prefill_mask(start_B + 2, cached_BS, 6, None).window is None


@pytest.mark.parametrize('window', [None, 2, 4, 50])
def test_denoise_mask(window):
  """Local layers see W - 1 tokens of the prefix, whatever the query."""
  mask = masks.denoise_mask(
    jnp.asarray(START_B)[:, None], jnp.asarray(CACHED_BS), 4, window
  ).seen_BLS
  assert mask.shape == (3, 1, 8)
  for b, length in enumerate(START_B):
    first = 0 if window is None else max(0, length - (window - 1))
    expected = [first <= key < length for key in CACHED_BS[b]] + [True] * 4
    assert mask[b, 0].tolist() == expected


@pytest.mark.parametrize('window', [None, 2, 4, 50])
def test_denoise_mask_of_several_canvases(window):
  """Each sees the text before it, which the cache holds all of, and itself."""
  start_BK = np.array([[2, 4, 6], [1, 3, 0]])
  cached_BS = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, -3, -2, -1]])
  mask = masks.denoise_mask(
    jnp.asarray(start_BK), jnp.asarray(cached_BS), 2, window
  ).seen_BLS
  assert mask.shape == (2, 6, 14)
  for b in range(2):
    for i in range(6):
      start = start_BK[b, i // 2]
      first = 0 if window is None else max(0, start - (window - 1))
      prefix = [first <= key < start for key in cached_BS[b]]
      own = [j // 2 == i // 2 for j in range(6)]
      assert mask[b, i].tolist() == prefix + own
