import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_image_vae import create, pictures
from models.tiny_models import apply, assert_close

from cola_jax import fields, rng
from cola_jax.objectives import image_stage
from cola_jax.objectives.image_stage import ImageStageConfig
from cola_jax.types import UserError

BATCH = {"image": pictures(3, 8, 12)}
KEYS = rng.key(0, "train", 5, jnp.arange(3))
OPTIONS = {"logsnr": None, "normalize_mean": False, "shift": 0.5, "scale": 2.0}
KL = ImageStageConfig(kl_weight=0.25)
ENTROPY = ImageStageConfig(loss="l2", kl_weight=0.0, entropy_weight=0.5, perceptual_weight=0.125)


def features(images):
    return {"means": images.mean((1, 2)), "rows": 3.0 * images[:, ::2]}


def terms(stage=KL, batch=BATCH, keys=KEYS, weight=None, features=None):
    model, params = create(**OPTIONS)
    call = jax.jit(lambda *arguments: image_stage.terms(model, stage, *arguments, features))
    return call(params, batch, keys, weight)


def expected():
    """(pixels, decoded pixels, mean and log-variance of latents), the decoding of a sample of the posterior."""
    model, params = create(**OPTIONS)
    pixels = BATCH["image"].astype(np.float32) / 127.5 - 1
    posterior = apply(model, params, jnp.asarray(pixels), method="encode")
    z = posterior.mean + jnp.exp(0.5 * posterior.logvar) * rng.normal(KEYS, (6, 4))
    decoded = jax.jit(lambda z: model.apply(params, (z - 0.5) * 2.0, (2, 3), method="decode"))(z)
    return (np.asarray(x, np.float64) for x in (pixels, decoded, *posterior))


@pytest.mark.parametrize("stage", [KL, ENTROPY])
def test_reconstruction_is_the_error_of_a_decoded_sample(stage):
    pixels, decoded, _, _ = expected()
    error = np.abs(decoded - pixels) if stage.loss == "l1" else (decoded - pixels) ** 2
    out = terms(stage, features=features)["reconstruction"]
    assert_close(out.value, error.sum((1, 2, 3)), 1e-5)
    np.testing.assert_array_equal(out.weight, [8 * 12 * 3] * 3)
    assert out.coefficient == 1.0


def test_pixel_error_is_of_what_is_shown():
    pixels, decoded, _, _ = expected()
    assert np.abs(decoded).max() > 1.1
    out = terms()["pixel_error"]
    assert_close(out.value / out.weight, (np.abs(np.clip(decoded, -1, 1) - pixels) / 2).mean((1, 2, 3)), 1e-5)
    assert out.coefficient == 0.0


def test_kl_is_summed_over_the_channels_of_latents():
    _, _, mean, logvar = expected()
    out = terms()
    assert_close(out["kl"].value, 0.5 * (np.exp(logvar) + mean**2 - 1 - logvar).sum((1, 2)), 1e-5)
    np.testing.assert_array_equal(out["kl"].weight, [6] * 3)
    assert out["kl"].coefficient == 0.25
    assert_close(out["latent_signal"].value, (mean**2).mean(-1).sum(-1), 1e-5)
    assert_close(out["latent_noise"].value, np.exp(logvar).mean(-1).sum(-1), 1e-5)
    assert set(out) == {"reconstruction", "kl", "pixel_error", "latent_signal", "latent_noise"}


def test_entropy_is_that_of_the_posterior():
    _, _, _, logvar = expected()
    out = terms(ENTROPY, features=features)
    assert_close(out["entropy"].value, -0.5 * (np.log(2 * np.pi) + 1 + logvar).sum((1, 2)), 1e-5)
    assert (out["entropy"].coefficient, out["kl"].coefficient) == (0.5, 0.0)


def test_perceptual_term_is_the_error_of_each_array_of_features():
    pixels, decoded, _, _ = expected()
    out = terms(ENTROPY, features=features)["perceptual"]
    pairs = zip(*(features(x).values() for x in (pixels, decoded)), strict=True)
    assert_close(out.value, sum(((a - b) ** 2).reshape(3, -1).mean(1) for a, b in pairs), 1e-5)
    np.testing.assert_array_equal(out.weight, [1] * 3)
    assert out.coefficient == 0.125


def test_perceptual_term_trains_encoder_and_decoder():
    model, params = create(**OPTIONS)

    def loss(params):
        return image_stage.terms(model, ENTROPY, params, BATCH, KEYS, None, features)["perceptual"].value.sum()

    gradient = jax.jit(jax.grad(loss))(params)["params"]
    for part in ("encoder", "decoder"):
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient[part])) > 1e-3


def test_features_are_asked_for_where_they_count():
    model, params = create(**OPTIONS)
    with pytest.raises(UserError, match="perceptual_weight = 0.125: must be 0 where no features of images are given"):
        image_stage.terms(model, ENTROPY, params, BATCH, KEYS)


def test_padding_rows_count_nothing():
    weight = jnp.array([1, 0, 1])
    other = {"image": np.where(np.array([0, 1, 0], bool)[:, None, None, None], 7, BATCH["image"]).astype(np.uint8)}
    alone = terms(ENTROPY, features=features)
    for batch in (BATCH, other):
        for name, term in terms(ENTROPY, batch, weight=weight, features=features).items():
            assert_close(term.value, alone[name].value * weight, 1e-6)
            np.testing.assert_array_equal(term.weight, alone[name].weight * weight, err_msg=name)


def test_an_example_does_not_depend_on_its_batch():
    part = terms(batch={"image": BATCH["image"][1:2]}, keys=KEYS[1:2])
    for name, term in terms().items():
        assert_close(part[name].value, term.value[1:2], 1e-5)


def test_kl_and_entropy_are_not_both_weighed():
    with pytest.raises(UserError, match="entropy_weight = 0.5: must be 0 where kl_weight > 0"):
        fields.check(dataclasses.replace(KL, entropy_weight=0.5), "image_stage.")
    with pytest.raises(UserError, match="loss = 'l3': must be one of 'l1', 'l2'"):
        fields.check(dataclasses.replace(KL, loss="l3"), "image_stage.")
    fields.check(ENTROPY, "image_stage.")
