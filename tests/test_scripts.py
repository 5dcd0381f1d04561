"""The cluster scripts, against programs of the same names that note how they were called and answer from a list."""

import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def gcloud(tmp_path: Path, *trainings: int, create="", describe="", scp="") -> None:
    """A cloud whose slices are there once asked for, and are lost when a training ends with 75.

    Args:
      trainings: statuses of the trainings, then 0.
      create, describe, scp: lines of shell that come before what the cloud does then.
    """
    (tmp_path / "bin").mkdir()
    stub(tmp_path / "bin", "sleep", "")
    stub(
        tmp_path / "bin",
        "gcloud",
        f"""
there="{tmp_path}/slice"
case "$*" in
  *describe*) {describe}
    if [ -e "$there" ]; then echo ACTIVE; else echo "ERROR: (gcloud) NOT_FOUND: no such request" >&2; exit 1; fi ;;
  *"queued-resources create"*) {create}
    touch "$there" ;;
  *"queued-resources delete"*) rm -f "$there" ;;
  *"tpu-vm scp"*) {scp}
    cp "$5" "{tmp_path}/sent.tgz" ;;
  *launch/train.py*)
    [ "$(head -n 1 "{tmp_path}/statuses")" = 75 ] && rm -f "$there"
    {statuses(tmp_path, *trainings)} ;;
esac
""",
    )


def first(tmp_path: Path, name: str, count: int, body: str) -> str:
    """A line of shell that does something in the first ``count`` calls, and nothing later."""
    mark = tmp_path / name
    return f'if [ "$(cat "{mark}" 2>/dev/null | wc -l)" -lt {count} ]; then echo >> "{mark}"; {body}; fi'


SLICE = {"NAME": "cola", "ZONE": "here", "TYPE": "v5litepod-16", "RUNTIME": "v2"}


def count(calls: list[str], words: str) -> int:
    return sum(words in call for call in calls)


def test_tpu_slice_is_asked_for_again_when_it_is_taken_away(tmp_path):
    gcloud(tmp_path, 75, 76, 0)
    more = {"SPOT": "1", "SETUP": "sudo a b", "MOUNTS": "host:/v=/mnt"}
    status, calls = run(tmp_path, "tpu_pod.sh", "--config=a b.py", "--workdir=/mnt/run", **SLICE, **more)
    assert status == 0
    created = [call for call in calls if "queued-resources create" in call]
    trained = [call for call in calls if "launch/train.py" in call]
    assert len(created) == 2 and len(trained) == 3  # lost after the first, still there after the second
    assert "--accelerator-type=v5litepod-16" in created[0] and created[0].endswith("--spot")
    assert all(r"launch/train.py --config=a\ b.py --workdir=/mnt/run" in call for call in trained)
    assert all("--worker=all" in call for call in trained)
    # What was edited goes to every worker before every start, and is installed there.
    assert count(calls, "tpu-vm scp") == count(calls, r"bash launch/tpu_worker.sh sudo\ a\ b host:/v=/mnt") == 3
    order = [
        next(w for w in ("scp", "worker.sh", "train.py") if w in call)
        for call in calls
        if "tpu" in call and ("tpu-vm scp" in call or "launch/t" in call)
    ]
    assert order == ["scp", "worker.sh", "train.py"] * 3
    with tarfile.open(tmp_path / "sent.tgz") as sent:
        names = sent.getnames()
    assert {"./launch/train.py", "./launch/tpu_worker.sh", "./launch/constraints.txt", "./setup.cfg"} <= set(names)
    assert not [name for name in names if name.startswith(("./runs", "./.git", "./.venv")) and name != "./.gitignore"]


def test_a_refused_request_is_not_waited_for(tmp_path):
    """Until it gives up: a quota, a wrong type or a missing permission do not change by waiting."""
    gcloud(tmp_path, create="exit 1")
    status, calls = run(tmp_path, "tpu_pod.sh", **SLICE, REFUSALS="3")
    assert status == 1 and count(calls, "queued-resources create") == 3
    assert count(calls, "describe") == 3 and not count(calls, "train.py")


def test_a_request_that_is_granted_later_begins_anew(tmp_path):
    """Twice in three a request is refused, but never three times in a row."""
    mark = tmp_path / "requests"
    gcloud(tmp_path, 75, create=f'echo >> "{mark}"; if [ $(($(wc -l < "{mark}") % 3)) != 0 ]; then exit 1; fi')
    status, calls = run(tmp_path, "tpu_pod.sh", **SLICE, REFUSALS="3")
    assert status == 0 and count(calls, "queued-resources create") == 6 and count(calls, "train.py") == 2


def test_a_failed_installation_is_tried_again_on_the_same_slice(tmp_path):
    gcloud(tmp_path, scp=first(tmp_path, "broken", 2, "exit 1"))
    status, calls = run(tmp_path, "tpu_pod.sh", **SLICE)
    assert status == 0 and count(calls, "queued-resources create") == 1 and not count(calls, "delete")
    assert count(calls, "tpu-vm scp") == 3 and count(calls, "train.py") == 1


