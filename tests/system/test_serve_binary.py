"""launch/serve.py as a user runs it, at a tiny size."""

import signal
import socket
import subprocess
import sys

import environment
import httpx
import openai
import pytest
from test_binaries import ROOT, call, start, train

pytestmark = pytest.mark.slow
SMALL = ("--batch_sizes=1,2", "--drain_seconds=20")


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("run") / "tiny"
    train(cache, workdir, "--config.stage1.steps=5", "--config.stage2.steps=5")
    return workdir


def started(process) -> str:
    for line in process.stdout:
        if "http://" in line:
            return line.split()[-1]
    raise AssertionError(process.stderr.read())


def test_it_answers_streams_and_drains(run, cache):
    key = run / "key"
    key.write_text("a key\n")
    process = start(cache, "serve.py", f"--checkpoint={run}", "--port=0", f"--api_key_file={key}", *SMALL)
    address = started(process)
    assert address.startswith("http://127.0.0.1:")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="a key", max_retries=0)
    fields = {"model": "tiny", "prompt": "Mia was a girl", "max_tokens": 8, "seed": 0}
    text = client.completions.create(**fields).choices[0].text
    whole = call(cache, "sample.py", f"--checkpoint={run}", "Mia was a girl", "--max_new_tokens=8")
    assert text + "\n" == whole
    assert text == "".join(chunk.choices[0].text for chunk in client.completions.create(**fields, stream=True))
    stream = client.completions.create(**fields | {"max_tokens": 40}, stream=True)
    next(iter(stream))
    process.send_signal(signal.SIGTERM)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] is not None
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "POST /v1/completions 200" in log and "Mia was" not in log and "draining" in log
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)


def test_prompts_stand_in_the_log_where_that_is_asked_for(run, cache):
    process = start(cache, "serve.py", f"--checkpoint={run}", "--port=0", "--log_texts", "--model_name=m", *SMALL)
    body = {"model": "m", "prompt": "Mia was a girl", "max_tokens": 2}
    assert httpx.post(f"{started(process)}/v1/completions", json=body, timeout=60).status_code == 200
    process.send_signal(signal.SIGINT)
    assert "Mia was a girl" in process.communicate(timeout=60)[1] and process.returncode == 0


def test_what_cannot_be_served_is_one_line(run, cache, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = call(cache, "serve.py", f"--checkpoint={run}", f"--port={port}", status=2)
        assert f"--port = {port}: cannot be had on 127.0.0.1" in line and "must be a free port" in line
    checkpoint = (f"--checkpoint={run}", "--port=0")
    cases = [
        (["--port=0"], "--checkpoint is missing"),
        ([*checkpoint, "--offer=steps"], "--offer = 'steps': must be settings such as"),
        ([*checkpoint, "--offer=stepz=5"], "--offer: stepz: family 'cola' has no such setting"),
        ([*checkpoint, "--batch_sizes=8,1"], "batch_sizes = (8, 1): must be each at least 1 and ascending"),
        ([*checkpoint, "--queue=-1"], "queue = -1: must be at least 0"),
        ([*checkpoint, "--chat_template=none"], "--chat_template = none: must be a UTF-8 file"),
        ([*checkpoint, "--api_key_file=none"], "--api_key_file = none: must be a UTF-8 file"),
        ([*checkpoint, "--host=nowhere.invalid"], "--host = nowhere.invalid: must be"),
    ]
    for arguments, words in cases:
        assert words in call(cache, "serve.py", *arguments, status=2)
    (tmp_path / "stage2").symlink_to(run / "stage2")
    line = call(cache, "serve.py", f"--checkpoint={tmp_path}", "--port=0", status=2)
    assert "tokenizer.model: missing" in line


def test_a_small_load_loses_nothing(run, cache):
    """The script behind docs/serving.md."""
    script = [sys.executable, ROOT / "tests/system/serve_load.py", f"--checkpoint={run}", "--batch=1,4", "--tokens=10"]
    for options in (["--clients=8", "--seconds=4", "--distinct=6"], ["--malformed=30"], ["--throughput", "--rounds=2"]):
        found = subprocess.run(
            [*script, *options], env=environment.process(1, cache), capture_output=True, text=True, timeout=300
        )
        assert found.returncode == 0, found.stdout + found.stderr[-2000:]
        assert "SIGTERM: ended with status 0" in found.stdout
