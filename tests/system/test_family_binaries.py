"""LLaDA and Plaid through the binaries, as a user runs them, at a tiny size."""

import json

import pytest
from test_binaries import call, rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["llada", "plaid"])
def run(request, tmp_path_factory, cache):
    """(family, directory of a finished run with its report)."""
    workdir = tmp_path_factory.mktemp("run") / request.param
    config = f"--config=tests/system/tiny_{request.param}.py"
    call(cache, "train.py", config, f"--workdir={workdir}", "--config.evaluation.count=4")
    return request.param, workdir


def test_training_ends_with_a_report(run):
    family, workdir = run
    last = [row for row in rows(workdir) if row["kind"] == "train"][-1]
    term = {"llada": "masked", "plaid": "flow"}[family]
    assert last["step"] == 20 and {"loss", term, "accuracy", "exaflops"} <= set(last)
    report = json.loads((workdir / "report.json").read_text())
    assert [row["prompted"] for row in report["generation"]][:2] == [False, False if family == "plaid" else True]
    measure = {"llada": "likelihood", "plaid": "prior"}[family]
    assert set(report) >= {measure}
    if family == "llada":
        assert report["likelihood"]["bound"] == "lower" and report["likelihood"]["nats_per_token"] > 0


def test_sampling_streaming_and_infilling(run, cache):
    _, workdir = run
    arguments = (f"--checkpoint={workdir}", "Mia was", "--max_new_tokens=6", "--temperature=0.7")
    whole = call(cache, "sample.py", *arguments)
    assert call(cache, "sample.py", *arguments, "--stream") == whole
    found = call(cache, "sample.py", f"--checkpoint={workdir}", "--mode=infill", "Mia was[[3]] girl.", "--json")
    assert len(json.loads(found)["tokens"]) == 3


def test_scoring(run, cache, tmp_path):
    family, workdir = run
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"text": "Mia was a girl."}, {"prefix": "Mia was", "candidates": [" a girl.", " a boy."]}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    how = ["--samples=4"] if family == "llada" else ["--samples=1", "--solver=heun", "--steps=4"]
    call(cache, "score.py", f"--checkpoint={workdir}", f"--input={source}", f"--output={out}", *how)
    text, candidates = map(json.loads, out.read_text().splitlines())
    if family == "llada":
        assert text["bound"] == "lower" and text["log_prob"] < 0 < text["log_prob_error"]
        assert candidates["best"] in (0, 1)
    else:
        assert text["elbo"] < 0 and candidates["best"]["response"] in (0, 1)


@pytest.mark.parametrize(
    ("family", "arguments", "words"),
    [
        ("llada", ["sample.py", "Mia", "--solver=heun"], "has no such setting"),
        ("llada", ["sample.py", "Mia", "--remasking=all"], "--remasking = 'all': must be one of"),
        ("llada", ["evaluate.py", "--evaluators=prior"], "'prior' needs a flow prior"),
        ("plaid", ["sample.py", "Mia", "--remasking=random"], "has no such setting"),
    ],
)
def test_what_does_not_fit_is_one_line(run, cache, family, arguments, words):
    if run[0] != family:
        pytest.skip(f"about {family}")
    binary, *rest = arguments
    assert words in call(cache, binary, f"--checkpoint={run[1]}", *rest, status=2)
