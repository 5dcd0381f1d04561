import jax.numpy as jnp
import numpy as np
import pytest

from cola_jax.flow import solve


def test_time_grid_runs_from_noise_to_data():
    np.testing.assert_allclose(solve.time_grid(4), [1.0, 0.75, 0.5, 0.25, 0.0])
    assert (float(solve.time_grid(7)[0]), float(solve.time_grid(7)[-1])) == (1.0, 0.0)


def test_one_euler_step():
    z = jnp.array([1.0, -2.0])
    out = solve.euler(lambda z, t: z * t, z, jnp.array([0.5, 0.2]))
    np.testing.assert_allclose(out, z * (1 - 0.3 * 0.5), rtol=1e-6)


@pytest.mark.parametrize("steps", [16, 32])
def test_euler_is_of_first_order(steps):
    """dz/dt = z from 1 to 0 multiplies by 1/e; half the step is half the error, within 10 %."""

    def error(steps):
        return float(solve.euler(lambda z, t: z, jnp.ones(()), solve.time_grid(steps))) - np.exp(-1)

    assert 1.8 < error(steps) / error(2 * steps) < 2.2


def test_euler_is_exact_on_straight_paths():
    """The velocity of a linear path is constant: one step is enough."""
    z0, z1 = jnp.array([1.0, 2.0]), jnp.array([-3.0, 0.5])
    np.testing.assert_allclose(solve.euler(lambda z, t: z1 - z0, z1, solve.time_grid(1)), z0, rtol=1e-6)
