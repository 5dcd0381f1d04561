"""The vocabulary head: its logits are sums in float32, and neither chunks nor meshes change what comes of them."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import assert_close, assert_trees_close

from cola_jax import sharding
from cola_jax.config import AxesConfig, TrainConfig
from cola_jax.models.vocabulary_head import VocabularyHead
from cola_jax.train import collectives

WIDTH, BATCH, LENGTH = 16, 8, 12
MESHES = {
    "data": ((8, 1, 1), {}),
    "fsdp": ((1, 8, 1), {}),
    "tensor": ((1, 1, 8), {}),
    "all": ((2, 2, 2), {}),
    "other axes": ((2, 2, 2), {"embed": "data", "vocab": "fsdp"}),
    "tensor over the width": ((2, 2, 2), {"embed": "tensor", "vocab": "fsdp"}),
}


def make(vocab: int = 32, chunk: int = 4, rows: int = 0, dtype="float32") -> VocabularyHead:
    return VocabularyHead(WIDTH, vocab, True, jnp.dtype(dtype), chunk, rows)


def draws(vocab: int, batch: int = BATCH):
    """(kernel and bias, hidden states, tokens, weights of the tokens)."""
    draw = np.random.default_rng(vocab)
    params = {"kernel": draw.standard_normal((WIDTH, vocab)), "bias": draw.standard_normal(vocab)}
    numbers = ({"params": params}, draw.standard_normal((batch, LENGTH, WIDTH)), draw.standard_normal((batch, LENGTH)))
    params, hidden, weights = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), numbers)
    return params, hidden, jnp.asarray(draw.integers(0, vocab, (batch, LENGTH)), jnp.int32), weights


def surprise(logits, tokens):
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]


def gradient(head, tokens, weights):
    """A function of parameters and hidden states: (sum of the surprises, these), and the gradient of the sum."""

    def total(params, hidden):
        each = head.apply(params, hidden, tokens, surprise, method="reduced")
        return jnp.sum(weights * each), each

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)


def on_mesh(name: str, function, head):
    """``function`` of parameters and hidden states, jitted for a mesh of `MESHES`."""
    sizes, axes = MESHES[name]
    config = TrainConfig(**dict(zip(("mesh_data", "mesh_fsdp", "mesh_tensor"), sizes, strict=True)))
    mesh, rules = sharding.make_mesh(config), sharding.make_rules(AxesConfig(**axes))
    boxed = jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, 1, WIDTH)))
    homes = (sharding.shardings(boxed, mesh, rules), sharding.batch_sharding(mesh))

    def traced(*arguments):
        with sharding.activate(mesh, rules):
            return function(*arguments)

    return jax.jit(traced, in_shardings=homes)


@functools.cache
def on_one_device(vocab: int, chunk: int):
    params, hidden, tokens, weights = draws(vocab)
    return jax.jit(gradient(make(vocab, chunk), tokens, weights))(params, hidden)


@pytest.mark.parametrize("vocab", [32, 30, 31])
@pytest.mark.parametrize("name", MESHES)
def test_meshes_change_neither_values_nor_gradients(name, vocab):
    """Also where an axis does not divide the vocabulary."""
    params, hidden, tokens, weights = draws(vocab)
    head = make(vocab)
    found = on_mesh(name, gradient(head, tokens, weights), head)(params, hidden)
    assert jax.tree.map(jnp.shape, found[1][0]) == jax.tree.map(jnp.shape, params)
    assert_trees_close(jax.device_get(found), on_one_device(vocab, 4), 1e-5)


@pytest.mark.parametrize(("name", "rows", "columns"), [("tensor", 8 * 4, 4), ("all", 2 * 4, 16)])
@pytest.mark.parametrize("vocab", [32, 31])
def test_devices_along_the_tensor_axis_share_the_logits(name, rows, columns, vocab):
    """Of a chunk, on a device: those of its examples, and its part of the vocabulary."""
    head = make(vocab)
    params, hidden, tokens, weights = draws(vocab)
    text = on_mesh(name, gradient(head, tokens, weights), head).lower(params, hidden).compile().as_text()
    products = set(re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(", text))
    assert (str(rows), str(columns)) in products
    assert not [pair for pair in products if {str(vocab), "32"} & set(pair) - {str(rows)}], products


def test_a_batch_that_a_mesh_does_not_divide_is_computed_all_the_same():
    params, hidden, tokens, weights = draws(32, batch=3)
    head = make()
    call = gradient(head, tokens, weights)
    mesh = sharding.make_mesh(TrainConfig(mesh_data=1, mesh_fsdp=8))
    with sharding.activate(mesh):
        found = jax.jit(call)(params, hidden)
    assert_trees_close(found, jax.jit(call)(params, hidden), 1e-5)


def test_weights_are_gathered_once_whatever_the_chunks():
    """Kernel and bias before the first chunk, the kernel's gradient after the last; in float32 here."""
    _, _, tokens, weights = draws(32)
    kernel, bias = WIDTH * 32 * 4, 32 * 4
    for chunk in (1, 4, 0):
        head = make(chunk=chunk)
        call = on_mesh("fsdp", gradient(head, tokens, weights), head)
        params = jax.eval_shape(lambda: draws(32)[0])
        hidden = jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), jnp.float32)
        found = collectives.count(call.lower(params, hidden).compile().as_text())
        moved = found["all-gather"] + found["reduce-scatter"] + found["all-reduce"]
        least = 7 / 8 * 2 * kernel
        rest = 2 * 7 / 8 * (2 * kernel + bias)  # the results here are whole on every device
        assert least <= moved <= least + rest, found


