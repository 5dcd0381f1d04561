"""Closed forms: linear velocity fields of Gaussians, where density, order and the estimator's variance are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cola_jax.flow import density, prediction
from cola_jax.flow.path import PATHS
from cola_jax.flow.solve import Method
from tests.flow import gaussian

MEAN = np.array([0.5, -1.0, 0.2, 0.8, -0.3, 0.0])
COVARIANCE = gaussian.covariance(6)
Z = np.random.default_rng(1).multivariate_normal(MEAN, COVARIANCE, 8).reshape(8, 3, 2)
EXACT = np.array([gaussian.log_prob(z, MEAN, COVARIANCE) for z in Z])
WHOLE = jnp.ones(3, bool)
FINE = Method(rtol=1e-9, atol=1e-9)


def score(z, method, probes=None, path="linear"):
    """log p of [S, 3, 2] under the Gaussian's flow, and the flow's end."""
    field = gaussian.velocity(jnp.asarray(MEAN), jnp.asarray(COVARIANCE), path)
    flow = jax.vmap(lambda x, e: density.transport(field, x, method, probes=e), (0, None if probes is None else 0))
    out = jax.jit(flow)(z, probes)
    return jax.vmap(density.log_prob, (0, None))(out, WHOLE), out


@pytest.mark.parametrize(
    ("solver", "path"), [("dopri5", name) for name in PATHS] + [("tsit5", "linear"), ("dopri8", "trigonometric")]
)
def test_log_density_of_a_gaussian(solver, path):
    """Each path has another field and the same density."""
    with jax.enable_x64(True):
        found, flow = score(jnp.asarray(Z), FINE._replace(solver=solver), path=path)
        assert np.all(flow.ok)
        np.testing.assert_allclose(found, EXACT, atol=1e-5)


def test_log_density_in_float32():
    found, flow = score(jnp.asarray(Z, jnp.float32), Method(rtol=1e-6, atol=1e-6))
    assert found.dtype == jnp.float32 and np.all(flow.ok)
    np.testing.assert_allclose(found, EXACT, atol=2e-4)


@pytest.mark.parametrize(
    ("solver", "order", "steps", "power"),
    [
        ("euler", 1, 64, 1.0),
        ("heun", 2, 64, 1.0),
        ("midpoint", 2, 64, 1.0),
        ("heun", 2, 64, 2.0),
        ("dopri5", 5, 16, 1.0),
    ],
)
def test_order_in_the_step_size(solver, order, steps, power):
    with jax.enable_x64(True):
        both = [Method(solver, n, power=power) for n in (steps, 2 * steps)]
        coarse, fine = (np.abs(score(jnp.asarray(Z), method)[0] - EXACT).mean() for method in both)
    assert abs(np.log2(coarse / fine) - order) < 0.35, (coarse, fine)


@pytest.mark.parametrize("path", PATHS)
def test_noise_is_carried_to_the_data(path):
    """The flow of a Gaussian is affine: ``z_0 = A z_1 + b`` with ``A A^T`` its covariance and b its mean."""
    with jax.enable_x64(True):
        field = gaussian.velocity(jnp.asarray(MEAN), jnp.asarray(COVARIANCE), path)
        corners = jnp.concatenate([jnp.zeros((1, 6)), jnp.eye(6)]).reshape(7, 3, 2)
        ends = jax.jit(jax.vmap(lambda z: density.transport(field, z, FINE, 1.0, 0.0).end))(corners).reshape(7, 6)
        ends = np.asarray(ends)
        gain = (ends[1:] - ends[0]).T
        np.testing.assert_allclose(ends[0], MEAN, atol=1e-6)
        np.testing.assert_allclose(gain @ gain.T, COVARIANCE, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_the_density_does_not_depend_on_the_coordinates_of_the_solver(path):
    """Another scale of the state, and a position that stays."""
    with jax.enable_x64(True):
        field = gaussian.velocity(jnp.asarray(MEAN), jnp.asarray(COVARIANCE), path)
        free = jnp.array([True, False, True])
        scales = (jnp.ones_like, lambda t: jnp.sqrt(0.3 * (1 - t) ** 2 + 0.5 * t**2))
        plain, scaled = (
            jax.jit(lambda z, s=s: density.transport(field, z, FINE, free=free, scale=s))(jnp.asarray(Z[0]))
            for s in scales
        )
        np.testing.assert_allclose(scaled.end, plain.end, atol=1e-7)
        np.testing.assert_allclose(scaled.change, plain.change, atol=1e-7)
        np.testing.assert_array_equal(scaled.end[1], Z[0, 1])


@pytest.mark.parametrize("path", PATHS)
def test_with_a_known_mean_one_step_in_standard_coordinates_is_exact(path):
    """The whole change of the density is that of the scale."""
    path, variance = PATHS[path], 0.14

    def field(z, t):
        skip, gate = prediction.mean_coefficients(path, t, variance)
        return skip * z + gate * jnp.asarray(MEAN.reshape(3, 2), jnp.float32)

    def deviation(t):
        return jnp.sqrt(prediction.spread(path, t, variance))

    z = jnp.asarray(Z[0], jnp.float32)
    flow = density.transport(field, z, Method("euler", 1), scale=deviation)
    assert float(flow.change) == pytest.approx(-6 * 0.5 * np.log(variance), abs=1e-5)
    rough = density.transport(field, z, Method("euler", 1))
    assert abs(float(rough.change) - float(flow.change)) > 1


def test_forward_then_backward_returns_the_latent():
    with jax.enable_x64(True):
        field = gaussian.velocity(jnp.asarray(MEAN), jnp.asarray(COVARIANCE))

        def there_and_back(z):
            there = density.transport(field, z, FINE)
            return there, density.transport(field, there.end, FINE, start=1.0, stop=0.0)

        there, back = jax.jit(jax.vmap(there_and_back))(jnp.asarray(Z))
        assert np.abs(there.end - Z).max() > 0.1 and np.abs(there.change).max() > 0.1
        np.testing.assert_allclose(back.end, Z, atol=1e-7)
        np.testing.assert_allclose(back.change, -there.change, atol=1e-7)


def _mean_gain() -> np.ndarray:
    """``int_0^1 A(t) dt`` for the field ``A(t) (z - ...) - mean``: in a linear field the estimate is e'Ae with it."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    times = (nodes + 1) / 2
    gains = []
    for t in times:
        spread = (1 - t) ** 2 * COVARIANCE + t**2 * np.eye(6)
        gains.append((t * np.eye(6) - (1 - t) * COVARIANCE) @ np.linalg.inv(spread))
    return np.einsum("t,tij->ij", weights / 2, np.array(gains))


