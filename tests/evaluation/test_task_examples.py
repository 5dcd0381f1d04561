"""Examples, demonstrations, predictions and prompts: what is read, what is refused, and what a model is asked."""

import json

import pytest

from cola_jax.data.tokenizers import ByteTokenizer
from cola_jax.evaluation.tasks import evaluate, examples, prompts, results
from cola_jax.evaluation.tasks.evaluate import Selection
from cola_jax.evaluation.tasks.prompts import Prompt
from cola_jax.evaluation.tasks.task import TASKS, Example, get
from cola_jax.types import UserError

MMLU = {"id": "7", "question": "2 + 2?", "choices": ["3", "4"], "answer": "4"}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def message(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def only(name, row, answered=False):
    task = TASKS[name]
    one = examples.example(name, task, {"id": 1, **row}, "here", {})
    return prompts.render(task, one)


def test_templates_of_the_eight_tasks():
    """SPEC 7: the field names, options as (A), the anchor last and no line end behind it."""
    two = {"choices": ["x", "y"], "answer": "y"}
    assert only("lambada", {"context": "He saw a", "answer": "dog"}) == "He saw a"
    for name in ("mmlu", "obqa", "siqa"):
        assert only(name, {"question": "Why?", **two}) == "Question: Why?\n(A) x\n(B) y\nAnswer:"
    assert only("siqa", {"context": "Al fell.", "question": "Why?", **two}).startswith("Question: Al fell. Why?\n")
    assert only("squad", {"context": "C.", "question": "Q?", "answer": "a"}) == "Context: C.\nQuestion: Q?\nAnswer:"
    assert only("hellaswag", {"context": "C.", **two}) == "Context: C.\n(A) x\n(B) y\nAnswer:"
    assert only("race", {"context": "C.", "question": "Q?", **two}) == (
        "Article: C. Q?\nOptions:\n(A) x\n(B) y\nAnswer:"
    )
    assert only("story_cloze", {"context": "C.", **two}) == "Story: C.\n(A) x\n(B) y\nEnd:"
    shots = {name: task.shots for name, task in TASKS.items() if task.match != "rule"}
    assert shots == {"lambada": 0, "squad": 1, "stories": 0} | dict.fromkeys(
        ("mmlu", "siqa", "obqa", "hellaswag", "race", "story_cloze"), 2
    )


def test_prompts_show_answered_demonstrations_of_the_package_first(tmp_path):
    """Those that users install: package data, of every task, in order."""
    tasks = {name: TASKS[name] for name in TASKS if name != "stories"}
    shown = examples.demonstrations(None, tasks, None)
    for name, task in tasks.items():
        assert len(shown[name]) == task.shots and all(one.answer in one.choices for one in shown[name] if task.choices)
    example = examples.read("mmlu", TASKS["mmlu"], write(tmp_path / "mmlu.jsonl", MMLU))
    (prompt,) = prompts.build(TASKS["mmlu"], example, shown["mmlu"])
    first, second, last = prompt.join().split("\n\n")
    assert first.startswith("Question: ") and first.endswith(f"Answer: {shown['mmlu'][0].answer}")
    assert second.endswith(f"Answer: {shown['mmlu'][1].answer}") and last == "Question: 2 + 2?\n(A) 3\n(B) 4\nAnswer:"
    mine = str(write(tmp_path / "mine.jsonl", {"task": "mmlu", **MMLU, "question": "1 + 3?"}, {"task": "other"}))
    (replaced,) = prompts.build(TASKS["mmlu"], example, examples.demonstrations(mine, tasks, 0)["mmlu"])
    assert replaced.shown == ()
    one = examples.demonstrations(mine, {"mmlu": TASKS["mmlu"]}, 1)["mmlu"]
    assert prompts.build(TASKS["mmlu"], example, one)[0].shown == ("Question: 1 + 3?\n(A) 3\n(B) 4\nAnswer: 4",)


def test_a_long_prompt_loses_demonstrations_first_and_then_its_front():
    prompt, tokenizer = Prompt(("first", "second"), "question"), ByteTokenizer()
    whole = "first\n\nsecond\n\nquestion"
    assert prompts.fit(prompt, tokenizer, len(whole)) == (list(whole.encode()), 0, 0)
    for room in (len(whole) - 1, len("second\n\nquestion")):
        assert prompts.fit(prompt, tokenizer, room) == (list(b"second\n\nquestion"), 1, 0)
    assert prompts.fit(prompt, tokenizer, 15) == (list(b"question"), 2, 0)
    assert prompts.fit(prompt, tokenizer, 3) == (list(b"ion"), 2, 5)
    assert prompts.fit(prompt, tokenizer, 7, unit=3) == (list(b"estion"), 2, 2)
    assert prompts.fit(Prompt((), "question!"), tokenizer, 7, unit=3) == (list(b"stion!"), 0, 3)
    assert prompts.fit(prompt, tokenizer, 100, unit=4) == (list(whole.encode())[3:], 0, 3)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: list; must be an object"),
        ({**MMLU, "id": "8", "question": None}, "line 2: no context or question; an example of task 'mmlu'"),
        ({"id": "8", "question": "?", "choices": ["a", "b"]}, "line 2: no answer"),
        ({"id": "8", "question": "?", "answer": "b"}, "line 2: choices = None; must be a list of at least 2 texts"),
        ({**MMLU, "id": "8", "answer": "5"}, "line 2: answer = '5'; must be one of its choices ['3', '4']"),
        ({**MMLU, "id": "8", "answer": 4}, "line 2: answer = 4; must be text"),
        (MMLU, "line 2: id '7' is in"),
        ({**MMLU, "id": None}, "line 2: id = None; must be text or a whole number"),
    ],
)
def test_a_bad_example_is_told_with_file_and_line(tmp_path, row, words):
    file = write(tmp_path / "mmlu.jsonl", MMLU, row)
    found = message(examples.read, "mmlu", TASKS["mmlu"], file)
    assert found.startswith(f"{file} line 2") and words in found


