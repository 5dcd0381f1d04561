"""Documents as tokens on disk: Megatron's indexed files ``NAME.bin`` and ``NAME.idx``, written once, read by index.

``.bin`` holds the ids of all documents end to end, little endian. ``.idx`` holds, little endian too:

    9 bytes  "MMIDIDX" and two zeros
    uint64   version, 1
    uint8    type of the ids (`_CODES`)
    uint64   S, number of sequences; uint64 D + 1, documents and one
    int32    [S] tokens of each sequence
    int64    [S] byte in ``.bin`` where each begins
    int64    [D + 1] first sequence of each document, and S

Here a document is one sequence; files from elsewhere may have several. Both are memory-mapped: a row costs what its
tokens cost, whatever the size of the corpus.
"""

import contextlib
import os
import struct
from pathlib import Path

import numpy as np

from cola_jax.types import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
LONGEST = 2**31 - 1  # tokens of a document: its length is an int32


def smallest_type(vocab_size: int) -> str:
    """The type of ids below ``vocab_size``: two bytes where they suffice, as Megatron chooses."""
    return "<u2" if vocab_size <= 65_500 else "<i4"


class Writer:
    """Writes one shard; the files get their names in `close`, when they are complete and on the disk."""

    def __init__(self, stem: Path, dtype: str):
        """Args:
        stem: path without ``.bin`` and ``.idx``.
        dtype: of the ids (`smallest_type`).
        """
        self._stem, self._dtype = Path(stem), np.dtype(dtype)
        self._code = next(code for code, name in _CODES.items() if np.dtype(name) == self._dtype)
        self._lengths: list[int] = []
        self.tokens = 0
        self._file = open(self._partial(".bin"), "wb")  # noqa: SIM115

    def _partial(self, suffix: str) -> Path:
        return self._stem.with_name(self._stem.name + suffix + ".partial")

    @property
    def documents(self) -> int:
        return len(self._lengths)

    def add(self, ids: np.ndarray) -> None:
        """Appends a document of at least one and at most `LONGEST` ids."""
        if not 0 < len(ids) <= LONGEST:
            raise ValueError(f"a document of {len(ids)} tokens: must have 1 to {LONGEST}")
        self._file.write(np.ascontiguousarray(ids, dtype=self._dtype).data)
        self._lengths.append(len(ids))
        self.tokens += len(ids)

    def close(self) -> None:
        """Completes both files."""
        _sync(self._file)
        lengths = np.array(self._lengths, dtype="<i4")
        starts = (np.cumsum(lengths, dtype="<i8") - lengths) * self._dtype.itemsize
        with open(self._partial(".idx"), "wb") as file:
            file.write(_MAGIC + _HEADER.pack(1, self._code, len(lengths), len(lengths) + 1))
            for array in (lengths, starts.astype("<i8"), np.arange(len(lengths) + 1, dtype="<i8")):
                file.write(array.tobytes())
            _sync(file)
        for suffix in (".bin", ".idx"):
            os.replace(self._partial(suffix), self._stem.with_name(self._stem.name + suffix))

    def discard(self) -> None:
        """Closes without result."""
        with contextlib.suppress(OSError):  # what is not written yet may not fit on the disk
            self._file.close()
        for suffix in (".bin", ".idx"):
            self._partial(suffix).unlink(missing_ok=True)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class Shard:
    """A shard, read by index; can be pickled.

    Attributes:
      ids: all tokens, 1-D, memory-mapped.
      starts: the first token of each document, int64 [D]; memory-mapped where a document is one sequence.
      itemsize: what to divide ``starts`` by (bytes of an id); 1 where they are tokens already.
    """

    def __init__(self, stem: str | Path):
        """Raises:
        UserError: the files are missing, or are no such files.
        """
        self.stem = Path(stem)
        self._open()

    def __reduce__(self):
        return Shard, (self.stem,)

    def file(self, suffix: str) -> Path:
        """``.bin`` or ``.idx``."""
        return self.stem.with_name(self.stem.name + suffix)

    def _open(self) -> None:
        path = self.file(".idx")
        try:
            with open(path, "rb") as file:
                head = file.read(len(_MAGIC) + _HEADER.size)
            if not head.startswith(_MAGIC) or len(head) < len(_MAGIC) + _HEADER.size:
                raise UserError(f"{path}: must be the index of a Megatron data set (it begins with MMIDIDX)")
            version, code, sequences, documents = _HEADER.unpack(head[len(_MAGIC) :])
            if version != 1 or code not in _CODES or not documents:
                raise UserError(f"{path}: version {version}, type {code}: must be version 1 with a type of integers")
            expected = len(head) + 12 * sequences + 8 * documents
            if (size := path.stat().st_size) != expected:
                raise UserError(f"{path}: has {size} bytes; must be {expected}, the file is damaged")
            mapped = np.asarray(np.memmap(path, mode="r"))  # the base class is faster to slice
            at = len(head) + 4 * sequences
            pointers = mapped[at : at + 8 * sequences].view("<i8")
            firsts = mapped[at + 8 * sequences :].view("<i8")
            self.ids = self._map_ids(np.dtype(_CODES[code]))
        except OSError as error:
            raise UserError(
                f"{error.filename or path}: {error.strerror}; must be a shard of a prepared corpus"
            ) from None
        self.itemsize = self.ids.dtype.itemsize
        one_each = documents == sequences + 1 and (not sequences or int(firsts[-2]) == sequences - 1)
        self.starts = pointers if one_each else pointers[np.asarray(firsts[:-1])]
        lengths = mapped[len(head) : at].view("<i4")
        end = int(pointers[-1]) // self.itemsize + int(lengths[-1]) if sequences else 0
        if end != len(self.ids):
            raise UserError(f"{self.file('.bin')}: has {len(self.ids)} tokens; must have {end}, as its index says")

    def _map_ids(self, dtype: np.dtype) -> np.ndarray:
        path = self.file(".bin")
        if path.stat().st_size % dtype.itemsize:
            raise UserError(f"{path}: has {path.stat().st_size} bytes; must be a multiple of {dtype.itemsize}")
        # An empty file cannot be mapped.
        return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.zeros(0, dtype)

    def __len__(self) -> int:
        """Documents."""
        return len(self.starts)

    def bounds(self, document: int) -> tuple[int, int]:
        """First token of a document, and the one behind it."""
        last = document + 1 == len(self.starts)
        stop = len(self.ids) if last else int(self.starts[document + 1]) // self.itemsize
        return int(self.starts[document]) // self.itemsize, stop

    def document(self, index: int) -> np.ndarray:
        """The ids of a document, int32."""
        start, stop = self.bounds(index)
        return np.asarray(self.ids[start:stop], dtype=np.int32)
