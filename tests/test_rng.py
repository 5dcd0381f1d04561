import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cola_jax import rng


def bits(key):
    return np.asarray(jax.random.key_data(key))


def test_a_key_depends_on_seed_stream_step_and_sample():
    keys = [
        rng.key(0, "train"),
        rng.key(1, "train"),
        rng.key(0, "sample"),
        rng.key(0, "train", 1),
        rng.key(0, "train", 0, 0),
        rng.key(0, "train", 0, 1),
    ]
    assert len({tuple(bits(key)) for key in keys}) == len(keys)


def test_a_key_is_a_function_of_its_arguments_traced_or_not():
    expected = bits(rng.key(3, "train", 17, 5))
    np.testing.assert_array_equal(bits(rng.key(3, "train", 17, 5)), expected)
    traced = jax.jit(lambda step, sample: rng.key(3, "train", step, sample))(17, 5)
    np.testing.assert_array_equal(bits(traced), expected)


def test_keys_of_samples_are_those_of_each_alone():
    keys = rng.key(0, "train", 2, jnp.array([5, 0, 9]))
    assert keys.shape == (3,)
    for i, sample in enumerate((5, 0, 9)):
        np.testing.assert_array_equal(bits(keys[i]), bits(rng.key(0, "train", 2, sample)))


def test_an_unknown_stream_is_an_error():
    with pytest.raises(ValueError):
        rng.key(0, "surprise")


def test_streams_keep_their_numbers():
    """A stream's number is part of every result: new ones go behind these."""
    assert rng.STREAMS[:4] == ("init", "train", "evaluate", "sample")


@pytest.mark.parametrize("draw", [rng.normal, rng.uniform])
def test_what_an_example_draws_does_not_depend_on_its_batch(draw):
    keys = rng.key(0, "train", 0, jnp.arange(4))
    values = draw(keys, (3, 2))
    assert values.shape == (4, 3, 2)
    np.testing.assert_array_equal(draw(keys[2:3], (3, 2))[0], values[2])
    assert len(np.unique(values)) == values.size


def test_split_gives_independent_keys_for_each_example():
    keys = rng.key(0, "train", 0, jnp.arange(4))
    parts = rng.split(keys, 3)
    assert len(parts) == 3 and all(part.shape == (4,) for part in parts)
    assert len({tuple(bits(key)) for part in (keys, *parts) for key in part}) == 16
    np.testing.assert_array_equal(bits(rng.split(keys[1:2], 3)[2][0]), bits(parts[2][1]))


def test_normal_and_uniform_have_their_moments():
    keys = rng.key(0, "train", 0, jnp.arange(100))
    values, shares = rng.normal(keys, (1000,)), rng.uniform(keys, (1000,))
    assert abs(values.mean()) < 0.015 and abs(values.std() - 1) < 0.01
    assert abs(shares.mean() - 0.5) < 0.005 and shares.min() >= 0 and shares.max() < 1
