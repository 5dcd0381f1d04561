"""A server under load, as docs/serving.md reports it: many clients, some of which vanish; malformed requests; speed.

    python tests/system/serve_load.py --checkpoint=runs/quickstart --clients=64 --seconds=300 --batch=1,8,64
    python tests/system/serve_load.py --checkpoint=runs/quickstart --clients=1,2,4,8,16,32,64 --seconds=30 --vanish=0
    python tests/system/serve_load.py --checkpoint=runs/quickstart --malformed=1000
    python tests/system/serve_load.py --checkpoint=runs/quickstart --throughput --batch=16

Starts `launch/serve.py` and talks to it on this machine only. Prints a line for each thing that it measures, and ends
with status 1 if a text was wrong, a request lost, or an answer none that OpenAI's interface knows.
"""

import asyncio
import contextlib
import json
import logging
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
from absl import app, flags

ROOT = Path(__file__).parents[2]
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "of the model", required=True)
_CLIENTS = flags.DEFINE_list("clients", ["64"], "at a time; several numbers: one load after another")
_SECONDS = flags.DEFINE_float("seconds", 300.0, "of each load")
_VANISH = flags.DEFINE_float("vanish", 0.2, "share of requests whose client goes away midway")
_BATCH = flags.DEFINE_string("batch", "1,8,64", "--batch_sizes of the server")
_DISTINCT = flags.DEFINE_integer("distinct", 48, "different requests; each is first made alone")
_TOKENS = flags.DEFINE_integer("tokens", 40, "most new tokens of a request")
_MALFORMED = flags.DEFINE_integer("malformed", 0, "instead of load: so many malformed requests")
_THROUGHPUT = flags.DEFINE_bool("throughput", False, "instead of load: speed beside that of generate_batches")
_ROUNDS = flags.DEFINE_integer("rounds", 4, "--throughput: requests for each place of the largest batch")
_LOG = flags.DEFINE_string("server_log", "/dev/null", "file for what the server logs")
_CACHE = flags.DEFINE_string("compilation_cache", None, "of the server")
_WORDS = "Mia was a girl from the village. She wanted to find a red drum. Tom walked into the forest one morning."


