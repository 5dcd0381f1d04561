"""Preparations that are stopped, killed, repeated or given something else the second time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import corpus_files
import pytest

from cola_jax.data import manifest
from cola_jax.data.preparation import prepare, progress, sources, tokenizer_choice
from cola_jax.types import UserError

HERE = Path(__file__).parent
TEXTS = [f"text {i} of the garden" for i in range(120)]
OPTIONS = {"holdout": 0.3, "shard_tokens": 500}


def run(folder: Path, output: str = "out", say=lambda line: None, stopped=lambda: False, **changes):
    source = sources.create("jsonl", str(folder / "in" / "*.jsonl"))
    choice = tokenizer_choice.Choice(changes.pop("tokenizer", "bytes"), changes.pop("vocab_size", 300))
    return prepare.prepare(source, choice, prepare.Options(**OPTIONS | changes), folder / output, say, stopped)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def stop_at(record: int):
    """A ``stopped`` that says yes at a record."""
    left = [record]

    def stopped() -> bool:
        left[0] -= 1
        return not left[0]

    return stopped


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with input, the finished corpus of it in "whole", and a stopped preparation in "out"."""
    monkeypatch.setattr(prepare, "_CHUNK_CHARACTERS", 50)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here stops the machine
    corpus_files.write(tmp_path / "in", "jsonl", TEXTS)
    run(tmp_path, "whole")
    with pytest.raises(prepare.Unfinished, match="stopped; the same command goes on"):
        run(tmp_path, stopped=stop_at(100))
    done = progress.read(tmp_path / "out").shards
    assert len(done["train"]) >= 2 and done["holdout"] and not (tmp_path / "out" / manifest.NAME).exists()
    return tmp_path


def kill(*arguments) -> list[int]:
    """The numbers that `killed` prints."""
    command = [sys.executable, HERE / "killed.py", *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert found.returncode == 0, found.stdout + found.stderr
    return [int(number) for number in re.findall(r"\d+", found.stdout)]


def test_what_is_killed_at_many_points_and_started_again_ends_the_same(tmp_path):
    ends, attempts = kill(tmp_path, 4)
    assert ends > 10 and attempts > 3


@pytest.mark.slow
def test_what_is_killed_anywhere_and_started_again_ends_the_same(tmp_path):
    ends, _, *signals = kill(tmp_path, 1, 100)
    assert ends > 40 and signals[0] == 90 and signals[3] == 10 and signals[2] > 2 and signals[5] > 0


def test_a_stopped_preparation_goes_on_and_makes_no_tokens_twice(folder, monkeypatch):
    made = []
    encode = prepare._Encoder.__call__

    def spy(self, contents):
        made.extend(contents)
        return encode(self, contents)

    monkeypatch.setattr(prepare._Encoder, "__call__", spy)
    done = sum(shard.info.documents for found in progress.read(folder / "out").shards.values() for shard in found)
    run(folder)
    assert content(folder / "out") == content(folder / "whole")
    assert len(made) == len(TEXTS) - done and done > 40


def test_a_complete_one_says_so_and_changes_nothing(folder):
    said, before = [], content(folder / "whole")
    (folder / "whole" / progress.NAME).write_text("{}")  # as if it was killed before it could remove it
    found = run(folder, "whole", said.append)
    assert len(said) == 1 and said[0].startswith("nothing to do: ") and "120 records" in said[0]
    assert content(folder / "whole") == before and found == manifest.read(folder / "whole")


@pytest.mark.parametrize("output", ["out", "whole"])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shard_tokens": 501}, "shard_tokens: 500 -> 501"),
        ({"holdout": 0.25}, "holdout: 0.3 -> 0.25"),
        ({"align": 2}, "align: 1 -> 2"),
        ({"deduplicate": True}, "deduplicate: False -> True"),
        ({"tokenizer": "train"}, "tokenizer: 'bytes .*' -> 'trained, vocab_size 300'"),
    ],
)
def test_other_settings_are_refused(output, changes, named, folder):
    before = content(folder / output)
    with pytest.raises(
        UserError, match=f"--output = .*{output}: was begun with other settings .{named}.*new directory"
    ):
        run(folder, output, **changes)
    assert content(folder / output) == before


def test_workers_and_strictness_may_change(folder):
    run(folder, strict=True)
    assert content(folder / "out") == content(folder / "whole")


def test_other_files_are_refused(folder):
    (folder / "in" / "c.jsonl").write_bytes(corpus_files.lines(["more"]))
    with pytest.raises(UserError, match=r"files\[2\]: absent -> 'c.jsonl, \d+ bytes'"):
        run(folder)


def test_other_content_of_the_same_size_is_refused(folder):
    path = folder / "in" / "a.jsonl"
    path.write_bytes(path.read_bytes().replace(b"text 7 ", b"text 8 "))
    with pytest.raises(UserError, match=r"--input: its documents are not those of .*-00000: it was changed"):
        run(folder)
    assert len(content(folder / "out")) > 4  # nothing is thrown away


