"""ELBO and IWAE against an enumerable model; invariances; bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cola_jax import likelihood, sharding
from cola_jax.config import TrainConfig
from cola_jax.likelihood import Settings, density, estimators, weights
from cola_jax.likelihood.rows import make_rows
from cola_jax.types import UserError
from tests.likelihood import toy
from tests.models import tiny_models

KEY = jax.random.key(7)
COARSE = Settings(solver="heun", steps=24, divergence="exact", rows=4096)
TINY = Settings(samples=4, solver="heun", steps=3)


@pytest.fixture(scope="module")
def enumerated():
    return likelihood.log_likelihood(
        toy.create(), toy.PARAMS, toy.texts(), dataclasses.replace(COARSE, samples=2000), KEY
    )


def test_texts_of_the_toy_model_sum_to_one():
    assert np.exp(toy.log_prob()).sum() == pytest.approx(1, abs=1e-6)


def test_elbo_and_iwae_approach_the_enumerated_likelihood_from_below(enumerated):
    exact = toy.log_prob()
    curve = likelihood.iwae_curve(enumerated.log_weights, (1, 5, 50, 2000))
    gaps = exact.mean() - curve.mean(axis=0)
    assert np.all(np.diff(gaps) < 0) and gaps[0] > 0.05  # nearer with every K
    assert np.all(enumerated.elbo < exact)
    assert np.all(np.abs(enumerated.iwae - exact) < 4 * enumerated.iwae_error + 1e-3)
    np.testing.assert_allclose(curve[:, 0], enumerated.elbo, rtol=1e-12)
    np.testing.assert_allclose(curve[:, -1], enumerated.iwae, rtol=1e-12)


def test_elbo_is_at_most_iwae(enumerated):
    assert np.all(enumerated.elbo <= enumerated.iwae)


def test_with_the_exact_posterior_every_weight_is_the_likelihood():
    """Also that both densities are of the same, normalised latents: the toy's scale is 2."""
    settings = dataclasses.replace(COARSE, samples=5, solver="dopri5", steps=0, rtol=1e-6, atol=1e-6)
    found = likelihood.log_likelihood(toy.create(False), toy.PARAMS, toy.texts(), settings, KEY)
    exact = toy.log_prob(False)
    np.testing.assert_allclose(found.log_weights, np.repeat(exact[:, None], 5, axis=1), atol=1e-4)
    np.testing.assert_allclose(found.iwae, exact, atol=1e-4)


def test_errors_are_those_of_repeated_estimates():
    """Over 40 keys, the spread of both estimates is what one of them reports."""
    settings = dataclasses.replace(COARSE, samples=60, steps=8)
    model, text = toy.create(), toy.texts()
    found = [likelihood.log_likelihood(model, toy.PARAMS, text, settings, jax.random.key(i)) for i in range(40)]
    for name in ("elbo", "iwae"):
        spread = np.std([getattr(f, name) for f in found], axis=0, ddof=1)
        reported = np.mean([getattr(f, f"{name}_error") for f in found], axis=0)
        assert np.mean(reported / spread) == pytest.approx(1, abs=0.2)


def test_terms_add_up_and_stay_apart(enumerated):
    blocks = enumerated.blocks
    np.testing.assert_allclose(blocks.elbo.sum(axis=1), enumerated.elbo, rtol=1e-5)
    np.testing.assert_allclose(
        enumerated.reconstruction + enumerated.prior - enumerated.posterior, enumerated.elbo, rtol=1e-5
    )
    assert blocks.prior.shape == (9, 2) and np.all(enumerated.tokens == 2) and not enumerated.failed.any()


def test_response_score_is_the_conditional_of_the_model():
    """Given token and latent of the first block, the second is a one-dimensional model of its own (10.21-10.22)."""
    model, settings = toy.create(), dataclasses.replace(COARSE, samples=2000)
    text = toy.texts()
    found = likelihood.log_likelihood(model, toy.PARAMS, text, settings, KEY, prefix=np.ones(9, int))
    first = (np.array([0.9, -0.9, 0.1])[text[:, 0]]) / 2  # the posterior mean, normalised
    grid, step = np.linspace(-9, 9, 4001, retstep=True)
    logits = toy.LOGITS[:, :1] * grid + toy.LOGITS[:, 1:]
    tokens = np.exp(logits - np.logaddexp.reduce(logits, axis=0))
    prior = np.exp(-0.5 * ((grid - toy.SLOPE * first[:, None]) / toy.SPREAD) ** 2)
    prior /= prior.sum(axis=1, keepdims=True) * step
    expected = np.log((prior * tokens[text[:, 1]]).sum(axis=1) * step)
    assert np.all(np.abs(found.iwae - expected) < 4 * found.iwae_error + 1e-3)
    assert np.all(found.blocks.elbo[:, 0] == 0) and np.all(found.tokens == 1)


