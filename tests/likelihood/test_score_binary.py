"""launch/score.py and the notebook as a user runs them, on the real model and data at a tiny size."""

import json
import os
import re
import time
from pathlib import Path

import jax
import pytest

from cola_jax import runs
from cola_jax.config import StoriesConfig
from cola_jax.data.stories import Stories
from cola_jax.evaluation import likelihood as measures
from tests.system.test_binaries import call, start, train

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TEXT = "Mia was a girl."  # few tokens, even where the tiny vocabulary does not have its words
STORIES = Stories(StoriesConfig(aligned=True, values=2, variants=1, choices=1))  # of tests/system/tiny.py
STORY = STORIES.story(0, 0)
FIRST = STORIES.first_sentence(STORY)  # whole blocks
LINES = [
    *({"text": TEXT, "id": i} for i in range(20)),
    {"prefix": FIRST, "response": STORY[len(FIRST) :]},
    {"prefix": FIRST, "candidates": [STORY[len(FIRST) :], " " + FIRST]},
    {"prefix": "Mia was", "candidates": [" a girl.", " a boy."]},
]
SETTINGS = ("--samples=2", "--solver=heun", "--steps=2", "--batch_size=4")


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("run") / "tiny"
    train(cache, workdir)
    return workdir


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    file = tmp_path_factory.mktemp("asked") / "in.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def whole(run, cache, asked, tmp_path_factory):
    file = tmp_path_factory.mktemp("whole") / "out.jsonl"
    call(cache, "score.py", f"--checkpoint={run}", f"--input={asked}", f"--output={file}", *SETTINGS)
    return file


def test_scores_every_line(whole):
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(len(LINES)))
    assert all(row["iwae"] is None and 1 <= row["ess"] <= 2 for row in rows[:20])  # Hutchinson's divergence
    assert len({row["elbo"] for row in rows[:20]}) == 20  # each line has its own draws
    assert rows[20]["plug_in_score"]["elbo"] < 0 and set(rows[21]["best"].values()) <= {0, 1}
    inside = [one["plug_in"] for one in rows[22]["scores"]]
    assert all(one["elbo"] is None and "ends inside a block" in one["reason"] for one in inside)
    assert rows[22]["best"]["plug_in"] is None and rows[22]["best"]["response"] in (0, 1)


def assert_same(text: str, other: str):
    """The same lines, up to the last digits: two processes' sums of float32 may differ in them."""
    number = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")
    assert number.sub("#", text) == number.sub("#", other)
    ours, theirs = ([float(x) for x in number.findall(one)] for one in (text, other))
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4)


def test_a_killed_run_continues_without_double_or_torn_lines(run, cache, asked, whole, tmp_path):
    file = tmp_path / "out.jsonl"
    arguments = (f"--checkpoint={run}", f"--input={asked}", f"--output={file}", *SETTINGS)
    for lines in (1, 9):
        process = start(cache, "score.py", *arguments)
        while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < lines):
            time.sleep(0.001)
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
        process.communicate()
    with open(file, "ab") as torn:
        torn.write(b'{"index": 99')
    call(cache, "score.py", *arguments)
    found = file.read_bytes()
    assert_same(found.decode(), whole.read_text())
    assert "seed = 0, not 1" in call(cache, "score.py", *arguments, "--seed=1", status=2)
    assert file.read_bytes() == found


def test_a_mesh_gives_the_same(run, cache, asked, whole, tmp_path):
    file = tmp_path / "out.jsonl"
    often = tmp_path / "in.jsonl"  # 96 batches: devices that blocked each other did it within 30
    often.write_text(asked.read_text() * 12)
    mesh = ("--mesh_data=2", "--mesh_tensor=2", "--batch_size=6")
    call(cache, "score.py", f"--checkpoint={run}", f"--input={often}", f"--output={file}", *SETTINGS, *mesh, devices=4)
    rows = file.read_text().splitlines()
    assert len(rows) == 12 * len(LINES)
    for one, other in zip(whole.read_text().splitlines(), rows[: len(LINES)], strict=True):
        one, other = json.loads(one), json.loads(other)
        if "text" in one:
            assert other["elbo"] == pytest.approx(one["elbo"], rel=1e-3)


def test_tolerances_that_cannot_be_met(run, cache, asked, tmp_path):
    file = tmp_path / "out.jsonl"
    settings = ("--samples=1", "--rtol=1e-7", "--atol=1e-7", "--max_steps=3", "--batch_size=8")
    said = call(cache, "score.py", f"--checkpoint={run}", f"--input={asked}", f"--output={file}", *settings)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == len(LINES) and all("the ODE was not solved" in row["error"] for row in rows)
    assert "not scored: [0, 1, 2," in said


