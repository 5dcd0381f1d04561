import dataclasses
import errno
import fnmatch
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import environment
import jax
import numpy as np
import pytest
import toy_run
from test_step import same_bits

from cola_jax import families, fields
from cola_jax.train import checkpoint, loop, reports, saved, verified, workdir
from cola_jax.train.experiment import data_seed
from cola_jax.train.interrupts import Interrupted
from cola_jax.train.trainer import NonFiniteLoss
from cola_jax.types import TemporaryError, UserError

OPTIMIZERS = ("optimizer1", "optimizer2")
REPORTS = ("metrics.jsonl", "samples.jsonl")


class Crash(BaseException):
    """Stands for a process that ends here and now."""


def train(workdir, log=lambda line: None, config=None, **changes):
    config = config or toy_run.settings()
    return loop.train(config, workdir, toy_run.experiment(config, **changes), toy_run.sampler, log)


def crash_at(words):
    def log(line):
        if words in line:
            raise Crash

    return log


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs: (directory, final state, lines on the console)."""
    workdir, lines = tmp_path_factory.mktemp("whole"), []
    state = train(workdir, lines.append)
    return workdir, jax.tree.map(np.array, state), lines


def assert_same_run(workdir, state, whole):
    assert same_bits(state, whole[1])
    for name in REPORTS:
        assert (workdir / name).read_bytes() == (whole[0] / name).read_bytes()
    for stage in ("stage1", "stage2"):
        newest = [verified.step_directories(directory / stage)[0] for directory in (workdir, whole[0])]
        assert newest == [12, 12]
    bodies = [verified.read_meta(directory / "stage2" / "12") for directory in (workdir, whole[0])]
    assert bodies[0] == bodies[1]  # the position in the data among other things


def test_whole_run(whole):
    workdir, state, lines = whole
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = [1, 2, 4, 6, 8, 10, 12]
    for stage in (1, 2):
        steps = {
            k: [e["step"] for e in entries if e["stage"] == stage and e["kind"] == k] for k in ("train", "holdout")
        }
        assert steps == {"train": logged, "holdout": [5, 10, 12]}
    assert verified.step_directories(workdir / "stage1") == [12, 8, 4]
    assert not any("seconds" in entry or "time" in entry for entry in entries)
    assert [json.loads(line)["step"] for line in (workdir / "samples.jsonl").read_text().splitlines()] == [12]
    assert int(state.step) == 12 and (workdir / "timing.jsonl").stat().st_size
    assert all("\n" not in line for line in lines)
    assert any("tokens/s" in line and "FLOP/s" in line and "ETA" in line for line in lines)


def test_a_run_of_the_first_stage_alone_generates_nothing(tmp_path):
    """A pretrained VAE, for `train.init_from`: it cannot write texts, and its checkpoint is complete."""
    config = toy_run.settings()
    config = dataclasses.replace(config, stage2=dataclasses.replace(config.stage2, steps=0))
    train(tmp_path, config=config)
    assert verified.step_directories(tmp_path / "stage1")[0] == 12
    assert not (tmp_path / "samples.jsonl").exists() or not (tmp_path / "samples.jsonl").read_text()


def test_stages_see_different_data_and_noise(whole):
    assert data_seed(0, 1) != data_seed(0, 2) != data_seed(1, 2)
    bodies = [verified.read_meta(whole[0] / stage / "12") for stage in ("stage1", "stage2")]
    assert bodies[0]["fingerprint"]["seed"] != bodies[1]["fingerprint"]["seed"]


def test_finished_run_says_so(whole):
    before = [(whole[0] / name).read_bytes() for name in REPORTS]
    lines = []
    state = train(whole[0], lines.append)
    assert same_bits(state, whole[1]) and lines == ["stage 2 is complete: 12 steps"]
    assert before == [(whole[0] / name).read_bytes() for name in REPORTS]


@pytest.mark.parametrize(
    "words",
    [
        ["stage 1  step 2/"],  # before the first checkpoint
        ["stage 1  step 6/", "stage 1  step 10/12  held out"],
        ["stage 1  step 12/", "stage 2  step 1/", "stage 2  step 8/", "stage 2  step 12/12  held out"],
    ],
)
def test_crashes_leave_no_trace(whole, tmp_path, words):
    for word in words:
        with pytest.raises(Crash):
            train(tmp_path, crash_at(word))
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"stage": 2, "step": 9, "ki')  # torn
    assert_same_run(tmp_path, train(tmp_path), whole)


def test_damaged_checkpoint_leaves_no_trace(whole, tmp_path):
    with pytest.raises(Crash):
        train(tmp_path, crash_at("stage 2  step 10/"))
    deadline = time.time() + 20
    while 8 not in verified.step_directories(tmp_path / "stage2") and time.time() < deadline:
        time.sleep(0.1)
    (tmp_path / "stage2" / "8" / "params" / "manifest.ocdbt").write_bytes(b"")
    lines = []
    state = train(tmp_path, lines.append)
    assert sum("damaged" in line for line in lines) == 1
    assert any("resumed at step 4" in line for line in lines)
    assert_same_run(tmp_path, state, whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_stops(whole, tmp_path, signum):
    def log(line):
        if "stage 2  step 6/" in line:
            os.kill(os.getpid(), signum)

    with pytest.raises(Interrupted, match=f"{signum.name} after step 7 of stage 2") as caught:
        train(tmp_path, log)
    assert caught.value.signum == signum
    assert verified.step_directories(tmp_path / "stage2")[0] == 7
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert_same_run(tmp_path, train(tmp_path), whole)


def test_other_config_is_refused(whole):
    before = sorted(path.stat().st_mtime_ns for path in whole[0].rglob("*"))
    config = toy_run.settings()
    train_ = dataclasses.replace(config.train, log_every=3, compute_dtype="bfloat16")
    config = dataclasses.replace(config, seed=5, train=train_)
    with pytest.raises(UserError, match=r"\(seed: 0 -> 5, train.compute_dtype: 'float32' -> 'bfloat16'\)") as caught:
        train(whole[0], config=config)
    assert "\n" not in str(caught.value)
    assert before == sorted(path.stat().st_mtime_ns for path in whole[0].rglob("*"))


def test_what_may_change_is_named_by_fields_that_exist():
    names = {name for family in families.FAMILIES.values() for name in fields.entries(family.config)}
    for pattern in workdir._FREE_FIELDS:
        assert fnmatch.filter(names, pattern), pattern
    free = {name for name in names if workdir.is_free(name)}
    groups = {name.partition(".")[0] for name in free}
    how_to_run, how_to_judge = ("data", "train", "vae", "image_vae", "dit", "transformer"), ("sample", "image_sample")
    assert groups == {*how_to_run, *how_to_judge, "evaluation", *OPTIMIZERS}
    assert {name for name in free if name.startswith("data.")} == {"data.num_workers", "data.files"}
    assert {name.partition(".")[2] for name in free if name.startswith(OPTIMIZERS)} == {"accumulation"}
    assert not {"seed", "train.compute_dtype", "train.init_from", "dit.num_layers", "stage2.steps"} & free
    assert workdir.is_free("train.milestone_steps[1]") and workdir.is_free("evaluation.evaluators[0]")


def losses(directory) -> dict:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {(row["stage"], row["step"], row["kind"]): row["loss"] for row in rows}


def test_a_run_resumes_with_other_microbatches_and_cadence(whole, tmp_path):
    """Accumulation changes nothing but rounding, and how often something is told or saved changes no number."""
    with pytest.raises(Crash):
        train(tmp_path, crash_at("stage 2  step 10/"))
    config = toy_run.settings(accumulation=4, log_every=1, eval_every=3, checkpoint_every=5)
    lines = []
    state = train(tmp_path, lines.append, config)
    assert any("resumed at step 8" in line or "resumed at step 4" in line for line in lines)
    before, after = losses(whole[0]), losses(tmp_path)
    assert (2, 11, "train") in after.keys() - before.keys()  # told more often
    both = before.keys() & after.keys()
    assert (2, 12, "train") in both and (2, 12, "holdout") in both
    np.testing.assert_allclose([after[k] for k in both], [before[k] for k in both], rtol=1e-5)
    assert any(after[k] != before[k] for k in both)  # other microbatches add in another order
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), dict(state.params), dict(whole[1].params))
    assert 10 in verified.step_directories(tmp_path / "stage2")


@pytest.mark.slow
def test_the_real_model_resumes_with_other_remat_and_chunks(tmp_path):
    small = {
        "data": {"tokenizer": "bytes", "num_stories": 64, "sequence_length": 16, "batch_size": 4, "holdout": 0.2},
        "vae": {"dim": 16, "ffn_dim": 32, "num_heads": 2, "latent_dim": 4, "logit_chunk": 0},
        "dit": {
            "latent_dim": 4,
            "dim": 16,
            "num_heads": 2,
            "head_dim": 8,
            "rope_dim": 4,
            "time_dim": 8,
            "num_layers": 2,
        },
        "stage1": {"steps": 0},
        "stage2": {"steps": 4, "strategy": "scratch", "reference_weight": 0.0},
        "train": {"log_every": 1, "eval_batches": 1, "checkpoint_every": 2, "num_samples": 0, "mesh_data": 1},
    }
    other = {name: dict(group) for name, group in small.items()}
    other["dit"].update(remat="full", unroll=2, attention_kernel="xla")
    other["vae"]["logit_chunk"] = 8
    other["optimizer2"] = {"accumulation": 2}
    first, second = families.parse(small), families.parse(other)
    expected = loop.train(first, tmp_path / "whole", log=lambda line: None)
    with pytest.raises(Crash):
        loop.train(first, tmp_path / "moved", log=crash_at("stage 2  step 3/"))
    lines = []
    found = loop.train(second, tmp_path / "moved", log=lines.append)
    assert any("resumed at step 2 of 4" in line for line in lines)
    before, after = losses(tmp_path / "whole"), losses(tmp_path / "moved")
    assert before.keys() == after.keys()
    np.testing.assert_allclose(list(after.values()), list(before.values()), rtol=2e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-4), dict(found.params), dict(expected.params)
    )


def test_a_run_that_never_began_may_begin_with_another_config(tmp_path):
    first = toy_run.settings()
    other = dataclasses.replace(first, seed=5)
    for config in (first, other):
        workdir.claim(config, tmp_path)
        assert workdir.read_config(tmp_path)["seed"] == config.seed
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(UserError, match="another config .*seed: 5 -> 0"):
        workdir.claim(first, tmp_path)


def test_other_data_is_refused(whole):
    with pytest.raises(UserError, match="name: 'toy' -> 'other'"):
        train(whole[0], name="other")


def test_non_finite_loss_stops_with_the_last_good_state(tmp_path):
    # The first batch of stage 2 with a row whose tokens sum to so much is some way in.
    iterator = iter(toy_run.dataset("train", data_seed(0, 2)))
    sums = [int(next(iterator)["tokens"].sum(axis=1).max()) for _ in range(12)]
    limit = max(sums[5:])
    step = 1 + next(i for i, total in enumerate(sums) if total >= limit)
    assert step > 1
    with pytest.raises(NonFiniteLoss, match=rf"stage 2, step {step}: .*poison inf.*after step {step - 1} is saved"):
        train(tmp_path, poison_from=limit)
    assert verified.step_directories(tmp_path / "stage2")[0] == step - 1
    with pytest.raises(NonFiniteLoss, match=f"stage 2, step {step}"):
        train(tmp_path, poison_from=limit)
    train(tmp_path)  # mended, it resumes


@pytest.mark.slow
def test_skipped_updates_are_told_and_resume_with_the_rest(tmp_path):
    """The poisoned batches of 12 steps cost their updates and no more; a crash on the way leaves no trace."""
    settings = toy_run.settings()
    optimizer2 = dataclasses.replace(settings.optimizer2, max_skipped=4, spike_factor=50.0)
    config = dataclasses.replace(settings, optimizer2=optimizer2)
    iterator = iter(toy_run.dataset("train", data_seed(0, 2)))
    sums = [int(next(iterator)["tokens"].sum(axis=1).max()) for _ in range(12)]
    limit = sorted(sums)[-2]
    bad = [step for step, total in enumerate(sums, 1) if total >= limit]
    lines = []
    state = train(tmp_path / "whole", lines.append, config, poison_from=limit)
    told = [line for line in lines if "update skipped" in line]
    assert len(told) == len(bad) == int(state.guard.skipped)
    assert all(f"stage 2  step {step}: update skipped, number {n} of" in told[n - 1] for n, step in enumerate(bad, 1))
    with pytest.raises(Crash):
        train(tmp_path / "resumed", crash_at("stage 2  step 10/"), config, poison_from=limit)
    again = train(tmp_path / "resumed", config=config, poison_from=limit)
    assert same_bits(again, jax.tree.map(np.array, state))
    for name in REPORTS:
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_profile(tmp_path):
    config = toy_run.settings(steps=4)
    loop.train(config, tmp_path, toy_run.experiment(config), None, lambda line: None, profile_steps=(2, 3))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_runs_from_before_a_field_existed_resume(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    del saved["train"]["hang_timeout"], saved["optimizer1"]["max_skipped"]
    path.write_text(json.dumps(saved))
    assert same_bits(train(tmp_path / "run"), whole[1])
    saved["optimizer1"]["ema"] = 0.5
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"\(optimizer1.ema: 0.5 -> 0.0\)"):
        train(tmp_path / "run")


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir = .*file.run: must be a directory that can be written"):
        train(tmp_path / "file" / "run")


@pytest.mark.slow
def test_a_full_disk_loses_nothing(whole, tmp_path):
    """A limit on the size of files stands for the disk: both make a write fail in the middle."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import toy_run\n"
        "from cola_jax.train import checkpoint, loop\n"
        "from cola_jax.types import TemporaryError\n"
        "def log(line):\n"
        "    if 'stage 2  step 6/' in line:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        "config = toy_run.settings()\n"
        "try:\n"
        "    loop.train(config, sys.argv[1], toy_run.experiment(config), toy_run.sampler, log)\n"
        "except TemporaryError as error:\n"
        "    print(error)\n"
        "    sys.exit(75)\n"
    )
    tests = Path(__file__).parent
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tests), str(tests.parents[1])]))
    command = [sys.executable, "-c", code, tmp_path / "run"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 75, result.stderr[-2000:]
    assert len(result.stdout.splitlines()) == 1 and str(tmp_path / "run") in result.stdout
    assert verified.step_directories(tmp_path / "run" / "stage2")[0] == 4
    lines = []
    state = train(tmp_path / "run", lines.append)
    assert any("resumed at step 4" in line for line in lines) and int(state.step) == int(whole[1].step)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC])
