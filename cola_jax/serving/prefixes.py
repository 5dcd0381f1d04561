"""Batches at their beginning, kept for requests that begin alike."""

from collections import OrderedDict
from typing import NamedTuple

from cola_jax.types import PyTree


class Beginning(NamedTuple):
    """Where a sequence stands at its beginning: a row of a batch of that size."""

    state: PyTree
    row: int
    size: int


class Prefixes:
    """The most recently used beginnings, by what they depend on (`Job.known`).

    A beginning is a row of the batch in which it was started; the batch is kept, and counts whole, while any of its
    rows is.
    """

    def __init__(self, capacity: int):
        """Args:
        capacity: most rows of the batches that are kept; 0: none.
        """
        self._capacity = capacity
        self._found: OrderedDict[tuple, Beginning] = OrderedDict()
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._found)

    def get(self, known: tuple) -> Beginning | None:
        """The beginning of such a sequence, or None."""
        found = self._found.get(known)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._found.move_to_end(known)
        return found

    def put(self, known: list[tuple], state: PyTree, size: int) -> None:
        """Keeps the beginnings of a batch of that size: those of its first rows."""
        for row, each in enumerate(known):
            self._found[each] = Beginning(state, row, size)
            self._found.move_to_end(each)
        while self.rows > self._capacity:
            self._found.popitem(last=False)

    @property
    def rows(self) -> int:
        """Of all batches that are kept."""
        return sum({id(found.state): found.size for found in self._found.values()}.values())