def test_input_that_has_become_shorter_is_refused(folder):
    for path in (folder / "in").iterdir():
        path.write_bytes(b"\n" * path.stat().st_size)
    path.write_bytes(corpus_files.lines(TEXTS[:3]).ljust(path.stat().st_size, b"\n"))
    with pytest.raises(UserError, match="its documents are not those of"):
        run(folder)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("damage", ["change", "cut", "remove"])
def test_a_damaged_shard_is_made_again(suffix, damage, folder):
    said = []
    path = folder / "out" / f"train-00001{suffix}"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data if damage == "change" else data[:-9])
    if damage == "remove":
        path.unlink()
    run(folder, say=said.append)
    assert content(folder / "out") == content(folder / "whole")
    assert f"{folder / 'out' / 'train-00001'}: is not what it was" in said[0]


def test_leftovers_are_removed(folder):
    for name in (
        "train-00009.bin.partial",
        "holdout-00007.idx",
        "tokenizer.model.123.partial",
        "manifest.json.partial",
    ):
        (folder / "out" / name).write_text("left")
    (folder / "out" / "notes.txt").write_text("mine")
    run(folder)
    assert content(folder / "out") == content(folder / "whole") | {"notes.txt": b"mine"}


def test_a_directory_with_something_else_is_refused(folder):
    (folder / "other").mkdir()
    (folder / "other" / "train-00000.bin").write_text("mine")
    with pytest.raises(UserError, match="other: holds train-00000.bin already; must be a new directory"):
        run(folder, "other")
    (folder / "file").write_text("mine")
    with pytest.raises(UserError, match="file: is a file; must be a new directory"):
        run(folder, "file")
    assert content(folder / "other") == {"train-00000.bin": b"mine"} and (folder / "file").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 2}', "{", '{"version": 1, "shards": {}}'])
def test_a_damaged_state_is_refused(text, folder):
    (folder / "out" / progress.NAME).write_text(text)
    with pytest.raises(UserError, match="progress.json: .*remove .* and prepare again"):
        run(folder)


def test_two_at_a_time_are_refused(folder):
    with progress.alone(folder / "out"), pytest.raises(UserError, match="out: another process is preparing it"):
        run(folder)
    run(folder)
    assert content(folder / "out") == content(folder / "whole")


def test_a_trained_tokenizer_is_not_trained_again(folder, monkeypatch):
    run(folder, "trained", tokenizer="train", shard_tokens=100)
    with pytest.raises(prepare.Unfinished):
        # The sample takes the records once, the shards a second time.
        run(folder, "stopped", tokenizer="train", shard_tokens=100, stopped=stop_at(220))
    monkeypatch.setattr(tokenizer_choice, "sample", None)
    run(folder, "stopped", tokenizer="train", shard_tokens=100)
    assert content(folder / "stopped") == content(folder / "trained")


def test_a_wrong_input_can_be_mended_before_a_shard_is_complete(folder):
    with open(folder / "in" / "a.jsonl", "ab") as file:
        file.write(b"{\n")
    for _ in range(2):
        with pytest.raises(UserError, match="a.jsonl line 61: not JSON"):
            run(folder, "new", strict=True, shard_tokens=10**6)
        assert not (folder / "new").exists()


LIMITED = """
import resource, sys
sys.path[:0] = [{root!r}, {here!r}]
from pathlib import Path
import test_prepare_again as tests
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    tests.run(Path({folder!r}), "limited", shard_tokens=10**6)
except tests.prepare.Unfinished as error:
    print(error)
"""


def test_a_file_that_cannot_grow_ends_with_a_line(folder):
    run(folder, "large", shard_tokens=10**6)
    code = LIMITED.format(root=str(HERE.parents[1]), here=str(HERE), folder=str(folder), limit=3000)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert re.fullmatch(r".*limited.*: File too large; it must be possible .* same command goes on\n", found.stdout), (
        found
    )
    assert sorted(content(folder / "limited")) == ["progress.json"]
    run(folder, "limited", shard_tokens=10**6)
    assert content(folder / "limited") == content(folder / "large")


def test_a_directory_that_cannot_be_made(folder):
    (folder / "file").write_text("")
    with pytest.raises(prepare.Unfinished, match=r"file/out: Not a directory; .*same command goes on"):
        run(folder, "file/out")


@pytest.mark.parametrize("act", ["replace", "open"])
def test_each_error_of_the_disk_ends_with_a_line_and_can_be_repeated(act, folder, monkeypatch):
    """At whichever call it happens."""
    original, left = getattr(os, act), [0]

    def failing(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device", "a file")
        return original(*arguments, **options)

    monkeypatch.setattr(os, act, failing)
    for number in range(1, 100):
        left[0] = number
        try:
            run(folder, f"out{number}")
            break
        except prepare.Unfinished as error:
            assert str(error).startswith("a file: No space left on device; ")
        left[0] = 0
        run(folder, f"out{number}")
        assert content(folder / f"out{number}") == content(folder / "whole")
    assert number > 10
