"""Checkpoints that are kept for good, by step or by EFLOPs, and the EFLOPs that a run reports."""

import dataclasses
import itertools
import json
import time
import types

import jax
import numpy as np
import pytest
import toy_model
import toy_run

from cola_jax import families
from cola_jax.train import interrupts, loop, reports, saved, trainer, verified
from cola_jax.types import UserError

STEPS, EVERY = 12, 4


def config(**train):
    train = {"keep_checkpoints": 1, "checkpoint_every": EVERY, "log_every": 3, "eval_every": 5} | train
    return toy_model.config(
        vae={"vocab_size": 300}, stage1={"steps": STEPS}, stage2={"steps": STEPS, "strategy": "joint"}, train=train
    )


def train(directory, asked, log=lambda line: None):
    return loop.train(asked, directory, toy_run.experiment(asked), toy_run.sampler, log)


def costs(asked):
    stages = toy_run.experiment(asked).stages
    return [reports.cost(asked, stages, index, 1) for index in range(len(stages))]


def kept(directory, stage: int) -> list[int]:
    return sorted(verified.step_directories(directory / f"stage{stage}"))


class Crash(BaseException):
    """Stands for a process that ends here and now."""


# Two steps between checkpoints, and EFLOPs of which the first are reached in step 6 of stage 1, others in 3 of stage 2.
MARKED = [2, 7]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("milestones")
    first, second = costs(config())
    asked = config(milestone_steps=MARKED, milestone_exaflops=[first.exaflops(6), second.exaflops(2) * 1.0001])
    return directory, asked, train(directory, asked)


def test_milestones_stay_beside_the_newest(run):
    assert kept(run[0], 1) == [2, 6, 7, 12] and kept(run[0], 2) == [2, 3, 7, 12]


def test_without_them_the_newest_stays_alone(tmp_path):
    asked = config(keep_checkpoints=2)
    train(tmp_path, asked)
    assert kept(tmp_path, 1) == kept(tmp_path, 2) == [8, 12]


def test_a_milestone_is_opened_by_its_step(run, tmp_path):
    loaded = {step: saved.load(run[0], step=step) for step in (2, 3, 7, 12)}
    assert all(found.step == step and found.stage == "stage2" for step, found in loaded.items())
    trees = [jax.tree.leaves(found.variables) for found in loaded.values()]
    for one, other in itertools.combinations(trees, 2):
        assert any(not np.array_equal(x, y) for x, y in zip(one, other, strict=True))
    last = jax.tree.leaves(dict(run[2].params))
    assert all(np.array_equal(x, y) for x, y in zip(last, trees[-1], strict=True))
    assert saved.load(run[0]).step == STEPS and saved.load(run[0] / "stage1", step=6).step == 6

    # A run of so many steps (at a constant rate, so that the schedule is the same) ends there.
    assert saved.open_lazily(run[0], step=3).step == 3


@pytest.mark.parametrize("load", [saved.load, saved.open_lazily])
def test_a_step_that_is_not_there_names_those_that_are(run, load):
    with pytest.raises(UserError) as caught:
        load(run[0], step=5)
    directory = run[0] / "stage2"
    assert str(caught.value) == f"--step = 5: {directory} has no such checkpoint; it must be one of 2, 3, 7, 12"


def test_every_row_says_what_was_computed(run):
    rows = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    assert {(row["stage"], row["kind"]) for row in rows} == {(s, k) for s in (1, 2) for k in ("train", "holdout")}
    found = [row["exaflops"] for row in rows]
    assert found == sorted(found)
    both = costs(run[1])
    assert found == [both[row["stage"] - 1].exaflops(row["step"]) for row in rows]


def test_what_a_run_computes_by_hand(run):
    tokens = run[1].data.batch_size * run[1].data.sequence_length
    first, second = (stage.flops_per_token for stage in families.of(run[1]).stages(None, run[1]))
    rows = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    ends = [max(row["exaflops"] for row in rows if row["stage"] == stage) for stage in (1, 2)]
    expected = [12 * tokens * first / 1e18, 12 * tokens * (first + second) / 1e18]
    assert ends == pytest.approx(expected, rel=1e-12) and second != first > 0


