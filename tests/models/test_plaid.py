"""Plaid: its codec, the limit of Cola that it is, its bound, what its sampler draws."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_models
from models.tiny_models import VOCAB, apply, assert_close, tokens

from cola_jax import families, rng, sampling
from cola_jax.fields import check
from cola_jax.models import cola, plaid
from cola_jax.objectives import common, stage2
from cola_jax.objectives import plaid as objective
from cola_jax.objectives.plaid import PlaidStageConfig
from cola_jax.types import UserError

LENGTH = 6
VARIANCE = 0.25


def make(variance: float = VARIANCE, **changes):
    fields = {"prediction": "mixture", "prediction_variance": variance, "block_size": LENGTH, "num_codes": VOCAB}
    model = plaid.create(tiny_models.dit_config(**(fields | changes)))
    params = tiny_models.parameters(model)
    dit = params["params"]["dit"]
    return model, {"params": {"dit": dit | {"codes": 5 * dit["codes"]}}}


def test_a_latent_is_its_token_and_noise():
    model, params = make()
    codes = np.asarray(params["params"]["dit"]["codes"])
    row = jnp.array([[3, 7, VOCAB, 3, 0, 30]])
    found = apply(model, params, row, method="encode")
    expected = np.where(np.asarray(row)[..., None] < VOCAB, codes[np.minimum(row, VOCAB - 1)], 0.0)
    assert_close(found.mean, expected, 1e-6)
    np.testing.assert_allclose(found.logvar, math.log(VARIANCE), rtol=1e-6)
    z = found.mean[:, :2] + 0.3
    logits = jax.nn.log_softmax(apply(model, params, z, method="decode"))
    density = -np.square(np.asarray(z)[:, :, None] - codes).sum(axis=-1) / (2 * VARIANCE)
    assert_close(logits, density - np.log(np.exp(density).sum(axis=-1, keepdims=True)), 1e-5)
    assert set(params["params"]) == {"dit"}  # nothing else is learned


def cola_in_the_limit(variance: float):
    """A Cola model whose encoder reads each token alone, a Plaid model with its means as embeddings, their codes."""
    _, vae = tiny_models.create({"logsnr": -math.log(variance)})
    twin, params = make(variance)
    model = cola.create(tiny_models.vae_config(logsnr=-math.log(variance)), twin.dit_config)
    vae = {"vae": vae["params"]["vae"]}
    codes = apply(model, {"params": vae}, jnp.arange(VOCAB)[:, None], method="encode").mean[:, 0]
    dit = params["params"]["dit"] | {"codes": codes}
    return model, {"params": vae | {"dit": dit}}, twin, {"params": {"dit": dit}}


def test_cola_becomes_plaid_where_a_latent_is_its_token():
    """11.17-11.19: equal posteriors and flow losses; and as sigma_0 falls, the decoder becomes the inverse."""
    row, segments = tokens(3, LENGTH), jnp.ones((3, LENGTH), jnp.int32)
    alone = jnp.tile(jnp.arange(1, LENGTH + 1)[None], (3, 1))  # every position is a document of its own
    keys, losses = rng.key(0, "train", 0, jnp.arange(3)), []
    for variance in (1.0, 0.01, 1e-5):
        model, params, twin, twin_params = cola_in_the_limit(variance)
        posteriors = (apply(model, params, row, alone, method="encode"), apply(twin, twin_params, row, method="encode"))
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *posteriors)
        z = common.draw(posteriors[0], keys)
        stage = PlaidStageConfig(prompts=0.5).flow
        terms = [
            stage2.flow_terms(each, stage, variables, z, segments, keys, True, posteriors[0])["flow"].value
            for each, variables in ((model, params), (twin, twin_params))
        ]
        assert_close(*terms, 1e-5)
        losses.append(common.token_scores(twin, twin_params, z, row, segments).cross_entropy.mean())
    assert losses[0] > 1 > losses[1] > losses[2] and losses[2] < 0.01


def vlb(model, params, stage, batch, keys):
    """The bound of each row, nats."""
    found = objective.terms(model, stage, params, batch, keys)
    return sum(found[name].coefficient * found[name].value for name in ("flow", "reconstruction"))


STAGE = PlaidStageConfig(prompts=0.0)


def test_embeddings_learn_through_all_of_the_bound():
    """Its derivative by them is that of numbers: nothing on the way is held."""
    model, params = make(self_conditioning=False)
    batch = {"tokens": tokens(4, LENGTH), "segment_ids": jnp.ones((4, LENGTH), jnp.int32)}
    keys, direction = rng.key(0, "train", 0, jnp.arange(4)), tiny_models.normal(VOCAB, 4, seed=3)

    @jax.jit
    def loss(step):
        dit = params["params"]["dit"]
        moved = {"params": {"dit": dit | {"codes": dit["codes"] + step * direction}}}
        return vlb(model, moved, STAGE, batch, keys).mean()

    numeric = (loss(1e-2) - loss(-1e-2)) / 2e-2
    assert float(jax.grad(loss)(0.0)) == pytest.approx(float(numeric), rel=0.02)


def test_the_bound_does_not_depend_on_where_times_are_drawn():
    model, params = make()
    count = 4000
    batch = {"tokens": jnp.tile(tokens(1, LENGTH), (count, 1)), "segment_ids": jnp.ones((count, LENGTH), jnp.int32)}
    found = []
    for index, changes in enumerate(({}, {"time_distribution": "logit_normal"})):
        stage = dataclasses.replace(STAGE, **changes)
        keys = rng.key(index, "train", 0, jnp.arange(count))
        values = np.asarray(jax.jit(lambda keys, stage=stage: vlb(model, params, stage, batch, keys))(keys), np.float64)
        found.append((values.mean(), values.std() / math.sqrt(count)))
    (one, error), (other, second) = found
    assert abs(one - other) < 4 * math.hypot(error, second) and error < 0.05 * one


@pytest.mark.slow
def test_the_bound_is_below_what_the_sampler_draws():
    """All four texts of two tokens of two: how often ancestral sampling writes each, against the bound."""
    model = plaid.create(
        tiny_models.dit_config(
            prediction="mixture", prediction_variance=0.05, block_size=2, num_codes=2, latent_dim=1, path="linear"
        )
    )
    params = tiny_models.parameters(model)
    dit = params["params"]["dit"]
    dit["codes"] = jnp.array([[-0.8], [0.9]])
    dit["out_layer"] = jax.tree.map(jnp.zeros_like, dit["out_layer"])  # means are expectations of the embeddings
    count = 10_000
    settings = sampling.Settings(
        max_new_tokens=2, steps=50, solver="exponential", churn=1.0, temperature=1.0, guidance_scale=1.0
    )
    out = sampling.generate(model, params, [[]] * count, settings, jax.random.key(0))
    shares = np.bincount(np.asarray(out.tokens) @ [2, 1], minlength=4) / count
    texts = jnp.repeat(jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]]), count, axis=0)
    batch = {"tokens": texts, "segment_ids": jnp.ones_like(texts)}
    keys = rng.key(1, "train", 0, jnp.arange(len(texts)))
    values = np.asarray(jax.jit(lambda: vlb(model, params, STAGE, batch, keys))(), np.float64).reshape(4, count)
    bound, error = -values.mean(axis=1), values.std(axis=1) / math.sqrt(count)
    frequency = np.sqrt((1 - shares) / (shares * count))  # error of log shares
    assert shares.min() > 0.002 and np.all(bound <= np.log(shares) + 4 * np.hypot(error, frequency))
    # Not an empty bound: within a nat of the truth, with a network that nothing was learned by.
    assert np.all(bound > np.log(shares) - 1.5)


def test_prompts_stay_and_gaps_are_filled():
    model, params = make()
    settings = sampling.Settings(max_new_tokens=3, steps=4, solver="exponential", guidance_scale=1.0, context=LENGTH)
    prompts = [[3, 5, 7], [9]]
    out = sampling.generate(model, params, prompts, settings, jax.random.key(0))
    assert np.asarray(out.lengths).tolist() == [3, 3]
    codes = np.asarray(params["params"]["dit"]["codes"])
    assert_close(np.asarray(out.latents)[0, 0, :3], codes[[3, 5, 7]], 1e-6)
    alone = sampling.generate(model, params, prompts[1:], settings, jax.random.key(0), sample_ids=[1])
    np.testing.assert_array_equal(alone.tokens[0], out.tokens[1])
    filled = sampling.infill(model, params, [([3], 2, [5, 7])], settings, jax.random.key(0))
    assert_close(np.asarray(filled.latents)[0, 0, [0, 3, 4]], codes[[3, 5, 7]], 1e-6)


GOOD = {"family": "plaid", "data": {"sequence_length": 8}, "dit": {"block_size": 8}}


@pytest.mark.parametrize(
    ("group", "field", "value", "words"),
    [
        ("dit", "block_size", 4, "config.dit.block_size = 4: must be data.sequence_length = 8"),
        ("dit", "prediction", "mean", "config.dit.prediction = 'mean': must be 'mixture'"),
        ("dit", "prediction_variance", None, "config.dit.prediction_variance = None: must be a number"),
        ("dit", "path", "quadratic", "config.dit.path = 'quadratic': must be stage1.path = 'linear'"),
        ("sample", "guidance_scale", 2.0, "config.sample.guidance_scale = 2.0: must be 1"),
        ("stage1", "time_distribution", "uniform_log_snr", "config.stage1.time_distribution = 'uniform_log_snr'"),
        ("stage1", "time_table", (1.0, 0.0), r"config.stage1.time_table = \(1.0, 0.0\)"),
    ],
)
def test_what_does_not_fit_is_one_line(group, field, value, words):
    families.parse(GOOD)
    changed = GOOD | {group: GOOD.get(group, {}) | {field: value}}
    with pytest.raises(UserError, match=words):
        families.parse(changed)
    with pytest.raises(UserError, match=r"config.dit.num_codes = 20: must be at least the tokenizer's 31"):
        families.plaid.resolve(families.parse(GOOD | {"dit": GOOD["dit"] | {"num_codes": 20}}), 31)
    check(PlaidStageConfig(), "x.")
