"""Sequences that join a batch and move in it."""

import jax.numpy as jnp
import numpy as np

from cola_jax.sampling import places


def batch(*names: int):
    """Two leaves of sequences that are known by a number: one with the batch first, one a stacked cache."""
    numbers = jnp.array(names, jnp.float32)
    return {"row": numbers[:, None] + jnp.zeros((1, 2)), "cache": jnp.zeros((3, len(names), 1, 1, 1)).at[:].add(
        numbers[None, :, None, None, None])}  # fmt: skip


def names(tree) -> list[int]:
    rows, cache = np.asarray(tree["row"])[:, 0], np.asarray(tree["cache"])[..., 0, 0, 0]
    assert np.all(cache == rows)
    return rows.astype(int).tolist()


def test_new_sequences_take_the_places_that_they_are_given():
    assert names(places.insert(batch(1, 2, 3, 4), batch(8, 9), np.array([3, 0]))) == [9, 2, 3, 8]


def test_a_place_outside_of_the_batch_drops_its_sequence():
    assert names(places.insert(batch(1, 2, 3), batch(8, 9), np.array([1, 3]))) == [1, 8, 3]


def test_a_batch_grows_and_shrinks_to_the_sequences_that_are_named():
    assert names(places.select(batch(1, 2, 3), np.array([2, 0]))) == [3, 1]
    assert names(places.select(batch(1, 2), np.array([1, 0, 0, 0]))) == [2, 1, 1, 1]
