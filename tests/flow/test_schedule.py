import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import normal

from cola_jax import rng
from cola_jax.flow import path, schedule, solve
from cola_jax.flow.path import LINEAR, PATHS, TRIGONOMETRIC
from cola_jax.flow.schedule import Times
from cola_jax.types import Posterior
from tests.flow import gaussian

KEYS = rng.key(0, "train", 0, jnp.arange(64))
QUANTILES = np.array([0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98])


DISTRIBUTIONS = {
    "logit-normal": Times(),
    "logit-normal, other": Times(loc=-0.5, scale=2.0),
    "uniform": Times("uniform"),
    "mixture": Times(share=0.3, second_loc=-2.0, second_scale=0.5),
    "uniform and more": Times("uniform", share=0.5),
    "table": Times("table", table=(0.5, 0.0, 2.0, 1.0)),
    "table and more": Times("table", table=(1.0, 3.0), share=0.2),
    **{f"log-SNR, {name}": Times("uniform_log_snr", low=-7.0, high=5.0, path=path) for name, path in PATHS.items()},
}
EACH = pytest.mark.parametrize("times", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)


@pytest.mark.parametrize(("loc", "scale"), [(1.0, 1.0), (-0.5, 2.0)])
def test_logit_normal_times_have_its_quantiles(loc, scale):
    times = np.asarray(schedule.sample(Times("logit_normal", loc, scale), KEYS, 1000))
    assert times.shape == (64, 1000) and 0 < times.min() and times.max() < 1
    expected = [loc + scale * statistics.NormalDist().inv_cdf(q) for q in QUANTILES]
    # 64 000 draws: the standard error of these quantiles is at most 0.011 scale.
    np.testing.assert_allclose(np.quantile(np.log(times / (1 - times)), QUANTILES), expected, atol=0.04 * scale)


def test_uniform_times_have_its_quantiles():
    times = schedule.sample(Times("uniform"), KEYS, 1000)
    np.testing.assert_allclose(np.quantile(times, QUANTILES), QUANTILES, atol=0.008)


def test_times_of_a_table_have_its_shares():
    """Uniform inside each part."""
    times = schedule.sample(Times("table", table=(0.5, 0.0, 2.0, 1.0)), KEYS, 1000)
    counts = np.histogram(times, np.linspace(0, 1, 9))[0] / times.size
    np.testing.assert_allclose(counts, np.repeat([0.5, 0.0, 2.0, 1.0], 2) / 7, atol=0.008)


@pytest.mark.parametrize("name", PATHS)
def test_log_snrs_are_uniform(name):
    """Of the path: ``log(signal^2 / noise^2)`` in closed form, from the low to the high one."""
    times = np.asarray(schedule.sample(Times("uniform_log_snr", low=-7.0, high=5.0, path=PATHS[name]), KEYS, 1000))
    signal, _, noise, _ = gaussian.CURVES[name](times.astype(np.float64))
    values = np.log(signal**2 / noise**2)
    assert -7.001 < values.min() < -6.9 and 4.9 < values.max() < 5.001
    np.testing.assert_allclose(np.quantile(values, QUANTILES), -7 + 12 * QUANTILES, atol=0.1)


def test_draws_have_the_bits_that_they_had():
    old = jax.jit(lambda keys: jax.nn.sigmoid(1.0 + 1.0 * rng.normal(keys, (50,))))(KEYS)
    new = jax.jit(lambda keys: schedule.sample(Times(), keys, 50))(KEYS)
    np.testing.assert_array_equal(new, old)
    np.testing.assert_array_equal(schedule.sample(Times("uniform"), KEYS, 50), rng.uniform(KEYS, (50,)))


@EACH
def test_times_of_an_example_depend_on_its_key_alone(times):
    drawn = schedule.sample(times, KEYS[:4], 6)
    # To the last bit but for transcendental functions, whose rounding may depend on the array's size.
    np.testing.assert_allclose(schedule.sample(times, KEYS[2:3], 6)[0], drawn[2], rtol=3e-7)
    assert len(np.unique(drawn)) == 24


def test_the_density_of_logit_normal_times():
    s = np.linspace(0.01, 0.99, 40)
    loc, scale = 0.7, 1.4
    away = np.log(s / (1 - s)) - loc
    expected = np.exp(-(away**2) / (2 * scale**2)) / (scale * np.sqrt(2 * np.pi) * s * (1 - s))
    found = schedule.pdf(Times(loc=loc, scale=scale), jnp.asarray(s, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@EACH
@pytest.mark.parametrize("horizon", [1.0, 1000.0])
def test_densities_integrate_to_one_and_to_their_cdf(times, horizon):
    with jax.enable_x64(True):
        t = jnp.linspace(0.0, horizon, 200_001)
        density = np.asarray(schedule.pdf(times, t, horizon))
        assert density.min() == 0 or times.distribution != "uniform_log_snr"
        integral = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2) * horizon / 200_000])
        assert integral[-1] == pytest.approx(1.0, abs=2e-3)
        np.testing.assert_allclose(schedule.cdf(times, t, horizon), integral, atol=2e-3)
        np.testing.assert_array_equal(schedule.pdf(times, jnp.array([-0.1, 1.1]) * horizon, horizon), 0.0)