@pytest.mark.parametrize(("probe", "probes"), [("rademacher", 1), ("gaussian", 1), ("gaussian", 3)])
def test_hutchinson_is_unbiased_with_the_predicted_variance(probe, probes):
    """Var e'Ae is 2 |A|^2 for Gaussian e, and 2 (|A|^2 - sum a_ii^2) for Rademacher e (A symmetric)."""
    count = 4000
    gain = _mean_gain()
    keys = jax.random.split(jax.random.key(3), count)
    drawn = jax.vmap(lambda k: density.draw_probes(k, (3, 2), probe, probes))(keys)
    copies = jnp.broadcast_to(jnp.asarray(Z[0], jnp.float32), (count, 3, 2))
    found = np.asarray(score(copies, Method(steps=12), drawn)[0])
    squares = np.square(gain).sum() - (np.square(np.diag(gain)).sum() if probe == "rademacher" else 0)
    variance = 2 * squares / probes
    assert abs(found.mean() - EXACT[0]) < 4 * np.sqrt(variance / count)
    assert abs(found.var() / variance - 1) < 0.15


def test_fixed_positions_do_not_move_and_have_no_density():
    """The free positions of a diagonal Gaussian have their own marginal."""
    variance = np.array([0.2, 0.5, 1.5, 0.1, 0.3, 2.0])
    field = gaussian.velocity(jnp.asarray(MEAN), jnp.diag(jnp.asarray(variance)))
    free = jnp.array([True, False, True])
    method = Method(rtol=1e-6, atol=1e-6)
    z = jnp.asarray(Z[0], jnp.float32)
    probes = density.draw_probes(jax.random.key(0), (3, 2))  # exact where the Jacobian is diagonal
    flow = jax.jit(lambda z, e: density.transport(field, z, method, free=free, probes=e))(z, probes)
    kept = [0, 1, 4, 5]
    expected = gaussian.log_prob(Z[0].reshape(-1)[kept], MEAN[kept], np.diag(variance[kept]))
    np.testing.assert_array_equal(flow.end[1], z[1])
    assert float(density.log_prob(flow, free)) == pytest.approx(expected, abs=1e-4)


def test_each_sample_has_its_own_steps_and_failures():
    """A stiff sample fails alone; the others are what they are by themselves."""
    method = Method(rtol=1e-4, atol=1e-4, max_steps=40)

    def solve(z, rate):
        return density.transport(lambda x, t: -rate * (x - jnp.cos(rate * t)), z, method)

    z = jnp.ones((4, 1, 2))
    rates = [0.1, 5.0, 3000.0, 2.0]
    together = jax.jit(jax.vmap(solve))(z, jnp.array(rates))
    np.testing.assert_array_equal(together.ok, [True, True, False, True])
    assert len(set(together.steps.tolist())) > 2
    solve_one = jax.jit(solve)
    for index in (0, 1, 3):
        alone = solve_one(z[index], rates[index])
        assert alone.steps == together.steps[index]
        np.testing.assert_allclose(alone.end, together.end[index], rtol=1e-5)
        assert float(together.change[index]) == pytest.approx(-2 * rates[index], rel=1e-4)


def test_a_velocity_that_is_not_finite_is_no_success():
    method = Method("heun", steps=4)
    flow = jax.jit(lambda z: density.transport(lambda x, t: x / (t - t), z, method))(jnp.ones((1, 2)))
    assert not flow.ok
