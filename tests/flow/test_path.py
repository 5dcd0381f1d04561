import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import assert_close, normal, uniform

from cola_jax.flow import path
from cola_jax.flow.path import LINEAR, PATHS, TRIGONOMETRIC
from tests.flow.gaussian import CURVES

Z0, Z1, T = normal(3, 5, 4), normal(3, 5, 4, seed=1), uniform(3, 5, 1)
EACH = pytest.mark.parametrize("name", PATHS)


def wide(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def test_every_path_has_its_closed_form_here():
    assert set(CURVES) == set(PATHS) and all(name == p.name for name, p in PATHS.items())


@EACH
def test_point_and_velocity(name):
    z0, z1, t = wide(Z0, Z1, T)
    signal, signal_slope, noise, noise_slope = CURVES[name](t)
    point, velocity = path.interpolate(PATHS[name], Z0, Z1, T)
    assert_close(point, signal * z0 + noise * z1, 1e-6)
    assert_close(velocity, signal_slope * z0 + noise_slope * z1, 1e-6)


@EACH
def test_paths_begin_at_data_and_end_at_noise(name):
    np.testing.assert_array_equal(path.interpolate(PATHS[name], Z0, Z1, jnp.zeros_like(T))[0], Z0)
    np.testing.assert_array_equal(path.interpolate(PATHS[name], Z0, Z1, jnp.ones_like(T))[0], Z1)


@EACH
def test_the_velocity_is_the_derivative_of_the_point(name):
    step = 1e-5
    with jax.enable_x64(True):
        z0, z1, t = (jnp.asarray(x) for x in wide(Z0, Z1, T))
        velocity = path.interpolate(PATHS[name], z0, z1, t)[1]
        ahead, behind = (path.interpolate(PATHS[name], z0, z1, t + s)[0] for s in (step, -step))
        assert_close(velocity, (ahead - behind) / (2 * step), 1e-9)


def test_a_bridge_of_any_alpha():
    cubic = path.bridge("cubic", lambda t: t**3)
    z0, z1, t = wide(Z0, Z1, T)
    point, velocity = path.interpolate(cubic, Z0, Z1, T)
    assert_close(point, (1 - t**3) * z0 + t**3 * z1, 1e-6)
    assert_close(velocity, 3 * t**2 * (z1 - z0), 1e-6)
    with pytest.raises(ValueError, match="'cubic': its log-SNR has no inverse"):
        path.time_at(cubic, jnp.zeros(2))


@EACH
def test_a_velocity_points_to_data_and_noise(name):
    point, velocity = path.interpolate(PATHS[name], Z0, Z1, T)
    assert_close(path.to_data(PATHS[name], point, velocity, T), Z0, 2e-6)
    assert_close(path.to_noise(PATHS[name], point, velocity, T), Z1, 2e-6)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_also_at_the_ends(name, end):
    t = jnp.full_like(T, end)
    point, velocity = path.interpolate(PATHS[name], Z0, Z1, t)
    assert_close(path.to_data(PATHS[name], point, velocity, t), Z0, 2e-6)
    assert_close(path.to_noise(PATHS[name], point, velocity, t), Z1, 2e-6)


def old_interpolate(z0, z1, t):
    """As before there were paths."""
    weight, slope = jax.jvp(lambda t: t, (t,), (jnp.ones_like(t),))
    return (1 - weight) * z0 + weight * z1, slope * (z1 - z0)


def old_renoise(now, later):
    keep = (1 - now) / (1 - later)
    return keep, jnp.sqrt(jnp.maximum(now**2 - (keep * later) ** 2, 0.0))


def assert_same_bits(new, old, *args):
    for a, b in zip(jax.tree.leaves(jax.jit(new)(*args)), jax.tree.leaves(jax.jit(old)(*args)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.int32), np.asarray(b).view(np.int32))


def test_the_linear_path_has_the_bits_that_it_had():
    """Results of earlier versions stay what they are: values, and gradients of a loss that uses both."""
    many = jnp.asarray(np.random.default_rng(5).uniform(0, 1, (64, 7, 1)).astype(np.float32))
    z0, z1, gain = normal(64, 7, 5, seed=6), normal(64, 7, 5, seed=7), normal(5, 5, seed=8)

    def loss(interpolate):
        def value(z0, gain):
            point, velocity = interpolate(z0, z1, many)
            return jnp.mean(jnp.square(jnp.tanh(point @ gain) - velocity))

        return jax.value_and_grad(value, (0, 1))

    def new(z0, z1, t):
        return path.interpolate(LINEAR, z0, z1, t)

    assert_same_bits(new, old_interpolate, z0, z1, many)
    assert_same_bits(loss(new), loss(old_interpolate), z0, gain)
    assert_same_bits(lambda z, v, t: path.to_data(LINEAR, z, v, t), lambda z, v, t: z - t * v, z0, z1, many)
    now, later = jnp.linspace(1.0, 0.05, 20), jnp.linspace(0.95, 0.0, 20)
    assert_same_bits(lambda s, t: path.renoise(LINEAR, s, t), old_renoise, now, later)


@EACH
def test_renoising_leaves_the_distribution_on_the_path(name):
    """Of Gaussian data with any mean and variance, from any time to any noisier one."""
    later, now = np.array([0.0, 0.1, 0.4, 0.7, 0.5]), np.array([0.2, 0.3, 0.9, 1.0, 0.5])
    ratio, spread = path.renoise(PATHS[name], jnp.asarray(now, jnp.float32), jnp.asarray(later, jnp.float32))
    (s, _, n, _), (s_later, _, n_later, _) = CURVES[name](now), CURVES[name](later)
    mean, variance = 1.7, 0.3
    np.testing.assert_allclose(ratio * s_later * mean, s * mean, atol=1e-6)
    found = np.asarray(ratio) ** 2 * (s_later**2 * variance + n_later**2) + np.asarray(spread) ** 2
    np.testing.assert_allclose(found, s**2 * variance + n**2, atol=1e-6)


@EACH
def test_log_snr_its_slope_and_its_inverse(name):
    t = jnp.linspace(0.01, 0.99, 50)
    signal, signal_slope, noise, noise_slope = CURVES[name](np.asarray(t, np.float64))
    value = path.log_snr(PATHS[name], t)
    np.testing.assert_allclose(value, np.log(signal**2 / noise**2), atol=2e-5)
    slope = 2 * (signal_slope / signal - noise_slope / noise)
    np.testing.assert_allclose(path.log_snr_slope(PATHS[name], t), slope, rtol=1e-4)
    assert np.all(np.diff(value) < 0)
    np.testing.assert_allclose(path.time_at(PATHS[name], value), t, atol=2e-6)
    far = jnp.array([-20.0, 20.0])
    np.testing.assert_allclose(path.log_snr(PATHS[name], path.time_at(PATHS[name], far)), far, atol=0.02)


@EACH
def test_velocity_along_log_snr(name):
    """``u_lambda = u_t / lambda'`` is the derivative of the point when log-SNR is the clock (15.17-15.18)."""
    with jax.enable_x64(True):
        z0, z1, t = (jnp.asarray(x) for x in wide(Z0, Z1, T))
        value = path.log_snr(PATHS[name], t)

        def point(value):
            return path.interpolate(PATHS[name], z0, z1, path.time_at(PATHS[name], value))[0]

        by_clock = jax.jvp(point, (value,), (jnp.ones_like(value),))[1]
        u = path.interpolate(PATHS[name], z0, z1, t)[1]
        assert_close(u / path.log_snr_slope(PATHS[name], t), by_clock, 1e-9)


def test_the_trigonometric_path_is_the_variance_preserving_one_of_its_log_snr():
    """``signal^2 = sigmoid(lambda)``, ``noise^2 = sigmoid(-lambda)`` (15.4)."""
    t = jnp.linspace(0.02, 0.98, 30)
    curve = path.from_log_snr("curve", lambda t: -2 * jnp.log(jnp.tan(jnp.pi * t / 2)))
    for role in ("signal", "noise"):
        np.testing.assert_allclose(getattr(curve, role)(t), getattr(TRIGONOMETRIC, role)(t), atol=1e-6)
    np.testing.assert_allclose(TRIGONOMETRIC.signal(t) ** 2, jax.nn.sigmoid(path.log_snr(TRIGONOMETRIC, t)), atol=1e-6)


@EACH
def test_effective_log_snr(name):
    """Measured on draws: means of a posterior, its noise and the path's."""
    draw, mean_power, variance, t = np.random.default_rng(2), 1.3, 0.2, 0.35
    signal, _, noise, _ = CURVES[name](t)
    rest = signal * np.sqrt(variance) * draw.standard_normal(400_000) + noise * draw.standard_normal(400_000)
    found = float(path.effective_log_snr(PATHS[name], jnp.asarray(t), mean_power, variance))
    assert abs(found - np.log(signal**2 * mean_power / rest.var())) < 0.012
    at_data = path.effective_log_snr(PATHS[name], jnp.zeros(()), mean_power, variance)
    assert float(at_data) == pytest.approx(np.log(mean_power / variance), abs=1e-6)
