"""The bound on log p of LLaDA: unbiased, below its sampler's log p, tight where it must be."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_llada as tiny

from cola_jax import likelihood, sharding
from cola_jax.config import TrainConfig
from cola_jax.data.tokenizers import ByteTokenizer
from cola_jax.likelihood import masked, requests
from cola_jax.types import UserError

KEY = jax.random.key(3)
MANY = masked.Settings(samples=600)


def bound(model, sequences, settings=MANY, prefix=None, **options):
    rows, segments = likelihood.stack(sequences)
    return masked.log_likelihood(*model, rows, segments, settings, KEY, prefix, **options)


@pytest.fixture(scope="module")
def known():
    model, params = tiny.create(vocab_size=3)
    return tiny.Enumerated(model.config, params, 3)


@pytest.fixture(scope="module")
def all_texts(known):
    return bound(tiny.create(vocab_size=3), known.texts)


def test_the_estimate_is_unbiased(known, all_texts):
    expected = np.array([known.bound(text) for text in known.texts])
    away = (all_texts.log_prob - expected) / all_texts.error
    assert np.all(np.abs(away) < 4) and 0.2 < np.mean(away**2) < 1.5 and np.all(all_texts.error < 0.3)
    np.testing.assert_array_equal(all_texts.tokens, 3)


def test_it_is_a_bound_on_what_the_sampler_draws(known):
    """Jensen, over the orders; the sampler's probabilities of all texts sum to one."""
    exact = np.array([known.log_prob(text) for text in known.texts])
    bounds = np.array([known.bound(text) for text in known.texts])
    assert np.exp(exact).sum() == pytest.approx(1.0)
    assert np.all(bounds <= exact + 1e-9) and np.max(exact - bounds) > 0.05


def test_it_is_tight_where_predictions_do_not_depend_on_the_order():
    """Without attention every token is predicted from its own mask: all orders have one probability."""
    model, params = tiny.create(vocab_size=3)
    layers = params["params"]["transformer"]["layers"]
    silent = layers | {"out": jax.tree.map(np.zeros_like, layers["out"])}
    params = {"params": {"transformer": params["params"]["transformer"] | {"layers": silent}}}
    known = tiny.Enumerated(model.config, params, 3)
    for text in known.texts[::5]:
        assert known.bound(text) == pytest.approx(known.log_prob(text), abs=1e-6)


def test_a_response_given_its_prefix(known):
    texts = known.texts[::7]
    found = bound(tiny.create(vocab_size=3), texts, prefix=[1] * len(texts))
    expected = np.array([known.bound(text, given=1) for text in texts])
    assert np.all(np.abs(found.log_prob - expected) < 4 * found.error)
    np.testing.assert_array_equal(found.tokens, 2)
    last = bound(tiny.create(vocab_size=3), texts, prefix=[2] * len(texts), settings=masked.Settings(samples=2))
    np.testing.assert_allclose(last.error, 0.0, atol=1e-6)  # one token is one mask
    np.testing.assert_allclose(last.log_prob, [known.hidden(text, {2}) for text in texts], rtol=1e-5)


def test_neither_batch_nor_padding_changes_a_text():
    texts, settings = [[1, 2, 3] * 7, [4], [5, 6]], masked.Settings(samples=8)
    together = bound(tiny.create(), texts, settings)
    for index, text in enumerate(texts):
        alone = bound(tiny.create(), [text], settings, ids=[index])
        np.testing.assert_allclose(alone.log_prob, together.log_prob[index], rtol=1e-5)


def test_stratified_numbers_of_masked_tokens_cover_all():
    scored = np.zeros((1, 9), bool)
    scored[:, 2:8] = True
    keys = jax.random.split(KEY, 1)
    masks = [np.asarray(masked.draw(keys, jnp.asarray(scored), number, 6)[0]) for number in range(6)]
    assert sorted(int(mask.sum()) for mask in masks) == [1, 2, 3, 4, 5, 6]
    assert not any((mask & ~scored).any() for mask in masks)


@pytest.mark.slow
def test_eight_devices_give_what_one_gives():
    model, params = tiny.create(vocab_size=32)
    mesh = sharding.make_mesh(TrainConfig(mesh_data=2, mesh_fsdp=2, mesh_tensor=2))
    boxed = jax.eval_shape(model.init, KEY, np.zeros((1, 4), np.int32))
    placed = jax.device_put(params, sharding.shardings(boxed, mesh))
    texts, settings = [[1, 2, 3], [4, 5, 6, 7, 8]], masked.Settings(samples=4)
    together = bound((model, placed), texts, settings, mesh=mesh)
    np.testing.assert_allclose(together.log_prob, bound((model, params), texts, settings).log_prob, rtol=1e-5)


def test_requests():
    form = requests.Format(ByteTokenizer(), context=16)
    lines = [{"text": "abcd"}, {"prefix": "ab", "response": "cd"}, {"prefix": "ab", "candidates": ["cd", "zz"]}]
    asked = [form.request(i, json.dumps(line), f"f line {i + 1}") for i, line in enumerate(lines)]
    model = tiny.create(vocab_size=258)
    scorer = masked.scorer(*model, masked.Settings(samples=4), KEY, batch_size=2)
    text, response, candidates = (line for some in scorer.score(asked) for line in some)
    json.dumps([text, response, candidates], allow_nan=False)
    settings = masked.Settings(samples=4)
    ids = [[*b"abcd", 256], [*b"abcd", 256], [*b"abzz", 256]]
    whole = bound(model, ids, settings, ids=[0, 1, 2])
    given = bound(model, ids, settings, prefix=[2] * 3, ids=[2, 2, 2])
    assert text["bound"] == "lower" and text["tokens"] == 5
    assert text["log_prob"] == pytest.approx(whole.log_prob[0], rel=1e-5)
    assert text["log_prob_error"] == pytest.approx(whole.error[0], rel=1e-4)
    assert response["joint"]["log_prob"] == pytest.approx(whole.log_prob[1], rel=1e-5)
    found = [one["log_prob"] for one in candidates["scores"]]
    assert found == pytest.approx(given.log_prob[1:].tolist(), rel=1e-5)
    assert candidates["best"] == int(np.argmax(found))


def test_what_cannot_be_scored_is_named():
    with pytest.raises(UserError, match="likelihood samples = 0: must be at least 1"):
        bound(tiny.create(), [[1]], masked.Settings(samples=0))
    with pytest.raises(UserError, match="example 0: a token id is outside the vocabulary"):
        bound(tiny.create(), [[99]])
    assert np.isnan(bound(tiny.create(), [[1, 2]], masked.Settings(samples=1)).error).all()
