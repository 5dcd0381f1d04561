"""Batches at their beginning, kept for requests that begin alike."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from cola_jax.sampling.jobs import Job
from cola_jax.types import PyTree


class Beginning(NamedTuple):
    """Where a sequence stands at its beginning: a row of a batch of that size; ``known`` is `Job.known`."""

    known: tuple
    state: PyTree
    row: int
    size: int


class Prefixes:
    """The most recently used beginnings, by what they depend on (`Job.known`), and by the chunks of their prompts.

    A beginning is a row of the batch in which it was started; the batch is kept, and counts whole, while any of its
    rows is.
    """

    def __init__(self, capacity: int, chunk: int = 0):
        """Args:
        capacity: most rows of the batches that are kept; 0: none.
        chunk: tokens of a prompt that beginnings can share; 0: they share all or nothing.
        """
        self._capacity, self._chunk = capacity, chunk
        self._found: OrderedDict[tuple, Beginning] = OrderedDict()
        self._chunks: dict[int, tuple] = {}  # hash of all tokens up to the end of a chunk -> the last one with them
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._found)

    def find(self, job: Job) -> tuple[Beginning | None, int | None]:
        """A beginning, and how many tokens of the job's prompt it shares; None: it is the job's own.

        Where there is none at all: (None, 0).
        """
        found, shared = self._found.get(job.known), None
        if found is None and job.suffix is None:
            found, shared = self._nearest(job.known[0])
        if found is None:
            self.misses += 1
            return None, 0
        self.hits += 1
        self._found.move_to_end(found.known)
        return found, shared

    def put(self, jobs: list[Job], state: PyTree, size: int) -> None:
        """Keeps the beginnings of a batch of that size: those of its first rows."""
        for row, job in enumerate(jobs):
            self._found[job.known] = Beginning(job.known, state, row, size)
            self._found.move_to_end(job.known)
            if job.suffix is None:
                self._chunks |= {chain: job.known for _, chain in self._chains(job.known[0])}
        while self.rows > self._capacity:
            _, dropped = self._found.popitem(last=False)
            for _, chain in self._chains(dropped.known[0]):
                if self._chunks.get(chain) == dropped.known:
                    del self._chunks[chain]

    def _nearest(self, prompt: tuple[int, ...]) -> tuple[Beginning | None, int]:
        """The beginning that shares the most whole chunks of a prompt, and how many tokens those are."""
        for end, chain in reversed(list(self._chains(prompt))):
            found = self._found.get(self._chunks.get(chain))
            if found is not None and found.known[0][:end] == prompt[:end]:
                return found, end
        return None, 0

    @property
    def rows(self) -> int:
        """Of all batches that are kept."""
        return sum({id(found.state): found.size for found in self._found.values()}.values())

    def _chains(self, prompt: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """The end of each whole chunk of a prompt, and a hash of all tokens before it."""
        chain = 0
        for end in range(self._chunk, len(prompt) + 1, self._chunk) if self._chunk else ():
            chain = hash((chain, *prompt[end - self._chunk : end]))
            yield end, chain
