import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cola_jax.flow import solve

ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "ralston": 2, "bosh3": 3, "tsit5": 5, "dopri5": 5, "dopri8": 8}


def test_time_grid_runs_from_noise_to_data():
    np.testing.assert_allclose(solve.time_grid(4), [1.0, 0.75, 0.5, 0.25, 0.0])
    assert (float(solve.time_grid(7)[0]), float(solve.time_grid(7)[-1])) == (1.0, 0.0)


def test_a_shifted_grid_has_the_same_ends():
    grid = solve.time_grid(4, shift=3.0)
    np.testing.assert_allclose(grid, [1.0, 0.9, 0.75, 0.5, 0.0], rtol=1e-6)  # 3 t / (1 + 2 t)
    np.testing.assert_allclose(solve.time_grid(2, start=0.6), [0.6, 0.3, 0.0], rtol=1e-6)


def test_one_step():
    z = jnp.array([1.0, 2.0])
    euler = solve.step("euler", lambda z, t: z * t, z, 0.5, 0.2)
    np.testing.assert_allclose(euler, z * (1 - 0.3 * 0.5), rtol=1e-6)
    heun = solve.step("heun", lambda z, t: z * t, z, 0.5, 0.2)
    np.testing.assert_allclose(heun, z * (1 - 0.15 * (0.5 + 0.85 * 0.2)), rtol=1e-6)
    np.testing.assert_allclose(solve.step("euler", lambda z, t: 0 * z, z, 0.5, 0.2, v=z), 0.7 * z, rtol=1e-6)


def test_every_solver_is_known():
    assert set(ORDERS) == set(solve.SOLVERS)


@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence(solver):
    """dz/dt = z + t from z(1) = 1: the error falls with the power of the step that the method promises."""
    exact = 3 / np.e - 1

    def error(steps):
        times = jnp.linspace(1.0, 0.0, steps + 1)
        return abs(float(solve.integrate(lambda z, t: z + t, jnp.ones(()), times, solver)) - exact)

    few = {1: 64, 2: 32, 3: 16}.get(ORDERS[solver], 2)
    with jax.enable_x64(True):  # where high orders can be seen
        coarse, fine = error(few), error(2 * few)
    assert fine < 0.01
    # This field is linear, for which the highest orders do better than they promise.
    order = np.log2(coarse / fine)
    assert order > ORDERS[solver] - 0.6 and (order < ORDERS[solver] + 0.6 or ORDERS[solver] > 3)


def test_euler_is_exact_on_straight_paths():
    """With the velocity of the linear path between two points, one step arrives."""
    z0, z1 = jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0])
    np.testing.assert_allclose(
        solve.integrate(lambda z, t: z1 - z0, z1, jnp.asarray(solve.time_grid(1))), z0, rtol=1e-6
    )
