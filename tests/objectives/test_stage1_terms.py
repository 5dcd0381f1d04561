import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from models.tiny_models import VOCAB, apply, assert_close, create, tokens

from cola_jax import rng
from cola_jax.objectives import common, stage1
from cola_jax.objectives.stage1 import Stage1Config

SEGMENTS = jnp.array([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3, [1] * 2 + [0] * 10])
BATCH = {"tokens": tokens(3, 12), "segment_ids": SEGMENTS}
REAL = np.asarray(SEGMENTS > 0)
KEYS = rng.key(0, "train", 5, jnp.arange(3))
PLAIN = Stage1Config(noisy_decoding=0.0, kl_weight=0.25, mask_weight=0.5, mask_ratio=0.3)
ALL_MASKED = dataclasses.replace(PLAIN, mask_ratio=1.0)
ALWAYS_NOISY = dataclasses.replace(PLAIN, noisy_decoding=1.0)
HALF_NOISY = dataclasses.replace(PLAIN, noisy_decoding=0.5)


@functools.cache
def compiled(stage, variational):
    model, _ = create({"variational": variational, "shift": 0.5, "scale": 2.0})
    return jax.jit(lambda params, batch, keys: stage1.terms(model, stage, params, batch, keys))


def terms(stage=PLAIN, variational=True, batch=BATCH, keys=KEYS):
    _, params = create({"variational": variational, "shift": 0.5, "scale": 2.0})
    return compiled(stage, variational)(params, batch, keys)


def numpy_cross_entropy(logits, targets):
    logits = np.asarray(logits, np.float64)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]


def decoded(inputs):
    """Logits of a deterministic autoencoder (sigma = 3e-7)."""
    model, params = create({"variational": False, "shift": 0.5, "scale": 2.0})
    mean = apply(model, params, inputs, SEGMENTS, method="encode").mean
    return apply(model, params, (mean - 0.5) * 2.0, SEGMENTS, method="decode")


def test_reconstruction_is_cross_entropy_of_real_tokens():
    out = terms(ALL_MASKED, variational=False)
    losses = numpy_cross_entropy(decoded(BATCH["tokens"]), BATCH["tokens"])
    assert_close(out["reconstruction"].value, (losses * REAL).sum(1), 1e-5)
    np.testing.assert_array_equal(out["reconstruction"].weight, REAL.sum(1))
    right = np.argmax(decoded(BATCH["tokens"]), -1) == BATCH["tokens"]
    np.testing.assert_array_equal(out["accuracy"].value, (right * REAL).sum(1))
    assert (out["reconstruction"].coefficient, out["accuracy"].coefficient) == (1.0, 0.0)


def test_a_sample_of_the_posterior_is_decoded():
    """Not its mean: the decoder learns to read what the prior has to write."""
    model, params = create({"variational": True, "shift": 0.5, "scale": 2.0})
    mean, logvar = apply(model, params, BATCH["tokens"], SEGMENTS, method="encode")
    noise = rng.normal(rng.split(KEYS, 3)[0], mean.shape[1:])
    losses = []
    for z in (mean + jnp.exp(0.5 * logvar) * noise, mean):
        logits = apply(model, params, (z - 0.5) * 2.0, SEGMENTS, method="decode")
        losses.append((numpy_cross_entropy(logits, BATCH["tokens"]) * REAL).sum(1))
    assert_close(terms()["reconstruction"].value, losses[0], 1e-5)
    assert np.all(np.abs(losses[0] - losses[1]) > 1e-2)


def test_noisy_decoding_goes_up_to_its_largest_time():
    """From latents of zero the noise is t times a standard normal: t is its size, uniform from 0 to the maximum."""
    keys = rng.key(0, "train", 0, jnp.arange(400))
    for most in (0.2, 0.8):
        stage = dataclasses.replace(ALWAYS_NOISY, noisy_decoding_max_time=most)
        noisy = np.asarray(stage1._some_noisy(jnp.zeros((400, 40, 10)), stage, keys))
        times = noisy.std(axis=(1, 2))  # of 400 elements: 3.5 %
        assert most * 0.9 < times.max() < most * 1.12 and times.min() < 0.05 * most
        assert abs(times.mean() / most - 0.5) < 0.07  # 400 draws: 4 standard errors and more


