"""The velocity that follows from a predicted mean, against conditional Gaussians in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import normal

from cola_jax.flow import prediction, solve
from cola_jax.flow.path import PATHS, interpolate
from tests.flow.gaussian import CURVES

TIMES = np.array([0.0, 0.02, 0.3, 0.5, 0.9, 1.0])
VARIANCE = 0.14


def conditional_velocity(path: str, t, z_t, mean, variance):
    """E[u | z_t] of z_0 ~ N(mean, variance), z_1 ~ N(0, 1), by the covariance of (u, z_t)."""
    signal, signal_slope, noise, noise_slope = CURVES[path](t)
    covariance = signal_slope * signal * variance + noise_slope * noise
    spread = signal**2 * variance + noise**2
    return signal_slope * mean + covariance / spread * (z_t - signal * mean)


@pytest.mark.parametrize("path", PATHS)
def test_the_velocity_of_a_known_mean(path):
    z, mean = (np.asarray(normal(3, 4, seed=i), np.float64) for i in range(2))
    for t in TIMES:
        skip, gate = prediction.mean_coefficients(PATHS[path], jnp.float32(t), VARIANCE)
        found = float(skip) * z + float(gate) * mean
        np.testing.assert_allclose(found, conditional_velocity(path, t, z, mean, VARIANCE), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("path", PATHS)
def test_the_mean_of_a_mixture_is_that_of_bayes(path):
    """Codes of unequal probability and norm, by the densities of Gaussians written out."""
    codes, logits = normal(5, 3, seed=1), normal(1, 1, 5, seed=2)
    z = np.asarray(normal(1, 4, 3, seed=3), np.float64)
    for t in TIMES:
        signal, _, noise, _ = CURVES[path](t)
        spread = signal**2 * VARIANCE + noise**2
        distance = np.square(z[:, :, None] - signal * np.asarray(codes, np.float64)).sum(-1)
        weights = np.exp(np.asarray(logits, np.float64) - distance / (2 * spread))
        expected = weights / weights.sum(-1, keepdims=True)
        scores = prediction.code_scores(
            logits, codes, jnp.asarray(z, jnp.float32), jnp.float32(signal / spread), jnp.float32(signal)
        )
        np.testing.assert_allclose(jax.nn.softmax(scores, axis=-1), expected, rtol=1e-3, atol=1e-5)
        assert t == 1 or np.ptp(expected[0], axis=0).max() > 0.01  # which code it is depends on z


def test_near_the_data_the_mean_does_not_matter():
    skip, gate = prediction.mean_coefficients(PATHS["linear"], jnp.zeros(()), VARIANCE)
    assert float(skip) == -1 and float(gate) == 0


@pytest.mark.parametrize("path", PATHS)
def test_the_target_is_the_mean_of_the_sampled_one(path):
    """Regressing u on z_t gives the posterior's velocity: the residual is uncorrelated with 1 and with z_t."""
    count, t = 200_000, 0.35
    mean, deviation = 0.7, VARIANCE**0.5
    z0 = mean + deviation * np.asarray(normal(count, seed=1), np.float32)
    z_t, u = interpolate(PATHS[path], jnp.asarray(z0), normal(count, seed=2), jnp.float32(t))
    target = prediction.posterior_velocity(
        PATHS[path], z_t, jnp.float32(t), jnp.full(count, mean), jnp.full(count, VARIANCE)
    )
    residual = np.asarray(u - target, np.float64)
    centred = np.asarray(z_t, np.float64) - np.mean(z_t)
    for product in (residual, residual * centred):
        assert abs(product.mean()) < 4 * product.std() / count**0.5
    assert residual.std() > 0.3  # what nobody can predict


def test_variances_of_channels_are_their_own():
    z, mean = normal(5, 3), normal(5, 3, seed=1)
    variance = jnp.array([0.01, 0.1, 1.0])
    found = prediction.posterior_velocity(PATHS["linear"], z, jnp.full((5, 1), 0.4), mean, variance)
    for channel in range(3):
        expected = conditional_velocity(
            "linear", 0.4, *(np.asarray(x)[:, channel] for x in (z, mean)), variance[channel]
        )
        np.testing.assert_allclose(found[:, channel], expected, rtol=1e-5, atol=1e-6)


def test_coefficients_have_finite_slopes_everywhere():
    for path in PATHS.values():
        slopes = jax.vmap(jax.jacfwd(lambda t, path=path: jnp.stack(prediction.mean_coefficients(path, t, 1e-3))))(
            jnp.asarray(TIMES, jnp.float32)
        )
        assert np.isfinite(slopes).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("now", "later"), [(1.0, 0.0), (0.8, 0.3), (0.1, 0.6)])
