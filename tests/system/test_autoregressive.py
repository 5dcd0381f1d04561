"""The binaries on a tiny run of the autoregressive family, and what they say where a run is of another family."""

import functools
import json
import math
import re
import subprocess
import time
from pathlib import Path

import pytest
import test_binaries as binaries

pytestmark = pytest.mark.slow  # every call of a binary imports and compiles
CONFIG = "--config=tests/system/tiny_ar.py"
PROMPT = "Mia was a girl from the village."
KEPT = "--config.train.milestone_steps=(10,)"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, shared by the processes of this module."""
    return tmp_path_factory.mktemp("cache")


def train(cache, workdir, *arguments, **options) -> str:
    return binaries.call(cache, "train.py", CONFIG, f"--workdir={workdir}", *arguments, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache) -> tuple[Path, str]:
    """A finished run and what it printed."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    return workdir, train(cache, workdir, KEPT)


@pytest.fixture(scope="module")
def use(run, cache):
    """Calls a binary with the run's checkpoint."""

    def call(binary, *arguments, **options) -> str:
        return binaries.call(cache, binary, f"--checkpoint={run[0]}", *arguments, **options)

    return call


def test_it_trains_and_closes_with_a_report(run):
    workdir, printed = run
    trained = [row for row in binaries.rows(workdir) if row["kind"] == "train"]
    assert {"loss", "next_token", "accuracy", "exaflops"} <= set(trained[-1])
    assert trained[-1]["step"] == 30 and trained[-1]["loss"] < 0.8 * trained[0]["loss"]
    assert sorted(int(path.name) for path in (workdir / "stage1").iterdir() if path.name.isdecimal()) == [
        10,
        20,
        25,
        30,
    ]
    report = json.loads((workdir / "report.json").read_text())
    assert set(report) == {"generation", "likelihood"} and report["likelihood"]["bound"] == "exact"
    assert report["likelihood"]["nats_per_token"] > report["likelihood"]["entropy"] > 0
    assert len(json.loads((workdir / "samples.jsonl").read_text())["texts"]) == 2
    assert "tokens/s" in printed and "evaluation 2 of 2: likelihood" in printed


def test_a_killed_run_ends_like_one_that_was_not(run, cache, tmp_path):
    """SIGKILL while a checkpoint is being written, twice."""
    null = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for more in (1, 2):  # names of checkpoints, temporary ones among them
        process = binaries.start(cache, "train.py", CONFIG, KEPT, f"--workdir={tmp_path / 'killed'}", **null)
        stage = tmp_path / "killed" / "stage1"
        before = set(stage.glob("*"))
        while process.poll() is None and len(set(stage.glob("*")) - before) < more:
            time.sleep(0.001)
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
        process.wait()
        assert not (stage / "30").exists()
    printed = train(cache, tmp_path / "killed", KEPT)
    assert "resumed at step" in printed or "step 1/30" in printed
    for name in binaries.REPORTS:
        assert (tmp_path / "killed" / name).read_bytes() == (run[0] / name).read_bytes()
    for step in (10, 25, 30):
        metas = [next((place / "stage1" / str(step) / "meta").iterdir()) for place in (tmp_path / "killed", run[0])]
        assert metas[0].read_text() == metas[1].read_text()  # hashes of every array, position in the data
    reports = [json.loads((place / "report.json").read_text()) for place in (tmp_path / "killed", run[0])]
    assert reports[0] == reports[1]


def test_one_device_and_eight_give_the_same_losses(cache, tmp_path):
    quiet = ["--config.train.num_samples=0", "--config.train.log_every=1", "--config.evaluation.count=0"]
    mesh = ["--config.train.mesh_data=2", "--config.train.mesh_fsdp=2", "--config.train.mesh_tensor=2"]
    quiet.append("--config.stage1.steps=10")
    train(cache, tmp_path / "one", *quiet)
    train(cache, tmp_path / "eight", *quiet, *mesh, devices=8)
    one, eight = (binaries.losses(tmp_path / name, stage=1) for name in ("one", "eight"))
    assert len(one) == 10 and one == pytest.approx(eight, rel=1e-5)
    assert not (tmp_path / "one" / "report.json").exists()


