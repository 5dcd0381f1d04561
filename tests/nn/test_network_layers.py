import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import assert_close, assert_trees_close, normal

from cola_jax.nn.layers import LayerNorm, Linear, scan_layers


def test_linear_maps_the_last_axis_to_several():
    kernel, bias, x = normal(3, 2, 5), normal(2, 5, seed=1), normal(4, 6, 3, seed=2)
    params = {"params": {"kernel": kernel, "bias": bias}}
    y = Linear((2, 5), ("embed", None, "heads")).apply(params, x)
    assert_close(y, np.einsum("abi,ijk->abjk", x, kernel) + np.asarray(bias), 1e-5)


def test_linear_computes_in_its_type_and_keeps_float32_parameters():
    layer = Linear((5,), ("embed", "mlp"), dtype=jnp.dtype("bfloat16"))
    params = nn.unbox(layer.init(jax.random.key(0), normal(2, 3)))
    assert layer.apply(params, normal(2, 3)).dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_linear_starts_at_zero_where_told():
    params = nn.unbox(Linear((5,), ("embed", "mlp"), zero=True).init(jax.random.key(0), normal(2, 3)))
    np.testing.assert_array_equal(params["params"]["kernel"], 0)


@pytest.mark.parametrize("fan_in", [30, 300])
def test_linear_starts_with_about_the_variance_of_its_input(fan_in):
    params = nn.unbox(Linear((400,), ("embed", "mlp")).init(jax.random.key(0), normal(1, fan_in)))
    assert 0.8 < np.std(params["params"]["kernel"]) * np.sqrt(fan_in) < 1.1


def test_layer_norm():
    x, scale, bias = normal(2, 3, 7) * 3 + 1, normal(7, seed=1), normal(7, seed=2)
    y = np.asarray(x, np.float64)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 0.1)
    actual = LayerNorm(0.1).apply({"params": {"scale": scale, "bias": bias}}, x)
    assert_close(actual, y * np.asarray(scale) + np.asarray(bias), 1e-5)
    assert_close(LayerNorm(0.1, affine=False).apply({}, x), y, 1e-5)


def test_layer_norm_of_bfloat16_computes_in_float32():
    """The mean, 100.125, is no bfloat16 number: its neighbour is 100."""
    x = np.array([[100.0] * 7 + [101.0]])
    y = LayerNorm(1e-6, affine=False).apply({}, jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), (x - x.mean()) / x.std(), 0.005)


class Layer(nn.Module):
    """Uses its own slice of the history, the shared context, and returns an output."""

    @nn.compact
    def __call__(self, x, history, context):
        h = jnp.tanh(jnp.sin(3 * jnp.tanh(Linear((4,), ("embed", "mlp"))(x) + history + context)))
        return x + h, h


def stack(remat, unroll=1):
    layers = scan_layers(Layer, 3, remat, unroll)(name="layers")
    x, history, context = normal(2, 4), normal(3, 2, 4, seed=1), normal(2, 4, seed=2)
    params = nn.unbox(jax.eval_shape(layers.init, jax.random.key(0), x, history, context))
    params = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=len(leaf.shape)), params)
    return layers, params, (x, history, context)


@pytest.mark.parametrize("unroll", [1, 2, 8])
def test_scan_stacks_parameters_and_equals_a_loop(unroll):
    layers, params, (x, history, context) = stack("none", unroll)
    carry, outputs = layers.apply(params, x, history, context)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], params)
        x, h = Layer().apply(one, x, history[i], context)
        assert_close(outputs[i], h, 1e-5)
    assert_close(carry, x, 1e-5)


def test_scan_draws_every_layer_differently():
    layers, _, arguments = stack("none")
    kernel = nn.unbox(layers.init(jax.random.key(0), *arguments))["params"]["Linear_0"]["kernel"]
    assert kernel.shape == (3, 4, 4)
    assert not np.any(kernel[0] == kernel[1])


@pytest.mark.parametrize("remat", ["full", "attention", "dots"])
def test_remat_changes_neither_values_nor_gradients_but_what_is_kept(remat):
    def kept_and_gradients(remat):
        layers, params, arguments = stack(remat)
        loss = lambda params: jnp.sum(jnp.sin(layers.apply(params, *arguments)[0]))  # noqa: E731
        _, backward = jax.vjp(loss, params)
        kept = sum(x.size for x in jax.tree.leaves(backward))
        return kept, jax.jit(jax.value_and_grad(loss))(params)

    plain, expected = kept_and_gradients("none")
    kept, actual = kept_and_gradients(remat)
    assert_trees_close(actual, expected, 1e-5)
    assert kept < plain