def test_the_first_step_that_has_computed_as_much():
    for cost in costs(config()):
        for step in (1, 2, 9, 12):
            exact = cost.exaflops(step)
            assert cost.step_at(exact) == step and cost.step_at(exact * (1 + 1e-6)) == step + 1
    first, second = costs(config())
    assert second.exaflops(0) == pytest.approx(first.exaflops(STEPS), rel=1e-12)
    assert second.step_at(first.exaflops(3)) < 1  # an earlier stage has


def test_milestones_outside_a_stage_are_none_of_it():
    first, second = costs(config())
    asked = config(milestone_steps=[12, 13], milestone_exaflops=[first.exaflops(1), second.exaflops(12) * 1.01])
    stages = toy_run.experiment(asked).stages
    assert [reports.milestones(asked, stages, index) for index in (0, 1)] == [{1, 12}, {12}]


def test_a_run_that_was_stopped_keeps_the_same(run, tmp_path):
    """Those that an earlier process saved stay, too."""

    def crash(line):
        if "stage 2  step 9/" in line:
            raise Crash

    with pytest.raises(Crash):
        train(tmp_path, run[1], crash)
    train(tmp_path, run[1])
    assert [kept(tmp_path, stage) for stage in (1, 2)] == [kept(run[0], stage) for stage in (1, 2)]
    name = "metrics.jsonl"
    assert (tmp_path / name).read_bytes() == (run[0] / name).read_bytes()
    for step in (2, 3, 7, 12):
        bodies = [verified.read_meta(directory / "stage2" / str(step)) for directory in (tmp_path, run[0])]
        assert bodies[0]["hashes"] == bodies[1]["hashes"] and bodies[0]["data"] == bodies[1]["data"]


class Minutes:
    """A clock that a run's log moves on: so many minutes a step."""

    def __init__(self, each: float):
        self.now, self._each = 0.0, each

    def __call__(self, line: str) -> None:
        if "lr " in line:
            self.now += 60 * self._each

    def __getattr__(self, name):  # the rest of the module
        return getattr(time, name)

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("every, expected", [(100, [5, 10, 12]), (7, [5, 7, 12])])
def test_checkpoints_by_minutes(tmp_path, monkeypatch, every, expected):
    """Beside those by steps, which start the time anew."""
    asked = config(log_every=1, checkpoint_every=every, checkpoint_minutes=8, keep_checkpoints=9)
    clock = Minutes(2)
    monkeypatch.setattr(trainer, "time", clock)
    train(tmp_path, asked, clock)
    # The clock is read before the line of a step, and started by the save after it.
    assert kept(tmp_path, 1) == kept(tmp_path, 2) == expected


def test_several_processes_save_by_the_clock_of_the_first(tmp_path, monkeypatch):
    """And stop together: all of them learn of both one step later, once."""

    class Asks(trainer.Trainer):
        def __init__(self):
            self._config, self._saved_at, self._asked = config(checkpoint_minutes=1), 0.0, (False, False)
            self._monitors = types.SimpleNamespace(signals=interrupts.Signals())

    now = [0.0]
    monkeypatch.setattr(trainer, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    asks = Asks()
    found = []
    for now[0] in (10.0, 60.0, 70.0, 80.0, 119.0, 120.0, 130.0):
        found.append(asks._is_asked())
    assert found == [(False, late) for late in (False, False, True, False, False, False, True)]
    asks._monitors.signals.received = 15
    assert asks._is_asked() == (False, False) and asks._is_asked() == (True, False)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    now[0] = 1e6
    asks._is_asked()
    assert asks._is_asked() == (True, False)  # its clock does not count


def test_a_run_may_resume_with_other_milestones(tmp_path):
    asked = config(milestone_steps=[2])

    def crash(line):
        if "stage 1  step 9/" in line:
            raise Crash

    with pytest.raises(Crash):
        train(tmp_path, asked, crash)
    later = dataclasses.replace(asked, train=dataclasses.replace(asked.train, milestone_steps=(2, 11)))
    train(tmp_path, later)
    assert kept(tmp_path, 1) == [2, 11, 12]