def test_sample(use):
    rows = [json.loads(line) for line in use("sample.py", "--json", PROMPT, "--unconditional=2").splitlines()]
    assert [row["prompt"] for row in rows] == [PROMPT, "", ""] and all(1 <= len(row["tokens"]) <= 16 for row in rows)
    plain = use("sample.py", PROMPT, "--unconditional=2")
    assert plain == "".join(row["text"] + "\n" for row in rows)
    assert use("sample.py", PROMPT, "--stream", "--unconditional=2") == plain
    assert use("sample.py", PROMPT, "--batch_size=2", "--unconditional=2") == plain
    assert use("sample.py", PROMPT, "--temperature=0") == use("sample.py", PROMPT, "--temperature=0", "--seed=5")
    assert use("sample.py", "--step=10", PROMPT, "--temperature=0") != use("sample.py", PROMPT, "--temperature=0")


def test_score(use, tmp_path):
    story = PROMPT + " She wanted to find a map in the garden."
    first, second = PROMPT, story[len(PROMPT) :]
    asked = [
        {"text": story},
        {"prefix": first, "response": second},
        {"prefix": first, "candidates": [second, " The the the the."], "id": "c"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    files = (f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}")
    assert "3 lines, 0 of them were there; not scored: none" in use("score.py", *files)
    text, response, chosen = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert text["bound"] == response["bound"] == "exact" and text["log_prob_error"] == 0
    assert response["joint"]["log_prob"] == pytest.approx(text["log_prob"], rel=1e-5)  # one density, cut in two
    assert response["log_prob"] > response["joint"]["log_prob"]
    assert text["perplexity"] == pytest.approx(math.exp(-text["log_prob"] / text["tokens"]), rel=1e-5)
    assert chosen["id"] == "c" and chosen["best"] == 0
    assert chosen["scores"][0]["log_prob"] == pytest.approx(response["log_prob"], rel=1e-5)
    assert "3 of them were there" in use("score.py", *files)


def test_evaluate(use, run, tmp_path):
    out = use("evaluate.py", "--count=4", f"--json={tmp_path / 'rows.json'}")
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["stories"] == 4 and row["temperature"] == 1.0 and len(out.splitlines()) == 1
    assert "after a first sentence" in use("evaluate.py", "--count=4", "--prompted")
    asked = ("--evaluators=likelihood,perplexity", f"--scorer={run[0]}", "--count=16", "--seed=0")
    use("evaluate.py", *asked, f"--json={tmp_path / 'found.json'}")
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {"likelihood", "perplexity"} and found["perplexity"]["scorer"] == str(run[0])
    assert found["likelihood"] == json.loads((run[0] / "report.json").read_text())["likelihood"]
    rate = found["perplexity"]
    assert rate["value"] == pytest.approx(math.exp(rate["nats_per_token"])) and rate["nats_per_token"] > 0


def test_benchmark_and_plan(cache, tmp_path):
    sizes = [CONFIG, "--config.transformer.vocab_size=300"]
    arguments = (*sizes, "--batch=1,2", "--prompt=9", "--repeats=1", f"--json={tmp_path / 'rows.json'}")
    assert len(binaries.call(cache, "benchmark.py", *arguments).splitlines()) == 4
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["what"], row["batch"]) for row in rows] == [(w, b) for w in ("generation", "training") for b in (1, 2)]
    assert all(row["flops_per_s"] > 0 for row in rows)
    assert "vocab_size = 0" in binaries.call(cache, "benchmark.py", CONFIG, status=2)
    out = binaries.call(cache, "train.py", *sizes, "--plan=h100:2", "--config.train.mesh_data=2")
    assert re.search(r"stage 1.*parameters", out) and "stage 2" not in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config.family=nonsense"], "config.family = 'nonsense': must be one of 'cola', 'autoregressive'"),
        (["--config.vae.dim=3"], "config.vae.dim: no such field"),
        (["--config.transformer.dims=3"], "config.transformer.dims: no such field; did you mean dim?"),
        (["--config.transformer.head_dim=7"], "config.transformer.head_dim = 7"),
        (
            ["--config.transformer.vocab_size=20"],
            "config.transformer.vocab_size = 20: must be at least the tokenizer's",
        ),
        (["--config.evaluation.evaluators=('reconstruction',)"], "which family 'autoregressive' does not have"),
        (["--config.evaluation.evaluators=('perplexity',)"], "config.evaluation.scorer"),
        (["--config.train.init_from=nowhere"], "nowhere: no checkpoint here"),
    ],
)
def test_train_refuses(cache, tmp_path, arguments, words):
    assert words in train(cache, tmp_path / "run", *arguments, status=2)
    assert not list((tmp_path / "run").glob("stage1/*"))


