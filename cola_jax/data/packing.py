"""Rows of a fixed length from documents of any length.

A row is a dict of int32 arrays of shape [T]:

* ``tokens``: ids; `pad_id` behind the text.
* ``segment_ids``: 1, 2, ... for the documents of the row in their order, 0 for padding.
"""

from collections.abc import Iterable

import grain
import numpy as np

from cola_jax.data.tokenizers import Tokenizer
from cola_jax.types import UserError

Row = dict[str, np.ndarray]


def document_tokens(text: str, tokenizer: Tokenizer, align: int) -> np.ndarray:
    """The int32 ids of a document and its end of text, repeated up to a multiple of ``align`` tokens."""
    return np.array(ended(tokenizer.encode(text), tokenizer.eos_id, align), dtype=np.int32)


def ended(ids: list[int], eos_id: int, align: int) -> list[int]:
    """The ids of a text with ends of text behind them, from 1 to ``align``, up to a multiple of ``align``."""
    return ids + [eos_id] * (align - len(ids) % align)


def _row(pieces: Iterable[np.ndarray], length: int, pad_id: int) -> Row:
    """A row of the given pieces of documents, at most ``length`` tokens together, padded behind."""
    row = empty_row(length, pad_id)
    start = 0
    for segment, piece in enumerate(pieces, 1):
        stop = start + len(piece)
        row["tokens"][start:stop] = piece
        row["segment_ids"][start:stop] = segment
        start = stop
    return row


def row_of(ids: np.ndarray, lengths: list[int], length: int, pad_id: int) -> Row:
    """A row of ids [n], n at most ``length``, whose documents have these lengths; padded behind."""
    row = empty_row(length, pad_id)
    row["tokens"][: len(ids)] = ids
    row["segment_ids"][: len(ids)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return row


def empty_row(length: int, pad_id: int) -> Row:
    """A row of nothing but padding."""
    return {
        "tokens": np.full(length, pad_id, dtype=np.int32),
        "segment_ids": np.zeros(length, dtype=np.int32),
    }


def pad_row(document: np.ndarray, length: int, pad_id: int, offset: int = 0) -> Row:
    """One document as one row: the head of a longer one, a shorter one padded; ``offset`` tokens of padding before."""
    row = _row([document[: length - offset]], length, pad_id)  # its last tokens are padding that rolls to the front
    return {name: np.roll(values, offset) for name, values in row.items()}


def pad_row_anywhere(document: np.ndarray, generator: np.random.Generator, length: int, pad_id: int, most: int) -> Row:
    """As `pad_row`, with an offset drawn uniformly from 0 to ``most``."""
    return pad_row(document, length, pad_id, int(generator.integers(most + 1)))


def place_row(row: Row, generator: np.random.Generator, pad_id: int, most: int) -> Row:
    """A row of ``most`` more tokens with the given one at an offset drawn uniformly from 0 to ``most``."""
    offset = int(generator.integers(most + 1))
    margin = (offset, most - offset)
    filler = {"tokens": pad_id, "segment_ids": 0}
    return {name: np.pad(values, margin, constant_values=filler[name]) for name, values in row.items()}


class _ConcatIterator(grain.DatasetIterator):
    """Cuts the documents of the parent into rows; see `ConcatIterDataset`."""

    def __init__(self, parent: grain.DatasetIterator, length: int, pad_id: int):
        super().__init__(parent)
        self._length = length
        self._pad_id = pad_id
        self._restart()

    def _restart(self) -> None:
        """Notes that the next token is the first one of the parent's next document."""
        self._document = np.zeros(0, dtype=np.int32)
        self._used = 0  # tokens of the document that are in rows already
        self._before_document = self._parent.get_state()

    def __next__(self) -> Row:
        pieces = []
        free = self._length
        while free:
            if self._used == len(self._document):
                self._restart()
                try:
                    self._document = next(self._parent)
                except StopIteration:
                    break
            piece = self._document[self._used : self._used + free]
            pieces.append(piece)
            self._used += len(piece)
            free -= len(piece)
        if not pieces:
            raise StopIteration
        return _row(pieces, self._length, self._pad_id)

    def get_state(self) -> dict:
        return {"parent": self._before_document, "used": self._used}

    def set_state(self, state: dict) -> None:
        self._parent.set_state(state["parent"])
        self._restart()
        if state["used"]:
            self._document = next(self._parent)
            self._used = state["used"]
            if self._used > len(self._document):
                raise UserError(
                    f"the checkpoint stands at token {self._used} of a document that has {len(self._document)}: the"
                    " corpus must be the one that the run began with"
                )


class ConcatIterDataset(grain.IterDataset):
    """Full rows from documents laid end to end; a document that is cut continues in the next row as a new segment.

    Only the last row of a finite parent has padding. Grain's `ConcatThenSplitIterDataset` makes the same rows, but its
    state does not survive JSON, which Grain's own checkpoint handler uses: the tuple ``(-1, -1)`` for "no remainder"
    comes back as a list, and the restored iterator then drops a document (grain 0.2.18).
    """

    def __init__(self, parent: grain.IterDataset, length: int, pad_id: int):
        """Args:
        parent: Non-empty int32 arrays of shape [n], any n.
        length: Tokens in a row, T.
        pad_id: Fills the last row.
        """
        super().__init__(parent)
        self._length = length
        self._pad_id = pad_id

    def __iter__(self) -> grain.DatasetIterator:
        return _ConcatIterator(iter(self._parent), self._length, self._pad_id)
