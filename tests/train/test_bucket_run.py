"""Runs whose directory is in a bucket: as on a disk, though files cannot grow there and directories have no names."""

import json

import jax
import numpy as np
import pytest
import toy_run
from etils import epath
from test_step import same_bits

from cola_jax import paths
from cola_jax.train import checkpoint, loop, reports, saved, verified
from cola_jax.train.interrupts import is_temporary
from cola_jax.types import TemporaryError, UserError

URL = "gs://bucket/runs/toy"
PLACE = epath.Path(URL)


class Crash(BaseException):
    """Stands for a process that ends here and now."""


def train(workdir, until="never", **train):
    """(final state, lines of the console) of a run, or of one that is killed at a line: what was open stays so."""

    def log(line):
        lines.append(line)
        if until in line:
            raise Crash

    lines, config = [], toy_run.settings(**train)
    with pytest.MonkeyPatch.context() as patch:
        if until != "never":
            patch.setattr(reports.Growing, "close", lambda self: None)
        try:
            return loop.train(config, workdir, toy_run.experiment(config), toy_run.sampler, log), lines
        except Crash:
            return None, lines


def reported(workdir, name):
    return b"".join(path.read_bytes() for path in sorted(epath.Path(workdir).glob(f"{name}*.jsonl")))


def assert_same_run(state, whole):
    directory, expected = whole
    assert same_bits(state, expected)
    for name in ("metrics", "samples"):
        assert reported(URL, name) == reported(directory, name)
    for stage in ("stage1", "stage2"):
        assert verified.step_directories(PLACE / stage) == verified.step_directories(directory / stage)
    assert verified.read_meta(PLACE / "stage2" / "12") == verified.read_meta(directory / "stage2" / "12")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on the disk that nothing disturbs: (directory, final state)."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, jax.tree.map(np.array, train(workdir)[0])


def test_a_run_that_is_killed_twice_ends_as_on_the_disk(bucket, whole):
    assert train(URL, "stage 1  step 10")[0] is None
    unfinished = bucket.read("runs/toy/stage1/8/params/_METADATA")
    bucket.write("bucket", "runs/toy/stage1/11/params/_METADATA", unfinished)  # of a save that did not end
    later = {"stage": 1, "step": 9, "kind": "train"}
    bucket.write("bucket", "runs/toy/metrics-00007.jsonl", json.dumps(later).encode() + b"\n" + b'{"stage": 1, "st')
    _, lines = train(URL, "stage 2  step 6")
    assert "stage 1: resumed at step 8 of 12" in lines and not any("damaged" in line for line in lines)
    state, lines = train(URL)
    assert "stage 2: resumed at step 4 of 12" in lines
    assert_same_run(state, whole)
    there = bucket.names("runs/toy/")
    # A segment for each start of a stage: 8 and 9, 10, and no 11 in the bucket that is begun twice.
    segments = [f"runs/toy/metrics-{number:05d}.jsonl" for number in (1, 7, 8, 9, 10)]
    assert [name for name in there if "metrics-" in name] == segments
    assert bucket.read("runs/toy/metrics-00007.jsonl") == b""
    assert len([name for name in there if "tensorboard/events" in name]) == 4
    assert len(bucket.read("runs/toy/starts.jsonl").splitlines()) == 3
    assert train(URL)[1] == ["stage 2 is complete: 12 steps"]