@pytest.mark.parametrize(("chunk", "rows", "positions"), [(4, 0, 4), (4, 20, 7), (1, 1, 1), (4, 1000, 12), (0, 8, 12)])
def test_chunks_have_so_many_rows_on_a_device(chunk, rows, positions):
    """Of three sequences on each of a device or two."""
    head = make(chunk=chunk, rows=rows)
    params, *_ = draws(32)
    for batch, mesh in ((3, None), (6, sharding.make_mesh(TrainConfig(mesh_data=2)))):
        seen = []

        def reduce(logits, tokens):
            seen.append(logits.shape)  # noqa: B023
            return surprise(logits, tokens)

        def call(hidden, tokens):
            if mesh is None:  # noqa: B023
                return head.apply(params, hidden, tokens, reduce, method="reduced")  # noqa: B023
            with sharding.activate(mesh):  # noqa: B023
                return head.apply(params, hidden, tokens, reduce, method="reduced")  # noqa: B023

        found = jax.eval_shape(call, jnp.zeros((batch, LENGTH, WIDTH)), jnp.zeros((batch, LENGTH), jnp.int32))
        assert found.shape == (batch, LENGTH) and set(seen) == {(3, positions, 32)}


def test_narrow_factors_are_summed_in_float32():
    """Logits and gradients of a bfloat16 head against NumPy on the same factors."""
    params, hidden, tokens, weights = draws(300)
    head = make(300, dtype="bfloat16")
    narrow = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)  # noqa: E731
    kernel, bias = params["params"]["kernel"], np.asarray(params["params"]["bias"], np.float64)
    expected = narrow(hidden) @ narrow(kernel) + bias
    logits = jax.jit(head.apply)(params, hidden)
    assert logits.dtype == jnp.float32
    assert_close(logits, expected, 1e-6)
    (_, each), (by_params, by_hidden) = jax.jit(gradient(head, tokens, weights))(params, hidden)
    largest = expected.max(-1, keepdims=True)
    shares = np.exp(expected - largest)
    sums = shares.sum(-1, keepdims=True)
    picked = np.take_along_axis(expected, np.asarray(tokens)[..., None], -1)[..., 0]
    assert_close(each, (np.log(sums) + largest)[..., 0] - picked, 1e-6)
    slope = np.asarray(weights, np.float64)[..., None] * (shares / sums - np.eye(300)[np.asarray(tokens)])
    assert_close(by_params["params"]["bias"], slope.sum((0, 1)), 1e-5)
    slope = narrow(jnp.asarray(slope, jnp.float32))
    by_kernel = np.einsum("btc,btv->cv", narrow(hidden), slope)
    assert by_params["params"]["kernel"].dtype == jnp.float32 == by_hidden.dtype
    assert_close(by_params["params"]["kernel"], by_kernel, 1e-4)  # a slope that rounds the other way
    assert_close(by_hidden, slope @ narrow(kernel).T, 1e-2)  # rounded to bfloat16


def test_narrow_products_give_float32():
    """Forward and for the kernel's gradient; XLA's CPU compiler may do it unasked, so the program is read."""
    head = make(dtype="bfloat16")
    params, hidden, tokens, weights = draws(32)
    text = jax.jit(gradient(head, tokens, weights)).lower(params, hidden).as_text()
    products = [line.rpartition("->")[2].strip() for line in text.splitlines() if "dot_general" in line]
    narrow = [kind for kind in products if "bf16" in kind]
    assert len(products) == 4 and len(narrow) == 1, products  # logits twice, the gradients of kernel and states


def test_narrow_weights_travel_narrow():
    head = make(dtype="bfloat16")
    _, _, tokens, _ = draws(32)

    def call(params, hidden):
        return head.apply(params, hidden, tokens, surprise, method="reduced")

    params = jax.eval_shape(lambda: draws(32)[0])
    hidden = jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), jnp.float32)
    text = on_mesh("fsdp", call, head).lower(params, hidden).as_text()
    lines = [line for line in text.splitlines() if "all_gather" in line]
    assert len(lines) == 1 and "tensor<2x32xbf16>" in lines[0]


def test_boxes_name_the_axes():
    boxed = jax.eval_shape(make().init, jax.random.key(0), jnp.zeros((1, 1, WIDTH)))["params"]
    assert boxed["kernel"].names == ("embed", "vocab") and boxed["bias"].names == ("vocab",)
    assert isinstance(boxed["kernel"], nn.Partitioned)
