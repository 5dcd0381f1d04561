"""Bytes that the collectives of a compiled program move, read from its text.

A device sends and receives, in a group of n devices and by a ring, per byte of the whole array: (n - 1) / n for an
all-gather, a reduce-scatter and an all-to-all, twice that for an all-reduce, and all of it for a permutation.
"""

import collections
import functools
import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64, "c128": 128}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s})\]])([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b(pred|bf16|c64|c128|[sufc]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Instruction(NamedTuple):
    """One line of a computation; ``type`` and ``rest`` stand before and after the opcode."""

    name: str
    opcode: str
    type: str
    rest: str
    is_root: bool


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(instructions by computation, name of the one that the program begins with)."""
    found, entry, own = {}, "", []
    for line in text.splitlines():
        if instruction := _INSTRUCTION.match(line):
            root, name, body = instruction.groups()
            if opcode := _OPCODE.search(body):
                end = opcode.end()
                own.append(Instruction(name, opcode[1], body[: opcode.start(1)], body[end:], bool(root)))
        elif head := _COMPUTATION.match(line):
            own = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
    return found, entry


def _operands(rest: str) -> list[str]:
    """Names of the operands, of an instruction's text behind the opening bracket."""
    depth, end = 1, len(rest)
    for index, letter in enumerate(rest):
        depth += (letter in "({[") - (letter in ")}]")
        if not depth:
            end = index
            break
    return re.findall(r"%([\w.\-]+)", rest[:end])


def _bytes(types: str) -> int:
    """Of all arrays in the text of a type."""
    total = 0
    for kind, sizes in _SHAPE.findall(types):
        bits = _BITS.get(kind) or int(re.search(r"\d+", kind)[0])
        total += bits * math.prod(int(size) for size in sizes.split(",") if size)
    return total // 8


def _group_size(rest: str) -> int:
    """Devices of a group: ``{{0,1},{2,3}}``, ``[2,4]<=[8]`` or ``mesh['x'=2,'y'=4] {'y'}``."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=(?:@?\w*)mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']*)'", found[2]))
    return 1


def _share(kind: str, rest: str) -> float:
    """Bytes that a device sends for each byte of the larger of a collective's operand and result."""
    if kind == "collective-permute":
        return 1.0
    size = _group_size(rest)
    return (2 if kind == "all-reduce" else 1) * (size - 1) / size


def _trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """Turns of a ``while``: what the compiler noted, or the bound of its counter over the counter's step.

    The counter begins at 0, as those of `jax.lax.scan` and of the compiler's own loops do.
    """
    if noted := _TRIPS.search(loop.rest):
        return int(noted[1])
    called = dict(_CALLED.findall(loop.rest))
    condition = {one.name: one for one in computations[called["condition"]]}
    root = next(one for one in condition.values() if one.is_root)
    for name in _operands(root.rest):
        if (other := condition.get(name)) is not None and other.opcode == "constant":
            return max(1, int(re.match(r"\d+", other.rest)[0]) // _step(root, condition, computations[called["body"]]))
    return 1


def _step(root: Instruction, condition: dict[str, Instruction], body: list[Instruction]) -> int:
    """What a loop's body adds to the counter that the condition compares; 1 if that is not plain."""
    counters = [condition[name] for name in _operands(root.rest) if name in condition]
    index = next((m[1] for one in counters if (m := re.search(r"index=(\d+)", one.rest))), None)
    lines = {one.name: one for one in body}
    last = next(one for one in body if one.is_root)
    if index is None or last.opcode != "tuple":
        return 1
    updated = lines.get(_operands(last.rest)[int(index)])
    if updated is None or updated.opcode != "add":
        return 1
    for name in _operands(updated.rest):
        if (other := lines.get(name)) is not None and other.opcode == "constant":
            return int(re.match(r"\d+", other.rest)[0])
    return 1


def count(text: str) -> dict[str, float]:
    """Bytes that a device sends in one call of a compiled program, by kind (`KINDS`).

    A loop's collectives count as often as it turns; of the branches of a conditional each counts once.

    Args:
      text: of the program (``compiled.as_text()``).
    """
    computations, entry = _parse(text)

    @functools.cache
    def inside(name: str) -> collections.Counter:
        total, chained = collections.Counter(), set()
        starts = {one.name: one for one in computations.get(name, ()) if one.opcode.endswith("-start")}
        for one in computations.get(name, ()):
            for kind, size in _own(one, starts, name):
                total[kind] += size
            times = _trips(one, computations) if one.opcode == "while" else 1
            for called in _callees(one):
                chain = _chain(computations.get(called, ()))
                if chain and chain <= chained:  # the same collective goes on in one fusion after another
                    continue
                chained |= chain
                for kind, size in inside(called).items():
                    total[kind] += times * size
        return total

    found = inside(entry)
    return {kind: float(found[kind]) for kind in KINDS}


def _own(one: Instruction, starts: dict[str, Instruction], computation: str):
    """(kind, bytes) of an instruction that is a collective; one that is divided into start and done counts at done."""
    kind, _, part = one.opcode.rpartition("-") if one.opcode.endswith(("-start", "-done")) else (one.opcode, "", "")
    if kind not in KINDS or part == "start":
        return
    began = starts.get(_operands(one.rest)[0], one) if part == "done" else one
    size = _bytes(one.type)
    if kind == "reduce-scatter":
        size *= _group_size(began.rest)  # its operand
    yielded = kind
    if kind == "all-reduce" and "all-reduce-scatter" in computation:  # how TPUs compute a reduce-scatter
        yielded = "reduce-scatter"
    yield yielded, size * _share(yielded, began.rest)


def _callees(one: Instruction) -> list[str]:
    """Computations that an instruction runs, but for those that collectives and reductions apply to elements."""
    if one.opcode in ("async-done", "async-update"):
        return []
    called = [name for role, name in _CALLED.findall(one.rest) if role != "to_apply" or one.opcode == "call"]
    for names in _BRANCHES.findall(one.rest):
        called += re.findall(r"[\w.\-]+", names)
    return called


def _chain(instructions) -> set[str]:
    """Channels of collectives in a fused computation that several fusions share."""
    found = set()
    for one in instructions:
        if one.opcode in KINDS and "chain_id=" in one.rest:
            found |= set(re.findall(r"channel_id=(\d+)", one.rest))
    return found
