"""`starts.jsonl`: versions, devices and changed fields of each start."""

import dataclasses
import importlib.metadata
import json

import jax
import pytest
import toy_run

from cola_jax.train import starts, workdir


@pytest.fixture
def claimed(tmp_path):
    workdir.claim(toy_run.settings(), tmp_path)
    return tmp_path


def record(directory, config=None) -> list[str]:
    lines = []
    starts.record(config or toy_run.settings(), directory, lines.append)
    return lines


def noted(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / starts.FILE).read_text().splitlines()]


def test_every_start_notes_versions_and_devices(claimed):
    assert record(claimed) == [] and record(claimed) == []
    first, second = noted(claimed)
    for name in ("jax", "jaxlib", "flax", "orbax-checkpoint", "grain", "numpy"):
        assert first["versions"][name] == importlib.metadata.version(name)
    assert first["versions"] == second["versions"] and first["time"] < second["time"]
    assert first["devices"] == {"kind": jax.devices()[0].device_kind, "count": jax.device_count()}
    assert first["processes"] == 1 and first["changed"] == {}


def test_other_versions_are_told_in_one_line(claimed, monkeypatch):
    record(claimed)
    now = starts.versions()
    later = {**now, "jax": "9.9", "libtpu": "0.0.1"}
    del later["grain"]
    monkeypatch.setattr(starts, "versions", lambda: later)
    (line,) = record(claimed)
    assert line.startswith("warning: other versions than at the last start: ") and "\n" not in line
    for words in (f"jax {now['jax']} -> 9.9", f"grain {now['grain']} -> absent", "libtpu absent -> 0.0.1"):
        assert words in line
    assert record(claimed) == []  # told once


def test_changed_fields_are_noted_and_told(claimed):
    record(claimed)
    other = toy_run.settings(accumulation=4, log_every=1, milestone_steps=[3])
    (line,) = record(claimed, other)
    assert "optimizer2.accumulation: absent -> 4" in line and "train.log_every: absent -> 1" in line
    changed = {"optimizer2.accumulation": 4, "train.log_every": 1, "train.milestone_steps[0]": 3}
    assert noted(claimed)[1]["changed"] == changed
    assert record(claimed, other) == []
    assert record(claimed) and noted(claimed)[-1]["changed"] == {}


def test_a_torn_line_is_passed_over(claimed):
    record(claimed)
    with open(claimed / starts.FILE, "a") as file:
        file.write('{"time": 1, "vers')
    assert starts.last(claimed)["processes"] == 1
    record(claimed, toy_run.settings(log_every=1))
    assert starts.last(claimed)["changed"] == {"train.log_every": 1}  # on a line of its own


def test_a_start_that_came_to_nothing_claims_nothing(claimed):
    record(claimed)
    workdir.claim(dataclasses.replace(toy_run.settings(), seed=5), claimed)
    assert workdir.read_config(claimed)["seed"] == 5
