"""launch/evaluate.py --task as a user runs it: predictions without a model, and a checkpoint that is killed."""

import json
import time

import pytest
from test_binaries import call, start

pytestmark = pytest.mark.slow
COUNT = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    rows = [{"id": i, "question": f"{i}?", "choices": ["a", "b"], "answer": "b"} for i in range(COUNT)]
    for name in ("obqa", "siqa"):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def last(printed: str) -> dict:
    return json.loads(printed.splitlines()[-1])


def test_predictions_are_judged_without_a_checkpoint(cache, data, tmp_path):
    said = tmp_path / "obqa.jsonl"
    said.write_text("".join(json.dumps({"id": i, "generated": " B\n" if i % 4 else "A"}) + "\n" for i in range(COUNT)))
    arguments = ("--task=obqa", f"--data={data}", f"--predictions={said}")
    found = last(call(cache, "evaluate.py", *arguments, "--matcher=released"))
    assert (found["accuracy"], found["count"], found["task"]) == (75.0, COUNT, "obqa")
    assert last(call(cache, "evaluate.py", *arguments, "--limit=8"))["count"] == 8
    bad = ("--task=obqa,siqa", f"--data={data}", f"--predictions={tmp_path}")
    assert "siqa.jsonl" in call(cache, "evaluate.py", *bad, status=2)
    assert "cannot be given with --checkpoint" in call(cache, "evaluate.py", *arguments, "--checkpoint=x", status=2)
    assert "needs --task" in call(cache, "evaluate.py", f"--predictions={said}", status=2)
    assert "--task = nonsense" in call(cache, "evaluate.py", "--task=nonsense", status=2)


def test_a_corpus_under_a_rule_and_its_prompts_are_written_and_judged(cache, tmp_path):
    arguments = ("--rule=reverse", f"--output={tmp_path}", "--documents=50", "--prompts=20", "--empty=4")
    assert "50 documents, 24 prompts, 4 of them empty" in call(cache, "structures.py", *arguments)
    rows = [json.loads(line) for line in (tmp_path / "reverse.jsonl").read_text().splitlines()]
    known = (tmp_path / "reverse.txt").read_text().splitlines()
    assert len(known) == 50 and not {row["context"] + row["answer"] for row in rows[4:]} & set(known)
    said = tmp_path / "said.jsonl"
    said.write_text("".join(json.dumps({"id": row["id"], "generated": row["answer"]}) + "\n" for row in rows))
    found = call(cache, "evaluate.py", "--task=reverse", f"--data={tmp_path}", f"--predictions={said}")
    assert last(found)["accuracy"] == 100.0 and last(found)["open"]["0"]["count"] == 4
    assert "--rule = 'html': not allowed here (value should be one of <dyck|json|copy|reverse>)" in call(
        cache, "structures.py", "--rule=html", "--output=x", status=2
    )
    assert "--rule is missing" in call(cache, "structures.py", status=2)


def test_a_killed_evaluation_ends_like_one_that_was_not(cache, data, tmp_path):
    run = tmp_path / "run"
    call(cache, "train.py", "--config=tests/system/tiny_ar.py", f"--workdir={run}")
    arguments = (f"--checkpoint={run}", "--task=obqa,siqa", f"--data={data}", "--max_new_tokens=4", "--batch_size=1")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    found = last(call(cache, "evaluate.py", *arguments, f"--output={whole}"))
    assert set(found["tasks"]) == {"obqa", "siqa"} and found["count"] == 2 * COUNT
    process = start(cache, "evaluate.py", *arguments, f"--output={stopped}")
    file = stopped / "obqa.jsonl"
    while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < 3):
        time.sleep(0.001)
    assert process.poll() is None, "it ended before it was killed"
    process.kill()
    process.communicate()
    assert last(call(cache, "evaluate.py", *arguments, f"--output={stopped}")) == found
    for name in ("obqa.jsonl", "siqa.jsonl", "results.json"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    assert "seed = 1, not 2" in call(cache, "evaluate.py", *arguments, f"--output={stopped}", "--seed=2", status=2)
    assert "--output is missing" in call(cache, "evaluate.py", *arguments, status=2)
    two = (*arguments, f"--output={tmp_path / 'two'}", "--guidance=1,2")
    assert "has no such setting" in call(cache, "evaluate.py", *two, status=2)
    stories = call(cache, "evaluate.py", f"--checkpoint={run}", "--task=stories", "--count=3", f"--output={whole}")
    assert last(stories)["task"] == "stories" and last(stories)["count"] == 3
