"""The next-token loss against NumPy, and of packed documents against the documents alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_autoregressive as tiny
from models.tiny_models import assert_trees_close, tokens

from cola_jax.objectives import next_token
from cola_jax.types import Term

SEGMENTS = jnp.array([[1] * 5 + [2] * 4 + [0] * 3, [0] * 2 + [1] * 10])
PIECES = ((0, 0, 5), (0, 5, 9), (1, 2, 12))  # row, begin, end of each document


def batch(rows, segment_ids):
    return {"tokens": rows, "segment_ids": segment_ids}


@functools.cache
def objective(chunk: int = 4):
    model, params = tiny.create(logit_chunk=chunk)
    return jax.jit(lambda rows, segments: next_token.terms(model, params, batch(rows, segments)))


@functools.cache
def gradient():
    model, params = tiny.create()

    def total(params, rows, segment_ids):
        terms = next_token.terms(model, params, batch(rows, segment_ids))
        return jnp.sum(terms["next_token"].value)

    whole = jax.jit(jax.value_and_grad(total))
    return lambda rows, segment_ids: whole(params, rows, segment_ids)


@pytest.mark.parametrize("chunk", [4, 0])
def test_terms_are_those_of_numpy(chunk):
    model, params = tiny.create()
    rows = tokens(2, 12)
    expected = {name: np.zeros(2) for name in ("next_token", "accuracy")}
    for row, begin, end in PIECES:
        document = np.asarray(rows[row, begin:end])
        expected["next_token"][row] -= tiny.log_probs(model.config, params, document).sum()
        expected["accuracy"][row] += (tiny.reference(model.config, params, document).argmax(-1) == document).sum()
    terms = objective(chunk)(rows, SEGMENTS)
    assert set(terms) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(terms[name].value, values, rtol=1e-5)
        np.testing.assert_array_equal(terms[name].weight, [9, 10])
    assert terms["next_token"].coefficient == 1.0 and terms["accuracy"].coefficient == 0.0


def test_the_most_likely_tokens_are_all_right():
    """So that the accuracy of `test_terms_are_those_of_numpy` is not that of chance only."""
    model, params = tiny.create()
    document = []
    for _ in range(12):
        document.append(int(tiny.reference(model.config, params, [*document, 0])[-1].argmax()))
    terms = objective()(jnp.array([document, document]), jnp.ones((2, 12), jnp.int32))
    np.testing.assert_array_equal(terms["accuracy"].value, [12, 12])
    off = objective()(jnp.array([document, document]) + 1, jnp.ones((2, 12), jnp.int32))
    assert np.all(off["accuracy"].value < 6)


def test_packed_documents_have_the_loss_and_the_gradient_of_the_documents_alone():
    rows = tokens(2, 12)
    alone, segments = np.zeros((4, 12), np.int32), np.zeros((4, 12), np.int32)
    for i, (row, begin, end) in enumerate(PIECES):
        alone[i, : end - begin], segments[i, : end - begin] = rows[row, begin:end], 1
    packed = gradient()(rows, SEGMENTS)
    first, second = (gradient()(jnp.asarray(alone[i : i + 2]), jnp.asarray(segments[i : i + 2])) for i in (0, 2))
    assert_trees_close(packed, jax.tree.map(jnp.add, first, second), 1e-5)


def test_what_stands_in_padding_changes_nothing():
    rows = tokens(2, 12)
    other = jnp.where(SEGMENTS > 0, rows, 30 - rows)
    assert np.any(other != rows)
    jax.tree.map(np.testing.assert_array_equal, gradient()(rows, SEGMENTS), gradient()(other, SEGMENTS))


def test_a_row_of_padding_has_no_weight():
    terms = objective()(tokens(2, 12), SEGMENTS.at[0].set(0))
    assert isinstance(terms["next_token"], Term)
    assert terms["next_token"].value[0] == terms["next_token"].weight[0] == terms["accuracy"].value[0] == 0
