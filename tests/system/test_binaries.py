"""The binaries as a user runs them, on the real model and data at a tiny size."""

import functools
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import copies
import environment
import jax
import pytest

pytestmark = pytest.mark.slow  # every call of a binary imports and compiles
ROOT = Path(__file__).parents[2]
REPORTS = ("metrics.jsonl", "samples.jsonl")


def start(cache, binary, *arguments, devices: int = 1, **options) -> subprocess.Popen:
    command = [sys.executable, ROOT / "launch" / binary, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, cwd=ROOT, env=environment.process(devices, cache), **pipes)


def call(cache, binary, *arguments, stdin: str | None = None, status: int = 0, devices: int = 1) -> str:
    given = (list(map(str, arguments)), environment.process(devices, cache), stdin or "")
    found, out, error = copies.call(ROOT / "launch" / binary, *given)
    assert found == status, error[-3000:]
    if status == 2:
        assert error.startswith("error: ") and len(error.splitlines()) == 1, error
        return error
    return out


def train(cache, workdir, *arguments, **options) -> str:
    return call(cache, "train.py", "--config=tests/system/tiny.py", f"--workdir={workdir}", *arguments, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    """A finished run and what it printed."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    return workdir, train(cache, workdir)


def losses(workdir, stage: int) -> list[float]:
    return [row["loss"] for row in rows(workdir) if row["kind"] == "train" and row["stage"] == stage]


def rows(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_training_reports_every_term(run):
    workdir, printed = run
    last = [row for row in rows(workdir) if row["kind"] == "train"][-1]
    terms = {"flow", "reconstruction", "entropy", "mask", "reference_kl", "logsnr", "accuracy", "loss"}
    assert last["step"] == 30 and last["stage"] == 2 and terms <= set(last)
    assert "tokens/s" in printed and "ETA" in printed


def test_sample(run, cache, tmp_path):
    checkpoint = f"--checkpoint={run[0]}"
    prompt = "Mia was a girl from the village."
    out = call(cache, "sample.py", checkpoint, "--json", prompt, "--max_new_tokens=5", "--unconditional=1")
    first, second = map(json.loads, out.splitlines())
    assert first["prompt"] == prompt and len(first["tokens"]) <= 5 and second["prompt"] == ""
    file = tmp_path / "prompts.txt"
    file.write_text(prompt + "\n", encoding="utf-8")
    from_file = call(cache, "sample.py", checkpoint, "--json", f"--prompts_file={file}", "--max_new_tokens=5")
    piped = call(cache, "sample.py", checkpoint, "--json", "-", "--max_new_tokens=5", stdin=prompt + "\n")
    assert json.loads(from_file) == json.loads(piped) == first


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([""], "prompt 0 is empty"),
        ([], "no prompt"),
        (["word " * 80], "must be at most 56 (context)"),
        (["Mia", "--steps=0"], "steps = 0"),
        (["Mia", "--prompts_file=none.txt"], "none.txt"),
        (["Mia", "--temperature=-1"], "temperature = -1.0"),
    ],
)
def test_sample_refuses(run, cache, arguments, words):
    assert words in call(cache, "sample.py", f"--checkpoint={run[0]}", *arguments, status=2)


def test_sample_needs_a_checkpoint_and_its_tokenizer(run, cache, tmp_path):
    assert "--checkpoint is missing" in call(cache, "sample.py", "Mia", status=2)
    assert "no checkpoint here" in call(cache, "sample.py", f"--checkpoint={tmp_path}", "Mia", status=2)
    (tmp_path / "stage2").symlink_to(run[0] / "stage2")
    assert "tokenizer.model: missing" in call(cache, "sample.py", f"--checkpoint={tmp_path}", "Mia", status=2)
    model = (run[0] / "tokenizer.model").read_bytes()
    other = model.replace(b"the", b"thy")
    assert other != model
    (tmp_path / "tokenizer.model").write_bytes(other)
    assert "its hash differs" in call(cache, "sample.py", f"--checkpoint={tmp_path}", "Mia", status=2)


def test_evaluate(run, cache, tmp_path):
    file = tmp_path / "rows.json"
    arguments = (f"--checkpoint={run[0]}", "--count=4", "--guidance=1,3", f"--json={file}")
    assert len(call(cache, "evaluate.py", *arguments).splitlines()) == 2
    assert [row["guidance_scale"] for row in json.loads(file.read_text())] == [1.0, 3.0]
    assert "--steps = x" in call(cache, "evaluate.py", f"--checkpoint={run[0]}", "--steps=x", status=2)


def test_evaluate_conditioning_and_gaps(run, cache):
    arguments = (f"--checkpoint={run[0]}", "--count=4")
    ways = "--conditioning=clean,repaint:2:0.5,left_pad,right_pad"
    assert len(call(cache, "evaluate.py", *arguments, "--prompt_tokens=5", ways).splitlines()) == 4
    assert "in gaps of 3 tokens" in call(cache, "evaluate.py", *arguments, "--gap=3")
    assert "repaint:R:M" in call(cache, "evaluate.py", *arguments, "--conditioning=repaint:x", status=2)
    assert "--gap: cannot be given" in call(cache, "evaluate.py", *arguments, "--gap=3", "--prompted", status=2)


def test_sample_fills_and_rewrites(run, cache):
    sample = functools.partial(call, cache, "sample.py", f"--checkpoint={run[0]}")
    out = sample("--mode=infill", "Mia was a[[3]] village.")
    assert out.startswith("Mia was a") and out.endswith(" village.\n")
    row = json.loads(sample("--mode=infill", "Mia was a[[3]] village.", "--json"))
    assert len(row["tokens"]) == 3 and out == "Mia was a" + row["text"] + " village.\n"
    out = sample("--mode=edit", "--strength=0.001", "Mia was[[ a girl]] from the village.")
    assert out.startswith("Mia was") and out.endswith(" from the village.\n")
    whole = sample("Mia was a girl from the village.", "--max_new_tokens=9")
    assert sample("Mia was a girl from the village.", "--max_new_tokens=9", "--stream") == whole
    assert "text with one [[N]]" in sample("--mode=infill", "Mia", status=2)
    assert "strength = 2.0" in sample("--mode=edit", "--strength=2", "[[Mia]]", status=2)


def test_the_notebook_on_sampling(run, monkeypatch):
    """Every code cell of colabs/sampling.ipynb, with a tiny run."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    scope, small = {}, {"RUN": str(run[0]), "COUNT": 2, "STEPS": (1, 2), "GUIDANCE": (1.0, 3.0), "PROMPT_TOKENS": 5}
    cells = json.loads((ROOT / "colabs" / "sampling.ipynb").read_text())["cells"]
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        with jax.numpy_rank_promotion("allow"):  # as users have it
            exec("".join(cell["source"]), scope)
        scope |= small if "COUNT" in "".join(cell["source"]) and "run" not in scope else {}
    assert scope["grid"].shape == (2, 2) and len(scope["shares"]) == 9


def test_benchmark(cache, tmp_path):
    file, sizes = tmp_path / "rows.json", ["--config.vae.vocab_size=300", "--config.data.sequence_length=56"]
    arguments = ("--config=tests/system/tiny.py", *sizes, "--batch=1,2", "--prompt=9", "--repeats=1", f"--json={file}")
    assert len(call(cache, "benchmark.py", *arguments).splitlines()) == 4
    rows = json.loads(file.read_text())
    assert [(row["what"], row["batch"]) for row in rows] == [(w, b) for w in ("generation", "training") for b in (1, 2)]
    assert "--dtype = 'x'" in call(cache, "benchmark.py", *arguments, "--dtype=x", status=2)
    assert "--batch = x" in call(cache, "benchmark.py", *arguments[:1], *sizes, "--batch=x", status=2)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config.data.corpus=text", "--config.data.files=none.txt"], "none.txt"),
        (["--config.dit.latent_dim=8"], "config.dit.latent_dim = 8: must be vae.latent_dim = 4"),
        (["--config.stage2.strategy=all"], "config.stage2.strategy = 'all'"),
    ],
)
def test_train_refuses(cache, tmp_path, arguments, words):
    assert words in train(cache, tmp_path / "run", *arguments, status=2)
    assert not (tmp_path / "run" / "stage1").exists()


