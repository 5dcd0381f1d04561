"""Who depends on whom, by gradients: exactly zero where forbidden, not zero where allowed."""

import jax
import numpy as np
import pytest
from models.tiny_models import BLOCK, create, jit, normal, uniform

LENGTH = 12  # latents
WEIGHTS = normal(64, seed=9)


def weighted(x):
    """One number for each position: no sum over channels that a norm makes constant."""
    return x @ WEIGHTS[: x.shape[-1]]


def influence(function, x) -> np.ndarray:
    """[outputs, positions of x] bool: whether the output depends on the position.

    ``function`` takes ``x`` [N, C] and returns [outputs].
    """
    return np.any(np.asarray(jit(jax.jacrev(function))(x)) != 0, axis=-1)


def block_of(positions, size):
    return np.arange(positions) // size


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("attention", ["causal", "block_causal"])
class TestTextVAE:
    def allowed(self, attention):
        block = np.arange(LENGTH) if attention == "causal" else block_of(LENGTH, 2)
        return block[:, None] >= block[None, :]

    def test_encoder(self, attention, patch):
        """Every token differs, so that row i of the embedding is position i."""
        vae = {"attention": attention, "patch_size": patch}
        model, params = create(vae)
        tokens = np.arange(LENGTH * patch, dtype=np.int32)[None]

        def posterior(table):
            encoder = params["params"]["vae"]["encoder"] | {"wte": table}
            variables = {"params": {"vae": {"encoder": encoder}}}
            mean, logvar = model.apply(variables, tokens, method="encode")
            return weighted(mean[0]), weighted(logvar[0])

        table = params["params"]["vae"]["encoder"]["wte"]
        for part in range(2):
            depends = influence(lambda x, part=part: posterior(x)[part], table)[:, : LENGTH * patch]
            np.testing.assert_array_equal(depends, np.repeat(self.allowed(attention), patch, axis=1))

    def test_decoder(self, attention, patch):
        model, params = create({"attention": attention, "patch_size": patch})
        depends = influence(
            lambda z: weighted(model.apply(params, z[None], method="decode")[0]), normal(LENGTH, 4)
        )
        np.testing.assert_array_equal(depends, np.repeat(self.allowed(attention), patch, axis=0))


def test_encoder_and_decoder_see_their_own_document_only():
    model, params = create()
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3], np.int32)
    allowed = np.tril(np.ones((LENGTH, LENGTH), bool)) & (segments[0][:, None] == segments[0][None])
    depends = influence(
        lambda z: weighted(model.apply(params, z[None], segments, method="decode")[0]), normal(LENGTH, 4)
    )
    np.testing.assert_array_equal(depends, allowed)
    tokens = np.arange(LENGTH, dtype=np.int32)[None]

    def mean(table):
        variables = {"params": {"vae": {"encoder": params["params"]["vae"]["encoder"] | {"wte": table}}}}
        return weighted(model.apply(variables, tokens, segments, method="encode").mean[0])

    depends = influence(mean, params["params"]["vae"]["encoder"]["wte"])
    np.testing.assert_array_equal(depends[:, :LENGTH], allowed)


class TestDiT:
    def test_whole_sequence_is_block_causal(self):
        model, params = create()
        block = block_of(LENGTH, BLOCK)
        depends = influence(
            lambda z: weighted(model.apply(params, z[None], uniform(1, 3), method="velocity")[0]), normal(LENGTH, 4)
        )
        np.testing.assert_array_equal(depends, block[:, None] >= block[None, :])

    def test_whole_sequence_sees_its_own_document_only(self):
        model, params = create()
        block, segments = block_of(LENGTH, BLOCK), np.array([[1] * 6 + [2] * 6], np.int32)

        def velocity(z):
            return weighted(model.apply(params, z[None], uniform(1, 3), segment_ids=segments, method="velocity")[0])

        same = segments[0][:, None] == segments[0][None]
        np.testing.assert_array_equal(influence(velocity, normal(LENGTH, 4)), (block[:, None] >= block) & same)

    def training_layout(self, copies=1, segments=None, dropped=None):
        """Influence of noisy and of clean positions on the velocity of each noisy position."""
        model, params = create(dit={"no_history_vector": True})
        noisy, clean = normal(copies * LENGTH, 4, seed=1), normal(LENGTH, 4, seed=2)
        times = uniform(1, copies * 3)
        extra = {"segment_ids": segments, "drop_history": dropped}

        def velocity(noisy, clean):
            out = model.apply(params, noisy[None], times, history=clean[None], method="velocity", **extra)
            return weighted(out[0])

        return influence(lambda x: velocity(x, clean), noisy), influence(lambda x: velocity(noisy, x), clean)

    @pytest.mark.parametrize("copies", [1, 2])
    def test_noisy_block_sees_itself_and_strictly_earlier_clean_blocks(self, copies):
        of_noisy, of_clean = self.training_layout(copies)
        noisy_block, clean_block = block_of(copies * LENGTH, BLOCK), block_of(LENGTH, BLOCK)
        np.testing.assert_array_equal(of_noisy, noisy_block[:, None] == noisy_block[None])
        np.testing.assert_array_equal(of_clean, np.tile(clean_block, copies)[:, None] > clean_block[None])

    @pytest.mark.parametrize("boundary", [4, 6])
    def test_noisy_block_sees_its_own_document_only(self, boundary):
        """Also where a document ends inside a block."""
        segments = (np.arange(LENGTH) >= boundary).astype(np.int32)[None] + 1
        of_noisy, of_clean = self.training_layout(2, segments)
        noisy_block, clean_block, document = block_of(2 * LENGTH, BLOCK), block_of(LENGTH, BLOCK), segments[0]
        same = np.tile(document, 2)[:, None] == np.tile(document, 2)[None]
        np.testing.assert_array_equal(of_noisy, (noisy_block[:, None] == noisy_block[None]) & same)
        earlier = np.tile(clean_block, 2)[:, None] > clean_block[None]
        np.testing.assert_array_equal(of_clean, earlier & (np.tile(document, 2)[:, None] == document[None]))

    def test_dropped_block_sees_no_history(self):
        dropped = np.array([[False, True, False, False, False, True]])
        of_noisy, of_clean = self.training_layout(2, dropped=dropped)
        noisy_block, clean_block = block_of(2 * LENGTH, BLOCK), block_of(LENGTH, BLOCK)
        np.testing.assert_array_equal(of_noisy, noisy_block[:, None] == noisy_block[None])
        kept = ~np.repeat(dropped[0], BLOCK)[:, None]
        np.testing.assert_array_equal(of_clean, (np.tile(clean_block, 2)[:, None] > clean_block[None]) & kept)

    def test_only_dropped_blocks_carry_the_no_history_vector(self):
        model, params = create(dit={"no_history_vector": True})
        dropped = np.array([[True, True, False]])

        def velocity(vector):
            dit = params["params"]["dit"] | {"no_history": vector[0]}
            noisy, clean = normal(1, LENGTH, 4), normal(1, LENGTH, 4, seed=1)
            out = model.apply(
                {"params": {"dit": dit}}, noisy, uniform(1, 1), history=clean, drop_history=dropped, method="velocity"
            )
            return weighted(out[0])

        depends = influence(velocity, params["params"]["dit"]["no_history"][None])
        np.testing.assert_array_equal(depends[:, 0], np.repeat(dropped[0], BLOCK))
