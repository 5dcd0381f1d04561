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
    """Every block of every row.

    The released code took the rotations of these runs from a table that an earlier batch of sequences of 12 latents
    had filled, laid end to end: hence positions modulo 12.
    """
    model, params, arrays = load(name)
    released = json.loads((FOLDER / name / "settings.json").read_text())
    settings = sampling.Settings(
        steps=released["steps"],
        guidance_scale=released["guidance_scale"],
        max_new_tokens=released["max_new_tokens"],
        pad_id=released["pad_token_id"],
        rotary_period=arrays["dit_latents"].shape[1],
    )
    prompts = [[int(token) for token in row if token >= 0] for row in arrays["gen_prompts"]]
    out = quickly(sampling.generate, model, params, prompts, settings, noise=jnp.asarray(arrays["gen_noise"]))
    assert_close(out.latents, arrays["gen_latents"], 1e-3)
    per_block = model.dit_config.block_size * model.vae_config.patch_size
    # The budget, or what the noise is enough for; padding behind it.
    room = out.latents.shape[1] * per_block
    tail = [len(prompt) % per_block for prompt in prompts]
    np.testing.assert_array_equal(out.lengths, [min(settings.max_new_tokens, room - t) for t in tail])
    for row, length in enumerate(out.lengths):
        np.testing.assert_array_equal(out.tokens[row, length:], settings.pad_id)
        tokens = arrays["gen_tokens"][row][arrays["gen_tokens"][row] >= 0]  # fewer: the tail counts in the release
        assert len(tokens)
        np.testing.assert_array_equal(out.tokens[row, : len(tokens)], tokens)
