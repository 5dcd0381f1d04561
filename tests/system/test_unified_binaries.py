"""The joint model of text and images through the binaries, as a user runs them, at a tiny size."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from test_binaries import ROOT, call, rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, cache):
    """A finished run with its report."""
    workdir = tmp_path_factory.mktemp("run") / "scenes"
    config = ("--config=tests/system/tiny_images.py", f"--workdir={workdir}")
    call(cache, "train.py", *config)
    return workdir


def test_training_ends_with_a_report(workdir):
    trained = [row for row in rows(workdir) if row["kind"] == "train" and row["stage"] == 2]
    assert trained[-1]["step"] == 20
    terms = ("text_flow", "image_flow", "caption_flow")
    tasks = [[name for name in terms if row[name] > 0] for row in trained]
    assert all(len(found) == 1 for found in tasks) and {found[0] for found in tasks} == set(terms)
    held_out = [row for row in rows(workdir) if row["kind"] == "holdout" and row["stage"] == 2]
    assert all(row[name] > 0 for row in held_out for name in terms)
    report = json.loads((workdir / "report.json").read_text())
    assert set(report["scenes"]) == {"reconstruction", "text_to_image", "image_to_text", "text", "image"}
    assert report["scenes"]["text_to_image"]["all"]["count"] == 4


def test_images_are_drawn_and_described(workdir, cache, tmp_path):
    sheet = tmp_path / "sheet.png"
    call(cache, "images.py", f"--checkpoint={workdir}", "A red circle.", "", f"--out={sheet}", "--copies=4")
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape[0] > 256 and pixels.std() > 5  # two rows of images of 128 pixels
    picture = tmp_path / "one.png"
    Image.fromarray(np.full((40, 50, 3), 255, np.uint8)).save(picture)
    told = call(cache, "images.py", f"--checkpoint={workdir}", "--mode=describe", str(picture))
    assert told.startswith(f"{picture}: ")
    assert call(cache, "sample.py", f"--checkpoint={workdir}", "A red", "--max_new_tokens=4")


def test_held_out_pictures_are_scored(workdir, cache, tmp_path):
    sheet, numbers = tmp_path / "sheet.png", tmp_path / "numbers.json"
    arguments = (f"--checkpoint={workdir}", "--mode=held_out", f"--out={sheet}", f"--json={numbers}")
    told = call(cache, "images.py", *arguments, "--count=40", "--probe=red,green", "--probe_pictures=200")
    found = json.loads(numbers.read_text())
    assert found["probe"]["held_out"]["mean"] > 0.8  # chance: a half
    assert 20 < found["probe"]["drawn"]["count"] < 40  # other captions have both colours
    assert 0 < found["reconstruction"]["absolute"]["mean"] < 1 and "of the pixels' range" in told
    assert np.asarray(Image.open(sheet)).shape[1] > 12 * 128  # six pairs in a row
    none = call(cache, "images.py", *arguments, "--probe=red,pink", status=2)
    assert "word 'pink': must be in a caption of 2000" in none


def test_pairs_are_scored(workdir, cache, tmp_path):
    options = ("--mode=likelihood", "--candidates=3", "--likelihood_solver=euler", "--likelihood_steps=2")
    out = call(
        cache, "images.py", f"--checkpoint={workdir}", "--count=6", *options, f"--json={tmp_path / 'found.json'}"
    )
    assert "images scored: 24 of 24" in out and "texts scored given images: 18 of 18" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["count"] == 6 and found["pixels"]["scale"] > 0
    bits = found["bits_per_dimension"]
    assert 0 < bits["reconstruction"]["mean"] < bits["own_text"]["mean"] < 20
    for name in ("image_given_text", "text_given_image", "text_given_image_over_text"):
        assert 0 <= found[name]["top_1"]["mean"] <= 1


def test_the_notebook(workdir, monkeypatch):
    """Every code cell of colabs/unified.ipynb, with a tiny run."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    scope, small = {}, {"RUN": str(workdir), "COUNT": 4, "STEPS": (1, 2), "GUIDANCE": (1.0, 3.0)}
    cells = json.loads((ROOT / "colabs" / "unified.ipynb").read_text())["cells"]
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        with jax.numpy_rank_promotion("allow"):  # as users have it
            exec("".join(cell["source"]), scope)
        scope |= small if "COUNT" in "".join(cell["source"]) and "run" not in scope else {}
    assert len(scope["told"]) == 4 and np.isfinite(scope["score"].elbo).all()
    assert [len(values) for values in scope["curves"].values()] == [2, 2]


def test_what_cannot_be_drawn_is_refused(workdir, cache, tmp_path):
    checkpoint = f"--checkpoint={workdir}"
    for arguments, words in (
        ([checkpoint], "--mode=draw: must have a text or more"),
        ([checkpoint, "--mode=scenes", "x"], "must have no arguments"),
        ([checkpoint, "--mode=describe", str(tmp_path / "no.png")], "no.png: must be an image that can be read"),
        ([checkpoint, "--mode=likelihood", "x", "y"], "must have one file of JSON lines, or no argument"),
        ([checkpoint, "--mode=likelihood", "--count=3"], "candidates = 8: must be from 2 to the 3 different texts"),
        ([checkpoint, "x", "--steps=0"], "--steps = 0: must be at least 1"),
        ([checkpoint, "x", f"--out={tmp_path}/no/x.png"], "x.png: must be in a directory that exists"),
    ):
        assert words in call(cache, "images.py", *arguments, status=2)
