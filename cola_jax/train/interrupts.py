"""What ends a run from outside: signals, failing machines, steps that never end. And the statuses a process ends with.

Exit status: 0 done, 2 something the user can fix, 3 training diverged, 75 stopped with its state saved, or something
outside the program failed (a disk, the network, another process), 76 hung, 130 Ctrl-C. After 75, 76 and 128 + a signal
that nobody catches the same command resumes; after 2 and 3 it would end in the same way.
"""

import errno
import faulthandler
import os
import re
import signal
import sys
import threading
import time

import jax

from cola_jax import paths
from cola_jax.types import TemporaryError, UserError

DONE, BAD_INPUT, DIVERGED = 0, 2, 3
RESTART = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to retry"
HUNG = 76

# A path, a permission or a name: the same command would find them as they are. All else (EIO, ESTALE, ENOSPC, ...) is
# of a machine or a network, and may be gone on the next start.
_OF_USERS = frozenset(
    (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.EXDEV)
    + (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.ENOTEMPTY, errno.ENOTSUP)
)

# What TensorStore says of a bucket that it cannot reach, or no longer may.
_OF_BUCKETS = re.compile(
    "(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|PERMISSION_DENIED|ABORTED):"
)


def is_temporary(error: BaseException, but: tuple[int, ...] = ()) -> bool:
    """Whether an exception, or one that it came from, is of something outside the program that another start may mend.

    Args:
      error: a TemporaryError, an OSError whose errno is not one of paths and permissions, one of a bucket's service, or
        a UserError or error of TensorStore (which names the errno in its text) that was made of one.
      but: errnos that do not count.
    """
    known, seen = {*_OF_USERS, *but}, set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, TemporaryError):
            return True
        numbers = [error.errno] if isinstance(error, OSError) and error.errno is not None else []
        if not isinstance(error, UserError):  # whose text may quote anything
            if paths.is_of_network(error) or _OF_BUCKETS.match(str(error)):
                return True
            numbers += map(int, re.findall(r"\[OS error (\d+)", str(error)))
        if any(number not in known for number in numbers):
            return True
        error = error.__cause__ or error.__context__
    return False


class Interrupted(Exception):
    """The run was asked to stop, and has saved its state."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum

    @property
    def status(self) -> int:
        """Of the process: Ctrl-C is a person, who does not want the run to be started again."""
        return 128 + signal.SIGINT if self.signum == signal.SIGINT else RESTART


class Signals:
    """Notes SIGTERM and SIGINT for the loop to act on between steps; a second one acts at once.

    In a run of several processes this takes SIGTERM from JAX's preemption service, whose agreement on a step to stop
    after is lost if a save of Orbax's is the last thing before it, or nothing at all: Orbax and the loop count steps
    differently, and the service goes by the last step it was told. The loop has `distributed.any_true` instead.
    """

    def __init__(self):
        self.received: int | None = None
        self._before = {}

    def _note(self, signum, frame) -> None:
        self.received = signum
        signal.signal(signum, self._before[signum])

    def __enter__(self) -> "Signals":
        for signum in (signal.SIGTERM, signal.SIGINT):
            try:
                before = signal.signal(signum, self._note)
            except ValueError:  # not in the main thread, where signals are handled
                break
            self._before[signum] = signal.SIG_DFL if before is None else before  # None: not Python's, but JAX's
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


class Watchdog:
    """Ends the process with status `HUNG` if nothing happens for a while, with the stacks of all threads on stderr.

    A process that waits for another (a collective, a barrier) waits for ever; only a thread of its own can tell.

    Args:
      timeout: seconds from one `beat` to the next; 0: no watchdog.
    """

    def __init__(self, timeout: float):
        self._timeout, self._idle, self._ended = timeout, 0.0, threading.Event()

    def beat(self) -> None:
        """Something has happened."""
        self._idle = 0.0

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()

    def _watch(self) -> None:
        tick, last = min(1.0, self._timeout / 4), time.monotonic()
        while not self._ended.wait(tick):
            now = time.monotonic()
            # Not all of it where this process was stopped itself: then the steps could not go on either.
            self._idle += min(now - last, 2 * tick)
            last = now
            if self._idle > self._timeout:
                self._bark()

    def _bark(self) -> None:
        where = f"process {jax.process_index()} of {jax.process_count()}"
        print(
            f"error: {where}: no step has ended for {self._timeout:g} s (config.train.hang_timeout); "
            f"its stacks follow; the same command resumes from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        os._exit(HUNG)