@pytest.mark.parametrize("where", ["checkpoint", "metrics", "data"])
def test_what_fails_outside_the_run_may_be_started_again(whole, tmp_path, monkeypatch, where, number):
    """A save, a file of the run or the corpus cannot be written or read: not the user's fault, and nothing is lost."""
    config, broken = toy_run.settings(), OSError(number, os.strerror(number), "/mnt/shared/file")
    experiment = toy_run.experiment(config)

    def fail(*_, **__):
        raise broken

    def read(split, seed, rows):
        try:
            fail()
        except OSError as error:
            raise UserError(f"/mnt/shared/file: {error.strerror}; must be a readable file") from None

    if where == "checkpoint":
        monkeypatch.setattr(checkpoint.Checkpoints, "_make_manager", lambda self: types.SimpleNamespace(save=fail))
        monkeypatch.setattr(checkpoint.Checkpoints, "close", lambda self: None)
    elif where == "metrics":
        monkeypatch.setattr(reports.Writer, "flush", fail)
    else:
        experiment = dataclasses.replace(experiment, dataset=read)
    with pytest.raises(TemporaryError) as caught:
        loop.train(config, tmp_path / "run", experiment, toy_run.sampler, lambda line: None)
    message = str(caught.value)
    assert os.strerror(number) in message and "\n" not in message
    monkeypatch.undo()
    if number == errno.ESTALE:
        assert same_bits(train(tmp_path / "run"), whole[1])


