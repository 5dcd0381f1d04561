import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import assert_close, normal

from cola_jax.nn import attention

HEADS, CHANNELS = 2, 4


def dense(q, k, v, mask):
    """Softmax attention of one example, written out for each query and head: [N, H, C]."""
    out = np.zeros_like(q)
    for n in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = k[:, h] @ q[n, h] / np.sqrt(q.shape[2])
            weights = np.where(mask[n], np.exp(scores - scores.max()), 0.0)
            out[n, h] = weights @ v[:, h] / weights.sum()
    return out


def test_attend_is_softmax_attention():
    q, k, v = (normal(2, n, HEADS, CHANNELS, seed=n) for n in (5, 7, 7))
    mask = np.random.default_rng(0).random((2, 5, 7)) < 0.5
    mask[:, :, 0] = True
    expected = [dense(*(np.asarray(x[i]) for x in (q, k, v)), mask[i]) for i in range(2)]
    assert_close(jax.jit(attention.attend)(q, k, v, jnp.asarray(mask)), np.stack(expected), 1e-5)


def test_attend_without_a_mask_sees_everything():
    q, k, v = (normal(2, 5, HEADS, CHANNELS, seed=n) for n in range(3))
    everything = attention.attend(q, k, v, jnp.ones((1, 5, 5), bool))
    assert_close(attention.attend(q, k, v), everything, 1e-6)


def test_logits_are_float32_for_bfloat16_inputs():
    """A difference between keys that bfloat16 logits would round away decides."""
    q = jnp.full((1, 1, 1, 2), 16.0, jnp.bfloat16)
    k = jnp.array([[16.0, 16.0], [16.0, 16.125]], jnp.bfloat16).reshape(1, 2, 1, 2)
    v = jnp.array([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    v = jnp.concatenate([v, v], axis=-1)
    expected = 1 / (1 + np.exp(-16 * 0.125 / np.sqrt(2)))
    assert abs(float(attention.attend(q, k, v)[0, 0, 0, 0]) - expected) < 0.01


@pytest.mark.parametrize(("history", "groups"), [(0, 1), (6, 3)])
def test_attend_history_equals_dense_attention_values_and_gradients(history, groups):
    """One softmax over [history | all queries' keys] under the mask in which blocks do not see each other."""
    block, length = 4, 4 * groups
    draw = np.random.default_rng(groups)
    history_mask = jnp.asarray(draw.random((2, length, history)) < 0.5)
    own = draw.random((2, groups, block, block)) < 0.7
    own[:, :, np.arange(block), np.arange(block)] = True
    whole = np.zeros((2, length, length), bool)
    for g in range(groups):
        whole[:, g * block : (g + 1) * block, g * block : (g + 1) * block] = own[:, g]
    mask = jnp.concatenate([history_mask, jnp.asarray(whole)], axis=-1)
    arrays = [normal(2, n, HEADS, CHANNELS, seed=i) for i, n in enumerate([length] * 3 + [history] * 2)]
    weights = normal(2, length, HEADS, CHANNELS, seed=9)

    def fast(q, k, v, past_k, past_v):
        return attention.attend_history(q, k, v, (past_k, past_v), history_mask, jnp.asarray(own))

    def slow(q, k, v, past_k, past_v):
        return attention.attend(q, jnp.concatenate([past_k, k], 1), jnp.concatenate([past_v, v], 1), mask)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(function, arrays):
        value, backward = jax.vjp(function, *arrays)
        return value, backward(weights)

    (value, gradients), (expected, expected_gradients) = (value_and_gradients(f, arrays) for f in (fast, slow))
    assert_close(value, expected, 1e-5)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        if wanted.size:
            assert_close(actual, wanted, 1e-5)


def test_a_query_that_sees_no_history_gets_no_nan_and_no_gradient_from_it():
    q, k, v = (normal(1, 4, HEADS, CHANNELS, seed=i) for i in range(3))
    nothing, own = jnp.zeros((1, 4, 3), bool), jnp.ones((1, 1, 4, 4), bool)

    def total(past):
        return jnp.sum(attention.attend_history(q, k, v, (past, past), nothing, own))

    value, gradient = jax.jit(jax.value_and_grad(total))(normal(1, 3, HEADS, CHANNELS, seed=4))
    assert jnp.isfinite(value)
    np.testing.assert_array_equal(gradient, 0)
