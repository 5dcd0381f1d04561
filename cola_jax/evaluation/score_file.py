"""A file of scores that grows line by line and resumes where it stopped."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from cola_jax import paths
from cola_jax.types import UserError


def resume(path: Path, identity: dict) -> int:
    """How many results a file holds already; a torn last line is cut off.

    What defines the results is kept beside the file, in ``<path>.run.json``.

    Args:
      path: the file; it need not exist.
      identity: what its results depend on, JSON-able.

    Raises:
      UserError: the file's results are of another run.
    """
    note = path.with_name(path.name + ".run.json")
    if not path.parent.is_dir():
        raise UserError(f"--output = {path}: no such directory {path.parent}")
    if not path.exists() or not path.stat().st_size:
        paths.write_atomically(note, json.dumps(identity, indent=1).encode())
        path.touch()
        return 0
    if not note.exists():
        raise UserError(f"--output = {path}: exists and is not of this program ({note.name} is missing)")
    before = json.loads(note.read_text())
    for name in {**before, **identity}:
        if before.get(name) != identity.get(name):
            raise UserError(
                f"--output = {path}: holds results for {name} = {before.get(name)!r}, not {identity.get(name)!r}; "
                "choose another file"
            )
    return _cut(path)


def _cut(path: Path) -> int:
    """Truncates the file behind its last whole line; returns the number of lines."""
    count = size = 0
    with open(path, "rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            index = json.loads(line).get("index")
            if index != count:
                raise UserError(f"--output = {path}: line {count + 1} has index {index!r}; must be {count}")
            count, size = count + 1, size + len(line)
        file.truncate(size)
    return count


def append(path: Path, results: Iterable[dict]) -> None:
    """Adds lines, on disk when it returns."""
    with open(path, "ab") as file:
        file.write("".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results).encode())
        file.flush()
        os.fsync(file.fileno())