def test_following_the_mean_is_the_flow_in_small_steps(path, now, later):
    z, mean = normal(6), normal(6, seed=1)

    def velocity(z, t):
        skip, gate = prediction.mean_coefficients(PATHS[path], t, VARIANCE)
        return skip * z + gate * mean

    times = jnp.linspace(now, later, 201)
    small = solve.integrate(velocity, z, times, "dopri5")
    found = prediction.follow_mean(PATHS[path], z, mean, jnp.float32(now), jnp.float32(later), VARIANCE)
    np.testing.assert_allclose(found, small, atol=1e-5)


def churned(path, z, mean, times, variance, churn, seed=0):
    for index, (now, later) in enumerate(itertools.pairwise(jnp.asarray(times, jnp.float32))):
        fresh = jax.random.normal(jax.random.fold_in(jax.random.key(seed), index), z.shape)
        z = prediction.follow_mean(path, z, mean(z, now), now, later, variance, churn, fresh)
    return z


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("churn", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("times", [(0.5, 0.3), (0.5, 0.42, 0.4, 0.3)])
def test_churn_forgets_as_fast_whatever_the_steps(path, churn, times):
    """With a mean that stays, the standard score is an Ornstein-Uhlenbeck process in the log-SNR."""
    path, mean, count = PATHS[path], jnp.float32(0.7), 100_000
    spreads = [float(prediction.spread(path, jnp.float32(t), VARIANCE)) for t in (times[0], times[-1])]
    signals = [float(path.signal(jnp.float32(t))) for t in (times[0], times[-1])]
    score = jax.random.normal(jax.random.key(1), (count,))
    z = churned(path, signals[0] * mean + spreads[0] ** 0.5 * score, lambda z, t: mean, times, VARIANCE, churn)
    end = (z - signals[1] * mean) / spreads[1] ** 0.5
    rate = (signals[0] ** 2 / spreads[0]) / (signals[1] ** 2 / spreads[1])
    expected = [0.0, 1.0, rate ** (churn / 2)]
    assert expected[2] > 0.1
    np.testing.assert_allclose([end.mean(), end.var(), (end * score).mean()], expected, atol=0.02)


@pytest.mark.parametrize("variance", [0.0, 0.1])
@pytest.mark.parametrize("churn", [0.0, 1.0, 2.0])
def test_churn_keeps_the_marginals_of_the_flow(variance, churn):
    """Gaussian data, whose posterior mean is known: all go to N(2, tau^2 + variance); with churn nothing is left of
    the noise."""
    path, tau, count = PATHS["linear"], 0.8, 40_000

    def mean(z, t):
        spread, signal = prediction.spread(path, t, variance), path.signal(t)
        return 2 + signal * tau**2 / (signal**2 * tau**2 + spread) * (z - signal * 2)

    noise = jax.random.normal(jax.random.key(1), (count,))
    z = churned(path, noise, mean, solve.Grid().times(400), variance, churn)
    np.testing.assert_allclose([z.mean(), z.var()], [2.0, tau**2 + variance], atol=0.03)
    correlation = np.corrcoef(z, noise)[0, 1]
    assert correlation > 0.99 if churn == 0 else abs(correlation) < 0.05


def test_one_step_with_churn_is_the_bayesian_posterior_of_ddpm():
    """Variance 0 on the trigonometric (variance preserving) path: mean and variance of q(z_s | z_t, z_0) of DDPM."""
    path, z, data = PATHS["trigonometric"], jnp.full(100_000, 0.4), jnp.float32(-0.3)
    now, later = jnp.float32(0.7), jnp.float32(0.5)
    fresh = jax.random.normal(jax.random.key(0), z.shape)
    found = prediction.follow_mean(path, z, data, now, later, 0.0, 1.0, fresh)
    a_now, a_later = (float(path.signal(t)) ** 2 for t in (now, later))  # DDPM's cumulative products
    beta = 1 - a_now / a_later
    mean = np.sqrt(a_later) * beta / (1 - a_now) * data + np.sqrt(1 - beta) * (1 - a_later) / (1 - a_now) * 0.4
    np.testing.assert_allclose(found.mean(), mean, atol=0.005)
    np.testing.assert_allclose(found.var(), beta * (1 - a_later) / (1 - a_now), rtol=0.02)
