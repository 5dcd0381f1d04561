"""Answers of a checkpoint: the same for every batch size and after a restart, truncated where they must be."""

import json

import pytest

from cola_jax import rng
from cola_jax.config import StoriesConfig
from cola_jax.data.stories import Stories
from cola_jax.evaluation import continuations
from cola_jax.evaluation.tasks import evaluate
from cola_jax.evaluation.tasks.answers import Way
from cola_jax.evaluation.tasks.evaluate import Selection
from cola_jax.evaluation.tasks.examples import Prediction
from cola_jax.evaluation.tasks.task import TASKS, Example, get
from cola_jax.types import UserError
from tests.evaluation import tiny_runs

FAMILIES = ("autoregressive", "cola")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    lambada = [{"id": str(i), "context": f"abcdefghi{i}" * i, "answer": "no"} for i in range(1, 6)]
    choices = {"choices": ["x", "yy", "z"], "answer": "yy"}
    tiny_runs.write(place / "lambada.jsonl", *lambada)
    tiny_runs.write(place / "obqa.jsonl", *({"id": i, "question": f"q{i}?", **choices} for i in range(5)))
    return place


def answers(run, data, output, name, batch_size=2, seed=0, choice="generation", selection=None, new_tokens=6, mod=0):
    settings = tiny_runs.generation(run) if choice == "generation" else tiny_runs.scoring(run)
    way = Way("checkpoint step 3", choice, settings, seed, batch_size, new_tokens)
    asked = evaluate.ask(get([name]), selection or Selection(str(data), shots=0))
    return evaluate.from_checkpoint(run, asked, way, str(output), "released", mod, lambda line: None)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_depend_neither_on_the_batch_nor_on_a_restart(family, data, tmp_path):
    run = tiny_runs.create(family)
    whole = answers(run, data, tmp_path / "a", "lambada")
    assert (whole["count"], whole["truncated"], whole["shots"]) == (5, {"dropped": 0, "cut": 3}, 0)
    lines = (tmp_path / "a" / "lambada.jsonl").read_bytes().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert [row["prompt_tokens"] for row in rows] == [10, 20, 26, 26, 26] and [row["cut"] for row in rows][2:] == [
        4,
        14,
        24,
    ]
    assert all(row["generated"] for row in rows) and [row["id"] for row in rows] == list("12345")
    # Killed in the third line, and started again with another batch size.
    stopped = tmp_path / "b"
    answers(run, data, stopped, "lambada", selection=Selection(str(data), limit=5))
    (stopped / "lambada.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])
    assert answers(run, data, stopped, "lambada", batch_size=4) == whole
    assert (stopped / "lambada.jsonl").read_bytes() == b"".join(lines)
    with pytest.raises(UserError, match="holds results for seed = 0, not 1"):
        answers(run, data, stopped, "lambada", seed=1)
    # Of a subset, too: what is written behind a prompt depends on (seed, prompt).
    answers(run, data, tmp_path / "c", "lambada", selection=Selection(str(data), limit=2, seed=1))
    some = [json.loads(line) for line in (tmp_path / "c" / "lambada.jsonl").read_text().splitlines()]
    known = {row["id"]: row["generated"] for row in rows}
    assert len(some) == 2 and all(known[row["id"]] == row["generated"] for row in some)


def test_families_are_asked_the_same(data, tmp_path):
    found = [answers(tiny_runs.create(family), data, tmp_path / family, "lambada", mod=2) for family in FAMILIES]
    assert found[0]["prompts_sha256"] == found[1]["prompts_sha256"]
    assert found[0]["prompt_ids_sha256"] == found[1]["prompt_ids_sha256"]
    results = json.loads((tmp_path / "cola" / "results.json").read_text())
    assert (
        results["family"] == "cola" and results["settings"]["steps"] == 1 and results["prompt_mod"]["0"]["count"] == 5
    )
    other = evaluate.ask(get(["lambada"]), Selection(str(data), limit=4))
    assert other[0].facts["prompts_sha256"] != found[0]["prompts_sha256"]


@pytest.mark.parametrize("family", ["autoregressive", pytest.param("cola", marks=pytest.mark.slow)])
def test_the_most_likely_option_does_not_depend_on_the_batch(family, data, tmp_path):
    run = tiny_runs.create(family)
    ways = [answers(run, data, tmp_path / str(size), "obqa", size, choice="likelihood") for size in (2, 3)]
    assert ways[0] == ways[1] and ways[0]["matcher"] == "likelihood"
    files = [(tmp_path / str(size) / "obqa.likelihood.jsonl") for size in (2, 3)]
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    for one, other in zip(*rows, strict=True):
        assert one["log_prob"] == pytest.approx(other["log_prob"], rel=1e-5) and max(one["log_prob"]) < 0
        assert one["choice"] == one["log_prob"].index(max(one["log_prob"]))
        assert all((error > 0) == (family == "cola") for error in one["log_prob_error"])
    assert ways[0]["correct"] == sum(row["choice"] == 1 for row in rows[0])


def test_the_most_likely_option_is_that_of_the_family_s_score(data, tmp_path):
    run = tiny_runs.create("autoregressive")
    answers(run, data, tmp_path, "obqa", choice="likelihood")
    row = json.loads((tmp_path / "obqa.likelihood.jsonl").read_text().splitlines()[0])
    key = rng.key(0, "likelihood")  # nothing is drawn
    prompt = b"Question: q0?\n(A) x\n(B) yy\n(C) z\nAnswer:"
    assert row["prompt_tokens"] == 25 and row["cut"] == len(prompt) - 25  # 32 less " yy" less up to 4 ends of text
    for text, value in zip((" x", " yy", " z"), row["log_prob"], strict=True):
        ids = [*prompt[-25:], *text.encode()]
        ids += [256] * (4 - len(ids) % 4)
        found = run.family.score(run.model, run.params, [ids], [[1] * len(ids)], tiny_runs.scoring(run), key, [25])
        assert value == pytest.approx(found.log_prob[0], rel=1e-5)


@pytest.mark.slow
def test_prompts_are_whole_patches_where_options_are_weighed(data, tmp_path):
    run = tiny_runs.create("cola", patch=2)
    found = answers(run, data, tmp_path, "obqa", choice="likelihood")
    assert found["prompt_mod"]["0"]["count"] == 5  # by default, modulo the tokens of a latent


def test_what_has_no_room_or_no_choices_is_told(data, tmp_path):
    run = tiny_runs.create("autoregressive")
    with pytest.raises(UserError, match="max_new_tokens = 32: must be at least 1 and below the 32 tokens"):
        answers(run, data, tmp_path, "lambada", new_tokens=None)
    with pytest.raises(UserError, match="task 'lambada' has no choices"):
        answers(run, data, tmp_path, "lambada", choice="likelihood")
    long = {"id": 0, "question": "?", "choices": ["x" * 30, "y"], "answer": "y"}
    file = tiny_runs.write(tmp_path / "obqa.jsonl", long)
    with pytest.raises(UserError, match=f"{file} line 1: an option with 31 tokens"):
        answers(run, tmp_path, tmp_path, "obqa", choice="likelihood")
    tiny_runs.write(tmp_path / "copy.jsonl", {"id": 0, "context": "ba " * 11, "answer": "ba"})
    with pytest.raises(UserError, match=r"task 'copy': a prompt has 33 tokens, all of the context \(32\)"):
        answers(run, tmp_path, tmp_path, "copy", new_tokens=None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; must be a directory"):
        answers(run, data, tmp_path / "file", "lambada")
    refusing = run._replace(family=run.family._replace(check_scorable=_refuse))
    with pytest.raises(UserError, match="no likelihood"):
        answers(refusing, data, tmp_path, "obqa", choice="likelihood")


def _refuse(model, params):
    raise UserError("this model has no likelihood")


def test_stories_are_judged_by_their_corpus(tmp_path):
    run = tiny_runs.create("autoregressive")
    config = StoriesConfig(values=2)
    long = run.config.data.__class__(stories=config, num_stories=200, sequence_length=400, tokenizer="bytes")
    run = run._replace(config=run.config.__class__(data=long, transformer=run.config.transformer))
    asked = evaluate.ask_stories("stories", TASKS["stories"], run, 3)
    stories = Stories(config)
    assert all(stories.log_prob(one.fields["context"] + one.answer) > -100 for one in asked.examples)
    said = [Prediction(one.answer, None, None) for one in asked.examples]
    assert evaluate.judge(asked, said, "released", stories) == [True] * 3
    cut = [Prediction(one.answer[:-3], None, None) for one in asked.examples]
    assert evaluate.judge(asked, cut, "released", stories) == [False] * 3
    text = run._replace(config=run.config.__class__(data=tiny_runs.DATA.__class__(corpus="text", files="x")))
    with pytest.raises(UserError, match="config.data.corpus = 'text'; must be 'stories'"):
        evaluate.ask_stories("stories", TASKS["stories"], text, 3)


def test_equal_texts_have_draws_of_their_own():
    one, two, other, again = continuations.identities([[1, 2], [1, 2], [1], [1, 2]])
    assert len({one, two, other, again}) == 4 and all(0 <= number < 2**31 for number in (one, two, other, again))
    assert continuations.identities([[1, 2]]) == [one] and continuations.identities([[1], [1, 2]]) == [other, one]


def test_the_tighter_bound_counts_and_what_was_not_solved_is_not_known():
    entry = {"elbo": -3.0, "elbo_error": 0.5, "iwae": None}
    assert continuations._score({"response": entry}) == (-3.0, 0.5)
    assert continuations._score({"response": entry | {"iwae": -2.0, "iwae_error": 0.1}}) == (-2.0, 0.1)
    unknown = continuations._score({"response": {"elbo": None}})
    assert unknown.log_prob != unknown.log_prob
    example = Example("0", {}, ("a", "b"), "b", "")
    asked = evaluate.Asked("obqa", TASKS["obqa"], [], [example] * 3, [], {})
    said = [Prediction(None, choice, None) for choice in (1, 0, None)]
    assert evaluate.judge(asked, said, "released") == [True, False, False]
