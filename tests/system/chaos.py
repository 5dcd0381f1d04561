"""Kills and stops runs of the toy at random moments and damages their checkpoints: nothing may be lost.

    python tests/system/chaos.py --kills=100 --stops=40 --corruptions=100 --processes=1,2
    python tests/system/chaos.py --kills=100 --stops=40 --corruptions=0 --processes=1 --bucket

A run that was killed, or stopped by SIGTERM at one of its processes, ends like one that was not: parameters,
optimizer, moving average and position in the data by their hashes, metrics and samples byte by byte. SIGTERM saves
within a few steps, in all processes. A damaged newest checkpoint is reported, and the one before is restored bit for
bit. With --bucket the runs that are killed are in a bucket, of a server that stands for Google's, and must end like
the one on the disk. The toy (tests/train) stands for the model, because a start of the real program takes longer than
its steps; loop, checkpoints, metrics, processes and prepared data are the real ones. Prints counts; any failure is an
exception.
"""

import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from etils import epath

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "train")]

import fake_gcs  # noqa: E402

STEPS, REPORTS = 80, ("metrics", "samples")
_BUCKET = fake_gcs.Store()
_CONTEXT = multiprocessing.get_context("forkserver")


def _settings(count: int):
    import toy_run

    return toy_run.settings(STEPS, mesh=(count, 1, 1), log_every=1)


