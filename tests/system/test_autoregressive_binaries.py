"""The autoregressive family through the same binaries, as a user runs them, at a tiny size."""

import json
import subprocess
import sys
import time

import pytest
from test_binaries import REPORTS, ROOT, call, rows, start

pytestmark = pytest.mark.slow
CONFIG, COLA = "--config=tests/system/tiny_ar.py", "--config=tests/system/tiny.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    """A finished run with its report."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    return workdir, call(cache, "train.py", CONFIG, f"--workdir={workdir}", "--config.evaluation.count=4")


def test_training_ends_with_a_report(run):
    workdir, printed = run
    last = [row for row in rows(workdir) if row["kind"] == "train"][-1]
    assert last["step"] == 20 and {"loss", "next_token", "accuracy", "exaflops"} <= set(last)
    assert "tokens/s" in printed and "exact entropy of the same stories" in printed
    report = json.loads((workdir / "report.json").read_text())
    assert report["likelihood"]["bound"] == "exact" and report["likelihood"]["nats_per_token"] > 0
    assert [row["prompted"] for row in report["generation"]] == [False, True]


def test_a_killed_run_ends_like_one_that_was_not(run, cache, tmp_path):
    workdir, null = tmp_path / "killed", subprocess.DEVNULL
    arguments = (CONFIG, f"--workdir={workdir}")
    process = start(cache, "train.py", *arguments, stdout=null, stderr=null)
    while process.poll() is None and not list((workdir / "stage1").glob("5*")):
        time.sleep(0.001)
    assert process.poll() is None
    process.kill()
    process.wait()
    call(cache, "train.py", *arguments)
    for name in REPORTS:
        assert (workdir / name).read_bytes() == (run[0] / name).read_bytes()
    metas = [next((place / "stage1" / "20" / "meta").iterdir()).read_text() for place in (workdir, run[0])]
    bodies = [json.loads(meta)["body"] for meta in metas]
    assert bodies[0]["hashes"] == bodies[1]["hashes"] and bodies[0]["data"] == bodies[1]["data"]


def test_sampling_and_streaming(run, cache):
    arguments = (f"--checkpoint={run[0]}", "Mia was", "--max_new_tokens=6", "--temperature=0.7")
    whole = call(cache, "sample.py", *arguments)
    assert call(cache, "sample.py", *arguments, "--stream") == whole
    several = (*arguments, "Tom was", "--unconditional=2")
    found = call(cache, "sample.py", *several, "--json").splitlines()
    texts = "".join(json.loads(line)["text"] + "\n" for line in found)
    for way in ("--stream", "--batch_size=3"):  # characters whose bytes come one by one among them
        assert call(cache, "sample.py", *several, way) == texts
    row = json.loads(call(cache, "sample.py", *arguments, "--json", "--step=15"))
    assert row["prompt"] == "Mia was" and len(row["tokens"]) <= 6


def test_scoring(run, cache, tmp_path):
    lines = [{"text": "Mia was a girl."}, {"prefix": "Mia was", "response": " a girl."}]
    lines.append({"prefix": "Mia was", "candidates": [" a girl.", " a boy."]})
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    call(cache, "score.py", f"--checkpoint={run[0]}", f"--input={source}", f"--output={out}")
    text, response, candidates = map(json.loads, out.read_text().splitlines())
    assert text["bound"] == "exact" and text["log_prob"] < 0
    assert candidates["scores"][0]["log_prob"] == pytest.approx(response["log_prob"], rel=1e-5)
    assert candidates["best"] in (0, 1) and response["joint"]["log_prob"] < response["log_prob"]
    assert response["joint"]["log_prob"] == pytest.approx(text["log_prob"], rel=1e-5)  # one density, cut in two


def test_evaluation_and_speed(run, cache, tmp_path):
    file = tmp_path / "found.json"
    options = ("--count=3", "--evaluators=held_out,likelihood,perplexity", f"--scorer={run[0]}", f"--json={file}")
    call(cache, "evaluate.py", f"--checkpoint={run[0]}", *options)
    assert set(json.loads(file.read_text())) == {"held_out", "likelihood", "perplexity"}
    assert "temperature 1" in call(cache, "evaluate.py", f"--checkpoint={run[0]}", "--count=3")
    sizes = ("--config.transformer.vocab_size=300", "--batch=1", "--prompt=9", "--repeats=1")
    assert len(call(cache, "benchmark.py", CONFIG, *sizes).splitlines()) == 2
    assert "fits" in call(cache, "train.py", CONFIG, "--plan=h100:1", "--config.train.mesh_data=1")


