"""LLaDA: its maths, who depends on whom."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_llada as tiny
from models.tiny_models import VOCAB, apply, assert_close, normal, tokens

DOCUMENTS = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
MASKED = jnp.array([[True, False, False] * 4])


@pytest.mark.parametrize("changes", [{}, {"norm": "layernorm", "qk_norm": True}])
def test_logits_are_those_of_the_network_written_in_numpy(changes):
    model, params = tiny.create(**changes)
    rows, masked = tokens(2, 9), np.random.default_rng(0).random((2, 9)) < 0.4
    found = apply(model, params, rows, jnp.asarray(masked), method="logits")
    assert found.dtype == jnp.float32 and masked.any(axis=1).all()
    pairs = zip(np.asarray(rows), masked, strict=True)
    assert_close(found, [tiny.logits(model.config, params, *pair) for pair in pairs], 1e-5)


@functools.cache
def dependence():
    """segment_ids -> what the logits at each position depend on: [T, V] tokens, [T] the vector "mask"."""
    model, params = tiny.create()
    row = jnp.arange(DOCUMENTS.shape[1])[None]  # every token once, so that its embedding is its position's

    def outputs(own, segment_ids):
        variables = {"params": {"transformer": params["params"]["transformer"] | own}}
        return model.apply(variables, row, MASKED, segment_ids, method="logits")[0] @ normal(VOCAB)

    jacobian = jax.jit(jax.jacrev(outputs))
    own = {name: params["params"]["transformer"][name] for name in ("wte", "mask")}
    return lambda segment_ids: {name: np.any(x != 0, axis=-1) for name, x in jacobian(own, segment_ids).items()}


@pytest.mark.parametrize("segment_ids", [jnp.ones_like(DOCUMENTS), DOCUMENTS], ids=["one", "three"])
def test_a_position_depends_on_what_is_not_masked_in_its_document_and_on_nothing_else(segment_ids):
    found, document, masked = dependence()(segment_ids), np.asarray(segment_ids[0]), np.asarray(MASKED[0])
    allowed = np.equal.outer(document, document) & ~masked[None]
    np.testing.assert_array_equal(found["wte"][:, : len(document)], allowed)
    assert not np.any(found["wte"][:, len(document) :])
    assert np.all(found["mask"])


def test_documents_of_a_row_are_as_alone():
    model, params = tiny.create()
    row = tokens(1, 12)
    packed = apply(model, params, row, MASKED, DOCUMENTS, method="logits")
    for begin, end in ((0, 5), (5, 9)):
        alone = apply(model, params, row[:, begin:end], MASKED[:, begin:end], method="logits")
        assert_close(packed[:, begin:end], alone, 1e-5)


def test_logits_at_positions_are_those_of_the_whole_row():
    model, params = tiny.create()
    row, positions = tokens(1, 12), jnp.array([[7, 0, 7]])
    whole = apply(model, params, row, MASKED, method="logits")
    some = apply(model, params, row, MASKED, None, positions, method="logits")
    assert_close(some, whole[:, positions[0]], 1e-6)