def test_plug_in_is_the_difference_of_two_estimates():
    model, settings = toy.create(), dataclasses.replace(COARSE, samples=2000)
    text = toy.texts()
    found = likelihood.conditional(model, toy.PARAMS, text[:, :1].tolist(), text[:, 1:].tolist(), settings, KEY)
    exact = toy.log_prob().reshape(3, 3)
    expected = (exact - np.logaddexp.reduce(exact, axis=1, keepdims=True)).reshape(-1)
    assert np.all(np.abs(found.iwae - expected) < 4 * found.iwae_error + 1e-3)
    # Draws of the prefix are shared, so that its noise cancels from the difference.
    for name in ("prior", "posterior", "reconstruction"):
        joint, prefix = (getattr(part.blocks, name)[:, 0] for part in (found.joint, found.prefix))
        np.testing.assert_allclose(joint, prefix, rtol=1e-5)


def test_an_empty_prefix_has_probability_one():
    model, settings = toy.create(), dataclasses.replace(COARSE, samples=8)
    found = likelihood.conditional(model, toy.PARAMS, [[], [1]], [[0, 1], [2]], settings, KEY)
    whole = likelihood.log_likelihood(model, toy.PARAMS, [[0, 1], [1, 2]], settings, KEY)
    np.testing.assert_allclose(found.iwae[0], whole.iwae[0], rtol=1e-6)
    assert found.iwae[1] != pytest.approx(whole.iwae[1])


def test_effective_sample_size():
    """By hand: (1 + 2 + 3)^2 / (1 + 4 + 9); equal weights; one that dominates. Below 10 the error means nothing."""
    log_w = np.log([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [1e-30, 1e-30, 1.0]]) + 400
    np.testing.assert_allclose(estimators.effective_sample_size(log_w), [36 / 14, 3, 1])
    weights = np.ones((2, 12)) + np.arange(12) * np.array([[0.1], [10.0]])
    blocks = estimators.BlockTerms(*[np.zeros((2, 1))] * 3)
    exact = Settings(divergence="exact")
    found = estimators._likelihood(np.log(weights), np.ones((2, 12), bool), np.ones((2, 12)), blocks, np.ones(2), exact)
    np.testing.assert_allclose(found.ess, weights.sum(1) ** 2 / (weights**2).sum(1))
    assert found.ess[0] > 10 > found.ess[1]
    np.testing.assert_allclose(found.iwae, np.log(weights.mean(1)))
    error = weights[0].std(ddof=1) / np.sqrt(12) / weights[0].mean()
    np.testing.assert_allclose(found.iwae_error, [error, np.nan])


def test_iwae_is_given_only_where_it_is_a_bound():
    """Hutchinson's noise enters an exponential: with q = p its IWAE would lie above log p."""
    model, text = toy.create(), toy.texts()
    for divergence in ("exact", "hutchinson"):
        settings = dataclasses.replace(COARSE, samples=40, divergence=divergence)
        found = likelihood.log_likelihood(model, toy.PARAMS, text, settings, KEY)
        assert np.all(np.isnan(found.iwae) == (divergence != "exact"))
        assert np.all(np.isfinite(found.elbo)) and np.all((found.ess >= 1) & (found.ess <= 40))
    assert np.all(np.isnan(found.iwae_error))


def test_a_prefix_that_ends_inside_a_block_has_no_plug_in_score(tiny):
    with pytest.raises(UserError) as error:
        likelihood.conditional(*tiny, [[1, 2, 3, 4], [1, 2, 3, 4, 5]], [[1], [1]], TINY, KEY)
    message = "example 1: prefix of 5 tokens ends inside a block of 4; it must be a multiple of 4"
    assert str(error.value) == message


@pytest.fixture(scope="module")
def tiny():
    return tiny_models.create(vae={"scale": 1.5, "shift": 0.2})


@pytest.fixture(scope="module")
def batch():
    lengths = (12, 5, 9)
    return likelihood.stack([tiny_models.tokens(n, seed=n).tolist() for n in lengths])


def run(tiny, batch, settings=TINY, **options):
    tokens, segments = batch
    return likelihood.log_likelihood(*tiny, tokens, settings, KEY, segment_ids=segments, **options)