def test_an_installation_that_always_fails_ends_the_script(tmp_path):
    gcloud(tmp_path, scp="exit 1")
    status, calls = run(tmp_path, "tpu_pod.sh", **SLICE, REFUSALS="2")
    assert status == 1 and count(calls, "tpu-vm scp") == 2 and not count(calls, "train.py")


def test_a_cloud_that_does_not_answer_costs_no_slice(tmp_path):
    gcloud(tmp_path, describe=first(tmp_path, "silent", 3, 'echo "network unreachable" >&2; exit 1'))
    (tmp_path / "slice").touch()
    status, calls = run(tmp_path, "tpu_pod.sh", **SLICE)
    assert status == 0 and not count(calls, "delete") and not count(calls, "create") and count(calls, "train.py") == 1
    assert count(calls, "describe") == 4


def test_waits_for_a_request_that_is_there_and_replaces_one_that_failed(tmp_path):
    states = "".join(first(tmp_path, s, n, f"echo {s}; exit 0") + "\n" for s, n in (("PROVISIONING", 2), ("FAILED", 1)))
    gcloud(tmp_path, describe=states)
    status, calls = run(tmp_path, "tpu_pod.sh", **SLICE)
    kinds = [
        next(
            k
            for k in ("describe", "delete", "create", "scp", "worker.sh", "train.py", "other")
            if k in call or k == "other"
        )
        for call in calls
        if call.startswith("gcloud")
    ]
    assert status == 0
    assert kinds[:5] == ["describe", "describe", "describe", "delete", "describe"] and kinds[5] == "create"


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


def worker(tmp_path: Path, pythons=(), **stubs: str) -> Path:
    """A folder with the worker's script, and programs that stand for a TPU VM's; ``pythons``: those that are new."""
    folder, programs = tmp_path / "cola_jax", tmp_path / "bin"
    (folder / "launch").mkdir(parents=True)
    programs.mkdir()
    shutil.copy(LAUNCH / "tpu_worker.sh", folder / "launch")
    (folder / "setup.cfg").write_text("[metadata]")
    (folder / "launch" / "constraints.txt").write_text("jax==1")
    pip = 'mkdir -p .venv/bin; printf \'#!/bin/bash\\necho "pip $*" >> "$CALLS"; exit ${PIP:-0}\' > .venv/bin/pip'
    venv = f"{pip}; chmod +x .venv/bin/pip"
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        stub(programs, name, f'case "$*" in *venv*) {venv} ;; *) exit {int(name not in pythons)} ;; esac')
    stubs = {"pkill": "exit 1", "pgrep": "exit 1", "sleep": "", "mountpoint": "exit 1", "uv": venv, "sudo": "", **stubs}
    for name, body in stubs.items():
        stub(programs, name, body)
    return folder


def work(tmp_path: Path, folder: Path, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    calls = tmp_path / "calls"
    calls.unlink(missing_ok=True)
    return run(tmp_path, str(folder / "launch" / "tpu_worker.sh"), *arguments, **environment)


def test_a_worker_installs_once_with_the_constraints(tmp_path):
    folder = worker(tmp_path, ["python3.11"])
    status, calls = work(tmp_path, folder, "", "", "")
    assert status == 0 and "python3.11 -m venv .venv" in calls and not count(calls, "uv ")
    assert "pip install -q -c launch/constraints.txt -e .[tpu,hf]" in calls and not count(calls, "libtpu")
    status, calls = work(tmp_path, folder, "", "", "")
    assert status == 0 and not count(calls, "pip") and not count(calls, "venv")
    (folder / "launch" / "constraints.txt").write_text("jax==2")  # other versions: from the beginning
    assert count(work(tmp_path, folder, "", "", "")[1], "pip install") == 1
    calls = work(tmp_path, folder, "", "", "0.0.52")[1]
    assert calls[-1] == "pip install -q libtpu==0.0.52"


def test_a_worker_without_a_new_python_has_uv_make_one(tmp_path):
    folder = worker(tmp_path)
    status, calls = work(tmp_path, folder, "", "", "")
    assert status == 0 and "uv venv -q --seed --python 3.12 .venv" in calls and count(calls, "pip install -q -c")
    (tmp_path / "other").mkdir()
    folder = worker(tmp_path / "other", uv="exit 1")
    status, lines = work(tmp_path / "other", folder, "", "", "")
    assert status == 1 and count(lines, "uv venv") and not count(lines, "pip install -q -c")


def test_a_failed_installation_is_not_taken_for_one(tmp_path):
    folder = worker(tmp_path, ["python3.12"])
    assert work(tmp_path, folder, "", "", "", PIP="1")[0] == 1
    assert count(work(tmp_path, folder, "", "", "")[1], "pip install") == 1


def test_a_worker_stops_what_is_left_of_a_training(tmp_path):
    folder = worker(tmp_path, ["python3.12"], pkill="", pgrep="")  # it does not end by itself
    status, calls = work(tmp_path, folder, "", "", "")
    kills = [call for call in calls if call.startswith("pkill")]
    assert status == 0 and [call.split()[1] for call in kills] == ["-TERM", "-KILL"]
    assert count(calls, "sleep 1") == 180 and calls.index(kills[1]) < calls.index("python3.12 -m venv .venv")
    pattern = kills[0].partition("-f ")[2]
    for line in (".venv/bin/python launch/train.py --config=x", "/home/me/cola_jax/.venv/bin/python3 launch/train.py"):
        assert re.search(pattern, line)
    for line in (f"pkill -TERM -f {pattern}", "bash launch/tpu_worker.sh", "vi launch/train.py"):
        assert not re.search(pattern, line)


def test_a_worker_mounts_what_is_not_mounted(tmp_path):
    folder = worker(tmp_path, ["python3.12"], gcsfuse="", mountpoint='[ "$2" = /mnt/there ]')
    mounts = "10.0.0.2:/volume=/mnt/nfs gs://bucket=/mnt/bucket 10.0.0.2:/other=/mnt/there"
    status, calls = work(tmp_path, folder, "echo set up >> $CALLS", mounts, "")
    assert status == 0 and calls[0] == "set up"
    assert "sudo mount -t nfs 10.0.0.2:/volume /mnt/nfs" in calls
    options = "--implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0"
    assert f"gcsfuse {options} bucket /mnt/bucket" in calls and not count(calls, "/other")
    for wrong in ("/mnt/x", "host:/v=mnt", "ftp=/mnt/x"):
        status, calls = work(tmp_path, folder, "", wrong, "")
        assert status == 1 and not count(calls, "venv")


def slurm(tmp_path: Path, status: int, environment=True, **variables: str) -> tuple[int, list[str]]:
    (tmp_path / "bin").mkdir()
    stub(
        tmp_path / "bin",
        "srun",
        f'echo "fraction $XLA_PYTHON_CLIENT_MEM_FRACTION" >> "$CALLS"\n{statuses(tmp_path, status)}',
    )
    stub(tmp_path / "bin", "scontrol", "")
    if environment:
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / ".venv" / "bin" / "python").symlink_to("/bin/true")
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "96"}
    return run(tmp_path, "slurm.sh", "--config=a.py", **job, **variables)