@contextlib.contextmanager
def serving(*options: str):
    """(address, model's name, process) of a server; it must end well when it is told to."""
    command = [sys.executable, str(ROOT / "launch/serve.py"), f"--checkpoint={_CHECKPOINT.value}", "--port=0", *options]
    command += [f"--batch_sizes={_BATCH.value}"]
    command += [f"--compilation_cache={_CACHE.value}"] if _CACHE.value else []
    begin = time.time()
    with open(_LOG.value, "w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
    name = address = None
    for line in process.stdout:
        if "http://" in line:
            name, address = line.split()
            break
    if address is None:
        raise SystemExit(f"the server did not start: {' '.join(command)}")
    print(f"started in {time.time() - begin:.1f} s", flush=True)
    try:
        yield address, name.rstrip(":"), process
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        print(f"SIGTERM: ended with status {status}", flush=True)


def memory(pid: int) -> float:
    """Resident memory, MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def metric(address: str, name: str) -> float:
    """Sum of a metric over its labels."""
    lines = httpx.get(f"{address}/metrics", timeout=60).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def requests(model: str) -> list[dict]:
    """Different ones, of mixed lengths, temperatures and budgets."""
    draw, found = random.Random(0), []
    for index in range(_DISTINCT.value):
        prompt = _WORDS[: draw.randrange(len(_WORDS) // 2)]
        fields = {"temperature": draw.choice([0.0, 0.8])} | ({"top_p": 0.9} if draw.random() < 0.3 else {})
        fields["max_tokens"] = draw.randint(2, _TOKENS.value // 2 if len(prompt) > 30 else _TOKENS.value)
        found.append({"model": model, "prompt": prompt, "seed": index, **fields})
    return found


class Load:
    """What the clients saw."""

    def __init__(self, expected: list[str]):
        self.expected, self.finished, self.vanished, self.wrong, self.lost = expected, 0, 0, 0, 0
        self.first, self.whole = [], []

    async def client(self, http: httpx.AsyncClient, asked: list[dict], number: int, until: float) -> None:
        draw = random.Random(number)
        while time.time() < until:
            index = draw.randrange(len(asked))
            await self.request(http, asked[index], self.expected[index], draw.random() < _VANISH.value)

    async def request(self, http, body: dict, expected: str, vanishes: bool) -> None:
        begin, text, ended = time.perf_counter(), "", False
        try:
            async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
                async for line in response.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    if not text and len(self.first) < 10**6:
                        self.first.append(time.perf_counter() - begin)
                    if line == "data: [DONE]":
                        ended = True
                        break
                    text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"]) or "\0"
                    if vanishes:
                        self.vanished += 1
                        return
        except httpx.HTTPError:
            ended = False
        text = text.replace("\0", "")
        self.lost += not ended
        self.finished += ended
        self.wrong += ended and text != expected
        self.whole.append(time.perf_counter() - begin)


async def under_load(address: str, model: str, pid: int) -> bool:
    asked, limits = requests(model), httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as http:
        alone = [(await http.post("/v1/completions", json=body)).json()["choices"][0]["text"] for body in asked]
        print(f"{len(asked)} requests alone: {len(set(alone))} different texts", flush=True)
        return all([await loaded(http, address, asked, alone, int(count), pid) for count in _CLIENTS.value])


async def loaded(http, address: str, asked: list[dict], alone: list[str], count: int, pid: int) -> bool:
    """The load of so many clients, and whether all went well."""
    compiled, tokens, begin = metric(address, "cola_compilations_total"), None, time.time()
    load, sizes = Load(alone), []
    tasks = [asyncio.create_task(load.client(http, asked, i, begin + _SECONDS.value)) for i in range(count)]
    while not all(task.done() for task in tasks):
        await asyncio.wait(tasks, timeout=max(1.0, _SECONDS.value / 20))
        sizes.append(memory(pid))
        tokens = tokens or (time.time(), await asyncio.to_thread(metric, address, "cola_generated_tokens_total"))
    for task in tasks:
        task.result()
    seconds, now = time.time() - tokens[0], metric(address, "cola_generated_tokens_total")
    new = metric(address, "cola_compilations_total") - compiled
    first, whole = (np.percentile(times, [50, 95]) for times in (load.first, load.whole))
    print(
        f"{count} clients, {time.time() - begin:.0f} s: {load.finished} answers, {load.wrong} wrong, "
        f"{load.lost} lost, {load.vanished} clients vanished; first text p50 {first[0]:.2f} s, p95 {first[1]:.2f} s; "
        f"whole p50 {whole[0]:.2f} s, p95 {whole[1]:.2f} s; {(now - tokens[1]) / seconds:.1f} tokens/s; "
        f"{new:.0f} compilations; memory MiB {' '.join(f'{size:.0f}' for size in sizes)}",
        flush=True,
    )
    return not (load.wrong or load.lost or new)


def fuzz(address: str, model: str) -> bool:
    from tests.serving.fuzz import malformed

    counts, slowest = {}, 0.0
    with httpx.Client(base_url=address, timeout=30) as http:
        for index in range(_MALFORMED.value):
            path, headers, body = malformed(index, model)
            begin = time.perf_counter()
            response = http.post(path, headers=headers, content=body)
            slowest = max(slowest, time.perf_counter() - begin)
            ok = "message" in response.json().get("error", {})
            counts[response.status_code if ok else "other"] = counts.get(response.status_code if ok else "other", 0) + 1
        fine = http.post("/v1/completions", json={"model": model, "prompt": "Mia", "max_tokens": 2}).status_code
    told = ", ".join(f"{count} of status {status}" for status, count in sorted(counts.items(), key=str))
    print(f"{_MALFORMED.value} malformed requests: {told}; the slowest took {slowest:.2f} s; then a good one: {fine}")
    return fine == 200 and all(status != "other" and 400 <= status < 500 for status in counts)


_LIBRARY = """
import json, sys, time, dataclasses
from cola_jax import rng, runs
path, prompts, tokens, size = json.loads(sys.argv[1])
run = runs.load(path)
settings = dataclasses.replace(run.settings, max_new_tokens=tokens)
ids = [run.tokenizer.encode(prompt) for prompt in prompts]
def once():
    begin = time.perf_counter()
    found = list(run.family.generate_batches(run.model, run.params, ids, settings, rng.key(0, "sample"), size))
    return time.perf_counter() - begin, found
once()
seconds, found = min(once() for _ in range(2))
texts = [run.tokenizer.decode(tokens) for _, tokens in found]
print(json.dumps([seconds, sum(len(tokens) for _, tokens in found), texts]))
"""


async def speed(address: str, model: str) -> bool:
    """The same prompts, budget and seed through the server and through `generate_batches`, one after the other."""
    size = int(_BATCH.value.split(",")[-1])
    prompts = [_WORDS[: 3 + 7 * (index % 8)] for index in range(size * _ROUNDS.value)]
    body = {"model": model, "max_tokens": _TOKENS.value, "seed": 0}
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=httpx.Limits(max_connections=None)) as http:
        best, texts = np.inf, []
        for _ in range(2):
            begin = time.perf_counter()
            found = (await http.post("/v1/completions", json=body | {"prompt": prompts})).json()
            best = min(best, time.perf_counter() - begin)
        texts = [choice["text"] for choice in found["choices"]]
    tokens = found["usage"]["completion_tokens"]
    arguments = json.dumps([_CHECKPOINT.value, prompts, _TOKENS.value, size])
    out = subprocess.run([sys.executable, "-c", _LIBRARY, arguments], capture_output=True, text=True, cwd=ROOT)
    seconds, count, expected = json.loads(out.stdout)
    same = sum(a == b for a, b in zip(texts, expected, strict=True))
    print(
        f"batch {size}, {len(prompts)} prompts: server {tokens / best:.1f} tokens/s, generate_batches "
        f"{count / seconds:.1f} tokens/s ({100 * tokens * seconds / best / count:.0f} %); {same} of {len(texts)} equal"
    )
    return same == len(texts)


def main(_) -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)
    options = ["--queue=4096", f"--max_sequences={10**4}"]
    with serving(*options) as (address, model, process):
        if _MALFORMED.value:
            ok = fuzz(address, model)
        elif _THROUGHPUT.value:
            ok = asyncio.run(speed(address, model))
        else:
            ok = asyncio.run(under_load(address, model, process.pid))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    app.run(main)
