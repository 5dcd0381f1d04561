"""Lines on the console that tell how far a preparation is, at most one every few seconds."""

import time
from collections.abc import Callable

_SECONDS = 5.0


def _size(count: int | float) -> str:
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.4g}T"


def _duration(seconds: int | float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Meter:
    """Says how far reading is.

    Attributes:
      tokens: made so far; the caller counts.
    """

    def __init__(
        self, say: Callable[[str], None], seconds: float = _SECONDS, clock: Callable[[], float] = time.monotonic
    ):
        self.say, self._seconds, self._clock = say, seconds, clock
        self._start = self._last = clock()
        self.tokens = 0

    @property
    def due(self) -> bool:
        """Whether it is time for a line."""
        return self._clock() - self._last >= self._seconds

    def show(self, what: str, documents: int, position: int, size: int) -> None:
        """Says a line.

        Args:
          what: is done.
          documents: read so far.
          position: of the input; bytes, or what the source counts.
          size: of all of it.
        """
        self._last = self._clock()
        passed = self._last - self._start
        share = position / size if size else 1.0
        left = _duration(passed * (1 - share) / share) if share else "unknown"
        rate = f", {_size(self.tokens / passed)} tokens/s" if self.tokens and passed else ""
        read = f"{_size(position)} of {_size(size)} ({100 * share:.1f} %)"
        self.say(f"{what}: {documents:,} documents, {read}{rate}, ETA {left}")
