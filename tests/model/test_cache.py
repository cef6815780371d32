"""The ring of each layer against a dictionary that remembers everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.model import cache as kv_cache


@pytest.mark.parametrize('num_slots', [1, 4, 7, 32])
def test_a_slot_holds_the_newest_token_of_its_residue(num_slots):
  length_B = jnp.arange(12)
  positions = np.asarray(kv_cache.slot_positions(length_B, num_slots))
  for length in range(12):
    held = {p % num_slots: p for p in range(length)}  # later ones overwrite
    for slot in range(num_slots):
      expected = held.get(slot)
      if expected is None:
        assert positions[length, slot] < 0
      else:
        assert positions[length, slot] == expected


@pytest.mark.parametrize('num_slots', [3, 5, 40])
def test_write_keeps_the_last_tokens_of_each_row(num_slots):
  """Over several calls, rows of different lengths, none and too many new."""
  write = jax.jit(kv_cache.write)
  slots = jnp.full((3, num_slots, 1, 2), -1.0)
  length_B = np.zeros(3, np.int32)
  for new_B in ([4, 0, 6], [1, 2, 6], [6, 6, 0]):
    new_BP = np.full((3, 6), 1000.0)  # padding, never to be seen
    for b, new in enumerate(new_B):
      new_BP[b, :new] = length_B[b] + np.arange(new)
    values = jnp.asarray(new_BP)[:, :, None, None] * jnp.ones((1, 1, 1, 2))
    slots = write(slots, values, jnp.asarray(length_B), jnp.asarray(new_B))
    length_B = length_B + np.array(new_B, np.int32)
    positions = kv_cache.slot_positions(jnp.asarray(length_B), num_slots)
    held = np.where(np.asarray(positions) >= 0, positions, -1)
    np.testing.assert_array_equal(slots[:, :, 0, 0], held)
    np.testing.assert_array_equal(slots[:, :, 0, 1], held)


def test_no_slot_is_written_twice():
  """A scatter to one place twice has no defined result on an accelerator."""
  for num_slots in (1, 3, 8):
    slot_BP = kv_cache.slots_for(
      jnp.arange(5), jnp.array([0, 2, 6, 5, 3]), 6, num_slots
    )
    for row in np.asarray(slot_BP):
      assert len(set(row)) == 6


def test_an_empty_cache_can_be_donated(model_config):
  """None of its arrays is another's too."""
  add = jax.jit(
    lambda cache: jax.tree.map(lambda x: x + 1, cache), donate_argnums=0
  )
  made = jax.tree.leaves(add(kv_cache.init_cache(model_config, 2, 5)))
  assert all((np.asarray(x) == 1).all() for x in made)


def test_local_layers_hold_their_window_only(model_config):
  cache = kv_cache.init_cache(model_config, 2, 100)
  slots = [k.shape[1] for k in cache.k]
  W = model_config.sliding_window
  expected = [
    W if kind == 'local' else 100 for kind in model_config.attention_pattern
  ]
  assert slots == expected == [v.shape[1] for v in cache.v]