def test_files_that_are_not_there_or_empty_are_told(tmp_path):
    assert "must be a UTF-8 file" in message(examples.read, "mmlu", TASKS["mmlu"], tmp_path / "none")
    assert "at least one line" in message(examples.read, "mmlu", TASKS["mmlu"], write(tmp_path / "empty"))
    assert "no file" in message(examples.file_of, str(tmp_path), "mmlu", "--data")
    assert "--data is missing" in message(examples.file_of, None, "mmlu", "--data")
    assert "must be one of lambada, mmlu" in message(get, ["mmlu", "nonsense"])
    assert "twice" in message(get, ["mmlu", "mmlu"])
    file = write(tmp_path / "mmlu.jsonl", MMLU)
    assert "must be a directory" in message(evaluate.ask, get(["mmlu", "siqa"]), Selection(str(file)))


def test_demonstrations_that_are_missing_or_in_the_evaluation_set_are_told(tmp_path):
    data = write(tmp_path / "mmlu.jsonl", MMLU)
    shown = write(tmp_path / "d.jsonl", {"task": "mmlu", **MMLU, "id": 1}, {"task": "mmlu", **MMLU, "id": 2})
    found = message(evaluate.ask, get(["mmlu"]), Selection(str(data), str(shown)))
    assert found.startswith(f"{shown} line 1: is in the evaluation set ({data} line 1)")
    assert "1 of task 'mmlu'; must be at least 2" in message(
        examples.demonstrations, str(write(tmp_path / "e.jsonl", {"task": "mmlu", **MMLU})), get(["mmlu"]), None
    )
    assert "task = None" in message(examples.demonstrations, str(data), get(["mmlu"]), None)


