"""Sequences of one program on their way: they join and leave at the boundaries of units."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cola_jax.families.interface import Engine
from cola_jax.sampling import places
from cola_jax.sampling.choose import Choice
from cola_jax.sampling.jobs import Job
from cola_jax.serving.prefixes import Beginning, Prefixes
from cola_jax.types import PyTree


@dataclasses.dataclass(eq=False)
class Ticket:
    """One sequence that a client waits for.

    Attributes:
      job: what is generated.
      sink: takes its updates; called in the client's thread.
      more: the client wants estimates or log-probabilities.
      cancelled: nobody waits any longer; set from any thread.
      sent: new tokens that were told.
    """

    job: Job
    sink: Callable[["Update"], None]
    more: bool = False
    cancelled: bool = False
    sent: int = 0


class Update(NamedTuple):
    """What one unit brought for a sequence.

    Attributes:
      tokens: new ones; they are final.
      done: there will be no others.
      ended: the text is complete; else it has used its budget, or goes on.
      estimates: [steps, len(tokens)], what each step made of these tokens; None where there are none.
      log_probs: of these tokens: chosen [n], ids [n, C], values [n, C]; None where there are none.
      picture: uint8 [S, S, 3], of an image that is done.
      error: the sequence was given up, for this reason.
    """

    tokens: Sequence[int] = ()
    done: bool = False
    ended: bool = False
    estimates: np.ndarray | None = None
    log_probs: Any = None
    picture: np.ndarray | None = None
    error: Exception | None = None


class Lane:
    """The sequences of one program, in a batch that takes the smallest of a few sizes."""

    def __init__(self, engine: Engine, program: Any, sizes: Sequence[int], prefixes: int):
        """Args:
        engine, program: of the family, and what it prepared.
        sizes: of batches, ascending.
        prefixes: beginnings that are kept.
        """
        self._engine, self._program, self._sizes = engine, program, tuple(sizes)
        self._renames = False  # until `warm` knows
        self._chunk = engine.chunk(program)
        self.prefixes = Prefixes(prefixes, self._chunk)
        self._state: PyTree | None = None
        self._tickets: list[Ticket | None] = []

    @property
    def active(self) -> list[Ticket]:
        """The sequences on their way."""
        return [ticket for ticket in self._tickets if ticket is not None]

    @property
    def size(self) -> int:
        """Of the batch now."""
        return len(self._tickets)

    @property
    def free(self) -> int:
        """Sequences that may join."""
        return self._sizes[-1] - len(self.active)

    def warm(self) -> None:
        """Compiles all that service will need: every size, and every way from one to another."""
        job = Job((0,), 1, Choice())
        for size in self._sizes:
            started = {count: _committed(self._engine.start(self._program, [job] * count)) for count in self._sizes}
            self._renames = self._engine.rename(self._program, started[size], [job] * size) is not None
            for count in self._sizes:
                state = places.select(started[count], np.zeros(size, np.int32))
                if count <= size:
                    state = places.insert(state, started[count], np.full(count, size, np.int32))
            if self._chunk:
                self._engine.start(self._program, [job] * size, state, 0)
            jax.block_until_ready(self._engine.advance(self._program, state, False)[0])

    def clear(self) -> list[Ticket]:
        """Gives up all sequences, and returns them."""
        active, self._tickets, self._state = self.active, [], None
        return active

    def release(self) -> None:
        """Frees the places of those for whom nobody waits any longer."""
        self._tickets = [None if ticket is None or ticket.cancelled else ticket for ticket in self._tickets]

    def admit(self, new: list[Ticket]) -> None:
        """Gives places to more sequences, at most `free`, and takes the smallest batch that holds all."""
        count = len(self.active) + len(new)
        if not count:
            self.clear()
            return
        beginnings = self._begin(new) if new else []
        self._resize(self._fitting(count), beginnings)
        for tickets, state in beginnings:
            free = [row for row, ticket in enumerate(self._tickets) if ticket is None][: len(tickets)]
            for row, ticket in zip(free, tickets, strict=True):
                self._tickets[row] = ticket
            outside = [self.size] * (self._fitting(len(tickets)) - len(tickets))
            self._state = places.insert(self._state, state, np.array(free + outside, np.int32))

    def step(self) -> list[tuple[Ticket, Update]]:
        """Generates one unit; returns what it brought for each sequence. Those that are done have left."""
        more = any(ticket.more for ticket in self.active)
        self._state, progress, estimates = self._engine.advance(self._program, self._state, more)
        if not more:
            progress, estimates = progress._replace(log_probs=None), None
        progress, estimates = jax.device_get((progress, estimates))
        updates = []
        for row, ticket in enumerate(self._tickets):
            if ticket is None:
                continue
            update = _update(ticket, row, progress, estimates)
            ticket.sent += len(update.tokens)
            if update.done:
                self._tickets[row] = None
            updates.append((ticket, update))
        if not self.active:
            self.clear()
        return updates

    def _fitting(self, count: int) -> int:
        """The smallest size that holds so many."""
        return next(size for size in self._sizes if size >= count)

    def _resize(self, size: int, beginnings: list) -> None:
        """Moves the sequences into a batch of another size; where there is none yet, one of beginnings."""
        if size == self.size:
            return
        rows = [row for row, ticket in enumerate(self._tickets) if ticket is not None]
        state = self._state if self._state is not None else beginnings[0][1]
        self._state = places.select(state, np.array(rows + [0] * (size - len(rows)), np.int32))
        self._tickets = [self._tickets[row] for row in rows] + [None] * (size - len(rows))

    def _begin(self, tickets: list[Ticket]) -> list[tuple[list[Ticket], PyTree]]:
        """Groups of sequences with batches, of a fitting size, in whose first rows they are at their beginnings."""
        if not self._renames:
            return [(tickets, self._started(tickets))]
        alike: dict[tuple, list[Ticket]] = {}
        for ticket in tickets:
            alike.setdefault(ticket.job.known, []).append(ticket)
        groups: dict[tuple, list[tuple[Beginning | None, list[Ticket]]]] = {}
        for same in alike.values():
            earlier, shared = self.prefixes.find(same[0].job)
            groups.setdefault((id(earlier and earlier.state), shared), []).append((earlier, same))
        return [self._begin_group(shared, *zip(*members, strict=True)) for (_, shared), members in groups.items()]

    def _begin_group(
        self, shared: int | None, earlier: Sequence[Beginning | None], alike: Sequence[list[Ticket]]
    ) -> tuple[list[Ticket], PyTree]:
        """Sequences that share so many tokens with beginnings of one batch; None: these are their own."""
        tickets = sum(alike, [])
        if shared is None:
            state, rows = earlier[0].state, [beginning.row for beginning in earlier]
        else:
            firsts, rows = [same[0] for same in alike], range(len(alike))
            state = self._started(firsts, earlier if shared else (), shared)
            self.prefixes.put([ticket.job for ticket in firsts], state, self._fitting(len(firsts)))
            if len(tickets) == len(firsts):
                return tickets, state
        rows = [row for row, same in zip(rows, alike, strict=True) for _ in same]
        return tickets, self._renamed(state, rows, tickets)

    def _started(self, tickets: list[Ticket], earlier: Sequence[Beginning] = (), shared: int = 0) -> PyTree:
        size = self._fitting(len(tickets))
        jobs = _filled([ticket.job for ticket in tickets], size)
        if not earlier:
            return _committed(self._engine.start(self._program, jobs))
        rows = np.array(_filled([beginning.row for beginning in earlier], size), np.int32)
        return _committed(self._engine.start(self._program, jobs, places.select(earlier[0].state, rows), shared))

    def _renamed(self, state: PyTree, rows: list[int], tickets: list[Ticket]) -> PyTree:
        """The rows of a batch at its beginning as those of these sequences."""
        size = self._fitting(len(tickets))
        state = places.select(state, np.array(_filled(rows, size), np.int32))
        jobs = _filled([ticket.job for ticket in tickets], size)
        return _committed(self._engine.rename(self._program, state, jobs))


def _committed(state: PyTree) -> PyTree:
    """A state all of whose leaves are bound to the device: for others, programs would be compiled once more."""
    return jax.device_put(state, jax.devices()[0])


def _filled(items: list, size: int) -> list:
    """The list with its last item again until it has that size."""
    return items + [items[-1]] * (size - len(items))


def _update(ticket: Ticket, row: int, progress, estimates) -> Update:
    ready, done = int(progress.ready[row]), bool(progress.done[row])
    new = slice(ticket.sent, max(ready, ticket.sent))
    tokens = progress.tokens[row, new].tolist()
    log_probs = None
    if ticket.more and progress.log_probs is not None:
        log_probs = jax.tree.map(lambda leaf: leaf[row, new], progress.log_probs)
    guesses = estimates[:, row, : len(tokens)] if ticket.more and estimates is not None else None
    picture = progress.pictures[row] if done and progress.pictures is not None else None
    return Update(tokens, done, done and ready < ticket.job.max_new_tokens, guesses, log_probs, picture)
