"""What reading a story gives: its sentences, what they say, and the tables that find their wordings."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from cola_jax.data.stories_templates import Wording

_SENTENCE = re.compile(r"[^.]*\.|[^.]+")


@dataclasses.dataclass(frozen=True)
class Sentence:
    """What one sentence of a parsed text says.

    Attributes:
      text: The sentence without surrounding white space.
      valid: Whether the grammar can produce this sentence.
      type: Sentence type, or None if not valid.
      mentions: Slot to the values the sentence allows, for the slots it speaks of: one
        value for a word such as a name, all values of a gender for a pronoun.
    """

    text: str
    valid: bool
    type: str | None
    mentions: Mapping[str, frozenset[str]]


@dataclasses.dataclass(frozen=True)
class Parse:
    """How the grammar explains a text.

    Attributes:
      sentences: One result per sentence, in the order of the text.
      valid_fraction: Share of valid sentences, 0 to 1; 0 for a text without any.
      candidates: Slot to the values that all valid sentences allow.
      candidate_count: Number of factors those values form; 0 if they contradict.
      factor: Slot to value for the slots that the text determines, or None if valid
        sentences contradict each other.
      log_prob: log p*(text) in nats, -inf outside the support.
    """

    sentences: tuple[Sentence, ...]
    valid_fraction: float
    candidates: Mapping[str, frozenset[str]]
    candidate_count: int
    factor: Mapping[str, str] | None
    log_prob: float

    @property
    def coherent(self) -> bool:
        """Whether the text is a whole story that one factor explains."""
        return self.log_prob > -math.inf


def split_sentences(text: str) -> list[str]:
    """Splits a text behind every full stop; drops white space around the parts."""
    parts = (part.strip() for part in _SENTENCE.findall(text))
    return [part for part in parts if part]


def build_lookup(wordings: Sequence[Wording]) -> dict[int, list[dict[str, int]]]:
    """Returns word count -> per position, word -> bit set of the possible wordings."""
    lookup: dict[int, list[dict[str, int]]] = {}
    for index, wording in enumerate(wordings):
        size = len(wording.positions)
        tables = lookup.setdefault(size, [{} for _ in range(size)])
        for table, position in zip(tables, wording.positions, strict=True):
            for word in position.words:
                table[word] = table.get(word, 0) | 1 << index
    return lookup