def test_train_refuses_another_config(run, cache):
    before = (run[0] / "config.json").read_bytes()
    assert "seed: 0 -> 1" in train(cache, run[0], "--config.seed=1", status=2)
    assert (run[0] / "config.json").read_bytes() == before


def test_killed_runs_end_like_one_that_was_not(run, cache, tmp_path):
    """SIGKILL twice in each stage, at random moments around checkpoints that are being written."""
    workdir, draw, null = tmp_path / "killed", random.Random(0), subprocess.DEVNULL
    for stage in ("stage1", "stage1", "stage2", "stage2"):
        process = start(
            cache, "train.py", "--config=tests/system/tiny.py", f"--workdir={workdir}", stdout=null, stderr=null
        )
        before = set((workdir / stage).glob("*"))
        wait = draw.randint(1, 2)  # new names of checkpoints, temporary ones among them
        while process.poll() is None and len(set((workdir / stage).glob("*")) - before) < wait:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        assert process.poll() is None, f"{stage} ended before it was killed"
        process.kill()
        process.wait()
    train(cache, workdir)
    for name in REPORTS:
        assert (workdir / name).read_bytes() == (run[0] / name).read_bytes()
    for stage in ("stage1", "stage2"):
        metas = [next((place / stage / "30" / "meta").iterdir()).read_text() for place in (workdir, run[0])]
        assert metas[0] == metas[1]  # hashes of every array (parameters, moments, average), position in the data
