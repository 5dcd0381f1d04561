"""Numbers of the released implementation, run once in float32 with random weights and noise."""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import apply, assert_close, quickly

from cola_jax import release, sampling

FOLDER = pathlib.Path(__file__).parent
NAMES = ("tiny", "patch2")


@functools.cache
def load(name):
    """(model, params, arrays) of one released run."""
    with np.load(FOLDER / name / "io.npz") as arrays:
        return *release.load(FOLDER / name), dict(arrays)


@pytest.mark.parametrize("name", NAMES)
def test_encoder(name):
    model, params, arrays = load(name)
    posterior = apply(model, params, arrays["vae_ids"], method="encode")
    assert_close(posterior.mean, arrays["vae_mean"], 1e-5)
    assert_close(posterior.logvar, arrays["vae_logvar"], 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_decoder(name):
    model, params, arrays = load(name)
    assert_close(apply(model, params, arrays["dec_latents"], method="decode"), arrays["dec_logits"], 1e-5)


# The released network takes 1000 t, ours t: t / 1000 * 1000 differs from t in the last bit, which the fastest
# sine makes 1e-5 of.
TOLERANCE = {"tiny": 1e-5, "patch2": 2e-5}


@pytest.mark.parametrize("name", NAMES)
def test_velocity(name):
    model, params, arrays = load(name)
    times = arrays["dit_timesteps"] / 1000
    velocity = apply(model, params, arrays["dit_latents"], times, method="velocity")
    assert_close(velocity, arrays["dit_velocity"], TOLERANCE[name])


@pytest.mark.parametrize("name", NAMES)
def test_velocity_in_the_training_layout(name):
    model, params, arrays = load(name)
    times = arrays["train_timestep"] / 1000
    velocity = apply(model, params, arrays["train_noisy"], times, history=arrays["train_clean"], method="velocity")
    assert_close(velocity, arrays["train_velocity"], TOLERANCE[name])


@pytest.mark.parametrize("name", NAMES)
def test_generation(name):
    """Blocks that begin before position 12 only: a known deviation of the released code.

    The released cache rotates the queries and keys of a block that begins at latent 12 or later (in these two
    runs) as if it began at position 0. We keep positions, so that only blocks that end by latent 12 agree.
    """
    model, params, arrays = load(name)
    released = json.loads((FOLDER / name / "settings.json").read_text())
    settings = sampling.Settings(
        steps=released["steps"],
        guidance_scale=released["guidance_scale"],
        max_new_tokens=released["max_new_tokens"],
        pad_id=released["pad_token_id"],
    )
    prompts = [[int(token) for token in row if token >= 0] for row in arrays["gen_prompts"]]
    out = quickly(sampling.generate, model, params, prompts, settings, noise=jnp.asarray(arrays["gen_noise"]))
    block, patch = model.dit_config.block_size, model.vae_config.patch_size
    compared, tail = 0, [len(prompt) % (block * patch) for prompt in prompts]
    # The budget, or what the noise is enough for; padding behind it.
    room = out.latents.shape[1] * block * patch
    np.testing.assert_array_equal(out.lengths, [min(settings.max_new_tokens, room - t) for t in tail])
    for index, length in enumerate(out.lengths):
        np.testing.assert_array_equal(out.tokens[index, length:], settings.pad_id)
    for index, prompt in enumerate(prompts):
        first = len(prompt) // (block * patch) * block
        blocks = max(0, (12 - first) // block)
        expected = arrays["gen_latents"][index, :blocks]
        if not blocks or not np.any(expected):
            continue
        assert_close(out.latents[index, :blocks], expected, 1e-3)
        tokens = arrays["gen_tokens"][index, : 12 * patch - len(prompt)]
        tokens = tokens[tokens >= 0]
        assert len(tokens)
        np.testing.assert_array_equal(out.tokens[index, : len(tokens)], tokens)
        compared += blocks
    assert compared == {"tiny": 5, "patch2": 3}[name]
