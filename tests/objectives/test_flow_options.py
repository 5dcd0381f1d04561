"""Weights of times, the posterior's velocity as target, errors by time, self-conditioning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import (
    BLOCK,
    VOCAB,
    assert_close,
    create,
    dit_config,
    normal,
    tokens,
    vae_config,
)

from cola_jax import rng
from cola_jax.fields import check
from cola_jax.flow import schedule
from cola_jax.models import cola
from cola_jax.objectives import stage2
from cola_jax.objectives.stage2 import Stage2Config
from cola_jax.types import Posterior, UserError

BATCH, LENGTH, CHANNELS = 6, 12, 4
Z = normal(BATCH, LENGTH, CHANNELS, seed=1)
SEGMENTS = jnp.array([[1] * LENGTH] * 5 + [[1] * 9 + [0] * 3])
KEYS = rng.key(0, "train", 0, jnp.arange(BATCH))
PLAIN = Stage2Config(prompt_blocks=0.0, noise_copies=2)
VELOCITY = normal(BATCH, 2 * LENGTH, CHANNELS, seed=5)


class Spy:
    """A model whose velocity is given; it records what it is asked."""

    vae_config = vae_config(shift=0.3, scale=0.5)
    dit_config = dit_config()
    normalize = cola.ColaDLM.normalize

    def apply(self, params, noisy, times, *, method, **kwargs):
        assert method == "velocity"
        self.noisy, self.times = noisy, np.repeat(np.asarray(times, np.float64), BLOCK, axis=1)
        return VELOCITY


def flow(stage, posterior=None):
    spy = Spy()
    return spy, stage2.flow_terms(spy, stage, None, Z, SEGMENTS, KEYS, True, posterior)


def test_the_target_is_the_velocity_given_the_posterior():
    """Its mean and variance before normalisation; written out for the linear path."""
    posterior = Posterior(normal(BATCH, LENGTH, CHANNELS, seed=2), normal(BATCH, LENGTH, CHANNELS, seed=3) - 1)
    spy, terms = flow(dataclasses.replace(PLAIN, target="posterior"), posterior)
    mean = np.tile((np.asarray(posterior.mean, np.float64) - 0.3) * 0.5, (1, 2, 1))
    variance = np.tile(np.exp(np.asarray(posterior.logvar, np.float64)) * 0.25, (1, 2, 1))
    t, z = spy.times[..., None], np.asarray(spy.noisy, np.float64)
    spread = (1 - t) ** 2 * variance + t**2
    target = -mean + (t - (1 - t) * variance) / spread * (z - (1 - t) * mean)
    error = ((np.asarray(VELOCITY) - target) ** 2).mean(-1)
    assert_close(terms["flow"].value, (error * np.tile(np.asarray(SEGMENTS > 0), (1, 2))).sum(1), 1e-4)


@pytest.mark.parametrize("weight", schedule.WEIGHTS)
def test_each_error_counts_its_importance(weight):
    stage = dataclasses.replace(PLAIN, time_loc=0.2, time_weight=weight, weight_loc=-0.5, weight_scale=1.3)
    _, plain = flow(dataclasses.replace(stage, time_weight="as_drawn"))
    spy, terms = flow(stage)
    z = np.asarray(spy.noisy, np.float64)
    t, data = spy.times[..., None], np.tile(np.asarray(Z, np.float64), (1, 2, 1))
    error = ((np.asarray(VELOCITY) - ((z - (1 - t) * data) / t - data)) ** 2).mean(-1)
    logit = np.log(spy.times / (1 - spy.times))

    def density(loc, scale):
        peak = np.exp(-0.5 * ((logit - loc) / scale) ** 2) / (scale * np.sqrt(2 * np.pi))
        return peak / (spy.times * (1 - spy.times))

    wanted = {
        "as_drawn": density(0.2, 1.0),
        "uniform": 1.0,
        "likelihood": (1 - spy.times) / spy.times,
        "logit_normal": density(-0.5, 1.3),
    }
    counted = error * wanted[weight] / density(0.2, 1.0) * np.tile(np.asarray(SEGMENTS > 0), (1, 2))
    assert_close(terms["flow"].value, counted.sum(1), 1e-3)
    for name in terms:  # the log's errors by time stay errors
        if name != "flow":
            np.testing.assert_array_equal(terms[name].value, plain[name].value)


def test_errors_by_time_add_up_and_have_no_gradient():
    _, terms = flow(PLAIN)
    total = terms.pop("flow")
    assert list(terms) == ["flow_from_0", "flow_from_0.1", "flow_from_0.3", "flow_from_0.7"]
    assert_close(sum(term.value for term in terms.values()), total.value, 1e-5)
    np.testing.assert_array_equal(sum(term.weight for term in terms.values()), total.weight)
    assert all(term.coefficient == 0 for term in terms.values())
    assert sum(float(term.weight.sum()) > 0 for term in terms.values()) >= 3


FED_BACK = {"no_history_vector": True, "prediction": "mean", "prediction_variance": 0.1, "self_conditioning": True}


def fed_back(share, params=None):
    model, own = create(dit=FED_BACK)
    stage = dataclasses.replace(PLAIN, self_conditioning=share)

    def value(params):
        return jnp.sum(stage2.flow_terms(model, stage, params, Z, SEGMENTS, KEYS, True)["flow"].value)

    return jax.jit(jax.value_and_grad(value))(own if params is None else params)


def by_hand(estimates, wrt_estimate):
    """The same loss with the estimate of a first pass, through which the gradient may or may not go."""
    model, params = create(dit=FED_BACK)
    draw = stage2._draw(PLAIN, KEYS, LENGTH, CHANNELS, BLOCK)
    times = jnp.repeat(draw.times, BLOCK, axis=1)[..., None]
    data = jnp.tile(Z, (1, 2, 1))
    noisy = (1 - times) * data + times * draw.noise

    def value(params):
        args = (params, noisy, draw.times)
        options = {"history": Z, "segment_ids": SEGMENTS}
        estimate = model.apply(*args, **options, method="first_estimate")
        if not wrt_estimate:
            estimate = jax.lax.stop_gradient(estimate)
        v = model.apply(*args, **options, estimate=estimate * estimates, method="velocity")
        error = jnp.mean(jnp.square(v - (draw.noise - data)), axis=-1)
        return jnp.sum(error * jnp.tile(SEGMENTS > 0, (1, 2)))

    return jax.jit(jax.value_and_grad(value))(params)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_the_sequences_reads_an_estimate_without_a_gradient(share):
    found, gradient = fed_back(share)
    value, expected = by_hand(share, False)
    assert_close(found, value, 1e-5)
    compared = [jax.tree.leaves(tree["params"]["dit"]) for tree in (gradient, expected)]
    for a, b in zip(*compared, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, float(jnp.max(jnp.abs(b)))))
    _, through = by_hand(share, True)
    differences = [
        float(jnp.max(jnp.abs(a - b)))
        for a, b in zip(compared[1], jax.tree.leaves(through["params"]["dit"]), strict=True)
    ]
    assert (max(differences) > 1e-2) == (share == 1.0)


def test_codes_are_told_which_token_it_is():
    """The cross-entropy of every noisy copy's tokens; the flow's own error does not change."""
    model, params = create(dit={"prediction": "mixture", "prediction_variance": 0.1, "num_codes": VOCAB})
    stage, ids = dataclasses.replace(PLAIN, code_weight=0.3), tokens(BATCH, LENGTH)
    terms = stage2.flow_terms(model, stage, params, Z, SEGMENTS, KEYS, True, tokens=ids)
    draw = stage2._draw(PLAIN, KEYS, LENGTH, CHANNELS, BLOCK)
    times = jnp.repeat(draw.times, BLOCK, axis=1)[..., None]
    noisy = (1 - times) * jnp.tile(Z, (1, 2, 1)) + times * draw.noise
    options = {"history": Z, "segment_ids": SEGMENTS, "method": "velocity", "mutable": ["scores"]}
    scores = model.apply(params, noisy, draw.times, **options)[1]["scores"]["dit"]["codes"][0]
    surprise = -np.take_along_axis(np.asarray(jax.nn.log_softmax(scores)), np.tile(ids, (1, 2))[..., None], 2)[..., 0]
    real = np.tile(np.asarray(SEGMENTS > 0), (1, 2))
    assert_close(terms["codes"].value, (surprise * real).sum(1), 1e-5)
    np.testing.assert_array_equal(terms["codes"].weight, real.sum(1))
    assert terms["codes"].coefficient == 0.3
    plain = stage2.flow_terms(model, PLAIN, params, Z, SEGMENTS, KEYS, True)
    assert "codes" not in plain
    assert_close(plain["flow"].value, terms["flow"].value, 1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"time_weight": "likelihood", "time_distribution": "uniform_log_snr"},
            "stage2.time_distribution = 'uniform_log_snr': must be one whose density is nowhere 0 (or "
            "time_second_share > 0) where time_weight is not 'as_drawn'",
        ),
        (
            {"time_weight": "uniform", "time_grid": 10},
            "stage2.time_grid = 10: must be 0 (continuous times) where time_weight is not 'as_drawn'",
        ),
        (
            {"target": "posterior", "strategy": "joint"},
            "stage2.target = 'posterior': must be 'sample' where the flow loss trains the encoder (its variance enters "
            "the noise of the target)",
        ),
        (
            {"time_weight": "uniform", "time_distribution": "table", "time_table": (1.0, 0.0)},
            "stage2.time_distribution = 'table': must be one whose density is nowhere 0 (or time_second_share > 0) "
            "where time_weight is not 'as_drawn'",
        ),
        (
            {"time_distribution": "table", "time_table": (0.0, 0.0)},
            "stage2.time_table = (0.0, 0.0): must be numbers of which one is above 0 where time_distribution = "
            "'table', and else empty",
        ),
        ({"time_second_share": 1.5}, "stage2.time_second_share = 1.5: must be from 0 to 1"),
    ],
)
def test_settings_that_contradict_each_other_are_told(changes, message):
    with pytest.raises(UserError) as error:
        check(dataclasses.replace(PLAIN, **changes), "stage2.")
    assert str(error.value) == message


def test_self_conditioning_needs_predicted_means():
    with pytest.raises(UserError) as error:
        dit_config(self_conditioning=True).validate()
    assert str(error.value) == "config.dit.self_conditioning = True: must be False where prediction is 'velocity'"
