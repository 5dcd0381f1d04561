"""Bounds on log p(image): the density of latents, the pixels, and what is made of them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_unified
from models.tiny_unified import GRID, SIDE
from scipy import stats

from cola_jax import likelihood, rng
from cola_jax.likelihood import images, pixels
from cola_jax.likelihood.pixels import Pixels
from cola_jax.objectives.unified import text_before
from cola_jax.types import UserError

QUICK, SPREAD = likelihood.Settings(samples=4, divergence="exact", solver="euler", steps=2), Pixels(20.0)
KEY = jax.random.key(7)


def before(changes=None, rows=slice(None)):
    """What three images read: a text each, the last one short."""
    model, params = tiny_unified.make()
    batch = {**tiny_unified.batch(), **(changes or {})}
    return text_before(model, params, {name: batch[name][rows] for name in ("tokens", "segment_ids")})


def latents(rows=3):
    return jnp.asarray(np.random.default_rng(3).standard_normal((rows, 4, 3), np.float32))


def still():
    """The tiny model at its start: its output, and so the velocity, is 0. Latents are normalised by (z - 0.3) * 2."""
    model, params = tiny_unified.make()
    model = model.clone(image_vae_config=dataclasses.replace(model.image_vae_config, shift=0.3, scale=2.0))
    stream = params["params"]["image_dit"]
    stream = {**stream, "out_layer": jax.tree.map(jnp.zeros_like, stream["out_layer"])}
    return model, {"params": {**params["params"], "image_dit": stream}}


def score(settings=QUICK, observed=SPREAD, rows=slice(None), model_params=None, **options):
    model, params = model_params or tiny_unified.make()
    found = np.asarray(tiny_unified.batch()["image"])[rows]
    return images.log_likelihood(model, params, found, observed, settings, KEY, **options)


@pytest.mark.parametrize("kind", ["logistic", "normal"])
@pytest.mark.parametrize("scale", [0.1, 3.0, 80.0])
def test_levels_have_the_mass_of_their_intervals(kind, scale):
    levels = np.arange(256, dtype=np.uint8)
    cdf = {"logistic": stats.logistic, "normal": stats.norm}[kind].cdf
    for centre in (-1.3, 0.1, 0.97):
        decoded = jnp.full(256, centre)
        found = np.asarray(pixels.log_prob(levels, decoded, scale, kind), np.float64)
        ends = (np.arange(257) - 0.5 - (np.float64(np.float32(centre)) + 1) * 127.5) / scale
        ends[0], ends[-1] = -np.inf, np.inf
        mass = np.where(ends[:-1] > 0, cdf(-ends[:-1]) - cdf(-ends[1:]), cdf(ends[1:]) - cdf(ends[:-1]))
        likely = mass > 1e-12
        np.testing.assert_allclose(found[likely], np.log(mass[likely]), rtol=2e-4, atol=2e-4)
        assert np.isfinite(found).all() and abs(np.exp(found).sum() - 1) < 1e-3


def test_the_scale_is_the_most_likely_one():
    draw = np.random.default_rng(0)
    decoded = draw.uniform(-0.5, 0.5, 20_000).astype(np.float32)
    levels = np.round((decoded + 1) * 127.5 + draw.logistic(0, 3.0, decoded.shape)).astype(np.uint8)
    found = pixels.fit(levels, decoded)
    assert found.kind == "logistic" and abs(found.scale / 3.0 - 1) < 0.03
    mean = lambda scale: pixels.log_prob(levels, jnp.asarray(decoded), scale, "logistic").mean()  # noqa: E731
    assert mean(found.scale) > max(mean(found.scale * 1.1), mean(found.scale / 1.1))


def test_before_training_latents_are_standard_normal():
    model, params = still()
    z = latents()
    found = images.log_prob(model, params, z, GRID, QUICK, before())
    assert found.log_prob.shape == (3, 1) and found.ok.all()
    np.testing.assert_allclose(found.log_prob[:, 0], stats.norm.logpdf(z).sum((1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(found.noise, z)


@pytest.mark.parametrize("prediction", ["velocity", "mean"])
def test_the_density_is_that_of_the_flow(prediction):
    """Against Runge-Kutta steps of all rows at once, and the trace of the whole Jacobian."""
    model, params = tiny_unified.make(prediction=prediction)
    slow = dataclasses.replace(model.image_dit_config, time_frequency=3.0)  # smooth in time: few steps are enough
    model = model.clone(image_dit_config=slow)
    z, read = latents(2), before(rows=slice(2))
    settings = likelihood.Settings(divergence="exact", rtol=1e-5, atol=1e-5)
    found = images.log_prob(model, params, z, GRID, settings, read)

    def velocity(z, t):
        return model.apply(params, z, jnp.full(2, t), GRID, read, method="image_velocity")

    def field(state, t):
        jacobian = jax.jacfwd(velocity)(state[0], t).reshape(2, 12, 2, 12)
        return velocity(state[0], t), jnp.einsum("bibi->b", jacobian)

    def step(state, t, h=1 / 40):
        move = lambda k, by: jax.tree.map(lambda x, v: x + by * v, state, k)  # noqa: E731
        a = field(state, t)
        b = field(move(a, h / 2), t + h / 2)
        c = field(move(b, h / 2), t + h / 2)
        d = field(move(c, h), t + h)
        return jax.tree.map(lambda x, *k: x + h / 6 * (k[0] + 2 * k[1] + 2 * k[2] + k[3]), state, a, b, c, d), None

    times = jnp.arange(40) / 40
    (end, change), _ = jax.jit(lambda z: jax.lax.scan(step, (z, jnp.zeros(2)), times))(z)
    wanted = stats.norm.logpdf(np.asarray(end)).sum((1, 2)) + np.asarray(change)
    np.testing.assert_allclose(found.noise, end, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(found.log_prob[:, 0], wanted, rtol=1e-3, atol=5e-3)
    assert np.abs(wanted - stats.norm.logpdf(z).sum((1, 2))).min() > 0.1


def test_an_image_depends_on_its_own_text_alone():
    model, params = tiny_unified.make()
    tokens, z = tiny_unified.batch()["tokens"], latents()
    found = lambda read: np.asarray(images.log_prob(model, params, z, GRID, QUICK, read).log_prob[:, 0])  # noqa: E731
    own = found(before())
    padding = found(before({"tokens": tokens.at[2, 6:].set(3)}))  # the short text's
    np.testing.assert_array_equal(padding, own)
    other = found(before({"tokens": tokens.at[1].set(tokens[0])}))
    assert abs(other[1] - own[1]) > 1e-3
    np.testing.assert_array_equal(other[::2], own[::2])
    alone = images.log_prob(model, params, z[:1], GRID, QUICK, before(rows=slice(1)))
    np.testing.assert_allclose(alone.log_prob[0], own[0], rtol=1e-5)
    empty = found(before({"segment_ids": jnp.zeros((3, 8), jnp.int32)}))
    np.testing.assert_allclose(empty, found(None), rtol=1e-5)


def test_the_bound_is_made_of_its_parts():
    """By hand, of the model whose velocity is 0."""
    model, params = still()
    found = score(model_params=(model, params))
    batch = tiny_unified.batch()["image"]
    posterior = model.apply(params, batch.astype(jnp.float32) / 127.5 - 1, method="encode_image")
    log_w = np.zeros((3, 4))
    for row in range(3):
        for sample in range(4):
            noise_key, _ = jax.random.split(rng.fold_in(rng.fold_in(KEY, row), sample))
            e = jax.random.normal(noise_key, (4, 3))
            z = posterior.mean[row] + jnp.exp(0.5 * posterior.logvar[row]) * e
            normal = (z - 0.3) * 2.0
            decoded = model.apply(params, normal[None], GRID, method="decode_image")[0]
            seen = pixels.log_prob(batch[row], decoded, 20.0, "logistic").sum()
            q = stats.norm.logpdf(z, posterior.mean[row], np.exp(0.5 * posterior.logvar[row])).sum()
            log_w[row, sample] = seen + stats.norm.logpdf(normal).sum() - (q - 12 * math.log(2.0))
    np.testing.assert_allclose(found.log_weights, log_w, rtol=1e-4)
    np.testing.assert_allclose(found.elbo, log_w.mean(1), rtol=1e-4)
    np.testing.assert_allclose(found.elbo, found.reconstruction + found.prior - found.posterior, rtol=1e-6)
    assert np.all(found.iwae >= found.elbo) and np.all(found.failed == 0)
    np.testing.assert_array_equal(found.tokens, SIDE * SIDE * 3)
    bits = images.bits_per_dimension(found.elbo, found.tokens)
    np.testing.assert_allclose(bits, -found.elbo / (SIDE * SIDE * 3 * math.log(2)))


def test_draws_follow_ids_and_not_the_batch():
    found, again = score(), score(ids=[0, 1, 0], before=before())
    assert np.all(np.isfinite(found.iwae)) and np.all(found.iwae >= found.elbo)
    np.testing.assert_allclose(again.reconstruction[:2], found.reconstruction[:2], rtol=1e-6)
    assert abs(again.reconstruction[2] / found.reconstruction[2] - 1) > 1e-6
    assert np.abs(again.prior - found.prior).min() > 1e-3  # given a text, and nothing
    np.testing.assert_allclose(again.posterior[:2], found.posterior[:2], rtol=1e-5)


def test_what_cannot_be_scored_is_refused():
    model, params = tiny_unified.make()
    for words, call in (
        ("rows of before = 2: must be 3", lambda: score(before=before(rows=slice(2)))),
        ("shape of ids = .2,.: must be .3,.", lambda: score(ids=[0, 1])),
        ("scale = -1.0: must be above 0", lambda: score(observed=Pixels(-1.0))),
        ("kind = 'flat': must be one of 'logistic', 'normal'", lambda: score(observed=Pixels(1.0, "flat"))),
        ("no image_dit; needs a joint model", lambda: score(model_params=(model, _without(params, "image_dit")))),
        ("uint8.0, 16, 16, 3.: must be uint8 .B, Y, X, C.", lambda: score(rows=slice(0))),
    ):
        with pytest.raises(UserError, match=words):
            call()


def _without(params, name):
    return {"params": {key: value for key, value in params["params"].items() if key != name}}