def test_a_missing_file_of_the_data_is_for_the_user(tmp_path):
    def read(split, seed, rows):
        try:
            open(tmp_path / "none")
        except OSError as error:
            raise UserError(f"none: {error.strerror}") from error

    config = toy_run.settings()
    experiment = dataclasses.replace(toy_run.experiment(config), dataset=read)
    with pytest.raises(UserError, match="none: No such file"):
        loop.train(config, tmp_path / "run", experiment, None, lambda line: None)


@pytest.mark.parametrize("stages", [(12, 0), (0, 12)])
def test_a_single_stage(tmp_path, stages):
    config = toy_run.toy_model.config(
        stage1={"steps": stages[0]},
        stage2={"steps": stages[1], "strategy": "joint" if stages[0] else "scratch", "reference_weight": 0.0},
    )
    state = train(tmp_path, config=config)
    assert int(state.step) == 12 and not state.frozen
    assert (tmp_path / "stage2").exists() == bool(stages[1])
    assert (tmp_path / "stage1").exists() == bool(stages[0])


def _start(workdir, cache):
    tests = Path(__file__).parent
    env = environment.process(8, cache, PYTHONPATH=os.pathsep.join([str(tests), str(tests.parents[1])]))
    with open(workdir.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            [sys.executable, tests / "toy_run.py", f"--workdir={workdir}"], env=env, stdout=log, stderr=log
        )