@pytest.mark.parametrize(
    ("line", "flags", "words"),
    [
        ({"text": "word " * 80}, (), "in.jsonl line 1: text makes"),
        ({"prefix": TEXT, "response": ""}, (), "in.jsonl line 1: response is empty"),
        ({"text": TEXT}, ("--samples=0",), "--samples = 0: must be at least 1"),
        ({"text": TEXT}, ("--dtype=float64",), "JAX_ENABLE_X64=1"),
        ({"text": TEXT}, ("--mesh_data=3",), "mesh"),
        ({"other": TEXT}, (), "in.jsonl line 1: fields ['other']"),
    ],
)
def test_refuses(run, cache, tmp_path, line, flags, words):
    asked = tmp_path / "in.jsonl"
    asked.write_text(json.dumps(line) + "\n")
    arguments = (f"--checkpoint={run}", f"--input={asked}", f"--output={tmp_path / 'out'}", *flags)
    assert words in call(cache, "score.py", *arguments, status=2)
    assert not (tmp_path / "out").exists()


def test_refuses_missing_files(run, cache, asked, tmp_path):
    checkpoint, output = f"--checkpoint={run}", f"--output={tmp_path / 'out'}"
    assert "--input is missing" in call(cache, "score.py", checkpoint, output, status=2)
    assert "--output is missing" in call(cache, "score.py", checkpoint, f"--input={asked}", status=2)
    assert "none.jsonl" in call(cache, "score.py", checkpoint, output, "--input=none.jsonl", status=2)
    # A run that has only been through stage 1.
    only = tmp_path / "only"
    only.mkdir()
    for name in ("stage1", "tokenizer.model", "config.json"):
        (only / name).symlink_to(run / name)
    said = call(cache, "score.py", f"--checkpoint={only}", f"--input={asked}", output, status=2)
    assert "its stage1 holds vae only" in said and "need dit" in said


def test_measures(run, cache, tmp_path):
    arguments = (f"--checkpoint={run}", "--solver=heun", "--steps=2", "--count=3")
    gap = call(cache, "likelihood.py", *arguments, "--samples=1,2", f"--json={tmp_path / 'gap.json'}")
    values = json.loads((tmp_path / "gap.json").read_text())
    assert "ETA" in gap and "-IWAE" not in gap and gap.count("no IWAE with --divergence=hutchinson") == 1
    # The same stories scored line by line as score.py does, K = 2: the same sum over the same tokens.
    opened = runs.load(str(run))
    stories = measures.held_out(opened, 3, opened.config.data_seed)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in stories.texts))
    files = (f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}")
    call(cache, "score.py", arguments[0], *files, *SETTINGS, "--seed=1")
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    tokens = sum(line["tokens"] for line in scored)
    for name, field, sign in (("-ELBO", "elbo", -1), ("-prior", "prior", -1), ("posterior", "posterior", 1)):
        assert values[name]["mean"] == pytest.approx(sign * sum(line[field] for line in scored) / tokens, rel=1e-3)
    assert values["entropy"]["mean"] == pytest.approx(-stories.log_prob.sum() / tokens, rel=1e-6)
    exact = call(cache, "likelihood.py", *arguments, "--samples=1,2", "--divergence=exact")
    bound = {name: float(value) for name, value in re.findall(r"^(-ELBO|-IWAE 2): ([\d.]+)", exact, re.MULTILINE)}
    assert bound["-IWAE 2"] < bound["-ELBO"]
    # So few and short stories have no pairs to rank.
    assert "--count = 3" in call(cache, "likelihood.py", *arguments, "--part=ranking", "--samples=1", status=2)
    assert "64 rademacher" in call(cache, "likelihood.py", *arguments, "--part=probes")


def test_measures_the_prior(run, cache, tmp_path):
    file = tmp_path / "prior.json"
    arguments = (f"--checkpoint={run}", "--solver=heun", "--steps=2", "--count=3", f"--json={file}")
    said = call(cache, "likelihood.py", *arguments, "--part=prior")
    found = json.loads(file.read_text())
    assert [row["time"] for row in found["field"]] == [0, 0.02, 0.1, 0.3, 0.7]
    assert [row["start"] for row in found["split"]] == [0, 0.02, 0.05, 0.1, 0.2, 0.3]
    assert all(row["error"]["mean"] > 0 for row in found["field"])
    assert all(row["mismatch"]["mean"] < row["excess"]["mean"] for row in found["split"])  # on stories: less the rate
    assert said.count("field at t = ") == 5 and said.count("exact flow below t = ") == 6


def test_notebook(run, monkeypatch):
    """Every code cell of colabs/likelihood.ipynb, with two tiny runs."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = json.loads((ROOT / "colabs" / "likelihood.ipynb").read_text())["cells"]
    scope = {}
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        with jax.numpy_rank_promotion("allow"):  # as users have it
            exec(compile(source, cell["id"], "exec"), scope)
        if "RUNS" in source and "runs" not in scope:
            small = {
                "RUNS": {"learnable": str(run), "1.0": str(run)},
                "STORIES": 2,
                "SAMPLES": 2,
                "CLOUD": 4,
                "GRID": 3,
            }
            small["SETTINGS"] = scope["Settings"](samples=2, solver="heun", steps=2)
            scope |= small | {"REFERENCE": 1e-3}
    assert len(scope["rows"]) == 3 and os.environ["MPLBACKEND"] == "Agg"
