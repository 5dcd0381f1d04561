"""Runs of several processes with virtual devices, on a toy model."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
import toy_run

from cola_jax.train import saved, verified

pytestmark = pytest.mark.slow  # every process imports and compiles


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(workdir, cache, mesh="1,1,1", *arguments, steps=25, **options):
    started = processes.start(
        workdir, cache, f"--steps={steps}", "--accumulation=1", f"--mesh={mesh}", *arguments, **options
    )
    statuses = processes.wait(started)
    assert set(statuses) == {0}, processes.log(workdir)[-3000:]


def losses(workdir) -> dict:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(row["stage"], row["step"], row["kind"]): row["loss"] for row in rows}


def body(workdir, step: int, stage: int = 2) -> dict:
    return verified.read_meta(workdir / f"stage{stage}" / str(step))


@pytest.fixture(scope="module")
def one(tmp_path_factory, cache):
    """50 steps, 25 of each stage, in one process on one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    run(workdir, cache)
    return workdir


@pytest.mark.parametrize(
    "count, devices, mesh",
    [
        *[(1, 8, mesh) for mesh in ("1,1,8", "2,2,2")],
        *[(2, 2, mesh) for mesh in ("4,1,1", "1,2,2")],
        (4, 2, "2,2,2"),
    ],
)
def test_meshes_and_processes_give_the_same_run(one, cache, tmp_path, count, devices, mesh):
    workdir = tmp_path / "run"
    run(workdir, cache, mesh, count=count, devices=devices)
    expected, found = losses(one), losses(workdir)
    assert expected.keys() == found.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=2e-6)
    trees = [saved.load(place).variables for place in (one, workdir)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), *trees)


def stop(workdir, cache, line: str, signum: int = signal.SIGTERM, steps: int = 60, *more) -> tuple[list[int], int]:
    """Runs two processes, of which the second gets a signal when the first has said ``line``: not the one that speaks.

    Returns:
      Their exit statuses and the last step that they saved.
    """
    started = processes.start(workdir, cache, "--accumulation=1", "--mesh=2,1,1", f"--steps={steps}", *more, count=2)
    deadline = time.time() + 200
    while line not in processes.log(workdir) and time.time() < deadline:
        time.sleep(0.01)
    started[1].send_signal(signum)
    statuses = processes.wait(started)
    assert "stopped by" in processes.log(workdir), processes.log(workdir)[-3000:]
    return statuses, max(verified.step_directories(workdir / "stage2"))


def test_a_signal_at_any_moment_stops_all_after_the_same_step(cache, tmp_path):
    """As soon as there is something to stop, in the middle of a save, and before the first step of a process."""
    workdir, last = tmp_path / "run", 0
    for line, signum, statuses in (
        ("stage 2  step 5/60  held out", signal.SIGTERM, [75, 75]),  # and then step 5 is saved
        ("stage 2: resumed at step", signal.SIGTERM, [75, 75]),
        ("stage 2: resumed at step", signal.SIGINT, [75, 130]),
    ):
        found, step = stop(workdir, cache, line, signum)
        assert found == statuses and last < step <= last + 8, processes.log(workdir)[-3000:]
        last = step
        Path(f"{workdir}.0.log").unlink()


def test_saved_by_two_processes_and_continued_by_one_and_four(cache, tmp_path):
    """Prepared data continues in the same order when processes, devices and readers change together."""
    saved, steps, corpus = tmp_path / "saved", 60, tmp_path / "corpus"
    toy_run.write_corpus(corpus)
    statuses, step = stop(saved, cache, "stage 2  step 2/", signal.SIGTERM, steps, f"--data={corpus}")
    assert statuses == [75, 75] and 2 < step < steps
    ends = []
    for count, devices, mesh, workers in ((2, 1, "2,1,1", 0), (1, 1, "1,1,1", 2), (4, 2, "2,2,2", 3)):
        workdir = tmp_path / f"on{count}"
        shutil.copytree(saved, workdir)
        data = (f"--data={corpus}", f"--workers={workers}")
        run(workdir, cache, mesh, *data, count=count, devices=devices, steps=steps)
        assert f"resumed at step {step} of {steps}" in processes.log(workdir)
        ends.append((losses(workdir), body(workdir, steps)["data"]))
    for found, position in ends[1:]:
        assert position == ends[0][1] and found.keys() == ends[0][0].keys()
        np.testing.assert_allclose(list(found.values()), list(ends[0][0].values()), rtol=1e-5)


