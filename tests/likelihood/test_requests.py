"""Lines of JSON to rows, scores and lines again."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from cola_jax import likelihood
from cola_jax.data.tokenizers import ByteTokenizer
from cola_jax.evaluation import score_file
from cola_jax.likelihood import Settings, estimators, requests
from cola_jax.types import UserError
from tests.models import tiny_models

KEY = jax.random.key(0)
SETTINGS = Settings(samples=3, solver="heun", steps=2)
FORM = requests.Format(ByteTokenizer(), context=16, align=4)
LINES = [
    {"text": "abcd", "id": "x"},
    {"prefix": "abcd", "response": "e"},
    {"prefix": "abcd", "candidates": ["d", "zz"]},
    {"prefix": "", "response": "abcd"},
    {"text": "abcdefgh"},
    {"prefix": "ab", "candidates": ["cde", "x"]},  # ends inside a block of 4
]
INSIDE = "prefix of 2 tokens ends inside a block of 4; it must be a multiple of 4"


@pytest.fixture(scope="module")
def tiny():
    return tiny_models.create(vae={"vocab_size": 258})


def parse(lines, form=FORM):
    return [form.request(i, json.dumps(line), f"f line {i + 1}") for i, line in enumerate(lines)]


def score(tiny, asked, settings=SETTINGS, batch_size=4):
    scorer = requests.Scorer(*tiny, settings, KEY, FORM.context, batch_size)
    return [line for some in scorer.score(asked) for line in some]


@pytest.fixture(scope="module")
def results(tiny):
    return score(tiny, parse(LINES))


@pytest.fixture(scope="module")
def direct(tiny):
    """The text of line 0, text and prefix of line 1, second candidate of line 2: as wide as a batch of these."""
    rows = [[*b"abcd", *[256] * 4], [*b"abcde", *[256] * 3], [*b"abcd"], [*b"abcdzz", *[256] * 2]]
    tokens, segments = likelihood.stack(rows)
    return likelihood.log_likelihood(*tiny, tokens, SETTINGS, KEY, segments, np.zeros(4, int), [0, 1, 1, 2])


def test_every_line_has_its_result(results, direct):
    assert [r["index"] for r in results] == [0, 1, 2, 3, 4, 5] and results[0]["id"] == "x"
    assert results[0]["tokens"] == 5  # four bytes and one end of text
    for name in ("elbo", "elbo_error", "ess", "prior", "posterior", "reconstruction"):
        assert results[0][name] == pytest.approx(float(getattr(direct, name)[0]), rel=1e-4)
    assert results[0]["iwae"] is results[0]["iwae_error"] is results[0]["iwae_perplexity"] is None  # Hutchinson's
    assert results[0]["elbo_perplexity"] == pytest.approx(float(likelihood.perplexity(direct.elbo[0], 5)), rel=1e-3)
    bits = float(likelihood.bits_per_byte(direct.elbo[0], 4))
    assert results[0]["elbo_bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_responses_and_candidates(results, direct):
    assert results[1]["plug_in_score"]["elbo"] == pytest.approx(float(direct.elbo[1] - direct.elbo[2]), abs=1e-3)
    assert results[2]["scores"][1]["joint"]["elbo"] == pytest.approx(float(direct.elbo[3]), rel=1e-4)
    for kind in ("plug_in", "response"):
        values = [one[kind]["elbo"] for one in results[2]["scores"]]
        assert results[2]["best"][kind] == values.index(max(values))
    # A response has its own terms only: fewer than the whole text's.
    assert results[1]["response_score"]["posterior"] != pytest.approx(results[1]["joint_score"]["posterior"])
    # Nothing given: the response is a text.
    assert (
        results[3]["plug_in_score"]["elbo"] == results[3]["response_score"]["elbo"] == results[3]["joint_score"]["elbo"]
    )


def test_where_a_run_starts_changes_nothing(tiny, results):
    again = score(tiny, parse(LINES)[2:])
    assert [r["index"] for r in again] == [2, 3, 4, 5]
    assert again[2]["elbo"] == pytest.approx(results[4]["elbo"], rel=1e-4)
    assert again[0]["scores"][1]["plug_in"]["elbo"] == pytest.approx(
        results[2]["scores"][1]["plug_in"]["elbo"], abs=1e-3
    )


def test_a_prefix_that_ends_inside_a_block_has_no_plug_in_score(results):
    """Its log p means nothing; what follows its latents has a score, as pinned positions are trained."""
    for one in results[5]["scores"]:
        assert one["plug_in"] == dict.fromkeys(("elbo", "elbo_error", "iwae", "iwae_error")) | {"reason": INSIDE}
        assert one["response"]["elbo"] < 0 and one["joint"]["elbo"] < 0
        assert "reason" not in one["response"] and "reason" not in one["joint"]
    assert results[5]["best"]["plug_in"] is None and results[5]["best"]["response"] in (0, 1)
    rows = [row.ids for row in requests._rows(parse(LINES)[5], 4)]
    assert len(rows) == 4 and [*b"ab"] not in rows  # that row is not computed


def test_a_text_that_is_not_complete_must_end_with_a_block(tiny):
    lines = [
        {"text": "abcde"},
        {"text": "abcd"},
        {"prefix": "abcd", "candidates": ["e", "efgh"]},
        {"prefix": "ab", "response": "c"},
    ]
    found = score(tiny, parse(lines, dataclasses.replace(FORM, end_of_text=False)))
    assert found[0]["elbo"] is None and found[0]["tokens"] == 5 and "error" not in found[0]
    reason = "text without its end, of 5 tokens, ends inside a block of 4; it must be a multiple of 4"
    assert found[0]["reason"] == reason
    assert found[1]["elbo"] < 0 and "reason" not in found[1]
    open_end, whole = found[2]["scores"]
    for part in open_end.values():
        assert part["elbo"] is None and part["reason"] == reason
    assert all(part["elbo"] is not None for part in whole.values())
    assert found[2]["best"] == {"plug_in": None, "response": None}
    assert found[3]["plug_in_score"]["reason"] == INSIDE
    assert "3 tokens, ends inside a block of 4" in found[3]["response_score"]["reason"]
    # Nothing at all to compute.
    (alone,) = score(tiny, parse(lines[:1], dataclasses.replace(FORM, end_of_text=False)))
    assert alone == found[0]
    json.dumps(found, allow_nan=False)


def test_the_best_candidate_is_that_of_the_iwae_where_it_is_a_bound(tiny):
    settings = dataclasses.replace(SETTINGS, samples=12, divergence="exact")
    (line,) = score(tiny, parse(LINES[2:3]), settings)
    for kind in ("plug_in", "response"):
        values = [one[kind]["iwae"] for one in line["scores"]]
        assert line["best"][kind] == values.index(max(values))
    for one in line["scores"]:
        terms = one["joint"]
        assert terms["elbo"] <= terms["iwae"] and 1 <= terms["ess"] <= 12
        assert (terms["iwae_error"] is None) == (terms["ess"] < 10)


def test_a_solve_that_fails_is_told(direct):
    nan = np.full(1, np.nan)
    bad = likelihood.take(direct, [0])._replace(failed=np.ones(1, int), elbo=nan, iwae=nan)
    nothing = estimators.BlockTerms(*[np.zeros((1, 0))] * 3)
    rows = estimators.join([bad._replace(blocks=nothing), estimators.unknown(SETTINGS)])
    line = requests._result(parse(LINES[:1])[0], rows, 4)
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
