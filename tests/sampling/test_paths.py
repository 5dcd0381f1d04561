"""Where the path of training enters generation: latents noised to a time, and the data that a velocity points to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import BLOCK, CHANNELS, apply, assert_close, create, normal

from cola_jax import sampling
from cola_jax.flow import solve
from cola_jax.flow.path import PATHS
from cola_jax.sampling import Settings, transport
from tests.flow import gaussian
from tests.flow.gaussian import CURVES

SETTINGS = Settings(steps=3, guidance_scale=3.0, max_new_tokens=BLOCK)
OTHERS = pytest.mark.parametrize("name", [name for name in PATHS if name != "linear"])


@OTHERS
def test_an_edit_starts_on_the_path(name):
    """The same as on the linear path, from the noise that leads to the same start."""
    model, params = create()
    text, strength, noise = list(range(1, 2 * BLOCK + 1)), 0.4, normal(1, 2, BLOCK, CHANNELS, seed=4)
    segments = jnp.ones((1, 2 * BLOCK), jnp.int32)
    mean = apply(model, params, jnp.array([text]), segments, method="encode").mean
    data = np.asarray(model.normalize(mean)).reshape(1, 2, BLOCK, CHANNELS)
    signal, _, weight, _ = CURVES[name](strength)
    same_start = jnp.asarray((signal * data + weight * noise - (1 - strength) * data) / strength)
    texts = [(text, 0, 2 * BLOCK)]

    def edit(noise, path):
        settings = dataclasses.replace(SETTINGS, path=path)
        return sampling.edit(model, params, texts, settings, strength, noise=noise).latents[:, :2]

    found = edit(noise, name)
    assert_close(found, edit(same_start, "linear"), 1e-5)
    assert np.abs(found - edit(noise, "linear")).max() > 0.05


@pytest.mark.parametrize(
    "name", ["trigonometric", *(pytest.param(p, marks=pytest.mark.slow) for p in ("linear", "quadratic"))]
)
def test_the_first_estimate_is_the_data_on_the_path(name):
    """At t = 1: ``z_0 = (noise' z_1 - v) / (-signal')``, with the velocity of a block alone."""
    model, params = create()
    settings = dataclasses.replace(SETTINGS, path=name)
    key = jax.random.key(0)
    noise = sampling.generate(model, params, [[]], dataclasses.replace(settings, prior="normal"), key).latents
    noise = noise[:, 0]
    v = apply(model, params, noise, jnp.ones(1), method="velocity")
    _, signal_slope, _, noise_slope = CURVES[name](1.0)
    data = jnp.asarray((noise_slope * np.asarray(noise) - np.asarray(v)) / -signal_slope, jnp.float32)
    expected = apply(model, params, data, method="decode").argmax(-1)
    stream = lambda: next(sampling.stream(model, params, [[]], settings, key, estimates=True))  # noqa: E731
    np.testing.assert_array_equal(stream().estimates[0], expected)


@pytest.mark.slow
def test_what_only_integrates_does_not_depend_on_the_path():
    """The velocity is the prior's own: from noise, with nothing known, all paths give the same."""
    model, params = create()
    noise = normal(1, 1, BLOCK, CHANNELS)
    ends = [
        sampling.generate(model, params, [[]], dataclasses.replace(SETTINGS, path=name), noise=noise).latents
        for name in PATHS
    ]
    for end in ends[1:]:
        np.testing.assert_array_equal(end, ends[0])


@pytest.mark.parametrize(
    ("name", "start"),
    [
        pytest.param(name, start, marks=() if (name, start) == ("trigonometric", 0.6) else pytest.mark.slow)
        for name in PATHS
        for start in (1.0, 0.6)
    ],
)
def test_the_distribution_of_gaussian_data_is_kept(name, start):
    """Data noised to a time and carried back by the exact field of the path: mean and covariance of the data.

    The carrying is affine, ``A z + b``, so that both are known without any draws.
    """
    mean, covariance, size = np.array([0.5, -1.0, 0.2]), gaussian.covariance(3), 3
    with jax.enable_x64(True):
        field = gaussian.velocity(jnp.asarray(mean), jnp.asarray(covariance), name)
        times = solve.Grid(start=start).times(24)

        def carry(z):
            return solve.integrate(field, z, times, "dopri5")

        def noised(data, noise):
            shape = (1, 1, size)
            return transport.noised(PATHS[name], data.reshape(shape), noise.reshape(shape), start).reshape(size)

        zero, unit = jnp.zeros(size), jnp.eye(size)
        offset = np.asarray(carry(noised(jnp.asarray(mean), zero)))
        of_data = np.stack([carry(noised(mean + row, zero)) - offset for row in unit], axis=1)
        of_noise = np.stack([carry(noised(jnp.asarray(mean), row)) - offset for row in unit], axis=1)
    np.testing.assert_allclose(offset, mean, atol=1e-5)
    np.testing.assert_allclose(of_data @ covariance @ of_data.T + of_noise @ of_noise.T, covariance, atol=1e-5)
    if start == 1.0:
        np.testing.assert_allclose(of_data, 0.0, atol=1e-12)
