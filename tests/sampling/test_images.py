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
from cola_jax.sampling import blocks, images
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


def given(rows: int = 5, without: tuple[int, ...] = (1, 4)):
    """Pictures of which some are missing, instructions for all, and prompts of several lengths."""
    batch = jax.tree.map(np.asarray, tiny_unified.batch(rows=rows))
    pictures = [None if index in without else batch["image"][index] for index in range(rows)]
    said = {"tokens": batch["instruction"], "segment_ids": batch["instruction_segment_ids"]}
    return pictures, said, [[3, 4, 5, 6, 7], [8], [], [1, 2], []][:rows]


def one_by_one(settings, pictures, said, prompts) -> list[list[int]]:
    """Each text from `generate`, alone, after its picture or after nothing."""
    (model, params), found = tiny_unified.make(), []
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        instruction = said and {name: value[index : index + 1] for name, value in said.items()}
        variables = params if picture is None else images.conditioned(model, params, picture[None], instruction)
        out = sampling.generate(model, variables, [prompt], settings, KEY, sample_ids=[index])
        found.append(out.tokens[0, : out.lengths[0]].tolist())
    return found


def test_texts_with_and_without_pictures_that_come_and_go_are_those_of_generate():
    settings = dataclasses.replace(TEXT, guidance_scale=9.0, max_new_tokens=12, eos_id=13)
    pictures, said, prompts = given()
    expected = one_by_one(settings, pictures, said, prompts)
    assert len({len(tokens) for tokens in expected}) > 2  # places are refilled at several times
    for size in (1, 3):
        found = images.caption_batches(*tiny_unified.make(), pictures, settings, KEY, said, prompts, size)
        assert list(found) == list(enumerate(expected)), size
    without = one_by_one(settings, [None] * 5, None, prompts)
    assert [a != b for a, b in zip(expected, without, strict=True)] == [True, False, True, True, False]


def test_batches_follow_what_the_variables_have():
    model, params = tiny_unified.make()
    pictures, _, prompts = given(rows=3, without=())
    variables = images.conditioned(model, params, np.stack(pictures))
    found = sampling.generate_batches(model, variables, prompts, TEXT, KEY, batch_size=2)
    assert [tokens for _, tokens in found] == one_by_one(TEXT, pictures, None, prompts)
    with pytest.raises(UserError, match="has 3 rows: must be one for each of 2 prompts"):
        sampling.generate_batches(model, variables, prompts[:2], TEXT, KEY, batch_size=2)


def test_where_no_text_has_a_picture_nothing_is_read():
    """The programs are those of texts alone."""
    model, params = tiny_unified.make()
    found = images.caption_batches(model, params, [None] * 3, TEXT, KEY, prompts=PROMPTS, batch_size=2)
    alone = sampling.generate_batches(model, params, PROMPTS, TEXT, KEY, batch_size=2)
    compiled = blocks.advance_once._cache_size()
    assert list(found) == list(alone) and blocks.advance_once._cache_size() <= compiled + 1


def test_pictures_that_do_not_fit_are_refused():
    model, params = tiny_unified.make()
    for pictures, words in (
        ([np.zeros((16, 16, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)], r"\[8, 16\] pixels on a side"),
        ([np.zeros((16, 8, 3), np.uint8)], r"picture 0 is \[16, 8, 3\]: must be \[16, 16, 3\]"),
    ):
        with pytest.raises(UserError, match=words):
            list(images.caption_batches(model, params, pictures, TEXT, KEY))
    with pytest.raises(UserError, match="1 prompts for 2 pictures"):
        images.caption_batches(model, params, [None, None], TEXT, KEY, prompts=[[]])
