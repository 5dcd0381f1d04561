"""The objective of LLaDA: its expectation, its forward process, what counts in it."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_llada as tiny

from cola_jax.objectives import masked_diffusion
from cola_jax.objectives.masked_diffusion import MaskedDiffusionConfig

STAGE = MaskedDiffusionConfig(smallest_time=1e-6)


def terms(model, params, tokens, segments, keys, stage=STAGE):
    batch = {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(segments)}
    return jax.jit(lambda batch, keys: masked_diffusion.terms(model, stage, params, batch, keys))(batch, keys)


def test_the_expectation_of_the_loss_is_the_bound():
    """Enumerated: a mask of m of L tokens has the weight ``int t^(m - 1) (1 - t)^(L - m) dt`` (11.13)."""
    model, params = tiny.create(vocab_size=3)
    text, count = (2, 0, 1), 40_000
    known = tiny.Enumerated(model.config, params, 3)
    expected = 0.0
    for size in (1, 2, 3):
        weight = math.gamma(size) * math.gamma(4 - size) / math.gamma(4)
        expected -= weight * sum(known.hidden(text, set(some)) for some in itertools.combinations(range(3), size))
    assert -expected == pytest.approx(known.bound(text))  # the form with a number of masked tokens is the same
    keys = jax.random.split(jax.random.key(0), count)
    term = terms(model, params, [text] * count, np.ones((count, 3), int), keys)["masked"]
    np.testing.assert_array_equal(term.weight, 3.0)
    values = np.asarray(term.value, np.float64)
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(count)
    assert values.std() / math.sqrt(count) < 0.02 * expected


def test_the_forward_process_is_the_absorbing_chain():
    """11.15-11.16: with a rate beta of jumps into the mask a token is masked by time s with ``t = 1 - exp(-beta s)``,
    and between two times those that are masked at the later one were masked at the earlier with ``t_early / t_late``:
    what the sampler's random order undoes."""
    beta, states = 0.7, 3  # two tokens and the mask
    generator = np.zeros((states, states))
    generator[:2, :2], generator[:2, 2] = -beta * np.eye(2), beta
    early, late = (jax.scipy.linalg.expm(jnp.asarray(generator * s, jnp.float32)) for s in (0.4, 1.1))
    ratio = [1 - math.exp(-beta * s) for s in (0.4, 1.1)]
    np.testing.assert_allclose([early[0, 2], late[1, 2]], ratio, rtol=1e-5)
    np.testing.assert_allclose([early[0, 1], early[2, 2]], [0.0, 1.0], atol=1e-6)
    # Draws of `corrupt` have these marginals at their ratio, independently for every position.
    t, masked = masked_diffusion.corrupt(jax.random.split(jax.random.key(1), 200_000), 2, 1e-6)
    near = np.abs(np.asarray(t) - ratio[1]) < 0.02
    found = np.asarray(masked)[near]
    assert near.sum() > 5000 and abs(found.mean() - ratio[1]) < 0.02
    assert abs(np.mean(found[:, 0] & found[:, 1]) - ratio[1] ** 2) < 0.025
    # The reverse transition of Bayes' rule.
    between = jax.scipy.linalg.expm(jnp.asarray(generator * 0.7, jnp.float32))
    posterior = early[0, 2] * between[2, 2] / late[0, 2]
    np.testing.assert_allclose(posterior, ratio[0] / ratio[1], rtol=1e-5)


def test_ratios_are_uniform():
    t, _ = masked_diffusion.corrupt(jax.random.split(jax.random.key(2), 20_000), 1, 0.2)
    t = np.sort(np.asarray(t))
    assert t[0] >= 0.2 and t[-1] < 1
    assert np.max(np.abs((t - 0.2) / 0.8 - np.linspace(0, 1, len(t)))) < 1.7 / math.sqrt(len(t))  # Kolmogorov-Smirnov


def test_padding_counts_nowhere():
    model, params = tiny.create(vocab_size=5)
    keys = jax.random.split(jax.random.key(3), 64)
    segments = np.array([[1, 1, 2, 2, 0, 0]] * 64)
    tokens = np.array([[1, 2, 3, 4, 0, 0]] * 64)
    found, other = (terms(model, params, np.where(segments > 0, tokens, fill), segments, keys) for fill in (0, 3))
    jax.tree.map(np.testing.assert_array_equal, found, other)
    np.testing.assert_array_equal(found["masked"].weight, 4.0)
    assert np.all(found["accuracy"].weight <= 4) and found["accuracy"].coefficient == 0.0


def test_a_share_of_the_rows_is_cut_at_a_uniform_length():
    segments = jnp.ones((8000, 10), jnp.int32)
    found = masked_diffusion.shortened(jax.random.split(jax.random.key(4), 8000), segments, 0.25)
    lengths = np.asarray(found.sum(axis=1))
    counts = np.bincount(lengths, minlength=11)
    expected = 8000 * 0.25 / 10
    assert counts[0] == 0 and np.all(np.abs(counts[1:10] - expected) < 5 * math.sqrt(expected))
    assert abs(counts[10] - 8000 * 0.75 - expected) < 5 * math.sqrt(8000 * 0.25 * 0.75)
