"""Mixtures of prepared corpora: which corpus, and which of its rows, row i of a run comes from.

A mixture is text, in `config.data.files`:

    runs/data/web                                           one corpus
    runs/data/web=0.7,runs/data/books=0.3                   shares of the rows
    runs/data/web=0.7,...; 20000: runs/data/web=0.2,...     other shares after 20,000 steps

Shares are exact: after any number of rows each corpus has had its share of them to within one row. When they change,
every corpus goes on behind the row where it stood.
"""

import functools
import math
import re
from typing import NamedTuple

import grain

from cola_jax import paths
from cola_jax.types import UserError

_ROWS = 2**60  # more rows than any run reads


class Phase(NamedTuple):
    """Shares from a step on.

    Attributes:
      start: step, the number of batches before it.
      shares: {directory: share}, which sum up to 1.
    """

    start: int
    shares: dict[str, float]


def parse(text: str, field: str = "config.data.files") -> tuple[Phase, ...]:
    """The phases of a mixture, the first from step 0 on.

    Directories in buckets are copied to this machine, once a process.

    Raises:
      UserError: a share that is no positive number, a directory named twice, or steps that do not grow.
    """
    phases = []
    for part in text.split(";"):
        found = re.fullmatch(r"(\d+)\s*:(.*)", part.strip(), re.DOTALL)
        start, body = (int(found[1]), found[2]) if found else (0, part)
        if (found is None) != (not phases) or (phases and start <= phases[-1].start):
            need = "DIR=SHARE,...; STEP: DIR=SHARE,... with growing steps"
            raise UserError(f"{field} = {text!r}: {part.strip()!r}: must be of the form {need}")
        phases.append(Phase(start, _shares(body, text, field)))
    return tuple(phases)


def _shares(body: str, text: str, field: str) -> dict[str, float]:
    entries = [entry.strip() for entry in body.split(",") if entry.strip()]
    shares: dict[str, float] = {}
    for entry in entries:
        directory, equals, number = entry.rpartition("=")
        if not equals and len(entries) == 1:
            directory, number = entry, "1"
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not directory or directory in shares or not 0 < share < math.inf:
            need = "DIR=SHARE with a share above 0, each directory once"
            raise UserError(f"{field} = {text!r}: {entry!r}: must be {need}")
        shares[directory] = share
    if not shares:
        raise UserError(f"{field} = {text!r}: must name a directory that launch/prepare.py has made")
    total = sum(shares.values())
    return {paths.copied(directory, field): share / total for directory, share in shares.items()}


def directories(phases: tuple[Phase, ...]) -> list[str]:
    """All that occur, in their order."""
    return list(dict.fromkeys(directory for phase in phases for directory in phase.shares))


class Selection:
    """Row i of a run -> (directory, row of its corpus)."""

    def __init__(self, phases: tuple[Phase, ...], batch_size: int):
        """Args:
        phases: of `parse`.
        batch_size: rows of a step.
        """
        self._phases = phases
        self._starts = [phase.start * batch_size for phase in phases]
        self._first = [dict.fromkeys(directories(phases), 0)]  # row of each corpus with which a phase begins
        for phase, start, end in zip(phases, self._starts, self._starts[1:], strict=False):
            self._first.append(self._first[-1] | self._rows_after(phase, end - start))

    def __getitem__(self, row: int) -> tuple[str, int]:
        k = max(k for k, start in enumerate(self._starts) if start <= row)
        directory, index = _select(tuple(self._phases[k].shares.items()), row - self._starts[k])
        return directory, self._first[k][directory] + index

    def _rows_after(self, phase: Phase, rows: int) -> dict[str, int]:
        """The row with which each corpus of a phase goes on after so many rows of it."""
        found: dict[str, int] = {}
        k = self._phases.index(phase)
        for row in range(rows - 1, -1, -1):  # ends soon: shares are exact to one row
            directory, index = _select(tuple(phase.shares.items()), row)
            found.setdefault(directory, self._first[k][directory] + index + 1)
            if len(found) == len(phase.shares):
                break
        return found


class _Numbers:
    """(name, 0), (name, 1), ... without end."""

    def __init__(self, name: str):
        self._name = name

    def __len__(self) -> int:
        return _ROWS

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self._name, index


@functools.lru_cache(maxsize=256)
def _mixed(shares: tuple[tuple[str, float], ...]) -> grain.MapDataset:
    parts = [grain.MapDataset.source(_Numbers(directory)) for directory, _ in shares]
    return grain.MapDataset.mix(parts, weights=[share for _, share in shares])


def _select(shares: tuple[tuple[str, float], ...], row: int) -> tuple[str, int]:
    return (shares[0][0], row) if len(shares) == 1 else _mixed(shares)[row]
