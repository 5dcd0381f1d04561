"""Numbers of the released implementation, run once in float32 with random weights and noise."""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import apply, assert_close

from cola_jax import release, sampling

FOLDER = pathlib.Path(__file__).parent
NAMES = ("tiny", "patch2")


# What to expect of a computation; bfloat16 has 8 bits.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
EVERY = [
    pytest.param(name, dtype, marks=[pytest.mark.slow] if dtype == "bfloat16" else [])
    for name in NAMES
    for dtype in TOLERANCE
]


@functools.cache
def load(name, dtype="float32"):
    """(model, params, arrays) of one released run."""
    with np.load(FOLDER / name / "io.npz") as arrays:
        return *release.load(FOLDER / name, dtype=dtype), dict(arrays)


def compare(name, dtype, what, actual, expected):
    """Prints (`pytest -s`) and checks the largest difference over the largest value."""
    error = np.max(np.abs(np.asarray(actual) - expected)) / np.max(np.abs(expected))
    print(f"\n{name:7s} {dtype:9s} {what:26s} {error:.1e}")
    assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_vae(name, dtype):
    model, params, arrays = load(name, dtype)
    posterior = apply(model, params, arrays["vae_ids"], method="encode")
    compare(name, dtype, "encoder mean", posterior.mean, arrays["vae_mean"])
    compare(name, dtype, "encoder log-variance", posterior.logvar, arrays["vae_logvar"])
    logits = apply(model, params, arrays["dec_latents"], method="decode")
    compare(name, dtype, "decoder logits", logits, arrays["dec_logits"])


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_velocity(name, dtype):
    model, params, arrays = load(name, dtype)
    velocity = functools.partial(apply, model, params, method="velocity")
    actual = velocity(arrays["dit_latents"], arrays["dit_timesteps"] / 1000)
    compare(name, dtype, "velocity", actual, arrays["dit_velocity"])
    times, clean = arrays["train_timestep"] / 1000, arrays["train_clean"]
    actual = velocity(arrays["train_noisy"], times, history=clean)
    compare(name, dtype, "velocity, training layout", actual, arrays["train_velocity"])


def generated(name, dtype):
    """The run's prompts continued with its noise: (settings, prompts, generation)."""
    model, params, arrays = load(name, dtype)
    released = json.loads((FOLDER / name / "settings.json").read_text())
    settings = sampling.Settings(
        steps=released["steps"],
        guidance_scale=released["guidance_scale"],
        max_new_tokens=released["max_new_tokens"],
        pad_id=released["pad_token_id"],
        rotary_period=arrays["dit_latents"].shape[1],
    )
    prompts = [[int(token) for token in row if token >= 0] for row in arrays["gen_prompts"]]
    noise = jnp.asarray(arrays["gen_noise"])
    return settings, prompts, sampling.generate(model, params, prompts, settings, noise=noise)


@pytest.mark.parametrize("name", NAMES)
def test_generation(name):
    """Every block of every row.

    The released code took the rotations of these runs from a table that an earlier batch of sequences of 12 latents
    had filled, laid end to end: hence positions modulo 12.
    """
    model, _, arrays = load(name)
    settings, prompts, out = generated(name, "float32")
    compare(name, "float32", "generation, latents", out.latents, arrays["gen_latents"])
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


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_generation_in_bfloat16(name):
    """Errors grow along the trajectory: most tokens stay the same."""
    arrays = load(name)[2]
    _, _, out = generated(name, "bfloat16")
    compare(name, "bfloat16", "generation, latents", out.latents, arrays["gen_latents"])
    known = arrays["gen_tokens"] >= 0
    width = min(known.shape[1], out.tokens.shape[1])
    equal = (np.asarray(out.tokens)[:, :width] == arrays["gen_tokens"][:, :width])[known[:, :width]]
    print(f"{name:7s} bfloat16  equal tokens               {equal.sum()} of {equal.size}")
    assert equal.mean() > 0.7