def _kill_while_it_saves(process, workdir, kills, draw) -> None:
    """Kills at a random moment around a checkpoint; three times and no more in each stage."""
    started = {stage: set((workdir / stage).glob("*")) for stage in kills}
    allowed = {stage: draw.randint(0, 4) if count < 3 else 10**6 for stage, count in kills.items()}
    while process.poll() is None:
        for stage in kills:
            # A new name there is a checkpoint that is being written or has just been.
            started[stage] |= (new := set((workdir / stage).glob("*")) - started[stage])
            allowed[stage] -= len(new)
            if allowed[stage] < 0:
                time.sleep(draw.uniform(0, 0.05))
                process.kill()
                process.wait()
                kills[stage] += 1
                return
        time.sleep(0.002)


@pytest.mark.slow
def test_sigkill_at_any_moment(tmp_path):
    draw, cache = random.Random(0), tmp_path / "cache"
    assert _start(tmp_path / "whole", cache).wait() == 0
    kills, workdir = {"stage1": 0, "stage2": 0}, tmp_path / "killed"
    for _ in range(20):
        process = _start(workdir, cache)
        _kill_while_it_saves(process, workdir, kills, draw)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, workdir.with_suffix(".log").read_text()[-2000:]
    assert process.returncode == 0 and kills == {"stage1": 3, "stage2": 3}
    for name in REPORTS:
        assert (workdir / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for stage in kills:
        found = [verified.read_meta(run / stage / "120") for run in (workdir, tmp_path / "whole")]
        assert found[0] == found[1]  # hashes of every array, position in the data


def test_a_run_begins_from_another_model(whole, tmp_path):
    """From its moving average, and a step of almost no length later it still is that model."""
    settings = toy_run.settings()
    config = dataclasses.replace(
        settings,
        stage1=dataclasses.replace(settings.stage1, steps=0),
        stage2=dataclasses.replace(settings.stage2, steps=1, strategy="joint"),
        optimizer2=dataclasses.replace(settings.optimizer2, learning_rate=1e-12, warmup_steps=0),
        train=dataclasses.replace(settings.train, init_from=str(whole[0])),
    )
    config.validate()
    state = train(tmp_path / "run", config=config)
    loaded = saved.load(whole[0]).variables
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), dict(state.params), loaded)
    golden = Path(__file__).parent.parent / "golden" / "tiny"
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(golden)))
    with pytest.raises(UserError, match=r"train.init_from = .*tiny: dit/in_layer.bias is \[48\], this run needs None"):
        train(tmp_path / "other", config=other)