@pytest.fixture(scope="module")
def scored(tiny, batch):
    return run(tiny, batch)


def test_an_example_does_not_depend_on_its_batch(tiny, batch, scored):
    """Nor on the width of its row, on the samples computed at a time, or on K beyond its first samples."""
    tokens, segments = batch
    alone = run(tiny, (tokens[1:2, :5], segments[1:2, :5]), ids=[1])
    np.testing.assert_allclose(alone.log_weights[0], scored.log_weights[1], rtol=1e-5)
    few = run(tiny, batch, dataclasses.replace(TINY, samples=3, rows=6))
    np.testing.assert_allclose(few.log_weights, scored.log_weights[:, :3], rtol=1e-5)
    np.testing.assert_allclose(few.blocks.prior.sum(axis=1), few.prior, rtol=1e-6)


@pytest.mark.slow
def test_a_mesh_changes_nothing(tiny, batch, scored):
    mesh = sharding.make_mesh(TrainConfig(mesh_data=2), jax.devices())
    model, params = tiny
    on_mesh = jax.device_put(params, sharding.replicated(mesh))
    found = run((model, on_mesh), batch, mesh=mesh)  # three rows on two devices
    np.testing.assert_allclose(found.log_weights, scored.log_weights, rtol=1e-4)
    np.testing.assert_allclose(found.blocks.posterior, scored.blocks.posterior, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["causal", "block_causal"])
def test_a_response_does_not_reach_the_latents_of_its_prefix(attention):
    """Nor in the block of the VAE that the prefix ends inside, where a block-causal encoder sees what follows."""
    model, params = tiny_models.create(vae={"attention": attention, "block_size": 4})
    text = np.array(tiny_models.tokens(2, 12, seed=3))
    text[1, :6] = text[0, :6]  # the same prefix, another response
    encode = functools.partial(weights.encode, model, params)
    found = encode(make_rows(model, text, prefix=[6, 6]))
    for value in found:
        np.testing.assert_array_equal(value[0, :6], value[1, :6])
        assert np.all(np.any(value[0, 6:] != value[1, 6:], axis=-1))
    # What is given is encoded as a prompt is, alone; the rest as the text is, whole.
    alone = encode(make_rows(model, text[:, :6]))
    whole = encode(make_rows(model, text))
    for value, prompt, full in zip(found, alone, whole, strict=True):
        np.testing.assert_allclose(value[:, :6], prompt[:, :6], atol=1e-5)
        np.testing.assert_allclose(value[:, 6:], full[:, 6:], atol=1e-5)


def test_a_causal_encoder_runs_once():
    """The prefix needs a pass of its own only where the encoder could see the response."""
    text = np.asarray(tiny_models.tokens(1, 8))
    passes = {}
    for attention in ("causal", "block_causal"):
        model, params = tiny_models.create(vae={"attention": attention, "block_size": 4})
        rows = make_rows(model, text, prefix=[4])
        program = str(jax.make_jaxpr(lambda p, rows=rows, model=model: weights.encode(model, p, rows))(params))
        passes[attention] = program.count("dot_general")
    assert passes["block_causal"] == 2 * passes["causal"]


def test_samples_differ_and_share_one_program(tiny, batch, scored):
    assert len(np.unique(scored.log_weights)) == scored.log_weights.size
    before = weights.terms._cache_size()
    run(tiny, batch, dataclasses.replace(TINY, rows=2))  # one sample at a time, four of them
    assert weights.terms._cache_size() <= before + 1


def test_probes_have_keys_of_their_own(tiny, batch, monkeypatch):
    """A key for each block of each sample of each row, none of them one that latents were drawn from."""
    model, params = tiny
    rows = jax.tree.map(jnp.asarray, make_rows(model, *batch))
    posterior = weights.encode(model, params, rows)
    seen = []

    def log_prob(model, params, z, settings, keys, segments, given):
        seen.append((z, keys))
        blocks = jnp.zeros(keys.shape)
        return density.Density(blocks, z, blocks == 0, blocks.astype(jnp.int32))

    monkeypatch.setattr(weights.density, "log_prob", log_prob)
    samples = jnp.arange(2)
    weights.terms.__wrapped__(model, params, rows, TINY, posterior, KEY, samples)
    ((z, keys),) = seen
    assert keys.shape == (6, 3) and len(np.unique(jax.random.key_data(keys).reshape(18, -1), axis=0)) == 18
    deviation = np.exp(0.5 * np.asarray(posterior.logvar)) * 1.5
    noise = (z - np.repeat(model.normalize(posterior.mean), 2, axis=0)) / np.repeat(deviation, 2, axis=0)
    drawn = jax.vmap(jax.vmap(lambda k: jax.random.normal(k, (tiny_models.BLOCK, tiny_models.CHANNELS))))(keys)
    assert np.all(np.abs(np.asarray(noise).reshape(drawn.shape) - drawn).max(axis=(2, 3)) > 0.1)
    assert len(np.unique(np.round(noise, 4))) > 0.95 * noise.size  # nor do blocks or samples share latents


