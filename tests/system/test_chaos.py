"""The short version of `chaos.py`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_stopped_and_damaged_runs_lose_nothing(tmp_path):
    command = [sys.executable, Path(__file__).with_name("chaos.py"), f"--workdir={tmp_path / 'runs'}"]
    command += ["--kills=4", "--stops=1", "--corruptions=3", "--processes=1,2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"^4 kills, 2 stops, 6 corruptions: nothing lost", result.stdout, re.MULTILINE)
    assert result.stdout.count("all detected and recovered from") == 2


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_loses_nothing(tmp_path):
    command = [sys.executable, Path(__file__).with_name("chaos.py"), f"--workdir={tmp_path / 'runs'}", "--bucket"]
    command += ["--kills=1", "--stops=0", "--corruptions=0", "--processes=2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"^1 kills, 0 stops, 0 corruptions: nothing lost", result.stdout, re.MULTILINE)