@pytest.mark.parametrize(
    "binary, arguments, words",
    [
        ("train.py", [CONFIG, "--config.family=nonsense"], "config.family = 'nonsense': must be one of"),
        ("train.py", [CONFIG, "--config.family=cola"], "config.transformer: belongs to family 'autoregressive'"),
        ("train.py", [CONFIG, "--config.vae.dim=8"], "no such field"),
        ("train.py", [CONFIG, "--config.sample.max_new_tokens=57"], "must be at most data.sequence_length = 56"),
        ("train.py", [CONFIG, "--config.train.init_from={run}"], "choose another --workdir"),
        (
            "train.py",
            ["--config=tests/system/tiny.py", "--config.train.init_from={run}", "--workdir={new}"],
            "holds no parameters",
        ),
        ("sample.py", ["--checkpoint={run}", "Mia", "--guidance_scale=3"], "has no such setting"),
        ("sample.py", ["--checkpoint={run}", "Mia[[2]]", "--mode=infill"], "only continues texts"),
        ("sample.py", ["--checkpoint={run}", "Mia", "--step=7"], "it must be one of 10, 15, 20"),
        ("likelihood.py", ["--checkpoint={run}"], "a run of family 'autoregressive'"),
        ("likelihood.py", ["--part=speed", CONFIG, "--config.transformer.vocab_size=300"], "--config: a run of family"),
        ("train.py", [COLA, "--workdir={run}"], "holds a run of family 'autoregressive', not 'cola'"),
        ("train.py", [CONFIG, "--config.train.init_from=nowhere"], "nowhere: no checkpoint here"),
        (
            "train.py",
            [CONFIG, "--config.transformer.vocab_size=20"],
            "vocab_size = 20: must be at least the tokenizer's",
        ),
        ("evaluate.py", ["--checkpoint={run}", "--guidance=1,2"], "--guidance: the checkpoint's family"),
        ("evaluate.py", ["--checkpoint={run}", "--gap=3"], "--gap: family 'autoregressive' only continues texts"),
        ("evaluate.py", ["--checkpoint={run}", "--evaluators=reconstruction"], "needs latents"),
        (
            "evaluate.py",
            ["--checkpoint={run}", "--evaluators=perplexity", "--scorer=nowhere"],
            "nowhere: no checkpoint here",
        ),
        ("convert.py", ["--from={run}", "--to={new}"], "a run of family 'autoregressive'"),
        ("score.py", ["--checkpoint={run}", "--samples=2", "--input=x", "--output=y"], "has no such setting"),
    ],
)
def test_what_does_not_fit_is_one_line(run, cache, tmp_path, binary, arguments, words):
    names = {"run": run[0], "new": tmp_path / "new"}
    filled = [argument.format(**names) for argument in arguments]
    if binary == "train.py" and "--workdir" not in arguments[-1]:
        filled.append(f"--workdir={run[0] if '{run}' in arguments[-1] else tmp_path / 'new'}")
    assert words in call(cache, binary, *filled, status=2)


def test_a_character_that_comes_byte_by_byte_is_printed_when_it_is_whole():
    """What --stream prints is the decoded text, also where the text ends inside a character."""
    code = """
import sys, types
from absl import flags
sys.path.insert(0, "launch")
import sample
flags.FLAGS(["sample", "--stream"])
shown = []
sample.print = lambda *texts, end, flush: shown.append("".join(texts))
decode = lambda ids: bytes(ids).decode("utf-8", "replace")
stream = lambda *rest, sample_ids: (types.SimpleNamespace(tokens=[[byte]]) for byte in TEXT)
TEXT = "a\\u00e9b\\U0001f600c".encode() + b"\\xe2\\x98"
config = types.SimpleNamespace(data=types.SimpleNamespace(sequence_length=56))
run = types.SimpleNamespace(
    tokenizer=types.SimpleNamespace(encode=list, decode=decode),
    family=types.SimpleNamespace(stream=stream), model=None, params=None, config=config,
)
import dataclasses
Settings = dataclasses.make_dataclass("Settings", [("max_new_tokens", int)])
assert list(sample.continuations(run, [b""], Settings(9), None)) == [list(TEXT)]
assert "".join(shown) == decode(TEXT), shown
assert [text for text in shown if text] == ["a", "\\u00e9", "b", "\\U0001f600", "c", "\\ufffd"], shown
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr[-2000:]
