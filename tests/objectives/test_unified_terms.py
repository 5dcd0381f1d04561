"""The loss of the joint prior of text and images, task by task."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_unified

from cola_jax import rng
from cola_jax.data import pair_rows
from cola_jax.flow import schedule
from cola_jax.models.image_vae import to_float
from cola_jax.objectives import unified
from cola_jax.objectives.unified import TASKS, UnifiedStage2Config
from cola_jax.types import UserError

STAGE = UnifiedStage2Config(
    flow_weight=2.0, image_weight=3.0, auxiliary_weight=0.5, caption_weight=4.0, text_dropout=0.0, prompt_blocks=0.0
)
OWN = {"text": {"text_flow"}, "image": {"image_flow", "auxiliary_flow"}, "caption": {"caption_flow"}}
KEYS = rng.key(0, "train", 0, jnp.arange(3))


@functools.partial(jax.jit, static_argnums=0)
def terms(stage, params, batch):
    model, _ = tiny_unified.make()
    return unified.terms(model, stage, params, batch, KEYS)


def batch(task: str, **changes) -> dict:
    return tiny_unified.batch(TASKS.index(task)) | changes


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_its_own_terms_alone(task):
    _, params = tiny_unified.make()
    found = terms(STAGE, params, batch(task))
    assert {name for name, term in found.items() if term.weight.sum() > 0} == OWN[task]
    weights = {name: float(term.coefficient) for name, term in found.items()}
    assert weights == {"text_flow": 2.0, "image_flow": 3.0, "auxiliary_flow": 0.5, "caption_flow": 4.0}
    for name in OWN[task]:
        latents = [4, 4, 4] if name == "image_flow" else [8, 8, 5]
        np.testing.assert_array_equal(found[name].weight, latents)
        assert np.all(found[name].value > 0)


def test_the_text_s_error_is_the_same_with_and_without_an_image_to_draw():
    _, params = tiny_unified.make()
    text, image = (terms(STAGE, params, batch(task)) for task in ("text", "image"))
    np.testing.assert_allclose(image["auxiliary_flow"].value, text["text_flow"].value, rtol=1e-5)


def test_an_image_s_error_needs_no_noisy_text():
    _, params = tiny_unified.make()
    stage = dataclasses.replace(STAGE, noise_copies=2, code_weight=0.0)
    both, alone = (
        terms(dataclasses.replace(stage, auxiliary_weight=weight), params, batch("image")) for weight in (0.5, 0.0)
    )
    np.testing.assert_allclose(alone["image_flow"].value, both["image_flow"].value, rtol=1e-5)
    assert not alone["auxiliary_flow"].weight.any() and both["auxiliary_flow"].weight.all()
    more = terms(dataclasses.replace(stage, auxiliary_weight=0.0, image_noise_copies=5), params, batch("image"))
    np.testing.assert_array_equal(more["image_flow"].weight, 5 * 4)


@pytest.mark.parametrize("target, copies", [("sample", 1), ("posterior", 3)])
def test_the_image_s_error_is_that_of_its_velocity(target, copies):
    model, params = tiny_unified.make()
    zero = jax.tree.map(jnp.zeros_like, params["params"]["image_dit"]["out_layer"])
    still = {"params": {**params["params"], "image_dit": {**params["params"]["image_dit"], "out_layer": zero}}}
    rows = batch("image")
    found = terms(dataclasses.replace(STAGE, target=target, noise_copies=copies), still, rows)["image_flow"]
    _, _, picture_keys, image_keys = rng.split(KEYS, 4)
    posterior = model.apply(params, to_float(rows["image"]), method="encode_image")
    noise_keys, time_keys, _ = rng.split(image_keys, 3)
    draw, noise = (np.asarray(rng.normal(keys, (n * 4, 3))) for keys, n in ((picture_keys, 1), (noise_keys, copies)))
    mean, variance = np.asarray(posterior.mean), np.exp(np.asarray(posterior.logvar))
    t = np.repeat(np.asarray(schedule.sample(STAGE.image_times, time_keys, copies)), 4, axis=1)[..., None]
    z, mean, variance = (np.tile(x, (1, copies, 1)) for x in (mean + np.sqrt(variance) * draw, mean, variance))
    velocity = noise - z  # on the linear path
    if target == "posterior":  # of z_1 - z_0 given z_t, both Gaussian around what is known
        away = ((1 - t) * z + t * noise - (1 - t) * mean) / ((1 - t) ** 2 * variance + t**2)
        velocity = t * away - (mean + (1 - t) * variance * away)
    wanted = np.square(velocity).mean(axis=2).sum(axis=1)  # the model's own is 0
    np.testing.assert_allclose(found.value, wanted, rtol=1e-4)


def test_copies_of_an_image_read_its_own_text():
    _, params = tiny_unified.make()
    rows, stage = batch("image"), dataclasses.replace(STAGE, noise_copies=2)
    other = {**rows, "tokens": rows["tokens"].at[1, 0].add(1)}
    one, two = (terms(stage, params, each)["image_flow"].value for each in (rows, other))
    moved = np.abs(one - two)
    assert moved[1] > 1e-4 and moved[0] < 1e-5 and moved[2] < 1e-5


def test_a_dropped_text_is_not_seen():
    _, params = tiny_unified.make()
    other = batch("image")["tokens"].at[:, 0].add(1)
    for dropout, moves in ((0.0, True), (1.0, False)):
        stage = dataclasses.replace(STAGE, text_dropout=dropout)
        found = [terms(stage, params, batch("image", **more))["image_flow"] for more in ({}, {"tokens": other})]
        one, two = (term.value for term in found)
        assert bool(np.abs(one - two).max() > 1e-4) is moves


@pytest.mark.parametrize("name", ["image", "instruction"])
def test_a_caption_is_written_for_its_image_and_instruction(name):
    _, params = tiny_unified.make()
    rows = batch("caption")
    other = {**rows, name: rows[name].at[0].set(rows[name][0][::-1])}
    one, two = (terms(STAGE, params, each)["caption_flow"].value for each in (rows, other))
    moved = np.abs(one - two)
    assert moved[0] > 1e-4 and moved[1:].max() < 1e-5


def test_images_without_instructions_stand_alone_before_their_captions():
    _, params = tiny_unified.make()
    plain = tiny_unified.batch(2, instruction=0)
    one, two = (
        terms(STAGE, params, {**plain, "image": image})["caption_flow"].value
        for image in (plain["image"], plain["image"][:, ::-1])
    )
    assert np.abs(one - two).min() > 1e-4


@pytest.mark.parametrize("task", ["image", "caption"])
def test_rows_of_padding_count_nothing(task):
    _, params = tiny_unified.make()
    rows = batch(task)
    found = terms(STAGE, params, {**rows, "segment_ids": rows["segment_ids"].at[1].set(0)})
    for name in OWN[task]:
        assert found[name].weight[1] == 0 and found[name].value[1] == 0 and found[name].weight[0] > 0


def test_both_streams_learn_from_each_task():
    _, params = tiny_unified.make()
    for task, streams in {"text": {"dit"}, "image": {"dit", "image_dit"}, "caption": {"dit", "image_dit"}}.items():

        def loss(own, task=task):
            found = terms(STAGE, {"params": {**params["params"], **own}}, batch(task))
            return sum(term.coefficient * term.value.sum() for term in found.values())

        own = {name: params["params"][name] for name in ("dit", "image_dit")}
        moved = {name for name, g in jax.grad(loss)(own).items() if max(map(jnp.max, jax.tree.leaves(g))) > 0}
        assert moved == streams


def test_the_text_stream_learns_from_the_image_alone():
    """Through the keys and values that the image reads, and the weights that it shares."""
    _, params = tiny_unified.make()

    def loss(dit):
        return terms(STAGE, {"params": {**params["params"], "dit": dit}}, batch("image"))["image_flow"].value.sum()

    gradient = jax.grad(loss)(params["params"]["dit"])
    own = np.asarray(gradient["layers"]["qkv"]["kernel"])  # the first layer has weights of text alone
    assert np.abs(own[0][:, 1:]).max() > 0 and np.abs(own[0][:, 0]).max() > 0 and np.abs(own[1]).max() > 0
    assert all(np.abs(x).max() == 0 for x in jax.tree.leaves(gradient["out_layer"]))


def test_tasks_come_by_their_shares_and_take_turns_when_held_out():
    shares = (1.0, 0.0, 3.0)
    drawn = np.array([pair_rows.task(shares, batch, 7) for batch in range(4000)])
    assert set(drawn) == {0, 2} and abs(np.mean(drawn == 2) - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 4000)
    assert [pair_rows.task(shares, batch, None) for batch in range(4)] == [0, 2, 0, 2]
    assert drawn.tolist() != [pair_rows.task(shares, batch, 8) for batch in range(4000)]


def test_other_strategies_are_refused():
    with pytest.raises(UserError, match="strategy = 'joint': must be 'fix_vae'"):
        dataclasses.replace(STAGE, strategy="joint").check_together("config.stage2.")


def test_times_are_those_of_images():
    stage = dataclasses.replace(STAGE, image_time_loc=3.0, image_time_scale=0.01)
    found = schedule.sample(stage.image_times, KEYS, 1)
    np.testing.assert_allclose(found, jax.nn.sigmoid(3.0), atol=0.01)
