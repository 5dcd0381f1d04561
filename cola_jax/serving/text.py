"""Text of a sequence while its tokens come."""

from collections.abc import Callable, Iterable, Sequence

_CUT = "\ufffd"  # what the bytes of a character that is not whole decode to


class TextStream:
    """Turns tokens into text that is never taken back.

    Text is held back while it may be the beginning of a stop text, or of a character of which bytes are missing. The
    whole text does not depend on how its tokens were grouped.

    Attributes:
      stopped: a stop text was found; the text ends before it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Iterable[str] = ()):
        """Args:
        decode: tokens to text.
        stops: texts before which the text ends.
        """
        self._decode, self._stops = decode, tuple(stops)
        self._tokens: list[int] = []
        self._shown = 0
        self.stopped = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """All that came."""
        return tuple(self._tokens)

    def add(self, tokens: Sequence[int], last: bool) -> str:
        """The new text after more tokens; ``last``: no others will come."""
        if self.stopped:
            return ""
        self._tokens += tokens
        text = self._decode(self._tokens)
        text = text if last else text.rstrip(_CUT)
        found = [(text.index(stop, self._shown), stop) for stop in self._stops if stop in text[self._shown :]]
        if found:  # the one that was complete first: another may begin earlier, but was not there yet
            end = min(found, key=lambda each: (each[0] + len(each[1]), each[0]))[0]
            self.stopped = True
        else:
            end = len(text) - (0 if last else self._held(text))
        new, self._shown = text[self._shown : end], max(self._shown, end)
        return new

    def _held(self, text: str) -> int:
        """Characters at the end of a text with which a stop text may begin."""
        lengths = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return max(lengths, default=0)
