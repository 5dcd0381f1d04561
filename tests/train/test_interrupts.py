import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cola_jax.train import devices, interrupts
from cola_jax.types import UserError

HANGS = """
import sys, time
from cola_jax.train.interrupts import Watchdog
with Watchdog(1.0) as watchdog:
    for _ in range(8):
        time.sleep(0.4)
        watchdog.beat()
    print("alive", flush=True)
    if sys.argv[1:]:
        time.sleep(60)
time.sleep(2)
print("ended")
"""


def call(*arguments):
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]), JAX_PLATFORMS="cpu")
    command = [sys.executable, "-c", HANGS, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_watchdog_ends_what_hangs_and_nothing_else():
    result = call()
    assert (result.returncode, result.stdout, result.stderr) == (0, "alive\nended\n", "")
    result = call("hang")
    assert result.returncode == interrupts.HUNG and result.stdout == "alive\n"
    first = result.stderr.splitlines()[0]
    assert first.startswith("error: process 0 of 1: no step has ended for 1 s (config.train.hang_timeout)")
    assert 'File "<string>", line ' in result.stderr  # the stack of the main thread


def test_no_watchdog_without_a_timeout():
    with interrupts.Watchdog(0.0):
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}
    with interrupts.Watchdog(60.0):
        assert "watchdog" in {thread.name for thread in threading.enumerate()}


def test_statuses():
    assert interrupts.Interrupted("", signal.SIGTERM).status == 75
    assert interrupts.Interrupted("", signal.SIGINT).status == 130


def caused(error: Exception, message: str = "file: something", hide: bool = False) -> UserError:
    """A UserError that was made of another error."""
    try:
        try:
            raise error
        except Exception as caught:
            if hide:
                raise UserError(message) from None
            raise UserError(message) from caught
    except UserError as made:
        return made


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.ETIMEDOUT, errno.EMFILE])
def test_machines_and_networks_are_temporary(number):
    error = OSError(number, os.strerror(number))
    assert interrupts.is_temporary(error) and interrupts.is_temporary(caused(error))
    assert interrupts.is_temporary(caused(error, hide=True)) and interrupts.is_temporary(caused(caused(error)))
    assert interrupts.is_temporary(ValueError(f"UNKNOWN: Error reading [OS error {number}: {os.strerror(number)}]"))
    assert not interrupts.is_temporary(error, but=(number,))


def test_paths_values_and_bugs_are_not():
    for number in (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EROFS):
        assert not interrupts.is_temporary(caused(OSError(number, os.strerror(number))))
    plain = [UserError("x = 1: must be 2"), ValueError("[OS error 2: ENOENT]"), OSError("no errno"), KeyError("x")]
    assert not any(map(interrupts.is_temporary, plain))
    assert not interrupts.is_temporary(UserError(f"x = '[OS error {errno.EIO}]': must be 2"))


def test_peak_flops_by_device_kind():
    assert devices.peak_flops("TPU v5 lite") == 197e12 and devices.peak_flops("TPU v5p") == 459e12
    assert devices.peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and devices.peak_flops("cpu") == 0.0
