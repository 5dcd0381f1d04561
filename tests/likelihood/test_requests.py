"""Lines of JSON to rows, scores and lines again."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from cola_jax import likelihood
from cola_jax.data.tokenizers import ByteTokenizer
from cola_jax.evaluation import score_file
from cola_jax.likelihood import Settings, requests
from cola_jax.types import UserError
from tests.models import tiny_models

KEY = jax.random.key(0)
SETTINGS = Settings(samples=3, solver="heun", steps=2)
FORM = requests.Format(ByteTokenizer(), context=16, align=4)
LINES = [
    {"text": "abcd", "id": "x"},
    {"prefix": "ab", "response": "cde"},
    {"prefix": "abc", "candidates": ["d", "zz"]},
    {"prefix": "", "response": "abcd"},
    {"text": "abcdefgh"},
]


@pytest.fixture(scope="module")
def tiny():
    return tiny_models.create(vae={"vocab_size": 258})


def parse(lines, form=FORM):
    return [form.request(i, json.dumps(line), f"f line {i + 1}") for i, line in enumerate(lines)]


def score(tiny, asked, settings=SETTINGS, batch_size=4):
    scorer = requests.Scorer(*tiny, settings, KEY, FORM.context, batch_size)
    return [line for some in tiny_models.quickly(lambda: list(scorer.score(asked))) for line in some]


@pytest.fixture(scope="module")
def results(tiny):
    return score(tiny, parse(LINES))


@pytest.fixture(scope="module")
def direct(tiny):
    """The text of line 0, text and prefix of line 1, second candidate of line 2: as wide as a batch of these."""
    rows = [[*b"abcd", *[256] * 4], [*b"abcde", *[256] * 3], [*b"ab"], [*b"abczz", *[256] * 3]]
    tokens, segments = likelihood.stack(rows)
    return tiny_models.quickly(
        likelihood.log_likelihood, *tiny, tokens, SETTINGS, KEY, segments, np.zeros(4, int), [0, 1, 1, 2]
    )


def test_every_line_has_its_result(results, direct):
    assert [r["index"] for r in results] == [0, 1, 2, 3, 4] and results[0]["id"] == "x"
    assert results[0]["tokens"] == 5  # four bytes and one end of text
    for name in ("elbo", "elbo_error", "iwae", "iwae_error", "prior", "posterior", "reconstruction"):
        assert results[0][name] == pytest.approx(float(getattr(direct, name)[0]), rel=1e-4)
    assert results[0]["elbo_perplexity"] == pytest.approx(float(likelihood.perplexity(direct.elbo[0], 5)), rel=1e-3)
    bits = float(likelihood.bits_per_byte(direct.elbo[0], 4))
    assert results[0]["elbo_bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_responses_and_candidates(results, direct):
    for name in ("elbo", "iwae"):
        value = getattr(direct, name)
        assert results[1]["plug_in_score"][name] == pytest.approx(float(value[1] - value[2]), abs=1e-3)
        assert results[2]["scores"][1]["joint"][name] == pytest.approx(float(value[3]), rel=1e-4)
    for kind in ("plug_in", "response"):
        values = [one[kind]["iwae"] for one in results[2]["scores"]]
        assert results[2]["best"][kind] == values.index(max(values))
    # A response has its own terms only: fewer than the whole text's.
    assert results[1]["response_score"]["posterior"] != pytest.approx(results[1]["joint_score"]["posterior"])
    # Nothing given: the response is a text.
    assert (
        results[3]["plug_in_score"]["elbo"] == results[3]["response_score"]["elbo"] == results[3]["joint_score"]["elbo"]
    )


def test_where_a_run_starts_changes_nothing(tiny, results):
    again = score(tiny, parse(LINES)[2:])
    assert [r["index"] for r in again] == [2, 3, 4]
    assert again[-1]["elbo"] == pytest.approx(results[-1]["elbo"], rel=1e-4)
    assert again[0]["scores"][1]["plug_in"]["iwae"] == pytest.approx(
        results[2]["scores"][1]["plug_in"]["iwae"], abs=1e-3
    )


def test_a_solve_that_fails_is_told(direct):
    nan = np.full(1, np.nan)
    bad = likelihood.take(direct, [0])._replace(failed=np.ones(1, int), elbo=nan, iwae=nan)
    line = requests._result(parse(LINES[:1])[0], bad)
    assert line["error"] == "the ODE was not solved for 1 of 3 samples"
    assert line["elbo"] is None and line["iwae_perplexity"] is None
    json.dumps(line, allow_nan=False)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"text": "a" * 16}, "f line 1: text makes 20 tokens; there must be at most 16 (context)"),
        ({"text": ""}, "f line 1: text is empty"),
        ({"prefix": "a", "response": ""}, "f line 1: response is empty"),
        ({"prefix": "a", "candidates": ["b", ""]}, "f line 1: candidate 1 is empty"),
        ({"prefix": "a", "candidates": []}, "f line 1: candidates = []"),
        ({"prefix": "a"}, "f line 1: fields ['prefix']"),
        ({"text": 3}, "f line 1: a value is not text"),
        ({"prefix": "a", "candidates": "bc"}, "f line 1: a value is not text"),
        ([1], "f line 1: fields []"),
    ],
)
def test_lines_refuse(line, words):
    with pytest.raises(UserError) as error:
        parse([line])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_line_that_just_fits():
    (fits,) = parse([{"text": "a" * 13, "id": 1}])
    assert len(fits.responses[0]) == 16 and fits.tokens == [14]


def test_a_line_that_is_not_json_and_patches():
    with pytest.raises(UserError, match="f line 1: not JSON"):
        FORM.request(0, "{", "f line 1")
    patched = dataclasses.replace(FORM, align=1, patch=2, end_of_text=False)
    with pytest.raises(UserError, match="1 tokens in prefix; must be a multiple of the patch 2"):
        parse([{"prefix": "a", "response": "b"}], patched)
    with pytest.raises(UserError, match="text makes 3 tokens; must be a multiple of the patch 2"):
        parse([{"text": "abc"}], patched)


def test_a_score_file_goes_on_behind_its_last_whole_line(tmp_path):
    path, identity = tmp_path / "out.jsonl", {"seed": 1}
    assert score_file.resume(path, identity) == 0
    score_file.append(path, [{"index": 0}, {"index": 1}])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"index": 2, "el')
    assert score_file.resume(path, identity) == 2 and path.read_bytes() == whole
    score_file.append(path, [{"index": 2}])
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 1, 2]
    with pytest.raises(UserError, match="holds results for seed = 1, not 2; choose another file"):
        score_file.resume(path, {"seed": 2})
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match="line 3 has index 0; must be 2"):
        score_file.resume(path, identity)
    other = tmp_path / "other.jsonl"
    other.write_text("{}\n")
    with pytest.raises(UserError, match="is not of this program"):
        score_file.resume(other, identity)
    assert other.read_text() == "{}\n"
    with pytest.raises(UserError, match="no such directory"):
        score_file.resume(tmp_path / "none" / "x", identity)