def test_kl_is_summed_over_channels_of_real_latents():
    model, params = create({"variational": True, "shift": 0.5, "scale": 2.0})
    mean, logvar = (np.asarray(x, np.float64) for x in apply(model, params, BATCH["tokens"], SEGMENTS, method="encode"))
    expected = (0.5 * (np.exp(logvar) + mean**2 - 1 - logvar).sum(-1) * REAL).sum(1)
    out = terms()["kl"]
    assert_close(out.value, expected, 1e-5)
    np.testing.assert_array_equal(out.weight, REAL.sum(1))
    assert out.coefficient == 0.25


def test_mask_term_is_cross_entropy_of_masked_tokens_only():
    """With a ratio of 1 every real token is the mask token, and padding is not."""
    out = terms(ALL_MASKED, variational=False)["mask"]
    losses = numpy_cross_entropy(decoded(jnp.where(SEGMENTS > 0, VOCAB, BATCH["tokens"])), BATCH["tokens"])
    assert_close(out.value, (losses * REAL).sum(1), 1e-5)
    np.testing.assert_array_equal(out.weight, REAL.sum(1))
    assert out.coefficient == 0.5


def test_the_share_of_masked_tokens_is_the_ratio():
    weights = sum(np.asarray(terms(keys=rng.key(0, "train", s, jnp.arange(3)))["mask"].weight) for s in range(100))
    expected = 0.3 * 100 * REAL.sum(1)
    assert np.all(np.abs(weights - expected) < 4 * np.sqrt(0.7 * expected))


def test_no_mask_weight_is_no_mask_term():
    stage = dataclasses.replace(PLAIN, mask_weight=0.0)
    model, params = create()
    shapes = jax.eval_shape(functools.partial(stage1.terms, model, stage), params, BATCH, KEYS)
    assert set(shapes) == {"reconstruction", "kl", "accuracy", "latent_signal", "latent_noise"}


def test_noisy_decoding_changes_the_chosen_share_of_the_reconstructions_only():
    noisy_share = []
    for step in range(20):
        keys = rng.key(0, "train", step, jnp.arange(3))
        plain, all_noisy, some = (terms(stage, keys=keys) for stage in (PLAIN, ALWAYS_NOISY, HALF_NOISY))
        assert np.all(np.asarray(all_noisy["reconstruction"].value) != plain["reconstruction"].value)
        np.testing.assert_array_equal(all_noisy["kl"].value, plain["kl"].value)
        is_noisy = np.isclose(some["reconstruction"].value, all_noisy["reconstruction"].value, rtol=1e-5)
        is_plain = np.isclose(some["reconstruction"].value, plain["reconstruction"].value, rtol=1e-5)
        assert np.all(is_noisy ^ is_plain)
        noisy_share += list(is_noisy)
    assert 0.25 < np.mean(noisy_share) < 0.75  # 60 draws: 4 standard errors


def test_padding_changes_nothing():
    other = BATCH | {"tokens": jnp.where(SEGMENTS > 0, BATCH["tokens"], (BATCH["tokens"] + 7) % VOCAB)}
    expected = terms()
    for name, term in terms(batch=other).items():
        np.testing.assert_allclose(term.value, expected[name].value, rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(term.weight, expected[name].weight, err_msg=name)


def test_an_example_does_not_depend_on_its_batch():
    whole = terms(HALF_NOISY)
    part = terms(HALF_NOISY, batch=jax.tree.map(lambda x: x[1:2], BATCH), keys=KEYS[1:2])
    assert set(part) == set(whole)
    for name in whole:
        np.testing.assert_allclose(part[name].value, whole[name].value[1:2], rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(part[name].weight, whole[name].weight[1:2], err_msg=name)


def test_padding_inside_a_patch_is_reconstructed():
    """As padding: so the decoder says where a text begins. Padding that fills patches counts nowhere."""
    batch = {"segment_ids": jnp.array([[0, 1, 1, 1, 1, 0, 0, 0]]), "tokens": jnp.arange(8)[None]}
    np.testing.assert_array_equal(common.reconstructed(batch, 2), [[1, 1, 1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(common.reconstructed(batch, 1), batch["segment_ids"])
    model, params = create({"patch_size": 2})
    stage = PLAIN
    run = jax.jit(lambda batch: stage1.terms(model, stage, params, batch, KEYS[:1])["reconstruction"].value[0])
    first, filling = (batch | {"tokens": batch["tokens"].at[0, i].set(9)} for i in (0, 7))
    assert float(run(batch)) != float(run(first)) and float(run(batch)) == float(run(filling))
