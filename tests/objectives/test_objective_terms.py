"""What both stages are made of, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from models.tiny_models import assert_close, normal, tokens

from cola_jax import rng
from cola_jax.objectives import common
from cola_jax.types import Posterior

P = Posterior(normal(2, 3, 4), normal(2, 3, 4, seed=1))
Q = Posterior(normal(2, 3, 4, seed=2), normal(2, 3, 4, seed=3))
KEYS = rng.key(0, "train", 0, jnp.arange(2))


def log_density(z, posterior):
    mean, logvar = (np.asarray(x, np.float64) for x in posterior)
    return (-0.5 * ((z - mean) ** 2 / np.exp(logvar) + logvar + np.log(2 * np.pi))).sum(-1)


def gauss_hermite(function, posterior):
    """E_q of a quadratic of z, exact: sigma points mean ± sigma sqrt(C) of each channel."""
    mean, logvar = (np.asarray(x, np.float64) for x in posterior)
    sigma, channels, total = np.exp(0.5 * logvar), mean.shape[-1], 0.0
    for channel in range(channels):
        for sign in (-1, 1):
            z = mean.copy()
            z[..., channel] += sign * np.sqrt(channels) * sigma[..., channel]
            total = total + function(z) / (2 * channels)
    return total


def test_kl_is_the_mean_log_ratio():
    expected = gauss_hermite(lambda z: log_density(z, P) - log_density(z, Q), P)
    assert_close(common.kl(P, Q), expected, 1e-5)
    np.testing.assert_array_equal(common.kl(P, P), 0.0)


def test_kl_to_the_standard_normal():
    mean, logvar = (np.asarray(x, np.float64) for x in P)
    expected = 0.5 * (np.exp(logvar) + mean**2 - 1 - logvar).sum(-1)
    assert_close(common.kl(P, common.standard_normal_like(P)), expected, 1e-5)


def test_negative_entropy_is_the_mean_log_density():
    assert_close(common.negative_entropy(P), gauss_hermite(lambda z: log_density(z, P), P), 1e-5)


def test_cross_entropy_and_accuracy():
    logits, targets = 3 * normal(2, 5, 31), tokens(2, 5)
    shares = np.exp(np.asarray(logits, np.float64))
    shares = shares / shares.sum(-1, keepdims=True)
    expected = [[-np.log(shares[b, t, targets[b, t]]) for t in range(5)] for b in range(2)]
    assert_close(common.cross_entropy(logits, targets), np.array(expected), 1e-5)
    best = jnp.argmax(logits, -1).at[0, 1].add(1) % 31
    np.testing.assert_array_equal(common.accuracy(logits, best), [[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def test_a_draw_has_the_posterior_mean_and_variance():
    posterior = jax.tree.map(lambda x: jnp.broadcast_to(x, (4000, *x.shape[1:])), Posterior(P.mean[:1], P.logvar[:1]))
    z = np.asarray(common.draw(posterior, rng.key(0, "train", 0, jnp.arange(4000))))
    sigma = np.exp(0.5 * np.asarray(P.logvar[0]))
    # Standard errors: sigma / 63 of the mean, sigma / 89 of the deviation.
    assert np.max(np.abs(z.mean(0) - P.mean[0]) / sigma) < 0.07
    assert np.max(np.abs(z.std(0) / sigma - 1)) < 0.05
    np.testing.assert_array_equal(common.draw(P, KEYS)[1:], common.draw(jax.tree.map(lambda x: x[1:], P), KEYS[1:]))


def test_a_term_counts_where_the_mask_is():
    term = common.per_example(jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]), jnp.array([[1.0, 0, 1], [0, 0, 0]]), 0.5)
    np.testing.assert_array_equal(term.value, [5.0, 0.0])
    np.testing.assert_array_equal(term.weight, [2.0, 0.0])
    assert term.coefficient == 0.5


def test_latents_have_the_document_of_their_tokens():
    segments = jnp.array([[1, 1, 2, 2, 2, 2, 0, 0]])
    np.testing.assert_array_equal(common.latent_segments({"segment_ids": segments}, 2), [[1, 2, 2, 0]])
    np.testing.assert_array_equal(common.latent_segments({"segment_ids": segments}, 1), segments)


def test_posterior_statistics_are_powers_of_latents_that_count():
    mask = jnp.array([[1.0, 1, 0], [1, 0, 0]])
    out = common.posterior_statistics(P, mask)
    mean, logvar = (np.asarray(x, np.float64) for x in P)
    for name, power in (("latent_signal", mean**2), ("latent_noise", np.exp(logvar))):
        assert_close(out[name].value, (power.mean(-1) * np.asarray(mask)).sum(1), 1e-6)
        np.testing.assert_array_equal(out[name].weight, [2, 1])
        assert out[name].coefficient == 0.0
