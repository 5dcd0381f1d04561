"""launch/prepare.py as a user runs it."""

import functools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import copies
import environment
import pytest

from cola_jax.data import manifest, shards, tokenizers

pytestmark = pytest.mark.slow  # every call of a binary imports
ROOT = Path(__file__).parents[2]


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, ROOT / "launch" / "prepare.py", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment.process(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def call(*arguments, status: int = 0) -> str:
    program = ROOT / "launch" / "prepare.py"
    found, out, error = copies.call(program, list(map(str, arguments)), environment.process())
    assert found == status, error[-3000:]
    if status == 2:
        assert error.startswith("error: ") and len(error.splitlines()) == 1, error
        return error
    assert not error, error
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepare")
    with open(folder / "a.jsonl", "w", encoding="utf-8") as file:
        for i in range(20_000):
            file.write(json.dumps({"text": f"document {i}\n" + f"word{i % 7} " * 300}) + "\n")
    return folder


COMMON = ("--format=jsonl", "--tokenizer=bytes", "--shard_tokens=3000000", "--workers=2")


@functools.cache
def whole(folder: Path) -> dict[str, bytes]:
    call(f"--input={folder}/a.jsonl", f"--output={folder}/whole", *COMMON)
    return content(folder / "whole")


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_corpus_and_the_same_command_again(folder):
    assert len(whole(folder)) > 20
    found = manifest.read(folder / "whole")
    assert found.counts["kept"] == 20_000
    shard = shards.Shard(folder / "whole" / "train-00000")
    assert tokenizers.ByteTokenizer().decode(shard.document(0)).startswith("document ")
    out = call(f"--input={folder}/a.jsonl", f"--output={folder}/whole", *COMMON)
    assert out.startswith("nothing to do: ") and len(out.splitlines()) == 1
    error = call(f"--input={folder}/a.jsonl", f"--output={folder}/whole", *COMMON, "--holdout=0.5", status=2)
    assert "holdout: 0.02 -> 0.5" in error


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_and_the_same_command_again(number, status, folder):
    expected = whole(folder)
    output = folder / f"stopped{number}"
    process = start(f"--input={folder}/a.jsonl", f"--output={output}", *COMMON)
    deadline = time.monotonic() + 120
    while not (output / "train-00001.idx").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    if number != signal.SIGKILL:  # after which Python's own resource tracker says what it cleans up
        assert not error and re.search(r"stopped; the same command goes on\n$", out)
    assert not (output / "manifest.json").exists()
    call(f"--input={folder}/a.jsonl", f"--output={output}", *COMMON)
    assert content(output) == expected


def test_workers_end_with_the_process_that_started_them(folder):
    output = folder / "orphans"
    process = start(f"--input={folder}/a.jsonl", f"--output={output}", *COMMON)
    deadline = time.monotonic() + 120
    while not (output / "train-00000.idx").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = {process.pid}
    for _ in range(3):  # a server, and its workers
        family |= {child for child, parent in parents.items() if parent in family}
    family.remove(process.pid)
    assert len(family) >= 3
    process.kill()
    process.communicate(timeout=60)
    while any(Path(f"/proc/{child}").exists() for child in family):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--format=csv"], ["--format = 'csv'", "jsonl, parquet"]),
        (["--input=none*"], ["--input = 'none*'", "no such file"]),
        (["--tokenizer=none.model"], ["none.model", "No such file"]),
        (["--tokenizer="], ["--tokenizer is missing"]),
        (["--output="], ["--output is missing"]),
        (["--text_field=body"], ["no field 'body'", "'text'", "a.jsonl line"]),
        (["--workers=-1"], ["--workers"]),
        (["--holdout=1"], ["--holdout"]),
        (["--vocab_size=3"], ["--vocab_size"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_what_is_wrong_ends_with_a_line_and_status_2(changes, words, folder):
    arguments = {"input": f"--input={folder}/a.jsonl", "output": f"--output={folder}/wrong"}
    error = call(*arguments.values(), *COMMON, *changes, status=2)
    assert all(word in error for word in words), error
    assert not (folder / "wrong").exists()