def test_a_config_of_the_other_family_is_refused(run, cache, tmp_path):
    cola = "--config=tests/system/tiny.py"
    error = binaries.call(cache, "train.py", cola, f"--workdir={run[0]}", status=2)
    assert "holds a run of family 'autoregressive', not 'cola'" in error
    arguments = (cola, f"--workdir={tmp_path / 'run'}", f"--config.train.init_from={run[0]}")
    error = binaries.call(cache, "train.py", *arguments, status=2)
    assert re.search(r"holds no parameters '(vae|dit)'; it has transformer", error)


def test_a_run_of_the_family_where_another_is_needed(use, run, cache, tmp_path):
    assert "config.family = 'autoregressive': must be 'cola' here" in use("likelihood.py", status=2)
    arguments = ("--part=speed", CONFIG, "--config.transformer.vocab_size=300")
    assert "must be 'cola' here" in binaries.call(cache, "likelihood.py", *arguments, status=2)
    convert = functools.partial(binaries.call, cache, "convert.py", f"--from={run[0]}", f"--to={tmp_path / 'released'}")
    assert "a run of family 'autoregressive'; the released layout is that of 'cola'" in convert(status=2)
    assert not (tmp_path / "released").exists()


@pytest.mark.parametrize(
    "binary, arguments, words",
    [
        ("sample.py", ["Mia", "--guidance_scale=3"], "--guidance_scale: the checkpoint's family 'autoregressive'"),
        ("sample.py", ["Mia was a[[3]] here.", "--mode=infill"], "--mode = infill: family 'autoregressive' only"),
        ("sample.py", ["Mia was[[ a girl]].", "--mode=edit"], "--mode = edit: family 'autoregressive' only"),
        ("sample.py", ["word " * 80], "must be at most 55 (context) minus 1"),
        ("sample.py", ["Mia", "--step=7"], "has no such checkpoint; it must be one of 10, 20, 25, 30"),
        ("sample.py", ["Mia", "--temperature=-1"], "temperature = -1.0"),
        ("sample.py", ["Mia", "--guidance_scale=3", "--context=4"], "context"),
        ("score.py", ["--input=none.jsonl", "--output=o.jsonl"], "none.jsonl"),
        ("score.py", ["--input=none.jsonl", "--output=o.jsonl", "--solver=heun"], "--solver: the checkpoint's family"),
        ("evaluate.py", ["--guidance=1,2"], "--guidance: the checkpoint's family 'autoregressive' has no such"),
        ("evaluate.py", ["--gap=3"], "--gap: family 'autoregressive' only continues texts"),
        ("evaluate.py", ["--evaluators=reconstruction"], "needs latents"),
        ("evaluate.py", ["--evaluators=nonsense"], "'nonsense' must be one of"),
        ("evaluate.py", ["--evaluators=perplexity", "--scorer=nowhere"], "nowhere: no checkpoint here"),
    ],
)
def test_binaries_refuse(use, binary, arguments, words):
    assert words in use(binary, *arguments, status=2)
