"""Which documents of a source a corpus keeps, in which split, and what became of the others."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from cola_jax.data import hashing
from cola_jax.data.preparation import records
from cola_jax.data.tokenizers import Tokenizer
from cola_jax.types import UserError

_JUDGED = 1000  # so many first records tell whether this is the right format
_SHOWN = 5  # bad records that are reported one by one


@dataclasses.dataclass(frozen=True)
class Options:
    """How documents are divided and stored.

    Attributes:
      align: each document is filled up with ends of text to a multiple of so many tokens, at least 1.
      holdout: share of the documents that is held out, from 0 to below 1.
      shard_tokens: a shard has at most so many tokens, except where a single document has more.
      deduplicate: of equal documents only the first is kept.
      strict: a bad record is an error.
      workers: processes that make tokens; 0: this one does.
    """

    align: int = 1
    holdout: float = 0.02
    shard_tokens: int = 2**28
    deduplicate: bool = False
    strict: bool = False
    workers: int = 0


@dataclasses.dataclass
class Counts:
    """Records and what became of them; characters of the documents that were kept."""

    read: int = 0
    kept: int = 0
    empty: int = 0
    bad: int = 0
    duplicate: int = 0
    characters: int = 0


@dataclasses.dataclass(frozen=True)
class Document:
    """A document that is kept.

    Attributes:
      content: text, or ids [n].
      digest: 16 bytes that stand for the content.
    """

    split: hashing.Split
    content: str | np.ndarray
    digest: bytes


class Reader:
    """The documents of a source that are kept, and what is counted on the way."""

    def __init__(
        self, source: records.Source, tokenizer: Tokenizer | None, options: Options, say: Callable, tick: Callable
    ):
        """Args:
        tokenizer: None: ids are not looked at.
        say: takes lines for the console.
        tick: called before each record with the counts.
        """
        self._source, self._tokenizer, self._options = source, tokenizer, options
        self._say, self._tick = say, tick

    def __iter__(self) -> Iterator[Document]:
        self.counts = counts = Counts()
        seen: set[bytes] = set()
        for place, content in self._source:
            counts.read += 1
            self._tick(counts)
            if isinstance(content, records.Bad):
                self._note(place, content)
                continue
            if isinstance(content, np.ndarray):
                content = self._checked(place, content)
                data, empty = content.astype("<i4").tobytes(), not len(content)
            else:
                data, empty = content.encode("utf-8"), not content or content.isspace()
            digest = hashlib.blake2b(data, digest_size=16).digest()
            if empty:
                counts.empty += 1
            elif self._options.deduplicate and digest in seen:
                counts.duplicate += 1
            else:
                if self._options.deduplicate:
                    seen.add(digest)
                counts.kept += 1
                counts.characters += len(content) if isinstance(content, str) else 0
                held_out = hashing.position(data) < self._options.holdout
                del data
                yield Document("holdout" if held_out else "train", content, digest)
        self._judge()
        if not counts.kept:
            found = f"{counts.read} records, {counts.bad} bad, {counts.empty} empty"
            raise UserError(f"--input: no documents in it ({found}); there must be some")

    def _note(self, place: records.Place, bad: records.Bad) -> None:
        self.counts.bad += 1
        if self._options.strict:
            raise UserError(f"{place}: {bad.reason}")
        if self.counts.bad <= _SHOWN:
            self._say(f"skipped: {place}: {bad.reason}")
        self._last_bad = f"{place}: {bad.reason}"
        if 2 * self.counts.bad > _JUDGED:
            self._judge()

    def _judge(self) -> None:
        """Ends with an error if more than half of the first records are bad, of all where they are fewer."""
        counts = self.counts
        if counts.read <= _JUDGED and 2 * counts.bad > counts.read:
            found = f"{counts.bad} of the first {counts.read} records are bad"
            raise UserError(f"{self._last_bad} ({found}; --format and --text_field must fit the input)")

    def _checked(self, place: records.Place, ids: np.ndarray) -> np.ndarray:
        """Ids without the ends of text behind them."""
        if self._tokenizer is None:
            return ids
        size = self._tokenizer.vocab_size
        wrong = ids[(ids < 0) | (ids >= size)]
        if len(wrong):
            raise UserError(f"{place}: id {wrong[0]}: must be below {size}, as the ids of --tokenizer are")
        others = np.flatnonzero(ids != self._tokenizer.eos_id)
        return ids[: others[-1] + 1 if len(others) else 0]
