import errno
import os
import subprocess
import sys
from pathlib import Path

import copies
import environment
import pytest

ROOT = Path(__file__).parents[2]

BINARY = """
import errno, os
from cola_jax import cli
from cola_jax.train import interrupts, trainer
from cola_jax.types import TemporaryError, UserError
FLAG = cli.config_flag()
cli.machine_flags()

def main():
    config = cli.read_config(FLAG)
    if config.seed == 1:
        raise UserError("file x = 1: must be 2")
    if config.seed == 2:
        raise trainer.NonFiniteLoss("stage 1, step 3: loss is nan")
    if config.seed == 3:
        raise interrupts.Interrupted("stopped by SIGTERM", 15)
    if config.seed == 4:
        raise interrupts.Interrupted("stopped by SIGINT", 2)
    if config.seed == 5:
        raise TemporaryError("checkpoint x: not saved: OSError: ...")
    if config.seed in (6, 7, 8):
        number = {6: errno.ESTALE, 7: errno.ENOENT, 8: errno.EIO}[config.seed]
        error = OSError(number, os.strerror(number), "/mnt/file")
        if config.seed == 8:
            raise error
        raise UserError(f"/mnt/file: {error.strerror}") from error
    print("steps", config.stage1.steps)

cli.run(main)
"""

CONFIG = """
from cola_jax import families

def get_config():
    return families.default_config()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("cli")
    (place / "binary.py").write_text(BINARY)
    (place / "good.py").write_text(CONFIG)
    (place / "broken.py").write_text("import nothing_of_this_name\n")
    yield place
    copies.close()


def call(place, *arguments):
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.CompletedProcess([], *copies.call(place / "binary.py", list(arguments), env, cwd=place))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["--config"]),
        (["--config=none.py"], ["none.py", "no such file"]),
        (["--config=broken.py"], ["nothing_of_this_name"]),
        (["--config=good.py", "--config.train.stepz=3"], ["config.train.stepz", "no such field"]),
        (["--config=good.py", "--config.stage1.step=3"], ["config.stage1.step", "did you mean steps?"]),
        (["--config=good.py", "--config.tarin.log_every=3"], ["config.tarin.log_every", "did you mean train?"]),
        (["--config=good.py", "--config.stage1.steps=many"], ["config.stage1.steps", "'many'"]),
        (["--config=good.py", "--config.stage1.steps=-1"], ["config.stage1.steps", "-1", "at least 0"]),
        (["--config=good.py", "--workdirr=3"], ["workdirr"]),
        (["--config=good.py", "extra"], ["'extra'"]),
        (["--config=good.py", "--join_timeout=nan"], ["--join_timeout = nan: must be a finite number"]),
        (["--config=good.py", "--config.vae.shift=-inf"], ["vae.shift", "-inf", "must be a finite number"]),
        (["--config=good.py", "--config.seed=1"], ["file x = 1: must be 2"]),
    ],
)
def test_errors_are_one_line_and_status_2(place, arguments, words):
    result = call(place, *arguments)
    assert result.returncode == 2
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert all(word in result.stderr for word in words)


def test_other_endings(place):
    good = call(place, "--config=good.py", "--config.stage1.steps=7")
    assert (good.returncode, good.stdout, good.stderr) == (0, "steps 7\n", "")
    diverged = call(place, "--config=good.py", "--config.seed=2")
    assert (diverged.returncode, diverged.stderr) == (3, "error: stage 1, step 3: loss is nan\n")
    stopped = call(place, "--config=good.py", "--config.seed=3")
    assert (stopped.returncode, stopped.stdout) == (75, "stopped by SIGTERM\n")
    stopped = call(place, "--config=good.py", "--config.seed=4")
    assert (stopped.returncode, stopped.stdout) == (130, "stopped by SIGINT\n")


@pytest.mark.parametrize(
    "seed, status, line",
    [
        (5, 75, "error: checkpoint x: not saved: OSError: ..."),
        (6, 75, f"error: /mnt/file: {os.strerror(errno.ESTALE)}"),
        (7, 2, "error: /mnt/file: No such file or directory"),
        (8, 75, "error: /mnt/file: Input/output error"),
    ],
)
def test_what_another_start_may_mend(place, seed, status, line):
    result = call(place, "--config=good.py", f"--config.seed={seed}")
    assert (result.returncode, result.stderr) == (status, line + "\n")


def test_huge_pages_restart_keeps_the_command(place):
    (place / "long.py").write_text(
        "import os, sys\n"
        "from cola_jax import cli\n"
        "def main(arguments):\n"
        "    print(arguments, os.environ['GLIBC_TUNABLES'])\n"
        "cli.run(main, arguments=True, huge_pages=True)\n"
    )
    env = dict(os.environ, PYTHONPATH=str(ROOT), GLIBC_TUNABLES="glibc.malloc.tcache_count=7")
    command = [sys.executable, "long.py", "one", "two words"]
    result = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    expected = "glibc.malloc.tcache_count=7:glibc.malloc.hugetlb=1" if sys.platform == "linux" else ""
    assert result.stdout == f"['one', 'two words'] {expected}\n", result.stderr


@pytest.mark.parametrize(
    ("devices", "given", "threads"), [(1, None, None), (4, None, max(64, os.cpu_count())), (4, 7, 7)]
)
def test_virtual_devices_have_threads_to_wait_in(place, devices, given, threads):
    (place / "main.py").write_text(
        "import os\nfrom cola_jax import cli\ncli.run(lambda: print(os.environ.get('NPROC')))\n"
    )
    given = {"NPROC": str(given)} if given else {}
    env = environment.process(devices, PYTHONPATH=str(ROOT), **given)
    result = subprocess.run([sys.executable, "main.py"], cwd=place, env=env, capture_output=True, text=True)
    assert result.stdout == f"{threads}\n", result.stderr
