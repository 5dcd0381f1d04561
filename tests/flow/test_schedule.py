import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import normal

from cola_jax import rng
from cola_jax.flow import schedule
from cola_jax.types import Posterior

KEYS = rng.key(0, "train", 0, jnp.arange(64))
QUANTILES = np.array([0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98])


@pytest.mark.parametrize(("loc", "scale"), [(1.0, 1.0), (-0.5, 2.0)])
def test_logit_normal_times_have_its_quantiles(loc, scale):
    times = np.asarray(schedule.sample_times(KEYS, 1000, "logit_normal", loc, scale))
    assert times.shape == (64, 1000) and 0 < times.min() and times.max() < 1
    expected = [loc + scale * statistics.NormalDist().inv_cdf(q) for q in QUANTILES]
    # 64 000 draws: the standard error of these quantiles is at most 0.011 scale.
    np.testing.assert_allclose(np.quantile(np.log(times / (1 - times)), QUANTILES), expected, atol=0.04 * scale)


def test_uniform_times_have_its_quantiles():
    times = schedule.sample_times(KEYS, 1000, "uniform")
    np.testing.assert_allclose(np.quantile(times, QUANTILES), QUANTILES, atol=0.008)


@pytest.mark.parametrize("distribution", ["logit_normal", "uniform"])
def test_times_of_an_example_depend_on_its_key_alone(distribution):
    times = schedule.sample_times(KEYS[:4], 6, distribution)
    np.testing.assert_array_equal(schedule.sample_times(KEYS[2:3], 6, distribution)[0], times[2])
    assert len(np.unique(times)) == 24


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
