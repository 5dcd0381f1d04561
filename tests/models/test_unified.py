"""The joint prior of text and images: who sees whom, against one row of all segments under a dense mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_unified
from models.tiny_unified import GRID

from cola_jax.models.cola import ColaDLM
from cola_jax.models.dit_layer import Before, DiTLayer
from cola_jax.models.image_dit import image_angles
from cola_jax.models.unified import with_before
from cola_jax.nn import attention, embeddings
from cola_jax.nn.layers import unstack_axis

BATCH, BLOCK, BLOCKS = 2, 2, 3
LENGTH, INSTRUCTION, PICTURE = BLOCK * BLOCKS, 3, GRID[0] * GRID[1]


def sees(task: str, query: tuple[str, int], key: tuple[str, int]) -> bool:
    """The rules as the issue of this model states them: (segment, block) of a query and of a key."""
    (q, i), (k, j) = query, key
    if task == "image":  # [C][I][N]
        return {"CC": j <= i, "NC": j < i, "NN": j == i, "IC": True, "II": True}.get(q + k, False)
    allowed = {"PP": True, "PI": True, "IP": True, "II": True}  # [P][I][C][N]
    allowed |= {"CP": True, "CI": True, "NP": True, "NI": True}
    return (allowed | {"CC": j <= i, "NC": j < i, "NN": j == i}).get(q + k, False)


class Segments:
    """Latents of all segments, and times of the noisy ones."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        normal = lambda *shape: jnp.asarray(rng.standard_normal((BATCH, *shape), np.float32))  # noqa: E731
        self.latents = {"C": normal(LENGTH, 4), "N": normal(LENGTH, 4), "P": normal(INSTRUCTION, 4)}
        self.latents["I"] = normal(PICTURE, 3)
        self.text_times = jnp.asarray(rng.uniform(0.1, 0.9, (BATCH, BLOCKS)), jnp.float32)
        self.image_times = jnp.asarray(rng.uniform(0.1, 0.9, BATCH), jnp.float32)


