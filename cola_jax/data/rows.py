"""Rows of prepared documents by index: row i of a run without the rows before it.

Each class maps a row's number, which grows over the epochs, to a row (`packing.Row`). All are pure functions of the
stream and the seed, and can be pickled.
"""

import collections

import grain
import numpy as np

from cola_jax.data import packing
from cola_jax.data.prepared import Stream
from cola_jax.types import UserError

_LARGEST = 2**32 - 1  # what Grain's shuffle can count


def shuffled(index: int, size: int, seed: int | None) -> int:
    """The element that stands at ``index`` of the endless order of ``size`` elements, each once an epoch.

    The order is that of ``grain.MapDataset.shuffle(seed).repeat()``; None: not shuffled.
    """
    epoch, index = divmod(index, size)
    if seed is None or size == 1:
        return index
    return grain.experimental.index_shuffle(index, max_index=size - 1, seed=(seed + epoch) % 2**32, rounds=4)


def _check_size(size: int, what: str) -> None:
    if not 0 < size <= _LARGEST:
        raise UserError(f"config.data.files: {size} {what}: must be 1 to {_LARGEST}")


class InOrder:
    """Row r is tokens [rC, (r + 1)C) of the stream; the rows of an epoch are shuffled.

    Neighbours in the corpus stay neighbours in their row. The last row of an epoch is filled up with padding.
    """

    def __init__(self, stream: Stream, length: int, pad_id: int, seed: int | None):
        """Args:
        stream: the documents.
        length: tokens of a row, C.
        pad_id: fills the last row.
        seed: 32 bits; None: not shuffled.
        """
        self._stream, self._length, self._pad_id, self._seed = stream, length, pad_id, seed
        self.size = -(-stream.tokens // length)
        _check_size(self.size, "rows")

    def __getitem__(self, index: int) -> packing.Row:
        start = shuffled(index, self.size, self._seed) * self._length
        stop = min(start + self._length, self._stream.tokens)
        return packing.row_of(
            self._stream.ids(start, stop), self._stream.pieces(start, stop), self._length, self._pad_id
        )


class ShuffledDocuments:
    """Row r is tokens [rC, (r + 1)C) of the endless stream of shuffled epochs of documents.

    These are the rows that online text gives (`packing.ConcatIterDataset`). Takes 40 bytes of memory a document (8, and
    16 for each of two epochs), and some microseconds each at the start of an epoch.
    """

    _KEPT = 2  # epochs; a row may touch more where they are short

    def __init__(self, stream: Stream, length: int, pad_id: int, seed: int | None):
        """Args: as for `InOrder`."""
        _check_size(stream.documents, "documents")
        self._stream, self._length, self._pad_id, self._seed = stream, length, pad_id, seed
        self.size = -(-stream.tokens // length)
        self._starts = stream.starts()
        self._epochs: collections.OrderedDict[int, tuple[np.ndarray, np.ndarray]] = collections.OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_epochs": collections.OrderedDict()}  # workers make their own

    def _epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in their order, and the token behind each."""
        if number not in self._epochs:
            count = self._stream.documents
            order = np.fromiter(
                (shuffled(number * count + i, count, self._seed) for i in range(count)), np.int64, count
            )
            ends = np.cumsum(np.diff(self._starts)[order])
            self._epochs[number] = order, ends
            while len(self._epochs) > self._KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def __getitem__(self, index: int) -> packing.Row:
        token, ids, lengths = index * self._length, [], []
        free = self._length
        while free:
            number, at = divmod(token, self._stream.tokens)
            order, ends = self._epoch(number)
            place = int(np.searchsorted(ends, at, side="right"))
            take = min(free, int(ends[place]) - at)
            document = int(order[place])
            start = int(self._starts[document + 1]) - (int(ends[place]) - at)
            ids.append(self._stream.ids(start, start + take))
            lengths.append(take)
            token, free = token + take, free - take
        return packing.row_of(np.concatenate(ids), lengths, self._length, self._pad_id)


class BestFit:
    """Whole documents, packed into as few rows as best-fit-decreasing finds; the rows of an epoch are shuffled.

    A document longer than a row is cut into full rows and a rest, which is packed as a document. Which documents share
    a row depends on the corpus and the length alone.
    """

    def __init__(self, stream: Stream, length: int, pad_id: int, seed: int | None):
        """Args: as for `InOrder`."""
        self._stream, self._length, self._pad_id, self._seed = stream, length, pad_id, seed
        starts = stream.starts()
        lengths = np.diff(starts)
        _check_size(stream.documents, "documents")
        full = lengths // length
        # First tokens and lengths of all pieces: the full ones, then the rests.
        documents = np.repeat(np.arange(len(lengths)), full)
        part = np.arange(len(documents)) - np.repeat(np.cumsum(full) - full, full)
        rest = lengths - full * length
        kept = rest > 0
        first = np.concatenate([starts[documents] + part * length, (starts[:-1] + full * length)[kept]])
        size = np.concatenate([np.full(len(documents), length), rest[kept]])
        row = best_fit(size, length)
        order = np.lexsort((first, row))
        self._first, self._size = first[order], size[order]
        self._rows = np.searchsorted(row[order], np.arange(row.max() + 2))
        self.size = len(self._rows) - 1

    def __getitem__(self, index: int) -> packing.Row:
        row = shuffled(index, self.size, self._seed)
        places = range(self._rows[row], self._rows[row + 1])
        parts = [self._stream.ids(int(self._first[p]), int(self._first[p] + self._size[p])) for p in places]
        return packing.row_of(np.concatenate(parts), [len(part) for part in parts], self._length, self._pad_id)


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item, by best-fit-decreasing: the fullest bin that has room, else a new one.

    Args:
      sizes: 1 to ``capacity``, int [n].
      capacity: of a bin.

    Returns:
      Bins from 0 on, int64 [n].
    """
    bins = np.zeros(len(sizes), np.int64)
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room that is left
    rooms = 0  # bit r is set where open_bins[r] has some
    count = 0
    for item in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        size = int(sizes[item])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = open_bins[room].pop()
            if not open_bins[room]:
                rooms &= ~(1 << room)
        else:
            room, chosen, count = capacity, count, count + 1
        bins[item] = chosen
        if left := room - size:
            open_bins[left].append(chosen)
            rooms |= 1 << left
    return bins
