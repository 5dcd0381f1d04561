"""Who depends on whom: exactly not at all where forbidden, and really where allowed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import BLOCK, apply, create, normal, tokens, uniform

from cola_jax.nn.visibility import BlockPlan

LENGTH = 12  # latents
ONE_DOCUMENT = jnp.ones((1, LENGTH), jnp.int32)
THREE_DOCUMENTS = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
PLANS = {"equal": None, "given sizes": BlockPlan.of_sizes((3, 1, 6, 2))}
BLOCKS = {"equal": np.arange(LENGTH) // BLOCK, "given sizes": np.repeat(np.arange(4), (3, 1, 6, 2))}


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


@pytest.mark.parametrize("documents", [ONE_DOCUMENT, THREE_DOCUMENTS], ids=["one", "three"])
def test_text_vae_with_blocks_of_given_sizes(documents):
    model, params = create({"attention": "block_causal"})
    options, block = {"plan": PLANS["given sizes"]}, BLOCKS["given sizes"]
    z, other = normal(1, LENGTH, 4), normal(1, LENGTH, 4, seed=1)
    decode = lambda z: apply(model, params, z, documents, method="decode", **options)  # noqa: E731
    np.testing.assert_array_equal(changed_positions(decode, z, other), later_or_equal(block) & same(documents[0]))
    x, other = tokens(1, LENGTH), (tokens(1, LENGTH) + 1) % 10
    encode = lambda t: apply(model, params, t, documents, method="encode", **options).mean  # noqa: E731
    np.testing.assert_array_equal(changed_positions(encode, x, other), later_or_equal(block) & same(documents[0]))


@functools.cache
def whole_sequence(blocks):
    model, params = create()

    def velocity(z, params, documents):
        options = {"segment_ids": documents, "plan": PLANS[blocks]}
        return weighted(model.apply(params, z, uniform(1, 3), method="velocity", **options))

    jacobian = jax.jit(jax.jacrev(velocity))
    return lambda documents: depends(jacobian(normal(1, LENGTH, 4), params, documents))


@pytest.mark.parametrize("blocks", PLANS)
@pytest.mark.parametrize("documents", [ONE_DOCUMENT, THREE_DOCUMENTS], ids=["one", "three"])
def test_velocity_of_a_whole_sequence_is_block_causal_within_documents(documents, blocks):
    allowed = later_or_equal(BLOCKS[blocks]) & same(documents[0])
    np.testing.assert_array_equal(whole_sequence(blocks)(documents), allowed)


@functools.cache
def training_layout(blocks):
    """(documents, dropped) -> what the velocity of two noisy copies depends on: noisy, clean, no-history vector."""
    model, params = create(dit={"no_history_vector": True})

    def velocity(noisy, clean, vector, params, documents, dropped):
        params = {"params": {"dit": params["params"]["dit"] | {"no_history": vector[0, 0]}}}
        extra = {"segment_ids": documents, "drop_history": dropped, "plan": PLANS[blocks]}
        times = uniform(1, dropped.shape[1])  # of each block of both copies
        return weighted(model.apply(params, noisy, times, history=clean, method="velocity", **extra))

    jacobian = jax.jit(jax.jacrev(velocity, argnums=(0, 1, 2)))
    noisy, clean = normal(1, 2 * LENGTH, 4, seed=1), normal(1, LENGTH, 4, seed=2)
    vector = params["params"]["dit"]["no_history"][None, None]
    return lambda *changes: [depends(part) for part in jacobian(noisy, clean, vector, params, *changes)]


def none_dropped(blocks):
    return jnp.zeros((1, 2 * (BLOCKS[blocks][-1] + 1)), bool)


def of_noisy_copies(blocks):
    """Who may see whom: [noisy, noisy] within a block of a copy, [noisy, clean] strictly earlier blocks."""
    copy, block = np.repeat([0, 1], LENGTH), np.tile(BLOCKS[blocks], 2)
    return same(copy) & same(block), np.greater.outer(block, BLOCKS[blocks])


@pytest.mark.parametrize("blocks", PLANS)
def test_noisy_block_sees_itself_and_strictly_earlier_clean_blocks(blocks):
    own, earlier = of_noisy_copies(blocks)
    of_noisy, of_clean, _ = training_layout(blocks)(ONE_DOCUMENT, none_dropped(blocks))
    np.testing.assert_array_equal(of_noisy, own)
    np.testing.assert_array_equal(of_clean, earlier)


@pytest.mark.parametrize("blocks", PLANS)
@pytest.mark.parametrize("boundary", [4, 6])
def test_noisy_block_sees_its_own_document_only(boundary, blocks):
    """Also where a document ends inside a block."""
    own, earlier = of_noisy_copies(blocks)
    documents = 1 + (jnp.arange(LENGTH) >= boundary).astype(jnp.int32)[None]
    of_noisy, of_clean, _ = training_layout(blocks)(documents, none_dropped(blocks))
    document = np.asarray(documents[0])
    np.testing.assert_array_equal(of_noisy, own & same(np.tile(document, 2)))
    np.testing.assert_array_equal(of_clean, earlier & np.equal.outer(np.tile(document, 2), document))


@pytest.mark.parametrize("blocks", PLANS)
def test_dropped_block_sees_no_history_but_the_vector_that_says_so(blocks):
    own, earlier = of_noisy_copies(blocks)
    dropped = np.array([True, True, False, False, False, True, False, True])[: none_dropped(blocks).shape[1]]
    of_noisy, of_clean, of_vector = training_layout(blocks)(ONE_DOCUMENT, jnp.asarray(dropped)[None])
    count = BLOCKS[blocks][-1] + 1
    is_dropped = np.concatenate([dropped[:count][BLOCKS[blocks]], dropped[count:][BLOCKS[blocks]]])
    np.testing.assert_array_equal(of_noisy, own)
    np.testing.assert_array_equal(of_clean, earlier & ~is_dropped[:, None])
    np.testing.assert_array_equal(of_vector[:, 0], is_dropped)
