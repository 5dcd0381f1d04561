"""Nested plain values, as JSON holds them: their leaves by dotted path, and what differs between two of them."""

from typing import NamedTuple


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


class Difference(NamedTuple):
    """A leaf that is not the same in two values; `ABSENT` where one of them has no such leaf."""

    name: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.name}: {self.before!r} -> {self.after!r}"


def leaves(value, path: str = "") -> dict:
    """The leaves of nested dicts and lists by their dotted path, ``a.b[0]``."""
    if isinstance(value, dict):
        items = [(f"{path}.{name}" if path else name, child) for name, child in value.items()]
    elif isinstance(value, list):
        items = [(f"{path}[{i}]", child) for i, child in enumerate(value)]
    else:
        return {path: value}
    return {name: leaf for key, child in items for name, leaf in leaves(child, key).items()}


def filled(value, default):
    """A value with what it lacks from a default; where both are dicts their entries are filled, all else is whole."""
    if not (isinstance(value, dict) and isinstance(default, dict)):
        return value
    return {**default, **{name: filled(child, default.get(name)) for name, child in value.items()}}


def differences(before: dict, after: dict) -> list[Difference]:
    """The leaves in which two values differ, those of ``before`` first; empty if they are equal."""
    old, new = leaves(before), leaves(after)
    return [
        Difference(name, old.get(name, ABSENT), new.get(name, ABSENT))
        for name in {**old, **new}
        if name not in old or name not in new or old[name] != new[name]
    ]