def test_saved_on_data_restored_on_fsdp_and_tensor(one, cache, tmp_path):
    """Nothing is trained: the restored state has the saved hashes on any mesh."""
    workdir = tmp_path / "run"
    run(workdir, cache, "8,1,1", devices=8)
    saved = body(workdir, 25)
    for mesh, devices in (("1,4,2", 8), ("1,1,1", 1)):
        before = {path: path.read_bytes() for path in (workdir / "stage2").rglob("*") if path.is_file()}
        run(workdir, cache, mesh, devices=devices)  # restores, verifies the hashes on this mesh, and has nothing to do
        assert "stage 2 is complete" in processes.log(workdir)
        assert before == {path: path.read_bytes() for path in (workdir / "stage2").rglob("*") if path.is_file()}
    assert body(workdir, 25) == saved


@pytest.mark.parametrize("present", [0, 1])
def test_a_process_that_never_joins(cache, tmp_path, present):
    workdir, began = tmp_path / "run", time.time()
    started = processes.start(workdir, cache, "--join_timeout=5", count=2, only=[present])
    assert processes.wait(started, 60) == [75] and time.time() - began < 50
    (line,) = processes.log(workdir, present).splitlines()
    assert line.startswith("error: --coordinator = ") and "not all processes joined within 5 s" in line
    assert not workdir.exists()


def test_a_step_that_hangs_ends_all_processes_with_their_stacks(cache, tmp_path):
    workdir = tmp_path / "run"
    arguments = ("--mesh=2,1,1", "--accumulation=1", "--steps=12", "--hang_timeout=20", "--hang_at=stage 2  step 6/")
    started = processes.start(workdir, cache, *arguments, count=2)
    statuses = processes.wait(started, 200)
    assert 76 in statuses and 0 not in statuses, processes.log(workdir)
    hung = processes.log(workdir, statuses.index(76))
    assert "no step has ended for 20 s (config.train.hang_timeout)" in hung and 'File "' in hung and "loop.py" in hung
    run(workdir, cache, "2,1,1", count=2, steps=12)  # the same command resumes


def test_a_killed_process_ends_the_others(cache, tmp_path):
    workdir = tmp_path / "run"
    started = processes.start(workdir, cache, "--mesh=2,1,1", "--accumulation=1", "--steps=100000", count=2)
    deadline = time.time() + 200
    while "stage 1  step 20/" not in processes.log(workdir) and time.time() < deadline:
        time.sleep(0.05)
    os.kill(started[1].pid, signal.SIGKILL)
    statuses = processes.wait(started, 150)
    assert statuses[0] in (75, -signal.SIGABRT), processes.log(workdir)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--coordinator=here", "--process_count=2", "--process_id=0"], "--coordinator = here: must be host:port"),
        (["--coordinator=a:1", "--process_count=2"], "--process_id is missing"),
        (["--coordinator=a:1", "--process_count=2", "--process_id=2"], "--process_id = 2: must be a number from 0"),
        (["--join_timeout=0"], "--join_timeout = 0: must be a positive number"),
        (["--mesh=3,1,1"], "config.data.batch_size = 8"),
        (["--mesh=16,1,1"], "config.train.mesh_* = (16, 1, 1): must be a product of at most 8 devices"),
    ],
)
def test_bad_flags_are_one_line(cache, tmp_path, flags, words):
    workdir = tmp_path / "run"
    (process,) = processes.start(workdir, cache, *flags, devices=8)
    assert processes.wait([process], 100) == [2]
    (line,) = processes.log(workdir).splitlines()
    assert line.startswith("error: ") and words in line
