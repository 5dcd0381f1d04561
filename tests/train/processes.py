"""Starts `toy_run.py` in one process or in several that form one run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import environment

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(workdir, cache, *arguments, count: int = 1, devices: int = 1, only=None) -> list[subprocess.Popen]:
    """The processes of a run of the toy; ``only``: the ids of those that are started, None for all."""
    env = environment.process(devices, cache, PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parents[1])]))
    place, started = f"--coordinator=127.0.0.1:{free_port()}", []
    for index in range(count) if only is None else only:
        several = [place, f"--process_count={count}", f"--process_id={index}"] if count > 1 else []
        command = [sys.executable, HERE / "toy_run.py", f"--workdir={workdir}", *several, *map(str, arguments)]
        with open(f"{workdir}.{index}.log", "a") as log:
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    return started


def wait(started, timeout: float = 300) -> list[int]:
    """Their exit statuses; kills those that do not end in time."""
    try:
        return [process.wait(timeout) for process in started]
    finally:
        for process in started:
            process.kill()


def log(workdir, index: int = 0) -> str:
    return Path(f"{workdir}.{index}.log").read_text()
