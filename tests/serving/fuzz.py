"""Requests that no server should accept."""

import json

import numpy as np

_JUNK = [None, True, -1, 0, 1.5, 1e308, "", "x" * 2000, [], {}, [[]], [None], {"a": {"b": []}}, "\u0000", "9" * 400]
_FIELDS = ["max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "cola_jax", "user"]
# Values of these fields that are junk and not allowed, whatever the field.
_WRONG = {
    "max_tokens": [-1, 0, 1.5, True, "5", [], {}, 2**70, 10**6],
    "temperature": [-1, "1", [], {}, True, 1e9],
    "top_p": [0, -1, 2, "1", [], True],
    "n": [0, -1, 1.5, "2", [], 10**9, True],
    "stop": [5, "", [""], ["a"] * 9, {}, [None]],
    "seed": ["1", 1.5, [], 2**80, True],
    "stream": ["yes", 1, [], {}],
    "stream_options": [5, "x", {"x": 1}, {"include_usage": "yes"}, []],
    "cola_jax": [5, "x", [], {"nothing": 1}, {"steps": "many"}, {"temperature": []}, {"provisional": 3}],
    "user": [5, [], {}],
    "model": ["another", 5, None, [], ""],
    "prompt": [5, None, {}, [None], [[]] * 3 + ["", 5], [True], [-5], [10**9], "long " * 40000, [[1, "a"]]],
    "messages": ["x", [], [5], [{}], [{"role": "x", "content": "y"}], [{"role": "user", "content": 5}], None],
}


def malformed(index: int, model: str) -> tuple[str, dict, bytes]:
    """(path, headers, body) of the request with this number, one that must be refused."""
    draw = np.random.default_rng(index)
    chat = index % 4 == 3
    path = "/v1/chat/completions" if chat else "/v1/completions"
    good = {"model": model, "max_tokens": 3}
    good |= {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
    headers = {"Content-Type": "application/json"}
    kind = index % 6
    if kind == 0:  # bytes that are cut or turned; 0xFF is nowhere in UTF-8, and outside of strings no JSON at all
        raw = bytearray(json.dumps(good).encode())
        return path, headers, bytes(raw[: draw.integers(0, len(raw) - 1)] + b"\xff" * int(draw.integers(0, 3)))
    if kind == 1:  # bad UTF-8 in a field
        raw = json.dumps(good).encode()
        return path, headers, raw.replace(b"hi", bytes(draw.integers(0x80, 0xC0, 5).astype(np.uint8)))
    if kind == 2:  # an unknown field
        name = "".join(chr(c) for c in draw.integers(97, 123, draw.integers(12, 300)))
        return path, headers, json.dumps(good | {name: _JUNK[draw.integers(len(_JUNK))]}).encode()
    if kind == 3:  # another type of content, or none; or nested without end
        if draw.integers(2):
            return path, {"Content-Type": str(draw.choice(["text/plain", "application/xml", ""]))}, b"{}"
        return path, headers, b'{"model":' + b'{"a":[' * int(draw.integers(100, 20000))
    if kind == 4 and draw.integers(4) == 0:  # a body beyond the limit
        return path, headers, b'{"model": "' + b"x" * (1 << 21) + b'"}'
    names = [*_FIELDS, "model", "messages" if chat else "prompt"]
    name = names[draw.integers(len(names))]
    value = _WRONG[name][draw.integers(len(_WRONG[name]))]
    return path, headers, json.dumps(good | {name: value}).encode()