def test_a_damaged_checkpoint_is_set_aside(bucket, whole):
    train(URL, "stage 2  step 10")
    place = next(name for name in bucket.names("runs/toy/stage2/8/ema/") if "/d/" in name)
    content = bytearray(bucket.read(place))
    content[len(content) // 2] ^= 1
    bucket.write("bucket", place, bytes(content))
    for part, status in (("8/meta/metadata", 403), ("8/ema/", 403), ("8/files/files.json", 401)):  # that is no damage
        bucket.refuse = lambda method, name, part=part, status=status: status if part in name else None
        with pytest.raises(TemporaryError, match="gs://bucket/runs/toy/stage2/8: cannot be read now"):
            train(URL)
    bucket.refuse = lambda method, name: None
    assert not bucket.names("runs/toy/rejected")
    state, lines = train(URL)
    assert any("gs://bucket/runs/toy/stage2/8 is damaged and not used" in line for line in lines)
    assert "stage 2: resumed at step 4 of 12" in lines
    assert bytes(content) == bucket.read(place.replace("stage2/8", "rejected/stage2-8-1"))
    assert_same_run(state, whole)


def test_another_config_and_what_cannot_be_written_are_refused(bucket):
    train(URL, "stage 1  step 1")
    with pytest.raises(UserError, match="gs://bucket/runs/toy: holds a run with another config .seed: 0 -> 1"):
        config = toy_run.settings()
        loop.train(toy_run.dataclasses.replace(config, seed=1), URL, toy_run.experiment(config))
    with pytest.raises(UserError, match="gs://none/toy/config.json: there is no such bucket"):
        train("gs://none/toy")
    bucket.refuse = lambda method, name: 403 if method == "POST" else None
    with pytest.raises(UserError, match="gs://bucket/other/config.json: may not be written from here"):
        train("gs://bucket/other")


def test_a_run_that_was_copied_into_a_bucket_is_read(bucket, whole):
    """A step that was not saved to its end has no mark; nor has a model that was converted."""
    for name, file in paths.files(whole[0]):
        bucket.write("bucket", f"runs/toy/{name}", file.read_bytes())
    found, expected = saved.load(saved.fetched(URL, "--checkpoint")), saved.load(whole[0])
    assert found.step == 12 and same_bits(found.variables, expected.variables)
    assert verified.step_directories(PLACE / "stage2") == [12, 8, 4]
    bucket.delete("bucket", "runs/toy/stage2/12/commit_success.txt")
    assert verified.step_directories(PLACE / "stage2") == [8, 4]
    assert saved.load(saved.fetched(URL, "--checkpoint")).step == 8
    for step in (8, 4):
        bucket.delete("bucket", f"runs/toy/stage2/{step}/commit_success.txt")
    assert saved.fetched(URL, "--checkpoint").joinpath("stage1", "12", "meta").is_dir()
    for name in bucket.names("runs/toy/stage1/"):
        bucket.delete("bucket", name)
    assert saved.fetched(URL, "--checkpoint").joinpath("stage2", "12", "meta").is_dir()


def test_files_that_grow_are_copied_when_they_have_changed(bucket, tmp_path, monkeypatch):
    near = reports.Growing(tmp_path)
    assert near.directory == tmp_path
    far = reports.Growing(PLACE)
    file = far.directory / "tensorboard" / "a"
    file.parent.mkdir()
    file.write_bytes(b"1")
    far.copy(now=False)
    assert not bucket.names()
    far.copy()
    posts = len(bucket.requests)
    far.copy()
    assert bucket.read("runs/toy/tensorboard/a") == b"1" and len(bucket.requests) == posts
    file.write_bytes(b"12")
    monkeypatch.setattr(reports.Growing, "_EVERY", 0.0)
    far.copy(now=False)
    assert bucket.read("runs/toy/tensorboard/a") == b"12"
    large = bytes(range(256)) * 2**15  # 8 MiB
    file.write_bytes(large)
    far.close()
    assert bucket.read("runs/toy/tensorboard/a") == large and not far.directory.exists()


def test_a_trace_is_copied(bucket):
    with reports.Profile(PLACE / "profile", (1, 1), 1) as profile:
        profile.before(1, 1)
        jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
        profile.after(1, 1)
    assert any(name.endswith(".xplane.pb") for name in bucket.names("runs/toy/profile/"))


def test_a_service_that_fails_is_no_damage():
    for text in ("UNAVAILABLE: Error reading gs", "DEADLINE_EXCEEDED: x", "PERMISSION_DENIED: x", "UNAUTHENTICATED: x"):
        assert is_temporary(ValueError(text))
    for text in ("NOT_FOUND: x", "DATA_LOSS: UNAVAILABLE: x", "FAILED_PRECONDITION: x"):
        assert not is_temporary(ValueError(text))


def test_a_directory_of_checkpoints_in_a_bucket_needs_none_before(bucket):
    assert verified.step_directories(PLACE / "stage1") == []
    manager = checkpoint.Checkpoints(PLACE / "stage1", 2)
    assert manager.directory == paths.directory(f"{URL}/stage1", "x") and not bucket.names()
    manager.close()
