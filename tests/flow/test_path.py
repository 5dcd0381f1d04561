import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import assert_close, normal, uniform

from cola_jax.flow import path

Z0, Z1, T = normal(3, 5, 4), normal(3, 5, 4, seed=1), uniform(3, 5, 1)


def test_linear_path():
    z0, z1, t = np.asarray(Z0), np.asarray(Z1), np.asarray(T)
    point, velocity = path.interpolate(Z0, Z1, T)
    assert_close(point, (1 - t) * z0 + t * z1, 1e-6)
    assert_close(velocity, z1 - z0, 1e-6)


def test_path_begins_at_data_and_ends_at_noise():
    np.testing.assert_array_equal(path.interpolate(Z0, Z1, jnp.zeros_like(T))[0], Z0)
    np.testing.assert_array_equal(path.interpolate(Z0, Z1, jnp.ones_like(T))[0], Z1)


@pytest.mark.parametrize("alpha", [lambda t: jnp.sin(jnp.pi * t / 2) ** 2, lambda t: t**3], ids=["sine", "cubic"])
def test_velocity_of_another_path_is_its_derivative(alpha):
    """Central difference of points that NumPy computes in float64."""
    step = 1e-3
    z0, z1, t = (np.asarray(x, np.float64) for x in (Z0, Z1, T))

    def point(t):
        weight = np.asarray(alpha(jnp.asarray(t)), np.float64)
        return (1 - weight) * z0 + weight * z1

    actual_point, velocity = path.interpolate(Z0, Z1, T, alpha)
    assert_close(actual_point, point(t), 1e-6)
    # float32 weights are good to 6e-8, over a step of 1e-3.
    assert_close(velocity, (point(t + step) - point(t - step)) / (2 * step), 5e-4)


def test_the_velocity_points_back_to_the_data():
    point, velocity = path.interpolate(Z0, Z1, T)
    assert_close(path.to_data(point, velocity, T), Z0, 1e-6)