def test_a_failed_solve_is_told_and_stays_alone(tiny, batch):
    settings = dataclasses.replace(TINY, samples=2, steps=0, rtol=1e-3, atol=1e-3, max_steps=1000)
    steps = run(tiny, batch, settings)
    assert not steps.failed.any()
    terms = [np.zeros((3, 2)), np.array([[True, True], [True, False], [True, True]]), np.ones((3, 2))]
    blocks = estimators.BlockTerms(*[np.ones((3, 2))] * 3)
    found = estimators._likelihood(*terms, blocks, np.ones(3), dataclasses.replace(settings, divergence="exact"))
    np.testing.assert_array_equal(np.isnan(found.elbo), [False, True, False])
    np.testing.assert_array_equal(np.isnan(found.iwae), [False, True, False])
    np.testing.assert_array_equal(found.failed, [0, 1, 0])
    hopeless = run(tiny, batch, dataclasses.replace(settings, max_steps=1))
    assert np.all(hopeless.failed == 2) and np.all(np.isnan(hopeless.elbo))


def test_report_counts_samples(tiny, batch):
    seen = []
    run(tiny, batch, dataclasses.replace(TINY, rows=6), report=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 4), (4, 4)]


def test_rates():
    assert likelihood.perplexity(-2 * np.log(7), 2) == pytest.approx(7)
    assert likelihood.bits_per_byte(-16 * np.log(2), 4) == pytest.approx(4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": 0}, "likelihood samples = 0: must be at least 1"),
        ({"solver": "rk9"}, "likelihood solver = 'rk9': must be one of 'euler', 'heun'"),
        ({"solver": "euler", "steps": 0}, "likelihood steps = 0"),
        ({"steps": 20, "max_steps": 10}, "likelihood max_steps = 10: must be at least steps = 20"),
        ({"power": float("inf")}, "likelihood power = inf: must be a finite number"),
        ({"rtol": 0.0, "steps": 0}, "likelihood rtol = 0.0"),
        ({"divergence": "none"}, "likelihood divergence = 'none'"),
        ({"probes": 0}, "likelihood probes = 0"),
        ({"dtype": "float64"}, "JAX_ENABLE_X64"),
        ({"prefix": "none"}, "likelihood prefix = 'none'"),
    ],
)
def test_settings_refuse(change, words):
    with pytest.raises(UserError, match="likelihood") as error:
        dataclasses.replace(TINY, **change).validate()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("tokens", "segments", "prefix", "words"),
    [
        ([[1, 2, 99]], None, None, "example 0: a token id is outside the vocabulary, must be 0 to 30"),
        ([[1, 2, -1]], None, None, "example 0: a token id is outside"),
        ([[1, 2], [1, 2]], [[1, 1], [1, 2]], None, "example 1: segment_ids"),
        ([[1, 2], [1, 2]], [[1, 1], [0, 0]], None, "example 1: no token"),
        ([[1, 2]], None, [2], "example 0: 2 tokens, of which the prefix has 2"),
        ([1, 2], None, None, "must be two equal shapes"),
    ],
)
def test_rows_refuse(tiny, tokens, segments, prefix, words):
    with pytest.raises(UserError) as error:
        likelihood.log_likelihood(*tiny, tokens, TINY, KEY, segments, prefix)
    assert words in str(error.value)


def test_models_without_a_density_are_refused(tiny):
    model, params = tiny
    with pytest.raises(UserError, match="no prior"):
        likelihood.log_likelihood(model, {"params": {"vae": params["params"]["vae"]}}, [[1]], TINY, KEY)
    plain, its_params = tiny_models.create(vae={"variational": False})
    with pytest.raises(UserError, match="config.vae.variational = False"):
        likelihood.log_likelihood(plain, its_params, [[1]], TINY, KEY)
    with pytest.raises(UserError, match="example 1: the response is empty"):
        likelihood.conditional(model, params, [[1], [2]], [[1], []], TINY, KEY)
