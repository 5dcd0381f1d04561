"""Images drawn for texts, and texts written for images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_unified
from models.tiny_unified import GRID, SIDE

from cola_jax import sampling
from cola_jax.models.unified import with_before
from cola_jax.objectives.unified import before_of
from cola_jax.sampling import images
from cola_jax.sampling.images import ImageSettings
from cola_jax.types import UserError

KEY = jax.random.key(5)
PROMPTS = [[3, 4, 5, 6, 7], [8, 9], []]
TEXT = sampling.Settings(steps=3, guidance_scale=1.5, max_new_tokens=6, eos_id=None, pad_id=None)


def draw(settings, prompts=PROMPTS, length=8, ids=None, prediction="velocity"):
    model, params = tiny_unified.make(prediction=prediction)
    return images.images(model, params, prompts, settings, KEY, SIDE, length, ids)


@pytest.mark.parametrize("prediction", ["velocity", "mean"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_image_is_what_euler_steps_of_its_velocity_make(scale, prediction):
    model, params = tiny_unified.make(prediction=prediction)
    drawn = draw(ImageSettings(steps=4, guidance_scale=scale), [PROMPTS[0]], ids=[7], prediction=prediction)
    tokens = jnp.array([PROMPTS[0]])
    z_text = model.normalize(model.apply(params, tokens, method="encode").mean)
    before = model.apply(params, z_text, jnp.ones((1, 5), jnp.int32), method="text_before")
    z = jax.random.normal(jax.random.fold_in(KEY, 7), (1, GRID[0] * GRID[1], 3))
    for t in (1.0, 0.75, 0.5, 0.25):
        told, alone = (
            model.apply(params, z, jnp.array([t]), GRID, read, method="image_velocity") for read in (before, None)
        )
        z = z - 0.25 * (alone + scale * (told - alone))
    np.testing.assert_allclose(drawn.latents, z, rtol=1e-3, atol=1e-3)
    pixels = model.apply(params, z, GRID, method="decode_image")
    wanted = np.clip(np.round((np.asarray(pixels) + 1) * 127.5), 0, 255)
    assert np.abs(np.asarray(drawn.images, float) - wanted).max() <= 1 and wanted.std() > 5


def test_an_image_depends_neither_on_its_batch_nor_on_the_length_of_its_row():
    settings = ImageSettings(steps=3, guidance_scale=2.0)
    together = draw(settings, ids=[4, 2, 9]).latents
    for index, (prompt, sample) in enumerate(zip(PROMPTS, [4, 2, 9], strict=True)):
        alone = draw(settings, [prompt], 12, [sample]).latents
        np.testing.assert_allclose(alone[0], together[index], rtol=1e-3, atol=1e-3)
    assert np.abs(draw(settings, ids=[5, 2, 9]).latents - together).max(axis=(1, 2)).round(6).tolist()[1:] == [0, 0]


def test_an_empty_text_has_no_guidance_and_an_interval_has_some():
    plain, guided = (draw(ImageSettings(steps=3, guidance_scale=s)).latents for s in (1.0, 4.0))
    moved = np.abs(plain - guided).max(axis=(1, 2))
    assert moved[0] > 1e-2 and moved[1] > 1e-2 and moved[2] < 1e-5
    never = draw(ImageSettings(steps=3, guidance_scale=4.0, guidance_interval=(0.0, 0.01))).latents
    np.testing.assert_allclose(never, plain, atol=1e-5)


def test_bad_settings_and_texts_are_refused():
    for change, words in ({"steps": 0}, "steps = 0"), ({"guidance_interval": (0.9, 0.1)}, "guidance_interval"):
        with pytest.raises(UserError, match=words):
            draw(dataclasses.replace(ImageSettings(), **change))
    with pytest.raises(UserError, match="text 0 has 5 tokens: must be at most 4"):
        draw(ImageSettings(), length=4)
    model, params = tiny_unified.make()
    with pytest.raises(UserError, match="multiples of 8"):
        images.images(model, params, PROMPTS, ImageSettings(), KEY, 12, 8)


def captions(model, params, batch, rows, **options):
    said = {name: batch[f"instruction{end}"][rows] for name, end in (("tokens", ""), ("segment_ids", "_segment_ids"))}
    return images.captions(model, params, batch["image"][rows], TEXT, KEY, said, **options)


def test_a_caption_depends_on_its_image_and_instruction_alone():
    model, params = tiny_unified.make()
    batch = tiny_unified.batch()
    together = captions(model, params, batch, np.arange(3))
    for index in range(3):
        alone = captions(model, params, batch, np.array([index]), sample_ids=[index])
        np.testing.assert_allclose(alone.latents[0], together.latents[index], rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[index])
    for name in ("image", "instruction"):
        other = {**batch, name: batch[name].at[0].set(batch[name][0][::-1])}
        moved = np.abs(captions(model, params, other, np.arange(3)).latents - together.latents).max(axis=(1, 2, 3))
        assert moved[0] > 1e-2 and moved[1:].max() == 0, name


def test_cached_generation_has_the_velocity_of_training():
    """The first block of a caption, at t = 1, in the sampler's way and in that of the loss."""
    model, params = tiny_unified.make()
    batch = tiny_unified.batch(rows=2)
    variables = with_before(params, before_of(model, params, batch))
    noise = jax.random.normal(KEY, (2, 1, 2, 4))
    one = dataclasses.replace(TEXT, steps=1, guidance_scale=1.0, max_new_tokens=2)
    found = sampling.generate(model, variables, [[], []], one, noise=noise).latents[:, 0]
    z = noise[:, 0]
    velocity = model.apply(variables, z, jnp.ones(2), history=jnp.zeros_like(z), method="velocity")
    np.testing.assert_allclose(found, z - velocity, rtol=1e-4, atol=1e-4)
    without = model.apply(params, z, jnp.ones(2), history=jnp.zeros_like(z), method="velocity")
    assert np.abs(without - velocity).max() > 1e-2
