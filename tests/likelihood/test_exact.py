"""log p(x) of the autoregressive model: a density, the chain rule, requests."""

import itertools
import json

import jax
import numpy as np
import pytest
from models import tiny_autoregressive as tiny
from models.tiny_models import tokens

from cola_jax import likelihood, sharding
from cola_jax.config import TrainConfig
from cola_jax.data.tokenizers import ByteTokenizer
from cola_jax.likelihood import exact, requests
from cola_jax.types import UserError

EOS, LENGTH = 2, 4
FORM = requests.Format(ByteTokenizer(), context=16, align=4)
LINES = [
    {"text": "abcd", "id": "x"},
    {"prefix": "ab", "response": "cde"},
    {"prefix": "abc", "candidates": ["d", "zz"]},
    {"prefix": "", "response": "abcd"},
]


def toy():
    return tiny.create(vocab_size=3)


def log_likelihood(model, sequences, prefix=None, **options):
    rows, segments = likelihood.stack(sequences)
    return exact.log_likelihood(*model, rows, segments, prefix, **options)


def test_probabilities_of_all_texts_sum_to_one():
    """Every document of at most 4 tokens, and every beginning of a longer one."""
    words = [list(p) for n in range(LENGTH) for p in itertools.product((0, 1), repeat=n)]
    complete = [[*word, EOS] for word in words]
    longer = [list(p) for p in itertools.product((0, 1), repeat=LENGTH)]
    assert len(complete) == 15 and len(longer) == 16
    found = log_likelihood(toy(), complete + longer)
    assert found.log_prob.dtype == np.float64 and np.exp(found.log_prob).max() < 0.9
    assert np.exp(found.log_prob).sum() == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_array_equal(found.tokens, [len(text) for text in complete + longer])