@EACH
def test_draws_have_the_density(times):
    edges = np.linspace(0, 1, 21)
    counts = np.histogram(np.asarray(schedule.sample(times, KEYS, 1000)), edges)[0]
    expected = 64_000 * np.diff(schedule.cdf(times, jnp.asarray(edges, jnp.float32)))
    assert np.all(np.abs(counts - expected) < 4.5 * np.sqrt(expected) + 3)


def test_times_on_a_grid():
    t = jnp.array([0.0, 0.04, 0.06, 0.449, 0.451, 0.99, 1.0])
    np.testing.assert_allclose(schedule.discretize(t, 10), [0, 0, 0.1, 0.4, 0.5, 1, 1])
    np.testing.assert_allclose(schedule.discretize(t, 10, "floor"), [0, 0, 0, 0.4, 0.4, 0.9, 1])


def test_draws_on_a_grid_have_the_mass_around_each_point():
    drawn = np.asarray(schedule.sample(Times(grid=10), KEYS, 1000)) * 10
    whole = np.round(drawn).astype(int)
    np.testing.assert_allclose(drawn, whole, atol=1e-5)
    edges = jnp.clip((jnp.arange(12) - 0.5) / 10, 0.0, 1.0)
    expected = 64_000 * np.diff(schedule.cdf(Times(), edges))
    assert np.all(np.abs(np.bincount(whole.ravel(), minlength=11) - expected) < 4.5 * np.sqrt(expected) + 3)


@EACH
@pytest.mark.parametrize("name", PATHS)
def test_the_density_on_log_snr_integrates_to_one(times, name):
    with jax.enable_x64(True):
        values = jnp.linspace(-40.0, 40.0, 80_001)
        total = np.trapezoid(schedule.log_snr_pdf(times, PATHS[name], values), values)
    assert total == pytest.approx(1.0, abs=1e-3)


def test_the_density_on_log_snr_in_closed_form():
    values = np.linspace(-6.0, 4.0, 41)
    at = jnp.asarray(values, jnp.float32)
    # lambda = -2 logit(t) on the linear path: logit-normal times make it normal.
    expected = [statistics.NormalDist(-2 * 1.0, 2 * 0.8).pdf(v) for v in values]
    np.testing.assert_allclose(schedule.log_snr_pdf(Times(scale=0.8), LINEAR, at), expected, rtol=1e-4, atol=1e-7)
    t = 1 / (1 + np.exp(values / 2))
    np.testing.assert_allclose(schedule.log_snr_pdf(Times("uniform"), LINEAR, at), t * (1 - t) / 2, rtol=1e-4)
    flat = Times("uniform_log_snr", low=-7.0, high=5.0, path=TRIGONOMETRIC)
    np.testing.assert_allclose(schedule.log_snr_pdf(flat, TRIGONOMETRIC, at), 1 / 12, rtol=1e-4)


@pytest.mark.parametrize("shift", [0.4, 1.0, 1.7, 3.0])
def test_a_shift_of_time_is_one_of_the_linear_paths_log_snr(shift):
    t = jnp.linspace(0.05, 0.95, 19)
    shifted = schedule.shift_time(t, shift)
    before, after = (np.asarray(path.log_snr(LINEAR, x)) for x in (t, shifted))
    np.testing.assert_allclose(after, before - 2 * np.log(shift), atol=1e-5)
    np.testing.assert_allclose(schedule.shift_log_snr(LINEAR, t, -2 * np.log(shift)), shifted, atol=1e-6)
    grid = schedule.shift_time(jnp.asarray(solve.Grid().times(8), jnp.float32), shift)
    np.testing.assert_allclose(solve.Grid(shift=shift).times(8), grid, atol=1e-6)
    # Logit-normal times move as a whole.
    drawn = schedule.shift_time(schedule.sample(Times(loc=0.3), KEYS, 5), shift)
    np.testing.assert_allclose(drawn, schedule.sample(Times(loc=0.3 + np.log(shift)), KEYS, 5), atol=1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_a_shift_of_log_snr(name):
    t = jnp.linspace(0.1, 0.9, 9)
    shifted = schedule.shift_log_snr(PATHS[name], t, 1.5)
    (s, _, n, _), (s1, _, n1, _) = (gaussian.CURVES[name](np.asarray(x, np.float64)) for x in (t, shifted))
    np.testing.assert_allclose(np.log(s1**2 / n1**2), np.log(s**2 / n**2) + 1.5, atol=1e-4)
    assert np.all(shifted < t)


def test_logsnr_is_a_ratio_of_means():
    posterior = Posterior(2 * normal(2, 5, 4), normal(2, 5, 4, seed=1))
    mean, logvar = (np.asarray(x, np.float64) for x in posterior)
    expected = np.log((mean**2).mean() / np.exp(logvar).mean())
    assert abs(float(schedule.logsnr(posterior)) - expected) < 1e-5


def test_logsnr_leaves_out_what_the_mask_does():
    posterior = Posterior(2 * normal(2, 5, 4), normal(2, 5, 4, seed=1))
    mask = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]], jnp.float32)
    expected = schedule.logsnr(jax.tree.map(lambda x: x[:, :3], posterior))
    assert abs(float(schedule.logsnr(posterior, mask)) - float(expected)) < 1e-5
    assert abs(float(schedule.logsnr(posterior)) - float(expected)) > 1e-3
