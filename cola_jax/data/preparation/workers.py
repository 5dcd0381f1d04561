"""A function over many items in worker processes: results in order, a bounded number of items on the way."""

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

_AHEAD = 2  # items on the way for each worker: one that it works on, one that waits

_function: Callable | None = None  # of a worker process


class Lost(Exception):
    """A worker process ended by itself, or was killed."""


def _start(function: Callable) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches them too; the process that started them ends them
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _apply(item):
    return _function(item)


def ordered(function: Callable, items: Iterable[tuple], count: int) -> Iterator[tuple]:
    """Applies a function to the first of each pair.

    Args:
      function: can be pickled, with what it returns; goes to each process once.
      items: pairs of an argument and anything. They are taken as results are asked for, a few ahead.
      count: worker processes; 0: all is done in this one.

    Yields:
      For each pair its second and the result, in the order of the items.

    Raises:
      Lost: a worker is gone (out of memory, most likely).
    """
    if not count:
        for argument, kept in items:
            yield kept, function(argument)
        return
    # Not forked from here: this process may have threads. A server forks them that has none and has imported all.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cola_jax.data.preparation.prepare"])
    pool = concurrent.futures.ProcessPoolExecutor(count, context, _start, (function,))
    waiting: collections.deque = collections.deque()
    try:
        for argument, kept in items:
            waiting.append((kept, pool.submit(_apply, argument)))
            del argument
            if len(waiting) > _AHEAD * count:
                kept, future = waiting.popleft()
                yield kept, future.result()
        while waiting:
            kept, future = waiting.popleft()
            yield kept, future.result()
    except concurrent.futures.BrokenExecutor as error:
        raise Lost("a worker process is gone, perhaps for lack of memory") from error
    finally:
        pool.shutdown(cancel_futures=True)
