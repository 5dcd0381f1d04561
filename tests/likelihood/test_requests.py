"""Lines of JSON to rows, scores and lines again."""

import dataclasses
import json

import jax
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


def test_every_line_has_its_result(tiny, results):
    assert [r["index"] for r in results] == [0, 1, 2, 3, 4] and results[0]["id"] == "x"
    assert results[0]["tokens"] == 5  # four bytes and one end of text
    text = likelihood.stack([[*b"abcd", *[256] * 4]])
    direct = tiny_models.quickly(likelihood.log_likelihood, *tiny, text[0], SETTINGS, KEY, segment_ids=text[1], ids=[0])
    for name in ("elbo", "iwae", "prior", "posterior", "reconstruction"):
        assert results[0][name] == pytest.approx(float(getattr(direct, name)[0]), rel=1e-4)
    assert results[0]["elbo_perplexity"] == pytest.approx(float(likelihood.perplexity(direct.elbo[0], 5)), rel=1e-3)
    bits = float(likelihood.bits_per_byte(direct.elbo[0], 4))
    assert results[0]["elbo_bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_responses_and_candidates(tiny, results):
    prefixes, responses = [[*b"ab"], [*b"abc"], [*b"abc"]], [[*b"cde"], [*b"d"], [*b"zz"]]
    responses = [r + [256] * (4 - (len(p) + len(r)) % 4) for p, r in zip(prefixes, responses, strict=True)]
    found = tiny_models.quickly(likelihood.conditional, *tiny, prefixes, responses, SETTINGS, KEY, ids=[1, 2, 2])
    scores = [results[1]["plug_in_score"], *(s["plug_in"] for s in results[2]["scores"])]
    for one, elbo, iwae in zip(scores, found.elbo, found.iwae, strict=True):
        assert one["elbo"] == pytest.approx(float(elbo), abs=1e-3) and one["iwae"] == pytest.approx(
            float(iwae), abs=1e-3
        )
    best = [one["iwae"] for one in scores[1:]]
    assert results[2]["best"]["plug_in"] == best.index(max(best))
    local = [s["response"]["iwae"] for s in results[2]["scores"]]
    assert results[2]["best"]["response"] == local.index(max(local))
    # Nothing given: the response is a text.
    assert (
        results[3]["plug_in_score"]["elbo"] == results[3]["response_score"]["elbo"] == results[3]["joint_score"]["elbo"]
    )


def test_batches_and_where_a_run_starts_change_nothing(tiny, results):
    again = score(tiny, parse(LINES)[2:], batch_size=3)
    assert [r["index"] for r in again] == [2, 3, 4]
    assert again[-1]["elbo"] == pytest.approx(results[-1]["elbo"], rel=1e-4)
    assert again[0]["scores"][1]["plug_in"]["iwae"] == pytest.approx(
        results[2]["scores"][1]["plug_in"]["iwae"], abs=1e-3
    )


def test_a_solve_that_fails_is_told_and_the_others_are_scored(tiny):
    settings = dataclasses.replace(SETTINGS, samples=2, solver="dopri5", steps=0, rtol=1e-6, atol=1e-6, max_steps=2)
    (bad,) = score(tiny, parse(LINES[:1]), settings)
    assert bad["error"] == "the ODE was not solved for 2 of 2 samples" and bad["elbo"] is None
    json.loads(json.dumps(bad, allow_nan=False))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"text": "a" * 13, "id": 1}, None),
        ({"text": "a" * 16}, "f line 1: text makes 20 tokens; allowed are at most 16 (context)"),
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
    if words is None:
        return parse([line])
    with pytest.raises(UserError) as error:
        parse([line])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_line_that_is_not_json_and_patches():
    with pytest.raises(UserError, match="f line 1: not JSON"):
        FORM.request(0, "{", "f line 1")
    patched = dataclasses.replace(FORM, align=1, patch=2, end_of_text=False)
    with pytest.raises(UserError, match="1 tokens in prefix; allowed is a multiple of the patch 2"):
        parse([{"prefix": "a", "response": "b"}], patched)
    with pytest.raises(UserError, match="text makes 3 tokens; allowed is a multiple of the patch 2"):
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
    with pytest.raises(UserError, match="holds results for seed = 1, not 2; allowed is another file"):
        score_file.resume(path, {"seed": 2})
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match="line 3 has index 0; allowed is 2"):
        score_file.resume(path, identity)
    other = tmp_path / "other.jsonl"
    other.write_text("{}\n")
    with pytest.raises(UserError, match="is not of this program"):
        score_file.resume(other, identity)
    assert other.read_text() == "{}\n"
    with pytest.raises(UserError, match="no such directory"):
        score_file.resume(tmp_path / "none" / "x", identity)
