"""Programs in copies of a process that has imported what they need: what a start took was mostly imports.

A copy (`os.fork`) has the arguments, environment, directory and files of a program that was started, and ends like one.
Only that the imports of a program succeed in a new process is not seen: the first call of each is a process of its own.
"""

import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Imported, they neither touch a device nor start a thread.
_MODULES = ["cli_evaluation", "data.preparation.prepare", "evaluation.conversion", "likelihood", "train.loop"]
_started: set[Path] = set()
_servers: "collections.OrderedDict[str, _Server]" = collections.OrderedDict()


def call(
    program: Path, arguments: list[str], environment: dict[str, str], stdin: str = "", cwd: Path = ROOT
) -> tuple[int, str, str]:
    """Runs a program to its end: (status, standard output, standard error)."""
    command = [str(program), *arguments]
    if program not in _started:
        _started.add(program)
        found = subprocess.run(
            [sys.executable, *command], cwd=cwd, env=environment, input=stdin, capture_output=True, text=True
        )
        return found.returncode, found.stdout, found.stderr
    environment = {name: value for name, value in environment.items() if name != "PYTEST_CURRENT_TEST"}
    key = json.dumps(sorted(environment.items()))
    if key not in _servers:
        if len(_servers) > 2:
            _servers.popitem(last=False)[1].close()
        _servers[key] = _Server(environment)
    _servers.move_to_end(key)
    return _servers[key].call(command, stdin, cwd)


class _Server:
    """Runs programs one after another in copies of one process."""

    def __init__(self, environment: dict[str, str]):
        command = [sys.executable, str(Path(__file__))]
        environment = environment | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}  # for which programs start anew
        self._process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def call(self, command: list[str], stdin: str, cwd: Path) -> tuple[int, str, str]:
        with tempfile.TemporaryDirectory() as place:
            files = [Path(place) / name for name in ("in", "out", "error")]
            files[0].write_text(stdin, encoding="utf-8")
            asked = json.dumps({"argv": command, "files": list(map(str, files)), "cwd": str(cwd)})
            self._process.stdin.write(asked.encode() + b"\n")
            self._process.stdin.flush()
            status = int(self._process.stdout.readline())
            return status, *(file.read_text(encoding="utf-8") for file in files[1:])

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def close() -> None:
    """Ends the processes that are copied."""
    while _servers:
        _servers.popitem()[1].close()


def _wait_for_copies() -> dict | None:
    """In each copy what it was asked to do; in the process itself, at its end, None."""
    while line := sys.stdin.buffer.readline():
        pid = os.fork()
        if not pid:
            return json.loads(line)
        os.write(1, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return None


def _become(argv: list[str], files: list[str], cwd: str) -> None:
    os.chdir(cwd)
    modes = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)
    for number, (name, mode) in enumerate(zip(files, modes, strict=True)):
        file = os.open(name, mode, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.argv, sys.orig_argv, sys.path[0] = argv, [sys.executable, *argv], str(Path(argv[0]).parent)


if __name__ == "__main__":
    import gc
    import importlib
    import runpy
    import warnings

    for name in _MODULES:
        importlib.import_module(f"cola_jax.{name}")
    gc.freeze()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
        asked = _wait_for_copies()
    if asked:
        _become(**asked)
        runpy.run_path(sys.argv[0], run_name="__main__")
