"""Gaps and spans: what is known there, and what that does to generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import BLOCK, VOCAB, apply, assert_close, create, normal, tokens

from cola_jax import sampling
from cola_jax.sampling import Settings, conditioning
from cola_jax.types import UserError

SETTINGS = Settings(steps=3, guidance_scale=3.0)
TEXT = [int(token) for token in tokens(12, seed=1)]
NOISE = normal(2, 3, BLOCK, 4, seed=5)


@pytest.mark.parametrize("strategy", ["clean", "left_pad", "right_pad"])
def test_where_a_prompt_stands(strategy):
    """Patches of two, blocks of 8 tokens, a prompt of 11."""
    model, _ = create({"patch_size": 2})
    layout = conditioning.prompts(model, [TEXT[:11]], Settings(conditioning=strategy))
    offset, begin = {"clean": (1, 12), "left_pad": (5, 16), "right_pad": (1, 16)}[strategy]
    expected = np.full(16, VOCAB)
    expected[offset : offset + 11] = TEXT[:11]
    np.testing.assert_array_equal(layout.tokens[0], expected)
    known = np.arange(8) * 2 + 1 >= offset
    known &= np.arange(8) * 2 < offset + 11
    np.testing.assert_array_equal(layout.known[0], known)
    np.testing.assert_array_equal(layout.visible[0], known)
    assert (layout.first[0], layout.begin[0], layout.end[0]) == (begin // 8, begin, begin + 32)
    np.testing.assert_array_equal(layout.attended[0], known | (np.arange(8) >= begin // 8 * BLOCK))


def test_visible_padding_is_the_given_token():
    model, _ = create()
    layout = conditioning.prompts(model, [TEXT[:5]], Settings(pad_id=7))
    np.testing.assert_array_equal(layout.tokens[0], TEXT[:5] + [7] * 3)
    np.testing.assert_array_equal(layout.visible[0], [True] * 8)
    np.testing.assert_array_equal(layout.known[0], [True] * 5 + [False] * 3)


def fill(before, length, after, row=0, **changes):
    model, params = create()
    settings = Settings(**(vars(SETTINGS) | changes))
    return sampling.infill(model, params, [(before, length, after)], settings, noise=NOISE[row : row + 1])


def test_what_follows_a_gap_is_pinned_in_its_block():
    """Latents of the text behind the gap, encoded with mask tokens in it, stand in the block as they are."""
    model, params = create()
    out = fill(TEXT[:5], 2, TEXT[7:])
    masked = jnp.array([TEXT[:5] + [VOCAB] * 2 + TEXT[7:]])
    mean = apply(model, params, masked, method="encode").mean[0]
    assert out.tokens.shape == (1, 2) and int(out.lengths[0]) == 2
    assert_close(out.latents[0, 0, np.array([0, 3])], mean[np.array([4, 7])], 1e-5)
    assert np.max(np.abs(out.latents[0, 0, 1:3] - mean[5:7])) > 0.1


def test_a_gap_feels_what_follows_in_its_block_and_nothing_later():
    other = [(token + 1) % VOCAB for token in TEXT]
    first = fill(TEXT[:5], 2, TEXT[7:]).latents[0, 0, 1:3]
    np.testing.assert_array_equal(fill(TEXT[:5], 2, TEXT[7:8] + other[8:]).latents[0, 0, 1:3], first)
    assert np.max(np.abs(fill(TEXT[:5], 2, other[7:8] + TEXT[8:]).latents[0, 0, 1:3] - first)) > 1e-3


def test_a_gap_at_the_end_is_a_continuation():
    model, params = create()
    out = fill(TEXT[:5], 6, [])
    settings = Settings(**(vars(SETTINGS) | {"max_new_tokens": 6}))
    expected = sampling.generate(model, params, [TEXT[:5]], settings, noise=NOISE[:1])
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    assert_close(out.latents[:, :2], expected.latents[:, :2], 1e-5)


def change(strength, texts, seed=0, **changes):
    model, params = create()
    settings = Settings(**(vars(SETTINGS) | changes))
    return sampling.edit(model, params, texts, settings, strength, jax.random.key(seed))


def test_an_edit_leaves_from_the_text_itself():
    """At strength near 0 the latents of the span are those of the text; at 1 they do not depend on it."""
    model, params = create()
    mean = apply(model, params, jnp.array([TEXT]), method="encode").mean[0]
    out = change(1e-4, [(TEXT, 5, 10)])
    assert out.tokens.shape == (1, 5)
    assert_close(out.latents[0, :2].reshape(8, 4), mean[4:12], 1e-2)
    some = np.asarray(change(0.5, [(TEXT, 5, 10)]).latents[0, :2].reshape(8, 4))
    inside = np.arange(8) % 7 > 0  # 5 to 9; 4 and 10, 11 are outside
    inside[6:] = False
    np.testing.assert_allclose(some[~inside], mean[4:12][~inside], atol=1e-5)
    assert np.all(np.max(np.abs(some - mean[4:12])[inside[:8]], axis=-1) > 0.01)


def test_a_full_edit_forgets_the_span():
    other = TEXT[:5] + [(token + 1) % VOCAB for token in TEXT[5:]]
    a, b = (change(1.0, [(text, 4, 8)]).latents[0, 0] for text in (TEXT[:4] + TEXT[4:], TEXT[:4] + other[4:]))
    np.testing.assert_allclose(a, b, atol=1e-5)


BAD = [
    (sampling.infill, [], "texts: none given; at least one is needed"),
    (sampling.infill, [([1], 0, [2])], "text 0 has a gap of length 0: must be at least 1"),
    (sampling.infill, [([1], 1, [VOCAB])], f"text 0 has a token outside the vocabulary of {VOCAB}"),
    (sampling.infill, [([1], 20, [1])], "text 0 has 22 tokens with its gap: must be at most 16 (context)"),
    (sampling.edit, [], "texts: none given; at least one is needed"),
    (sampling.edit, [([1, 2], 1, 1)], "text 0: span 1:1: must be 0 <= start < stop <= 2 (tokens)"),
    (sampling.edit, [([1, VOCAB], 0, 1)], f"text 0 has a token outside the vocabulary of {VOCAB}"),
    (sampling.edit, [([1] * 17, 0, 1)], "text 0 has 17 tokens: must be at most 16 (context)"),
]


@pytest.mark.parametrize(("function", "texts", "message"), BAD, ids=lambda x: str(x)[:20])
def test_a_bad_text_is_told(function, texts, message):
    model, params = create()
    settings = Settings(context=16)
    if function is sampling.edit:
        function = functools.partial(function, strength=0.5)
    with pytest.raises(UserError) as error:
        function(model, params, texts, settings, key=jax.random.key(0))
    assert str(error.value) == message


def test_a_strength_out_of_range_is_told():
    model, params = create()
    with pytest.raises(UserError, match="strength = 0: must be above 0 and at most 1"):
        sampling.edit(model, params, [([1, 2], 0, 1)], SETTINGS, 0, jax.random.key(0))
