"""The binaries on a released directory, as a user runs them."""

import json
import pathlib
import shutil

import pytest
from evaluation.test_conversion import GOLDEN, tokenizer_json
from system.test_binaries import call

from cola_jax import release

pytestmark = pytest.mark.slow  # every call of a binary imports and compiles


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("released") / "cola"
    for part in release.PARTS:
        shutil.copytree(GOLDEN / part, place / part)
    (place / "tokenizer.json").write_text(tokenizer_json())
    return place


def test_every_binary_takes_it(released, cache, tmp_path):
    arguments = ("--json", "--max_new_tokens=5", "--steps=2", "a cat.")
    line = json.loads(call(cache, "sample.py", f"--checkpoint={released}", *arguments))
    assert line["prompt"] == "a cat." and len(line["tokens"]) <= 5
    elsewhere = tmp_path / "mine.json"
    (released / "tokenizer.json").rename(elsewhere)
    flags = (f"--tokenizer={elsewhere}", "--eos_id=65", "--pad_id=66")
    assert json.loads(call(cache, "sample.py", f"--checkpoint={released}", *flags, *arguments)) == line
    assert "tokenizer.json: missing" in call(cache, "sample.py", f"--checkpoint={released}", "a cat", status=2)
    elsewhere.rename(released / "tokenizer.json")
    rows = call(cache, "evaluate.py", f"--checkpoint={released}", "--count=2", "--steps=1", "--guidance=1")
    assert len(rows.splitlines()) == 1


def test_convert(released, cache, tmp_path):
    run, back = tmp_path / "run", tmp_path / "back"
    assert "ETA" in call(cache, "convert.py", f"--from={released}", f"--to={run}", "--mesh_fsdp=2", devices=2)
    call(cache, "sample.py", f"--checkpoint={run}", "--steps=1", "a cat.")
    call(cache, "convert.py", f"--from={run}", f"--to={back}")
    for file in released.rglob("*.*"):
        assert (back / file.relative_to(released)).read_bytes() == file.read_bytes()
    assert "run: not empty" in call(cache, "convert.py", f"--from={released}", f"--to={run}", status=2)
    assert "--to is missing" in call(cache, "convert.py", f"--from={released}", status=2)
    assert "no checkpoint here" in call(cache, "convert.py", "--from=none", f"--to={tmp_path}/x", status=2)
    target = f"--to={tmp_path}/x"
    assert "--dtype = 'int8'" in call(cache, "convert.py", f"--from={run}", target, "--dtype=int8", status=2)
    assert "mesh" in call(cache, "convert.py", f"--from={released}", target, "--mesh_fsdp=64", status=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "run"]