def _join(workdir: Path, index: int, count: int, port: int) -> None:
    log = os.open(f"{workdir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import jax

    from cola_jax.train import distributed

    jax.config.update("jax_compilation_cache_dir", str(workdir.parent / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if count > 1:
        distributed.initialize(f"127.0.0.1:{port}", count, index, timeout=120)


def _train(workdir: Path, index: int, count: int, port: int, directory: str = "") -> None:
    _join(workdir, index, count, port)
    import toy_run

    from cola_jax.train import interrupts, loop

    config = _settings(count)
    try:
        data = workdir.parent / "data"
        loop.train(config, directory or workdir, toy_run.prepared_experiment(config, data), toy_run.sampler)
    except interrupts.Interrupted as error:
        sys.exit(error.status)


def _start(target, workdir: Path, count: int, *arguments) -> list:
    import processes

    port = processes.free_port()
    started = [_CONTEXT.Process(target=target, args=(workdir, i, count, port, *arguments)) for i in range(count)]
    for process in started:
        process.start()
    return started


def _wait(started: list, what: str, timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
    statuses = [process.exitcode for process in started]
    for process in started:
        process.kill()
    if any(statuses):
        raise AssertionError(f"{what}: exit statuses {statuses}")


def _wait_for_a_moment(started: list, workdir: Path, draw: random.Random) -> bool:
    """Returns at a random moment, more often than not around a commit; False if the processes ended before."""
    stages = [workdir / "stage1", workdir / "stage2"]

    def names() -> set:
        # A checkpoint of the toy has some fifty objects in a bucket.
        return {path for stage in stages for path in stage.glob("*")} | {*_BUCKET.names(f"{workdir.name}/stage")}

    most = 200 if _BUCKET.requests else 4
    seen, wait, deadline = names(), draw.randint(1, most), time.monotonic() + draw.uniform(0.5, 6.0)
    at_commit = draw.random() < 0.7
    while all(process.is_alive() for process in started):
        new = names() - seen  # a checkpoint that is being written, or has just been committed
        seen |= new
        wait -= len(new)
        if at_commit and wait <= 0:
            time.sleep(draw.uniform(0, 0.03))
            return True
        if not at_commit and time.monotonic() > deadline:
            return True
        time.sleep(0.001)
    return False


def _kill(started: list, workdir: Path, draw: random.Random) -> bool:
    """Kills the processes at a random moment; False if they ended before."""
    if not _wait_for_a_moment(started, workdir, draw):
        return False
    for process in draw.sample(started, len(started)):
        process.kill()
        time.sleep(draw.choice([0, 0.02, 0.3]) if len(started) > 1 else 0)
    for process in started:
        process.join()
    return any(process.exitcode == -signal.SIGKILL for process in started)


def _steps_said(workdir: Path) -> list[str]:
    return re.findall(r"^stage \d  step \d+/", Path(f"{workdir}.log").read_text(), re.MULTILINE)


def _stop(started: list, workdir: Path, draw: random.Random) -> bool:
    """SIGTERM at one of the processes, after the first step of this start; False if they ended before.

    All must save and end with status 75 before the run's last steps.
    """
    said = len(_steps_said(workdir)) if Path(f"{workdir}.log").exists() else 0
    if not _wait_for_a_moment(started, workdir, draw):
        return False
    while len(before := _steps_said(workdir)) == said and all(process.is_alive() for process in started):
        time.sleep(0.001)
    draw.choice(started).terminate()
    for process in started:
        process.join(60)
    statuses = [process.exitcode for process in started]
    for process in started:
        process.kill()  # one that hangs would keep this program
    if statuses == [0] * len(started):
        assert before[-1] in {f"stage 2  step {step}/" for step in range(STEPS - 3, STEPS + 1)}, f"lost at {before[-1]}"
        return False
    assert statuses == [75] * len(started), f"{workdir}: exit statuses {statuses} after SIGTERM at {before[-1]}"
    return True


def _assert_same(workdir: Path, whole: Path) -> None:
    from cola_jax.train import verified

    for name in REPORTS:
        written = b"".join(path.read_bytes() for path in sorted(workdir.glob(f"{name}*.jsonl")))
        assert written == (whole / f"{name}.jsonl").read_bytes(), f"{workdir / name} differs"
    for stage in ("stage1", "stage2"):
        bodies = [verified.read_meta(run / stage / str(STEPS)) for run in (workdir, whole)]
        assert bodies[0] == bodies[1], f"{workdir / stage} differs"


def _undisturbed(place: Path, count: int) -> Path:
    whole = place / f"whole{count}"
    if not whole.exists():
        _wait(_start(_train, whole, count), "the undisturbed run")
    return whole


def interruptions(
    place: Path, interrupt: Callable, number: int, count: int, draw: random.Random, bucket: bool = False
) -> None:
    """So many SIGKILLs or SIGTERMs (`_kill`, `_stop`) of runs of ``count`` processes, each followed by a restart."""
    whole, name, done, runs = _undisturbed(place, count), interrupt.__name__.strip("_"), 0, 0
    while done < number:
        workdir = place / f"{name}{count}-{runs}"
        directory = epath.Path(f"gs://bucket/{workdir.name}" if bucket else workdir)
        for _ in range(min(20, number - done)):
            if not interrupt(_start(_train, workdir, count, str(directory)), workdir, draw):
                break
            done += 1
        _wait(_start(_train, workdir, count, str(directory)), f"{directory}, to its end")
        _assert_same(directory, whole)
        directory.rmtree()
        runs += 1
        print(f"{count} processes: {name}s {done}, runs {runs}", flush=True)


def _damage(step: Path, draw: random.Random) -> str:
    """Flips a bit of a file of the step's items, cuts it off, or deletes it or a whole item; says what it did."""
    # But for the marker that Orbax adds after the checksums; like _CHECKPOINT_METADATA it holds nothing of the run.
    marker = step / "files" / "commit_success.txt"
    files = sorted(path for path in step.glob("*/**/*") if path.is_file() and path.stat().st_size and path != marker)
    victim, kind = draw.choice(files), draw.choice(["flip", "flip", "truncate", "delete", "delete item"])
    content = bytearray(victim.read_bytes())
    if kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        victim.write_bytes(content)
    elif kind == "truncate":
        victim.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "delete":
        victim.unlink()
    else:
        shutil.rmtree(step / victim.relative_to(step).parts[0])
    return f"{kind} {victim.relative_to(step)}"


def _corrupt(workdir: Path, index: int, count: int, port: int, source: Path, number: int, seed: int) -> None:
    """In each process of a group: restores copies of a stage whose newest step is damaged."""
    _join(workdir, index, count, port)
    import jax
    import toy_model
    from jax.experimental import multihost_utils

    from cola_jax import sharding
    from cola_jax.train import checkpoint, state, verified

    config, draw = _settings(count), random.Random(seed)
    make = state.make_init(toy_model.init, toy_model.stages(config)[1])
    target = state.abstract(make, sharding.make_mesh(config.train))
    _, before = verified.step_directories(source)[:2]
    expected = verified.read_meta(source / str(before))["hashes"]

    def together(name: str) -> None:
        if count > 1:
            multihost_utils.sync_global_devices(name)

    kinds = {}
    for turn in range(number):
        place, said = workdir / str(turn), []
        if index == 0:
            shutil.copytree(source, place)
            what = _damage(place / str(STEPS), draw)
            kinds[what.split(" ")[0]] = kinds.get(what.split(" ")[0], 0) + 1
        together(f"damaged {turn}")
        manager = checkpoint.Checkpoints(place, 3, said.append)
        step, restored, _ = manager.restore(target)
        got = verified.hashes(checkpoint._items(restored))
        manager.close()
        if index == 0:
            assert step == before and len(said) == 1 and "damaged" in said[0], f"{what}: step {step}, said {said}"
            assert got == expected, f"{what}: step {step} is not as it was"
            print(f"{what}: {said[0].split('not used: ')[1]}", flush=True)
        together(f"restored {turn}")
        if index == 0:
            shutil.rmtree(place)
    together("done")
    if index == 0:
        print(f"{count} processes: {number} corruptions, all detected and recovered from: {kinds}", flush=True)
    jax.effects_barrier()


def corruptions(place: Path, number: int, count: int, seed: int) -> None:
    """So many damaged copies of the checkpoints of a whole run, restored by so many processes."""
    whole, workdir = _undisturbed(place, count), place / f"corrupted{count}"
    workdir.mkdir()
    _wait(_start(_corrupt, workdir, count, whole / "stage2", number, seed), "damaged checkpoints", timeout=1800)
    said = Path(f"{workdir}.log").read_text().splitlines()
    print(next(line for line in said if "all detected" in line), flush=True)


def prepare() -> None:
    """Imports what the processes need once, in a server from which they are forked."""
    import environment

    os.environ.update(environment.variables())
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:3], os.environ.get("PYTHONPATH", "")])
    _CONTEXT.set_forkserver_preload(["toy_run", "cola_jax.train.loop", "cola_jax.train.distributed"])


def write_data(place: Path) -> None:
    import toy_run

    if not (place / "data").exists():
        toy_run.write_corpus(place / "data")


def main(argv: list[str]) -> None:
    from absl import flags

    kill_count = flags.DEFINE_integer("kills", 100, "SIGKILLs in all, three quarters of them on the first number")
    stop_count = flags.DEFINE_integer("stops", 40, "SIGTERMs for each number of processes")
    damage_count = flags.DEFINE_integer("corruptions", 100, "damaged checkpoints for each number of processes")
    counts = flags.DEFINE_list("processes", ["1", "2"], "numbers of processes of a run")
    seed = flags.DEFINE_integer("seed", 0, "of moments and damages")
    workdir = flags.DEFINE_string("workdir", "/tmp/chaos", "an empty directory for the runs")
    bucket = flags.DEFINE_boolean("bucket", False, "runs are in a bucket")
    flags.FLAGS(argv)
    with fake_gcs.serving(_BUCKET) as variables:
        if bucket.value:
            os.environ.update(variables)
        prepare()
        place, started = Path(workdir.value).absolute(), time.monotonic()
        place.mkdir(parents=True, exist_ok=True)
        write_data(place)
        numbers = list(map(int, counts.value))
        for position, count in enumerate(numbers):
            share = kill_count.value if len(numbers) == 1 else kill_count.value * (3 if position == 0 else 1) // 4
            interruptions(place, _kill, share, count, random.Random(seed.value + count), bucket.value)
            interruptions(place, _stop, stop_count.value, count, random.Random(seed.value + count), bucket.value)
            if damage_count.value:
                corruptions(place, damage_count.value, count, seed.value)
    seconds = time.monotonic() - started
    stopped, damaged = stop_count.value * len(numbers), damage_count.value * len(numbers)
    done = f"{kill_count.value} kills, {stopped} stops, {damaged} corruptions"
    print(f"{done}: nothing lost; {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv)
