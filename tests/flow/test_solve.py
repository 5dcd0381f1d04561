import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cola_jax.flow import solve
from cola_jax.flow.solve import Grid

ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "ralston": 2, "bosh3": 3, "tsit5": 5, "dopri5": 5, "dopri8": 8}


def test_a_grid_runs_from_noise_to_data():
    np.testing.assert_allclose(Grid().times(4), [1.0, 0.75, 0.5, 0.25, 0.0])
    for grid in (Grid(), Grid(shift=1.7), Grid(power=3.0), Grid(start=0.3, stop=0.9, shift=0.2, power=0.5)):
        times = grid.times(7)
        assert (times[0], times[-1]) == (grid.start, grid.stop) and times.dtype == np.float64
        assert np.all(np.diff(times) * np.sign(grid.stop - grid.start) > 0)


def test_a_shifted_grid_has_the_same_ends():
    np.testing.assert_allclose(Grid(shift=3.0).times(4), [1.0, 0.9, 0.75, 0.5, 0.0], rtol=1e-6)  # 3 t / (1 + 2 t)
    np.testing.assert_allclose(Grid(start=0.6).times(2), [0.6, 0.3, 0.0], rtol=1e-6)
    np.testing.assert_allclose(Grid(shift=3.0, start=0.0, stop=1.0).times(4), [0.0, 0.5, 0.75, 0.9, 1.0], rtol=1e-6)
    np.testing.assert_allclose(Grid(shift=3.0, start=0.8, stop=0.4).times(2), [0.8, 0.7, 0.4], rtol=1e-6)


def test_steps_are_finer_near_the_data_for_a_power():
    np.testing.assert_allclose(Grid(power=2.0, start=0.0, stop=1.0).times(4), [0, 1 / 16, 1 / 4, 9 / 16, 1])
    np.testing.assert_allclose(Grid(power=2.0).times(4), [1, 9 / 16, 1 / 4, 1 / 16, 0])


def test_grids_have_the_bits_that_they_had():
    """Those of sampling in float32, those of likelihood in float64: results of earlier versions stay."""

    def sampling(steps, shift, start):
        times = np.linspace(1.0, 0.0, steps + 1)
        return (start * shift * times / (1.0 + (shift - 1.0) * times)).astype(np.float32)

    def likelihood(steps, power, start, stop):
        ends = np.asarray([start, stop]) ** (1 / power)
        grid = np.linspace(*ends, steps + 1) ** power
        grid[[0, -1]] = start, stop
        return grid

    for steps in (1, 2, 7, 16, 33):
        for shift in (1.0, 0.3, 1.7, 3.0):
            for start in (1.0, 0.6, 0.35):
                new = Grid(shift, start=start).times(steps).astype(np.float32)
                np.testing.assert_array_equal(new, sampling(steps, shift, start))
        for power in (1.0, 2.0, 0.7):
            for ends in ((0.0, 1.0), (1.0, 0.0)):
                new = Grid(power=power, start=ends[0], stop=ends[1]).times(steps)
                np.testing.assert_array_equal(new, likelihood(steps, power, *ends))


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
        solve.integrate(lambda z, t: z1 - z0, z1, jnp.asarray(Grid().times(1), jnp.float32)), z0, rtol=1e-6
    )
