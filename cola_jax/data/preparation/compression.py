"""Files that may be compressed (gzip, zstandard), as streams of what is in them."""

import contextlib
import gzip
import importlib
import io
from collections.abc import Iterable, Iterator

from cola_jax.types import UserError

_PIECE = 2**13  # bytes of a compressed file read at a time; text may be a thousand times as long
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_WINDOW = 2**31  # the largest that zstd --long writes


def _kind(path: str) -> str:
    with open(path, "rb") as file:
        head = file.read(4)
    if path.endswith(".gz") or head.startswith(_GZIP):
        return "gzip"
    return "zstd" if path.endswith(".zst") or head == _ZSTD else "plain"


def check(paths: Iterable[str]) -> None:
    """Raises:
    UserError: a file cannot be opened, or the package that it needs is missing.
    """
    for path in paths:
        try:
            if _kind(path) == "zstd":
                _zstandard(path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; must be a readable file") from None


def _zstandard(path: str):
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        raise UserError(f"{path}: needs the package zstandard; pip install 'cola_jax[data]'") from None


class _Zstd(io.RawIOBase):
    """What is in the frames of a file; unlike the package's own reader it notices a file that is cut."""

    def __init__(self, file: io.BufferedIOBase, module):
        self._file, self._module = file, module
        self._frame = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        while not self._ready:
            rest = b""
            if self._frame is not None and self._frame.eof:
                rest, self._frame = self._frame.unused_data, None
            data = rest or self._file.read(_PIECE)
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle of a frame")
                return 0
            if self._frame is None:
                self._frame = self._module.ZstdDecompressor(max_window_size=_WINDOW).decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._module.ZstdError as error:
                raise EOFError(str(error)) from error
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


@contextlib.contextmanager
def opened(path: str) -> Iterator[tuple[io.BufferedIOBase, io.BufferedIOBase]]:
    """The file as it is stored, whose position tells how far reading is, and a stream of its content.

    Reading raises OSError, EOFError or zlib.error where the file is damaged.
    """
    with open(path, "rb") as raw:
        kind = _kind(path)
        if kind == "gzip":
            yield raw, gzip.GzipFile(fileobj=raw)
        elif kind == "zstd":
            yield raw, io.BufferedReader(_Zstd(raw, _zstandard(path)), 2**20)
        else:
            yield raw, raw
