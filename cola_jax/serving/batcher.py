"""The thread that generates: requests join and leave batches at the boundaries of units."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from cola_jax.serving.errors import ApiError
from cola_jax.serving.lane import Lane, Ticket, Update
from cola_jax.serving.metrics import Metrics

Updates = list[tuple[Ticket, Update]]
_LOG = logging.getLogger("cola_jax.serving")


class Batcher:
    """Lanes, the sequences that wait for a place in them, and the thread that advances them in turn."""

    def __init__(self, lanes: Sequence[Lane], queue: int, deliver: Callable[[Updates], None], metrics: Metrics):
        """Args:
        lanes: one for each way to generate.
        queue: sequences that may wait.
        deliver: takes what each unit brought; called in the batcher's thread.
        metrics: are kept up to date.
        """
        self._lanes = [(lane, deque[Ticket]()) for lane in lanes]
        self._queue, self._deliver, self._metrics = queue, deliver, metrics
        self._changed = threading.Condition()
        self._closing = self._stopped = self._turning = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a sequence waits or is on its way, or is just about to begin."""
        return self._turning or any(lane.active or waiting for lane, waiting in self._lanes)

    @property
    def closing(self) -> bool:
        """Whether new sequences are refused."""
        return self._closing

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, index: int, tickets: Sequence[Ticket]) -> None:
        """Sequences for a lane: all of them, or none.

        Raises:
          ApiError: 503, the server ends; 429, too many wait.
        """
        with self._changed:
            if self._closing:
                raise ApiError(503, "the server is shutting down", code="shutting_down")
            lane, waiting = self._lanes[index]
            ahead = sum(not ticket.cancelled for _, queue in self._lanes for ticket in queue)
            room = self._queue + lane.free - ahead
            if len(tickets) > room:
                wait = f"{ahead} sequences wait; there is room for {max(room, 0)} more, not for {len(tickets)}"
                raise ApiError(429, f"the server is busy: {wait}", code="queue_full")
            waiting.extend(tickets)
            self._changed.notify()

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Nobody waits for these any longer: those that are there leave at the next boundary."""
        for ticket in tickets:
            if not ticket.cancelled:
                ticket.cancelled = True
                self._metrics.cancelled.inc()

    def close(self) -> None:
        """Refuses new sequences; those that are there go on."""
        self._closing = True

    def stop(self) -> None:
        """Ends the thread; sequences that are there are given up."""
        with self._changed:
            self._closing = self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self.busy)
                if self._stopped:
                    return
                self._turning = True
            for lane, waiting in self._lanes:
                if lane.active or waiting:
                    self._deliver(self._turn(lane, waiting))
            self._turning = False

    def _turn(self, lane: Lane, waiting: deque[Ticket]) -> Updates:
        """One unit of a lane. If it fails, its sequences are given up, and the lane begins anew."""
        new: list[Ticket] = []
        begin = time.perf_counter()
        try:
            lane.release()
            with self._changed:
                while waiting and len(new) < lane.free:
                    ticket = waiting.popleft()
                    new += [] if ticket.cancelled else [ticket]
            lane.admit(new)
            updates = lane.step() if lane.active else []
        except Exception as error:
            _LOG.exception("a batch of %d sequences failed", lane.size)
            failed = dict.fromkeys([*lane.clear(), *new])
            updates = [(ticket, Update(done=True, error=error)) for ticket in failed]
        self._note(time.perf_counter() - begin, updates)
        return updates

    def _note(self, seconds: float, updates: Updates) -> None:
        metrics, lanes = self._metrics, [lane for lane, _ in self._lanes]
        if updates:
            metrics.units.observe(seconds)
        metrics.tokens.inc(sum(len(update.tokens) for _, update in updates))
        metrics.images.inc(sum(update.picture is not None for _, update in updates))
        metrics.waiting.set(sum(len(waiting) for _, waiting in self._lanes))
        metrics.active.set(sum(len(lane.active) for lane in lanes))
        metrics.size.set(sum(lane.size for lane in lanes))
        metrics.prefixes.labels("yes").set(sum(lane.prefixes.hits for lane in lanes))
        metrics.prefixes.labels("no").set(sum(lane.prefixes.misses for lane in lanes))
