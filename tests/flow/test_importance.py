"""The loss's expectation does not depend on the density that times are drawn from."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from cola_jax import rng
from cola_jax.flow import path, schedule
from cola_jax.flow.path import PATHS
from cola_jax.flow.schedule import Times, Weight

# 100,000 draws: 1,000 keys with 100 times each.
KEYS = rng.key(0, "train", 0, jnp.arange(1000))
PROPOSALS = {
    "logit-normal": Times(loc=0.5, scale=1.5),
    "uniform": Times("uniform"),
    "table": Times("table", table=(0.2, 0.5, 2.0, 1.0)),
    "mixture": Times(loc=1.0, share=0.5, second_loc=-1.5, second_scale=1.2),
}
WEIGHTS = {kind: Weight(kind, loc=0.5, scale=1.2) for kind in schedule.WEIGHTS[1:]}


def error(t):
    """An error that vanishes near the data as that of a predicted mean does."""
    return t**2 / (t**2 + 0.1) * (1 + np.sin(5 * t))


def drawn(times, weight):
    t = schedule.sample(times, KEYS, 100).reshape(-1)
    return np.asarray(schedule.importance(weight, times, t), np.float64) * error(np.asarray(t, np.float64))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_any_two_proposals_agree(kind):
    values = [drawn(times, WEIGHTS[kind]) for times in PROPOSALS.values()]
    for a, b in itertools.combinations(values, 2):
        spread = np.hypot(a.std() / len(a) ** 0.5, b.std() / len(b) ** 0.5)
        assert abs(a.mean() - b.mean()) < 4 * spread
        assert spread < 0.05 * a.mean()  # the test would see an error of a fifth


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_expectation_is_the_integral(kind):
    curves = {
        "uniform": lambda t: 1.0,
        "likelihood": lambda t: (1 - t) / t,
        "logit_normal": lambda t: float(schedule.pdf(Times(loc=0.5, scale=1.2), jnp.float32(t))),
    }
    expected = integrate.quad(lambda t: curves[kind](t) * error(t), 1e-6, 1 - 1e-6, limit=200)[0]
    values = drawn(PROPOSALS["mixture"], WEIGHTS[kind])
    assert abs(values.mean() - expected) < 4 * values.std() / len(values) ** 0.5


def test_as_drawn_counts_all_the_same():
    np.testing.assert_array_equal(schedule.importance(Weight(), Times(), jnp.array([0.0, 0.5, 1.0])), 1.0)


@pytest.mark.parametrize("name", PATHS)
def test_the_likelihood_weight(name):
    """``g^2 / 2`` times the squared error of the score that a unit error of the velocity makes, by differences."""
    along, t, h = PATHS[name], 0.4, 1e-3
    signal, noise = (lambda t, f=f: float(f(jnp.float32(t))) for f in (along.signal, along.noise))
    slope = [(f(t + h) - f(t - h)) / (2 * h) for f in (signal, noise)]
    rate = slope[0] / signal(t)
    squared = 2 * noise(t) * slope[1] - 2 * rate * noise(t) ** 2  # g^2: d noise^2/dt = 2 rate noise^2 + g^2
    # v = rate z_t - (g^2 / 2) score on every path, so that a unit error of v is one of 2 / g^2 of the score.
    expected = 0.5 * squared * (2 / squared) ** 2
    np.testing.assert_allclose(path.likelihood_weight(along, jnp.float32(t)), expected, rtol=1e-3)


def test_the_linear_path_weighs_by_1_minus_t_over_t():
    t = jnp.array([0.01, 0.2, 0.9])
    np.testing.assert_allclose(path.likelihood_weight(PATHS["linear"], t), (1 - t) / t, rtol=1e-5)
