"""Who depends on whom: exactly not at all where forbidden, and really where allowed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import BLOCK, apply, create, jit, normal, tokens, uniform

LENGTH = 12  # latents
ONE_DOCUMENT = jnp.ones((1, LENGTH), jnp.int32)
THREE_DOCUMENTS = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])


def later_or_equal(block):
    return np.greater_equal.outer(block, block)


def same(document):
    return np.equal.outer(document, document)


def changed_positions(function, x, other) -> np.ndarray:
    """[outputs, inputs] bool: whether output i changes, in any bit, when input j of ``x`` becomes that of ``other``."""
    base = np.asarray(function(x))
    moved = [np.asarray(function(x.at[:, j].set(other[:, j]))) for j in range(x.shape[1])]
    return np.stack([np.any(one != base, axis=(0, 2)) for one in moved], axis=1)


@pytest.mark.parametrize("documents", [ONE_DOCUMENT, THREE_DOCUMENTS], ids=["one", "three"])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("attention", ["causal", "block_causal"])
class TestTextVAE:
    def allowed(self, attention, documents):
        block = np.arange(LENGTH) // (1 if attention == "causal" else 2)
        return later_or_equal(block) & same(documents[0])

    def test_encoder(self, attention, patch, documents):
        model, params = create({"attention": attention, "patch_size": patch})
        x, other = tokens(1, LENGTH * patch), tokens(1, LENGTH * patch, seed=1)
        other = jnp.where(other == x, (x + 1) % 10, other)
        allowed = np.repeat(self.allowed(attention, documents), patch, axis=1)
        for part in range(2):  # mean, log-variance
            changed = changed_positions(
                lambda t, part=part: apply(model, params, t, documents, method="encode")[part], x, other
            )
            np.testing.assert_array_equal(changed, allowed)

    def test_decoder(self, attention, patch, documents):
        model, params = create({"attention": attention, "patch_size": patch})
        z, other = normal(1, LENGTH, 4), normal(1, LENGTH, 4, seed=1)
        changed = changed_positions(lambda z: apply(model, params, z, documents, method="decode"), z, other)
        np.testing.assert_array_equal(changed, np.repeat(self.allowed(attention, documents), patch, axis=0))


def depends(jacobian) -> np.ndarray:
    """[outputs, positions] of a Jacobian [outputs, 1, positions, channels]."""
    return np.any(np.asarray(jacobian) != 0, axis=(1, 3))


def weighted(velocity):
    """One number for each position, [Q]."""
    return velocity[0] @ normal(4, seed=9)


@functools.cache
def whole_sequence():
    model, params = create()

    def velocity(z, params, documents):
        return weighted(model.apply(params, z, uniform(1, 3), segment_ids=documents, method="velocity"))

    jacobian = jit(jax.jacrev(velocity))
    return lambda documents: depends(jacobian(normal(1, LENGTH, 4), params, documents))


@pytest.mark.parametrize("documents", [ONE_DOCUMENT, THREE_DOCUMENTS], ids=["one", "three"])
def test_velocity_of_a_whole_sequence_is_block_causal_within_documents(documents):
    allowed = later_or_equal(np.arange(LENGTH) // BLOCK) & same(documents[0])
    np.testing.assert_array_equal(whole_sequence()(documents), allowed)


@functools.cache
def training_layout():
    """(documents, dropped) -> what the velocity of two noisy copies depends on: noisy, clean, no-history vector."""
    model, params = create(dit={"no_history_vector": True})

    def velocity(noisy, clean, vector, params, documents, dropped):
        params = {"params": {"dit": params["params"]["dit"] | {"no_history": vector[0, 0]}}}
        extra = {"segment_ids": documents, "drop_history": dropped}
        return weighted(model.apply(params, noisy, uniform(1, 6), history=clean, method="velocity", **extra))

    jacobian = jit(jax.jacrev(velocity, argnums=(0, 1, 2)))
    noisy, clean = normal(1, 2 * LENGTH, 4, seed=1), normal(1, LENGTH, 4, seed=2)
    vector = params["params"]["dit"]["no_history"][None, None]
    return lambda *changes: [depends(part) for part in jacobian(noisy, clean, vector, params, *changes)]


NONE_DROPPED = jnp.zeros((1, 6), bool)
NOISY_BLOCK, CLEAN_BLOCK = np.arange(2 * LENGTH) // BLOCK, np.arange(LENGTH) // BLOCK
EARLIER = np.greater.outer(np.tile(CLEAN_BLOCK, 2), CLEAN_BLOCK)


def test_noisy_block_sees_itself_and_strictly_earlier_clean_blocks():
    of_noisy, of_clean, _ = training_layout()(ONE_DOCUMENT, NONE_DROPPED)
    np.testing.assert_array_equal(of_noisy, same(NOISY_BLOCK))
    np.testing.assert_array_equal(of_clean, EARLIER)


@pytest.mark.parametrize("boundary", [4, 6])
def test_noisy_block_sees_its_own_document_only(boundary):
    """Also where a document ends inside a block."""
    documents = 1 + (jnp.arange(LENGTH) >= boundary).astype(jnp.int32)[None]
    of_noisy, of_clean, _ = training_layout()(documents, NONE_DROPPED)
    document = np.asarray(documents[0])
    np.testing.assert_array_equal(of_noisy, same(NOISY_BLOCK) & same(np.tile(document, 2)))
    np.testing.assert_array_equal(of_clean, EARLIER & np.equal.outer(np.tile(document, 2), document))


def test_dropped_block_sees_no_history_but_the_vector_that_says_so():
    dropped = np.array([True, True, False, False, False, True])
    of_noisy, of_clean, of_vector = training_layout()(ONE_DOCUMENT, jnp.asarray(dropped)[None])
    is_dropped = np.repeat(dropped, BLOCK)
    np.testing.assert_array_equal(of_noisy, same(NOISY_BLOCK))
    np.testing.assert_array_equal(of_clean, EARLIER & ~is_dropped[:, None])
    np.testing.assert_array_equal(of_vector[:, 0], is_dropped)
