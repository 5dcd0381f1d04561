import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import assert_close, normal

from cola_jax.nn import embeddings


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_turns_each_pair_of_channels(interleaved):
    """As multiplication of complex numbers; channels beyond the rotated ones stay as they are."""
    dim, theta, positions = 6, 100.0, np.array([[0, 1, 7], [3, 2, 11]])
    x = np.asarray(normal(2, 3, 2, 8))
    first, second = (x[..., 0:6:2], x[..., 1:6:2]) if interleaved else (x[..., 0:3], x[..., 3:6])
    angles = positions[..., None] * theta ** (-2 * np.arange(3) / dim)
    turned = (first + 1j * second) * np.exp(1j * angles)[:, :, None, :]
    expected = x.copy()
    if interleaved:
        expected[..., 0:6:2], expected[..., 1:6:2] = turned.real, turned.imag
    else:
        expected[..., 0:3], expected[..., 3:6] = turned.real, turned.imag
    ours = embeddings.rope_angles(jnp.asarray(positions), dim, theta)
    actual = embeddings.apply_rope(jnp.asarray(x), ours, interleaved)
    assert_close(actual, expected, 1e-6)
    np.testing.assert_array_equal(actual[..., 6:], x[..., 6:])


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_products_depend_on_the_distance_only(interleaved):
    def products(start):
        positions = start + jnp.array([[0, 2, 3, 9]])
        q, k = normal(1, 4, 2, 8), normal(1, 4, 2, 8, seed=1)
        angles = embeddings.rope_angles(positions, 8, 10_000.0)
        q, k = (embeddings.apply_rope(x, angles, interleaved) for x in (q, k))
        return jnp.einsum("bnhc,bmhc->bhnm", q, k)

    assert_close(products(100), products(0), 2e-5)
    unturned = jnp.einsum("bnhc,bmhc->bhnm", normal(1, 4, 2, 8), normal(1, 4, 2, 8, seed=1))
    assert np.max(np.abs(products(0) - unturned)) > 0.1


def test_rope_of_no_channels_is_the_identity():
    x = normal(1, 3, 2, 4)
    np.testing.assert_array_equal(
        embeddings.apply_rope(x, embeddings.rope_angles(jnp.arange(3)[None], 0, 10.0), interleaved=True), x
    )


def test_rope_keeps_bfloat16():
    angles = embeddings.rope_angles(jnp.arange(3)[None], 4, 10.0)
    assert embeddings.apply_rope(normal(1, 3, 2, 8).astype(jnp.bfloat16), angles, True).dtype == jnp.bfloat16


def test_time_features_are_sines_then_cosines_of_1000_t():
    times = np.array([[0.0, 0.25], [0.731, 1.0]])
    frequencies = np.array([10_000.0 ** (-i / 128) for i in range(128)])
    angles = 1000 * times[..., None] * frequencies
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    actual = embeddings.time_features(jnp.asarray(times, jnp.float32))
    assert actual.shape == (2, 2, 256)
    # float32 represents 1000 t to 6e-5.
    np.testing.assert_allclose(actual, expected, atol=2e-4)
    np.testing.assert_array_equal(actual[0, 0], [0.0] * 128 + [1.0] * 128)