def test_a_subset_is_drawn_by_its_seed_and_kept_in_order():
    every = [Example(str(i), {}, (), "", "") for i in range(50)]
    drawn = [examples.subset(every, 10, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 10
    assert [int(one.id) for one in drawn[0]] == sorted(int(one.id) for one in drawn[0])
    assert examples.subset(every, 0, 0) == examples.subset(every, 60, 0) == every


ROWS = [{**MMLU, "id": name} for name in "abc"]
SAID = [{"id": name, "generated": text} for name, text in (("c", "4"), ("a", " 4\n"), ("b", "3"))]


def judged(tmp_path, said, limit=0, names=("mmlu",)):
    write(tmp_path / "mmlu.jsonl", *ROWS)
    place = write(tmp_path / "said.jsonl", *said)
    selection = Selection(str(tmp_path / "mmlu.jsonl"), limit=limit)
    return evaluate.from_predictions(get(list(names)), selection, str(place), "released", 0, lambda line: None)


def test_predictions_are_judged_in_any_order(tmp_path):
    found = judged(tmp_path, SAID)
    assert (found["task"], found["count"], found["correct"]) == ("mmlu", 3, 2)
    assert found["accuracy"] == pytest.approx(200 / 3)
    assert judged(tmp_path, SAID, limit=1)["count"] == 1  # the others are no unknown ids


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (SAID[:1], "no line with id 'a' (and 1 more); must have all of 3 examples"),
        ([*SAID, {"id": "d", "generated": ""}], "line 4: id 'd' is not in the data"),
        ([*SAID, SAID[0]], "line 4: id 'c' is in"),
        ([*SAID[:2], {"id": "b"}], "line 3: no generated"),
        ([*SAID[:2], {"id": "b", "generated": 3}], "line 3: generated = 3; must be text"),
        ([*SAID[:2], '{"id": "b", '], "line 3: not JSON"),
    ],
)
def test_predictions_that_do_not_fit_the_examples_are_told(tmp_path, said, words):
    assert words in message(judged, tmp_path, said)


def test_stories_are_not_judged_without_their_run(tmp_path):
    assert "needs --checkpoint" in message(judged, tmp_path, SAID, 0, ("stories",))


def test_texts_under_a_rule_are_judged_whole_and_divided_by_what_their_prompts_leave_open(tmp_path):
    begun = [("", "(a a) (b b)"), ("(a (b", " b) a)"), ("(a (b", " a) b)"), ("(c", " c)"), ("(c", " c) (d")]
    rows = [{"id": i, "context": prompt, "answer": "x"} for i, (prompt, _) in enumerate(begun)]
    write(tmp_path / "dyck.jsonl", *rows)
    said = write(tmp_path / "said", *({"id": i, "generated": rest} for i, (_, rest) in enumerate(begun)))
    told: list[str] = []
    asked = Selection(str(tmp_path / "dyck.jsonl"))
    found = evaluate.from_predictions(get(["dyck"]), asked, str(said), "released", 0, told.append)
    assert {left: (one["correct"], one["count"]) for left, one in found["open"].items()} == {
        "0": (1, 1),
        "1": (1, 2),
        "2": (1, 2),
    }
    assert "\n  2 open: 50.00 % of 2" in told[0]
    assert "context = ''; must be text" in message(only, "lambada", {"context": "", "answer": "x"})
    assert "context = 3; must be text" in message(only, "dyck", {"context": 3, "answer": "x"})


def test_accuracies_are_divided_by_prompt_length_and_averaged():
    one = results.result([True, True, False, False, False], [2, 4, 3, 5, 6], 2)
    assert (one["accuracy"], one["count"], one["correct"]) == (40.0, 5, 2)
    assert one["interval"] == pytest.approx([11.762, 76.928], abs=1e-3)  # Wilson's formula by hand for 2 of 5
    assert [one["prompt_mod"][rest]["accuracy"] for rest in "01"] == [pytest.approx(200 / 3), 0.0]
    assert "prompt_mod" not in results.result([True], [2], 1) and "prompt_mod" not in results.result([True], [None], 2)
    other = results.result([True], [1], 2)
    mean = results.average({"a": one, "b": other})
    assert (mean["accuracy"], mean["count"]) == (70.0, 6)
    assert mean["prompt_mod"] == {"0": {"accuracy": None}, "1": {"accuracy": 50.0}}  # b has no even prompt
    assert "Mod1  0.00 % of 2" in results.line("a", one) and "  -  " in results.line("average", mean)
    cut = {**one, "truncated": {"dropped": 3, "cut": 1}}
    assert "prompts without all demonstrations 3, cut 1" in results.line("a", cut)
