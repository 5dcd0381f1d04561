"""The cluster scripts, against programs of the same names that note how they were called and answer from a list."""

import os
import subprocess
from pathlib import Path

LAUNCH = Path(__file__).parents[1] / "launch"


def stub(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "$CALLS"\n{body}\n')
    path.chmod(0o755)


def run(tmp_path: Path, script: str, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    """(exit status, lines that the stubs wrote)."""
    calls = tmp_path / "calls"
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "CALLS": str(calls), "TMPDIR": str(tmp_path), **environment}
    found = subprocess.run(["bash", LAUNCH / script, *arguments], env=env, timeout=60, capture_output=True, text=True)
    return found.returncode, calls.read_text().splitlines() if calls.exists() else [found.stderr]


def statuses(tmp_path: Path, *values: int) -> str:
    """A line of shell that ends with these statuses, one a call, then with 0."""
    (tmp_path / "statuses").write_text("".join(f"{value}\n" for value in values))
    return f'status=$(head -n 1 "{tmp_path}/statuses"); sed -i 1d "{tmp_path}/statuses"; exit "${{status:-0}}"'


def gcloud(tmp_path: Path, *trainings: int) -> None:
    """A cloud whose slices are there once asked for, and are lost when a training ends with 75."""
    (tmp_path / "bin").mkdir()
    stub(tmp_path / "bin", "sleep", "")
    stub(
        tmp_path / "bin",
        "gcloud",
        f"""
there="{tmp_path}/slice"
case "$*" in
  *describe*) [ -e "$there" ] && echo ACTIVE ;;
  *"queued-resources create"*) touch "$there" ;;
  *"queued-resources delete"*) rm -f "$there" ;;
  *launch/train.py*)
    [ "$(head -n 1 "{tmp_path}/statuses")" = 75 ] && rm -f "$there"
    {statuses(tmp_path, *trainings)} ;;
esac
""",
    )


SLICE = {"NAME": "cola", "ZONE": "here", "TYPE": "v5litepod-16", "RUNTIME": "v2"}


def test_tpu_slice_is_asked_for_again_when_it_is_taken_away(tmp_path):
    gcloud(tmp_path, 75, 76, 0)
    status, calls = run(tmp_path, "tpu_pod.sh", "--config=a b.py", "--workdir=/mnt/run", **SLICE, SPOT="1")
    assert status == 0
    created = [call for call in calls if "queued-resources create" in call]
    trained = [call for call in calls if "launch/train.py" in call]
    assert len(created) == 2 and len(trained) == 3  # lost after the first, still there after the second
    assert "--accelerator-type=v5litepod-16" in created[0] and created[0].endswith("--spot")
    assert all(r"launch/train.py --config=a\ b.py --workdir=/mnt/run" in call for call in trained)
    assert all("--worker=all" in call for call in trained)
    assert sum("tpu-vm scp" in call for call in calls) == 2  # installed on each new slice


def test_tpu_script_gives_up(tmp_path):
    gcloud(tmp_path, 1, 1, 1)
    status, calls = run(tmp_path, "tpu_pod.sh", **SLICE, RESTARTS="2")
    assert status == 1 and sum("launch/train.py" in call for call in calls) == 2


def test_tpu_script_does_not_repeat_an_error(tmp_path):
    gcloud(tmp_path, 2)
    status, calls = run(tmp_path, "tpu_pod.sh", "--config=none.py", **SLICE)
    assert status == 2 and sum("launch/train.py" in call for call in calls) == 1
    assert not any("--spot" in call for call in calls)


def test_tpu_script_names_what_is_missing(tmp_path):
    status, (message,) = run(tmp_path, "tpu_pod.sh", NAME="cola")
    assert status == 1 and "ZONE: its zone" in message


def slurm(tmp_path: Path, status: int, **environment: str) -> tuple[int, list[str]]:
    (tmp_path / "bin").mkdir()
    stub(tmp_path / "bin", "srun", statuses(tmp_path, status))
    stub(tmp_path / "bin", "scontrol", "")
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    return run(tmp_path, "slurm.sh", "--config=a.py", **job, **environment)


def test_slurm_job_is_queued_again_after_a_preemption(tmp_path):
    status, calls = slurm(tmp_path, 75)
    assert status == 0 and calls[1:] == ["scontrol requeue 7"]
    assert calls[0] == "srun --kill-on-bad-exit=1 .venv/bin/python launch/train.py --config=a.py"


def test_slurm_job_ends_with_an_error_or_after_many_starts(tmp_path):
    assert slurm(tmp_path, 3)[0] == 3
    other = tmp_path / "other"
    other.mkdir()
    status, calls = slurm(other, 76, SLURM_RESTART_COUNT="100")
    assert status == 76 and len(calls) == 1


def test_ssh_starts_a_process_on_each_machine(tmp_path):
    (tmp_path / "bin").mkdir()
    stub(tmp_path / "bin", "ssh", 'case "$2" in two) exit 75 ;; esac')
    status, calls = run(tmp_path, "ssh.sh", "--config=a b.py", HOSTS="one two", PORT="99")
    assert status == 75
    for index, host in enumerate(("one", "two")):
        (call,) = [call for call in calls if call.startswith(f"ssh -tt {host} ")]
        assert r"launch/train.py --config=a\ b.py" in call
        assert call.endswith(f"--coordinator=one:99 --process_count=2 --process_id={index}")