def test_a_text_has_the_product_of_its_tokens_probabilities():
    model, params = toy()
    texts = [list(p) for n in range(1, LENGTH + 1) for p in itertools.product(range(3), repeat=n)]
    expected = [tiny.log_probs(model.config, params, text).sum() for text in texts]
    np.testing.assert_allclose(log_likelihood((model, params), texts).log_prob, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def texts():
    rows = np.asarray(tokens(3, 20))
    return [rows[0, :20].tolist(), rows[1, :3].tolist(), rows[2, :11].tolist()]


def test_neither_batch_nor_padding_changes_a_text(texts):
    together = log_likelihood(tiny.create(), texts).log_prob
    for text, value in zip(texts, together, strict=True):
        alone = exact.log_likelihood(*tiny.create(), [text])
        np.testing.assert_allclose(alone.log_prob, [value], rtol=1e-5)
        assert alone.tokens == len(text)


def test_what_stands_in_padding_is_not_read(texts):
    rows, segments = likelihood.stack(texts)
    found = [exact.token_log_probs(*tiny.create(), np.where(segments > 0, rows, fill), segments) for fill in (0, 10**6)]
    np.testing.assert_array_equal(*found)
    assert np.all(found[0][segments == 0] == 0) and np.all(found[0][segments > 0] < 0)


def test_a_response_given_its_prefix_is_the_rest_of_the_chain(texts):
    model, given = tiny.create(), [7, 0, 10]
    joint = log_likelihood(model, texts)
    conditional = log_likelihood(model, texts, given)
    prefixes = log_likelihood(model, [text[: max(n, 1)] for text, n in zip(texts, given, strict=True)])
    before = np.where(np.array(given) > 0, prefixes.log_prob, 0.0)
    np.testing.assert_allclose(conditional.log_prob, joint.log_prob - before, rtol=1e-5)
    np.testing.assert_array_equal(conditional.tokens, [13, 3, 1])


def test_eight_devices_give_what_one_gives(texts):
    model, params = tiny.create(vocab_size=32)
    mesh = sharding.make_mesh(TrainConfig(mesh_data=2, mesh_fsdp=2, mesh_tensor=2))
    placed = jax.device_put(params, sharding.shardings(tiny.boxed(model), mesh))
    together = log_likelihood((model, placed), texts, mesh=mesh)
    np.testing.assert_allclose(together.log_prob, log_likelihood((model, params), texts).log_prob, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "segments", "prefix", "words"),
    [
        ([[1, 31]], None, None, "example 0: a token id is outside the vocabulary, must be 0 to 30"),
        ([[1, 2], [1, 2]], [[1, 1], [0, 1]], None, "example 1: segment_ids are not 1 for one document"),
        ([[1, 2], [1, 2]], [[1, 1], [0, 0]], None, "example 1: 0 tokens in its prefix, must be at least 0 and below"),
        ([[1, 2], [1, 2]], None, [1, 2], "example 1: 2 tokens in its prefix, must be at least 0 and below its 2"),
        ([[1, 2], [1, 2]], None, [1], r"prefix has shape \(1,\): must be \(2,\)"),
        ([1, 2], None, None, r"tokens \(2,\), segment_ids \(2,\): must be two equal shapes"),
        ([[1, 2]], [[1]], None, r"tokens \(1, 2\), segment_ids \(1, 1\): must be two equal shapes"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(rows, segments, prefix, words):
    with pytest.raises(UserError, match=words):
        exact.log_likelihood(*tiny.create(), rows, segments, prefix)


def parse(lines):
    return [FORM.request(i, json.dumps(line), f"f line {i + 1}") for i, line in enumerate(lines)]


def score(asked, batch_size=4, report=None):
    scorer = exact.scorer(*tiny.create(vocab_size=258), batch_size)
    return [line for some in scorer.score(asked, report) for line in some]


@pytest.fixture(scope="module")
def results():
    return score(parse(LINES))


def test_every_request_has_its_result(results):
    json.dumps(results, allow_nan=False)
    assert [line["index"] for line in results] == [0, 1, 2, 3] and results[0]["id"] == "x"
    rows = [[*b"abcd", *[256] * 4], [*b"abcde", *[256] * 3], [*b"abcd", *[256] * 4], [*b"abczz", *[256] * 3]]
    joint = log_likelihood(tiny.create(vocab_size=258), rows).log_prob
    response = log_likelihood(tiny.create(vocab_size=258), rows, [0, 2, 3, 3]).log_prob
    text = results[0]
    assert (text["log_prob_error"], text["bound"], text["tokens"]) == (
        0.0,
        "exact",
        5,
    )  # four bytes and one end of text
    assert text["log_prob"] == pytest.approx(joint[0], rel=1e-5)
    assert text["perplexity"] == pytest.approx(np.exp(-joint[0] / 5), rel=1e-4)
    assert text["bits_per_byte"] == pytest.approx(-joint[0] / (4 * np.log(2)), rel=1e-5)
    answers = [results[1], *results[2]["scores"]]
    for place, answer, size, count in zip((1, 2, 3), answers, (3, 1, 2), (4, 2, 3), strict=True):
        assert answer["log_prob"] == pytest.approx(response[place], rel=1e-5)
        assert answer["joint"]["log_prob"] == pytest.approx(joint[place], rel=1e-5)
        assert answer["bits_per_byte"] == pytest.approx(-response[place] / (size * np.log(2)), rel=1e-5)
        assert answer["perplexity"] == pytest.approx(np.exp(-response[place] / count), rel=1e-4)
        assert answer["tokens"] == count
        assert answer["joint"]["tokens"] == len(LINES[answer.get("index", 2)]["prefix"]) + count
    assert results[2]["best"] == int(np.argmax(response[2:]))
    assert results[3]["log_prob"] == results[3]["joint"]["log_prob"] == pytest.approx(text["log_prob"], rel=1e-5)


def test_the_best_candidate_is_the_most_likely_one_in_any_order():
    line = {"prefix": "abc", "candidates": ["zz", "d", "q"]}
    backwards = line | {"candidates": line["candidates"][::-1]}
    found, turned = score(parse([line, backwards]))
    values = [one["log_prob"] for one in found["scores"]]
    assert found["best"] == int(np.argmax(values)) and turned["best"] == 2 - found["best"]


def test_batches_and_progress(results):
    seen = []
    again = score(parse(LINES), batch_size=2, report=lambda *progress: seen.append(progress))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    for one, other in zip(again, results, strict=True):
        assert one.keys() == other.keys()
    for place in (0, 1, 3):
        assert again[place]["log_prob"] == pytest.approx(results[place]["log_prob"], rel=1e-5)


def test_texts_of_all_lengths_up_to_the_smallest_width_need_one_program():
    score(parse([{"text": "a"}]))
    before = exact._log_probs._cache_size()
    score(parse([{"text": "a" * n} for n in range(1, 16, 2)]))
    assert exact._log_probs._cache_size() == before
