"""UTF-8 files as documents by index: read once to find where documents begin, then only where they are asked for."""

import codecs
import functools
import hashlib
import mmap
import os
import re
from typing import NamedTuple

import numpy as np

from cola_jax import paths
from cola_jax.data.hashing import position
from cola_jax.types import UserError

_CHUNK = 2**20


class _File(NamedTuple):
    """Where the documents of a file are: bytes from, and to; their positions; and its hash."""

    path: str
    starts: np.ndarray
    stops: np.ndarray
    positions: np.ndarray
    sha256: str
    size: int


class TextFiles:
    """The documents of some files, in the files' order.

    Attributes:
      positions: `hashing.position` of each document, float64 [documents].
      description: name, size and hash of each file.
    """

    def __init__(self, files: list[_File]):
        self._files = files
        self._firsts = np.cumsum([0, *(len(file.starts) for file in files)])
        self.positions = np.concatenate([file.positions for file in files])
        names = (os.path.basename(file.path) for file in files)  # files may move between runs
        self.description = [
            f"{name}, {file.size} bytes, sha256 {file.sha256}" for name, file in zip(names, files, strict=True)
        ]

    def read(self, index: int) -> str:
        """The text of a document, unchanged.

        Raises:
          UserError: its file is gone or has changed.
        """
        k = int(np.searchsorted(self._firsts, index, side="right")) - 1
        file = self._files[k]
        start, stop = (int(bounds[index - self._firsts[k]]) for bounds in (file.starts, file.stops))
        try:
            with open(file.path, "rb") as opened:
                opened.seek(start)
                data = opened.read(stop - start)
        except OSError as error:
            raise _unreadable(file.path, error) from error
        text = data.decode("utf-8", errors="replace")
        if len(data) != stop - start or position(data) != file.positions[index - self._firsts[k]]:
            raise UserError(f"{file.path}: has changed while it was read; must stay as it is during a run")
        return text


def scan(pattern: str, separator: str) -> TextFiles:
    """The documents of the files that a pattern names: what lies between separators and is not only white space.

    Args:
      pattern: a file, or a glob of files, which are sorted.
      separator: text; its line ends also match "\\r\\n". "": each file is one document.

    Raises:
      UserError: no such file, or one that cannot be read or is not UTF-8.
    """
    return TextFiles([_open(path, separator) for path in paths.matching(pattern, "config.data.files")])


def _unreadable(path: str, error: OSError) -> UserError:
    return UserError(f"{path}: {error.strerror}; must be a readable file of UTF-8 text")


def _open(path: str, separator: str) -> _File:
    try:
        status = os.stat(path)
        return _scan_file(path, separator, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise _unreadable(path, error) from error


@functools.lru_cache(maxsize=4096)
def _scan_file(path: str, separator: str, size: int, changed: int) -> _File:
    """One pass over a file; another one only when its size or its time has changed."""
    del changed
    with open(path, "rb") as file:
        sha256 = _check_utf8(path, file)
        if not size:
            return _File(path, *np.zeros((2, 0), np.int64), np.zeros(0), sha256, size)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            starts, stops, positions = _find(data, separator)
    return _File(path, np.array(starts, np.int64), np.array(stops, np.int64), np.array(positions), sha256, size)


def _check_utf8(path: str, file) -> str:
    """The hash of a file that is UTF-8."""
    digest, decoder, done = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        chunk = file.read(_CHUNK)
        before = len(decoder.getstate()[0])  # bytes of a character that is not complete yet
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            where = f"byte {done - before + error.start} is not UTF-8 ({error.reason})"
            raise UserError(f"{path}: {where}; must be UTF-8 text") from error
        if not chunk:
            return digest.hexdigest()
        digest.update(chunk)
        done += len(chunk)


def _find(data: mmap.mmap, separator: str) -> tuple[list[int], list[int], list[float]]:
    """Starts, stops and positions of the documents."""
    starts, stops, positions = [], [], []

    def note(start: int, stop: int) -> None:
        text = data[start:stop]
        if text.decode("utf-8").strip():
            starts.append(start)
            stops.append(stop)
            positions.append(position(text))

    start = 0
    if separator:
        for match in divider(separator).finditer(data):
            note(start, match.start())
            start = match.end()
    note(start, len(data))
    return starts, stops, positions


def divider(separator: str) -> re.Pattern[bytes]:
    """What divides documents; a separator of line ends also divides files that have "\\r\\n"."""
    return re.compile(b"\r?\n".join(re.escape(part.encode()) for part in separator.split("\n")))