def sines(grid, dim) -> np.ndarray:
    """What is added to the latent at (row, column): sines and cosines of the row, then of the column."""
    speeds = 10_000.0 ** (-np.arange(dim // 4) / (dim // 4))
    of = lambda place: [*np.sin(place * speeds), *np.cos(place * speeds)]  # noqa: E731
    return np.array([[*of(row), *of(column)] for row in range(grid[0]) for column in range(grid[1])])


def reference(model, params, segments: Segments, task: str) -> dict[str, jax.Array]:
    """Velocities of the noisy segments: one row of all segments, a dense mask, every layer's weights by hand."""
    dit = model.dit_config
    image_times = segments.image_times if task == "image" else jnp.zeros(BATCH)
    names = ("C", "I", "N") if task == "image" else ("P", "I", "C", "N")
    begin = -max(GRID)
    positions = {"C": jnp.arange(LENGTH), "N": jnp.arange(LENGTH), "P": jnp.arange(INSTRUCTION) + begin - INSTRUCTION}
    angles = {n: embeddings.rope_angles(p[None], dit.rope_dim, dit.rope_theta) for n, p in positions.items()}
    angles["I"] = image_angles(dit, GRID)
    zero = {n: jnp.zeros((BATCH, len(p))) for n, p in positions.items()}
    times = zero | {"N": jnp.repeat(segments.text_times, BLOCK, axis=1)}
    times["I"] = jnp.repeat(image_times[:, None], PICTURE, axis=1)
    blocks = {"C": np.arange(LENGTH) // BLOCK, "N": np.arange(LENGTH) // BLOCK}
    blocks |= {"P": np.zeros(INSTRUCTION, int), "I": np.zeros(PICTURE, int)}
    places = [(n, b) for n in names for b in blocks[n]]
    mask = jnp.array([[sees(task, q, k) for k in places] for q in places])[None]

    stream = lambda n: "image_dit" if n == "I" else "dit"  # noqa: E731
    call = lambda n, f: model.apply(params, method=lambda m: f(getattr(m, stream(n))))  # noqa: E731
    embedded = {n: call(n, lambda s, t=times[n]: s._embed(t)) for n in names}
    x = {n: call(n, lambda s, z=segments.latents[n]: s.in_layer(z)) for n in names}
    x["I"] = x["I"] + sines(GRID, dit.dim)[None]
    text, image = params["params"]["dit"]["layers"], params["params"]["image_dit"]
    layer, dual = DiTLayer(dit, model.dtype, parent=None), model.image_dit_config.dual_layers
    for index in range(dit.num_layers):
        words = jax.tree.map(lambda w: w[index], text)  # noqa: B023
        if index < dual:
            picture = jax.tree.map(lambda w: w[index], image["dual"])  # noqa: B023
        else:
            own = jax.tree.map(lambda w: w[index - dual], image["modulations"])  # noqa: B023
            picture = {**words, **own}
        weights = {n: {"params": picture if n == "I" else words} for n in names}
        values, parts = {}, []
        for n in names:
            found = layer.apply(weights[n], None, None, embedded[n], method="modulations")[1]
            values[n] = [part for v in found for part in unstack_axis(v, 2)]
            parts.append(layer.apply(weights[n], x[n], *values[n][:2], angles[n], method="project"))
        y = attention.attend(*(jnp.concatenate(p, axis=1) for p in zip(*parts, strict=True)), mask)
        sizes = np.cumsum([x[n].shape[1] for n in names])[:-1]
        for n, attended in zip(names, jnp.split(y, sizes, axis=1), strict=True):
            x[n] = layer.apply(weights[n], x[n], attended, *values[n][2:], method="finish")
    out = {}
    for n in ("N", "I") if task == "image" else ("N",):
        shift, scale = unstack_axis(call(n, lambda s, e=embedded[n]: s.out_modulation(e)), 2)
        out[n] = call(n, lambda s, h=x[n], a=shift, b=scale: s.out_layer(s.out_norm(h) * (1 + b) + a))
    return out


def velocities(model, params, segments: Segments, task: str) -> dict[str, jax.Array]:
    """The same by the model: streams that read each other's keys and values."""
    latents = segments.latents
    noisy = functools.partial(model.apply, latents=latents["N"], times=segments.text_times, history=latents["C"])
    if task == "caption":
        ids = jnp.ones((BATCH, INSTRUCTION), jnp.int32)
        before = model.apply(params, latents["P"], ids, latents["I"], GRID, method="joined")
        return {"N": noisy(with_before(params, before), method="velocity")}
    velocity, recorded = noisy(params, method="velocity", mutable=["kept"])
    before = Before(*recorded["kept"]["dit"]["keys_values"][0], jnp.ones((BATCH, LENGTH), jnp.int32))
    drawn = model.apply(params, latents["I"], segments.image_times, GRID, before, method="image_velocity")
    return {"N": velocity, "I": drawn}


@pytest.mark.parametrize("task", ["image", "caption"])
@pytest.mark.parametrize(("dual", "unroll"), [(0, 1), (1, 3), (3, 1)])
def test_the_streams_are_one_transformer_over_all_segments(task, dual, unroll):
    model, params = tiny_unified.make(dual, unroll=unroll)
    segments = Segments()
    wanted, found = (jax.jit(f, static_argnums=(0, 3))(model, params, segments, task) for f in (reference, velocities))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float(jnp.std(value)) > 0.1
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5)


jax.tree_util.register_pytree_node(
    Segments,
    lambda s: ((s.latents, s.text_times, s.image_times), None),
    lambda _, children: _segments(*children),
)


def _segments(latents, text_times, image_times) -> Segments:
    made = object.__new__(Segments)
    made.latents, made.text_times, made.image_times = latents, text_times, image_times
    return made


@pytest.mark.parametrize("task", ["image", "caption"])
def test_gradients_are_zero_exactly_where_seeing_is_forbidden(task):
    model, params = tiny_unified.make()
    segments, size = Segments(), {"N": BLOCK, "C": BLOCK, "I": PICTURE, "P": INSTRUCTION}

    @jax.jit
    def gradients(weights):
        def total(latents):
            found = velocities(model, params, _segments(latents, segments.text_times, segments.image_times), task)
            return sum(jnp.sum(found[name] * weights[name]) for name in found)

        return jax.grad(total)(segments.latents)

    shapes = jax.eval_shape(lambda: velocities(model, params, segments, task))
    rng = np.random.default_rng(2)
    for out, shape in shapes.items():
        for i in range(shape.shape[1] // size[out]):
            weights = {name: np.zeros(each.shape, np.float32) for name, each in shapes.items()}
            part = slice(i * size[out], (i + 1) * size[out])
            weights[out][:, part] = rng.standard_normal(weights[out][:, part].shape)
            for name, gradient in gradients(weights).items():
                for j in range(gradient.shape[1] // size[name]):
                    moved = np.abs(gradient[:, j * size[name] : (j + 1) * size[name]]).max()
                    # What a query sees of what sees others: C is only ever reached through C, P and I.
                    allowed = sees(task, (out, i), (name, j))
                    assert (moved > 1e-6) if allowed else (moved == 0), (out, i, name, j, moved)


def test_a_text_alone_has_the_velocity_of_the_text_model():
    model, params = tiny_unified.make()
    alone = ColaDLM(model.vae_config, model.dit_config)
    own = {"params": {name: params["params"][name] for name in ("vae", "dit")}}
    segments = Segments()
    arguments = (segments.latents["N"], segments.text_times, segments.latents["C"])
    found, wanted = (m.apply(p, *arguments, method="velocity") for m, p in ((model, params), (alone, own)))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("prediction", ["velocity", "mean"])
def test_an_image_depends_on_its_own_row_and_not_on_padding(prediction):
    model, params = tiny_unified.make(prediction=prediction)
    segments = Segments()
    draw = functools.partial(model.apply, params, method="image_velocity")

    def before(latents, ids):
        return model.apply(params, latents, ids, method="text_before")

    def both(latents, ids):
        return draw(segments.latents["I"], segments.image_times, GRID, before(latents, ids))

    ids = jnp.ones((BATCH, LENGTH), jnp.int32)
    whole = both(segments.latents["C"], ids)
    padded = jnp.pad(segments.latents["C"], ((0, 0), (0, 4), (0, 0)), constant_values=7.0)
    np.testing.assert_allclose(both(padded, jnp.pad(ids, ((0, 0), (0, 4)))), whole, rtol=1e-5, atol=1e-5)
    other = segments.latents["C"].at[0].add(1.0)
    moved = np.abs(both(other, ids) - whole).max(axis=(1, 2))
    assert moved[0] > 1e-3 and moved[1] == 0
    # An image with an id of its own reads nothing; that is the image without a text.
    apart = draw(
        segments.latents["I"], segments.image_times, GRID, before(segments.latents["C"], ids),
        jnp.full((BATCH, PICTURE), -1),
    )  # fmt: skip
    np.testing.assert_allclose(apart, draw(segments.latents["I"], segments.image_times, GRID), rtol=1e-5, atol=1e-5)
    assert np.abs(apart - whole).max() > 1e-3


def test_places_in_a_picture_are_told_apart_by_row_and_column():
    model, params = tiny_unified.make()
    angles = np.asarray(image_angles(model.dit_config, (3, 3)))[0]
    assert len(np.unique(angles.round(5), axis=0)) == 9
    diagonal = embeddings.rope_angles(jnp.arange(-3, 0)[None], 8, model.dit_config.rope_theta)[0]
    np.testing.assert_allclose(angles[::4], diagonal)  # where row and column are equal: as a text's positions
    z = jnp.broadcast_to(jnp.array([1.0, -1.0, 0.5])[None, None], (1, PICTURE, 3)).at[0, 0].set(2.0)
    found = np.asarray(model.apply(params, z, jnp.array([0.5]), GRID, method="image_velocity"))[0]
    assert np.abs(found[1] - found[2]).max() > 1e-4  # right of the odd one out, and below it
