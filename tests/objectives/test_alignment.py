"""Alignment of the image stream's states with features of clean images."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_unified

from cola_jax import families, rng
from cola_jax.families import unified as family
from cola_jax.models import image_dit
from cola_jax.models.image_vae import to_float
from cola_jax.objectives import alignment, unified
from cola_jax.objectives.unified import TASKS, UnifiedStage2Config
from cola_jax.types import UserError

SIZE, KEYS = 5, rng.key(0, "train", 0, jnp.arange(3))
STAGE = UnifiedStage2Config(alignment_weight=0.5, text_dropout=0.0, noise_copies=2)
WEIGHTS = jnp.asarray(np.random.default_rng(2).standard_normal((12, SIZE), np.float32))


def features(images):
    """Of squares of 2 pixels, 8 x 8 of them."""
    count, height, width, _ = images.shape
    squares = images.reshape(count, height // 2, 2, width // 2, 2, 3).swapaxes(2, 3)
    return squares.reshape(count, height // 2, width // 2, 12) @ WEIGHTS


@functools.partial(jax.jit, static_argnums=0)
def compute(stage, params, rows):
    model, _ = tiny_unified.make(alignment=(SIZE, 2))
    return unified.terms(model, stage, params, rows, KEYS, features)


def terms(stage=STAGE, task="image", params=None, **changes):
    _, own = tiny_unified.make(alignment=(SIZE, 2))
    return compute(stage, own if params is None else params, tiny_unified.batch(TASKS.index(task)) | changes)


def head(params, x) -> np.ndarray:
    """The alignment head by hand."""
    own = jax.tree.map(lambda w: np.asarray(w, np.float64), params["params"]["image_dit"]["alignment"])
    for name in ("layer_in", "hidden"):
        x = x @ own[name]["kernel"] + own[name]["bias"]
        x = x / (1 + np.exp(-x))
    return x @ own["layer_out"]["kernel"] + own["layer_out"]["bias"]


def velocity(model, params, **options):
    z = jnp.asarray(np.random.default_rng(3).standard_normal((2, 4, 3), np.float32))
    return model.apply(params, z, jnp.full(1, 0.3), (2, 2), method="image_velocity", **options)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_head_reads_the_states_behind_its_layer(layer):
    """They are what the last norm of a model without the later layers reads."""
    model, params = tiny_unified.make(2, alignment=(SIZE, layer))
    _, recorded = velocity(model, params, mutable=["alignment"])
    (found,) = recorded["alignment"]["image_dit"]["features"]
    cut = jax.tree.map(lambda x: x, params)  # a copy of the dicts
    image, text = cut["params"]["image_dit"], cut["params"]["dit"]
    text["layers"] = jax.tree.map(lambda x: x[:layer], text["layers"])
    image["dual"] = jax.tree.map(lambda x: x[:layer], image["dual"])
    dit = dataclasses.replace(model.dit_config, num_layers=layer)
    own = dataclasses.replace(model.image_dit_config, dual_layers=min(2, layer))
    states = []

    def note(call, args, kwargs, context):
        if context.module.name == "out_norm":
            states.append(np.asarray(args[0], np.float64))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        velocity(model.clone(dit_config=dit, image_dit_config=own), cut)
    np.testing.assert_allclose(found, head(params, states[0]), rtol=2e-4, atol=2e-4)


def test_without_a_layer_it_is_the_last_of_the_first_third():
    config = image_dit.ImageDiTConfig()
    dit = tiny_unified.make()[0].dit_config
    found = [
        image_dit.aligned_layer(config, dataclasses.replace(dit, num_layers=layers)) for layers in (1, 3, 8, 12, 28)
    ]
    assert found == [1, 1, 3, 4, 10]
    assert image_dit.aligned_layer(dataclasses.replace(config, alignment_layer=2), dit) == 2


def test_the_error_is_minus_the_cosine():
    numbers = np.random.default_rng(4)
    a, b = (numbers.standard_normal((2, 3, 7)).astype(np.float32) for _ in range(2))
    a[1, 2] = 0.0
    wanted = -(a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1) + 1e-30)
    np.testing.assert_allclose(alignment.error(jnp.asarray(a), jnp.asarray(b)), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(alignment.error(jnp.asarray(b), jnp.asarray(2 * b)), -1.0, rtol=1e-5)
    grads = jax.grad(lambda x: alignment.error(x, jnp.asarray(b)).sum())(jnp.asarray(a))
    assert np.isfinite(grads).all()


def test_features_are_resampled_to_the_grid_of_the_latents():
    images = tiny_unified.batch()["image"]
    found = alignment.wanted(SIZE, images, (2, 2), jnp.zeros((3, 4, 3)), features)
    assert found.shape == (3, 4, SIZE)
    smooth = lambda pixels: jnp.broadcast_to(pixels.mean((1, 2))[:, None, None], (3, 4, 6, 3))  # noqa: E731
    found = alignment.wanted(3, images, (2, 2), jnp.zeros((3, 4, 3)), smooth)
    np.testing.assert_allclose(found, np.repeat(smooth(to_float(images))[:, 0, :1], 4, axis=1), rtol=1e-4, atol=1e-5)
    ramp = lambda pixels: jnp.broadcast_to(jnp.arange(8.0)[None, :, None, None], (3, 8, 8, 1))  # noqa: E731
    found = np.asarray(alignment.wanted(1, images, (2, 2), jnp.zeros((3, 4, 3)), ramp))
    np.testing.assert_array_equal(found[:, 0], found[:, 1])  # a row of latents is one of features
    weights = np.array([0.625, 0.875, 0.875, 0.625, 0.375, 0.125])  # a triangle around 1.5 over two of four rows each
    mean = (weights * np.arange(6)).sum() / weights.sum()
    np.testing.assert_allclose(found[0, [0, 2], 0], [mean, 7 - mean], rtol=1e-5)


def test_features_in_a_row_are_those_of_a_grid_in_the_shape_of_the_images():
    images = jnp.asarray(np.random.default_rng(5).integers(0, 256, (2, 16, 32, 3), np.uint8))
    rows = lambda pixels: features(pixels).reshape(2, 8 * 16, SIZE)  # noqa: E731
    found = [alignment.wanted(SIZE, images, (2, 4), jnp.zeros((2, 8, 3)), f) for f in (features, rows)]
    np.testing.assert_array_equal(*found)


def test_the_same_grid_is_taken_as_it_is():
    images = tiny_unified.batch()["image"]
    found = alignment.wanted(SIZE, images, (8, 8), jnp.zeros((3, 64, 3)), features)
    np.testing.assert_allclose(found, features(to_float(images)).reshape(3, 64, SIZE), rtol=1e-6)


def test_without_features_images_are_aligned_with_the_means_of_their_latents():
    means = jnp.asarray(np.random.default_rng(6).standard_normal((3, 4, SIZE), np.float32))
    images = tiny_unified.batch()["image"]
    np.testing.assert_array_equal(alignment.wanted(SIZE, images, (2, 2), means), means)
    with pytest.raises(UserError, match="alignment_size = 5: must be the latents' 3 channels where no features"):
        alignment.wanted(SIZE, images, (2, 2), means[..., :3])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda x: x.mean((1, 2)), r"the shape \[3, 3\]: must be \[3, rows \* columns, F\]"),
        (lambda x: x.reshape(3, 16 * 16, 3)[:, :-1], r"the shape \[3, 255, 3\]"),
        (lambda x: x[:2], r"the shape \[2, 16, 16, 3\]"),
        (lambda x: x, "alignment_size = 5: must be the 3 features that are given"),
    ],
)
def test_other_features_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        alignment.wanted(SIZE, tiny_unified.batch()["image"], (2, 2), jnp.zeros((3, 4, 3)), given)


def test_the_term_is_the_mean_over_noisy_copies_of_images_with_text():
    segments = tiny_unified.batch()["segment_ids"].at[1].set(0)
    term = terms(segment_ids=segments)["alignment"]
    assert term.coefficient == 0.5
    np.testing.assert_array_equal(term.weight, [8, 0, 8])
    assert term.value[1] == 0 and np.all(np.abs(term.value) <= 8) and np.all(term.value[::2] != 0)


def test_copies_of_an_image_are_aligned_with_their_own_image():
    """A head that does not see its input has the same features everywhere."""
    _, params = tiny_unified.make(alignment=(SIZE, 2))
    out = params["params"]["image_dit"]["alignment"]["layer_out"]
    constant = np.arange(1.0, 6.0, dtype=np.float32)
    blind = jax.tree.map(lambda x: x, params)
    blind["params"]["image_dit"]["alignment"]["layer_out"] = {
        "kernel": 0 * out["kernel"],
        "bias": jnp.asarray(constant),
    }
    rows = tiny_unified.batch(TASKS.index("image"))
    term = terms(params=blind)["alignment"]
    wanted = np.asarray(alignment.wanted(SIZE, rows["image"], (2, 2), jnp.zeros((3, 4, 3)), features), np.float64)
    cosine = wanted @ constant / np.linalg.norm(wanted, axis=-1) / np.linalg.norm(constant)
    np.testing.assert_allclose(term.value, -2 * cosine.sum(1), rtol=1e-5)


@pytest.mark.parametrize("task", ["text", "caption"])
def test_other_tasks_have_no_alignment(task):
    term = terms(task=task)["alignment"]
    assert not np.any(term.value) and not np.any(term.weight)


@pytest.mark.parametrize(("layer", "dual"), [(1, 2), (2, 1)])
def test_gradients_reach_the_layers_below_and_none_above(layer, dual):
    model, params = tiny_unified.make(dual, alignment=(SIZE, layer))
    rows = tiny_unified.batch(TASKS.index("image"))

    def loss(own):
        return unified.terms(model, STAGE, {"params": own}, rows, KEYS, features)["alignment"].value.sum()

    found = jax.jit(jax.grad(loss))(params["params"])
    largest = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))  # noqa: E731
    image = found["image_dit"]
    assert min(largest(image[name]) for name in ("alignment", "in_layer", "time_in", "dual")) > 1e-6
    assert largest(image["out_layer"]) == largest(image["out_norm"]) == largest(image["out_modulation"]) == 0
    assert largest(found["image_vae"]) == largest(found["vae"]) == 0
    kernels = {"dual": (0, image["dual"]["qkv"]), "modulations": (dual, image["modulations"])}
    for first, tree in kernels.values():
        for index in range(jax.tree.leaves(tree)[0].shape[0]):
            size = largest(jax.tree.map(lambda x: x[index], tree))  # noqa: B023
            assert (size > 1e-6) if first + index < layer else size == 0
    shared = [largest(jax.tree.map(lambda x: x[i], found["dit"]["layers"]["mlp_in"])) for i in range(3)]  # noqa: B023
    assert [size > 0 for size in shared] == [i < layer and (i >= dual or i < layer - 1) for i in range(3)]


def test_without_a_weight_nothing_is_computed():
    model, params = tiny_unified.make(alignment=(SIZE, 2))
    bare, _ = tiny_unified.make()
    own = {name: value for name, value in params["params"]["image_dit"].items() if name != "alignment"}
    without = {"params": {**params["params"], "image_dit": own}}
    assert "alignment" not in tiny_unified.make()[1]["params"]["image_dit"]
    stage = dataclasses.replace(STAGE, alignment_weight=0.0)
    rows = tiny_unified.batch(TASKS.index("image"))
    programs = [
        str(jax.make_jaxpr(lambda p: unified.terms(m, stage, p, rows, KEYS, f))(without))  # noqa: B023
        for m, f in ((model, features), (bare, None))
    ]
    assert programs[0] == programs[1] and "alignment" not in terms(stage=stage)


def test_the_others_terms_are_as_without_it():
    found, plain = terms(), terms(stage=dataclasses.replace(STAGE, alignment_weight=0.0))
    assert found.keys() == {*plain, "alignment"}
    for name, term in plain.items():
        np.testing.assert_allclose(found[name].value, term.value, rtol=1e-5, err_msg=name)


def config(**image_dit):
    values = families.default("unified")
    values["image_dit"] |= image_dit
    values["stage2"]["alignment_weight"] = 0.5
    return families.parse(values)


def test_configs_that_do_not_fit_are_refused_before_anything_is_trained():
    with pytest.raises(UserError, match="alignment_size = 0: must be at least 1 where stage2.alignment_weight > 0"):
        config()
    with pytest.raises(UserError, match="alignment_layer = 99: must be at most dit.num_layers"):
        config(alignment_size=7, alignment_layer=99)
    chosen = config(alignment_size=7)
    model = family.make_model(chosen)
    family.make_stages(None, chosen)
    with pytest.raises(UserError, match="alignment_size = 7: must be the latents' 16 channels where no features"):
        family.make_stages(model, chosen)
    with pytest.raises(UserError, match="alignment_size = 7: must be the 5 features that are given"):
        family.with_features(alignment=features).stages(model, chosen)
    assert family.make_stages(model, config(alignment_size=16))


def test_features_reach_the_loss_through_the_family():
    small = dataclasses.replace(config(alignment_size=SIZE), stage2=STAGE)
    model, params = tiny_unified.make(alignment=(SIZE, 2))
    _, prior = family.with_features(alignment=features).stages(model, small)
    rows = tiny_unified.batch(TASKS.index("image"))
    found = jax.jit(lambda p: prior.terms(p, rows, KEYS, {})["alignment"].value)(params)
    np.testing.assert_allclose(found, terms()["alignment"].value, rtol=1e-5)