def test_slurm_job_is_queued_again_after_a_preemption(tmp_path):
    status, calls = slurm(tmp_path, 75)
    assert status == 0 and calls[1:] == ["fraction 0.92", "scontrol requeue 7"]
    task = "srun --kill-on-bad-exit=1 --cpus-per-task=96 .venv/bin/python launch/train.py --config=a.py"
    assert calls[0] == task


def test_slurm_job_takes_whole_nodes_unless_told_otherwise(tmp_path):
    asked = re.findall(r"^#SBATCH (\S+)$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    assert {"--exclusive", "--mem=0", "--requeue", "--ntasks-per-node=1"} <= set(asked)
    calls = slurm(tmp_path, 0, SLURM_CPUS_PER_TASK="8", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")[1]
    assert "--cpus-per-task=8 " in calls[0] and calls[1] == "fraction 0.5"


def test_slurm_job_without_an_environment_says_so(tmp_path):
    status, (line,) = slurm(tmp_path, 0, environment=False)
    assert status == 2 and line.startswith(f"error: {tmp_path}/.venv: must be an environment with jax")


def test_slurm_job_ends_with_an_error_or_after_many_starts(tmp_path):
    assert slurm(tmp_path, 3)[0] == 3
    other = tmp_path / "other"
    other.mkdir()
    status, calls = slurm(other, 76, SLURM_RESTART_COUNT="100")
    assert status == 76 and not count(calls, "scontrol")


def test_constraints_are_what_the_package_and_jax_ask_for():
    """One exact version for every requirement, and in its range."""
    pinned = {}
    for line in (LAUNCH / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pinned[canonicalize_name(name)] = version
    config = configparser.ConfigParser()
    config.read(LAUNCH.parent / "setup.cfg")
    wanted = config["options"]["install_requires"].split("\n") + config["options.extras_require"]["hf"].split("\n")
    wanted += [line for line in importlib.metadata.requires("jax") if "extra == 'tpu'" in line.replace('"', "'")]
    if importlib.metadata.version("jax") != pinned["jax"]:
        pytest.skip("another jax is installed than the constraints have")
    for line in filter(None, wanted):
        requirement = Requirement(line)
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, line
    assert pinned["jax-cuda12-plugin"] == pinned["jax-cuda12-pjrt"] == pinned["jax"] == pinned["jaxlib"]


def test_ssh_starts_a_process_on_each_machine(tmp_path):
    (tmp_path / "bin").mkdir()
    stub(tmp_path / "bin", "ssh", 'case "$2" in two) exit 75 ;; esac')
    status, calls = run(tmp_path, "ssh.sh", "--config=a b.py", HOSTS="one two", PORT="99")
    assert status == 75
    for index, host in enumerate(("one", "two")):
        (call,) = [call for call in calls if call.startswith(f"ssh -tt {host} ")]
        assert r"launch/train.py --config=a\ b.py" in call
        assert call.endswith(f"--coordinator=one:99 --process_count=2 --process_id={index}")
