"""Prepared corpora, read by index: the documents of a split end to end, as one stream of tokens.

`launch/prepare.py` writes them (`manifest`, `shards`). Opening one reads its manifest and maps its files; a row costs
what its tokens cost, so nothing depends on the size of the corpus.
"""

import bisect
import collections.abc
import functools
import itertools
import os
from pathlib import Path

import numpy as np

from cola_jax.config import DataConfig
from cola_jax.data import manifest as manifests
from cola_jax.data import tokenizers
from cola_jax.data.hashing import Split
from cola_jax.data.manifest import Manifest
from cola_jax.data.shards import Shard
from cola_jax.types import UserError

_HASHED = 2**30  # bytes of shards whose hash is compared when they are opened; `inspect_data --verify` reads them all


class Stream(collections.abc.Sequence):
    """The documents of some shards, laid end to end; can be pickled.

    Attributes:
      documents, tokens: how many there are.
    """

    def __init__(self, shards: collections.abc.Sequence[Shard]):
        self._shards = [shard for shard in shards if len(shard)]
        sizes = [(len(shard), len(shard.ids)) for shard in self._shards]
        self._first_documents = [0, *np.cumsum([n for n, _ in sizes], dtype=np.int64).tolist()]
        self._first_tokens = [0, *np.cumsum([n for _, n in sizes], dtype=np.int64).tolist()]
        self.documents, self.tokens = self._first_documents[-1], self._first_tokens[-1]

    def __len__(self) -> int:
        return self.documents

    def __getitem__(self, index: int) -> np.ndarray:
        """The ids of a document, int32, its ends of text included."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} of {self.documents}")
        k = bisect.bisect_right(self._first_documents, index) - 1
        return self._shards[k].document(index - self._first_documents[k])

    def starts(self) -> np.ndarray:
        """The first token of each document, and the number of tokens: int64 [documents + 1]."""
        parts = [s.starts // s.itemsize + first for s, first in zip(self._shards, self._first_tokens, strict=False)]
        return np.concatenate([*parts, [self.tokens]]).astype(np.int64)

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` - 1 of the stream, int32."""
        parts = [shard.ids[a:b] for shard, a, b in self._cut(start, stop)]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(np.int32)

    def pieces(self, start: int, stop: int) -> list[int]:
        """Tokens of each document between ``start`` and ``stop``; they sum up to ``stop - start``."""
        lengths = []
        for shard, a, b in self._cut(start, stop):
            scale = shard.itemsize
            # Documents that begin behind a and before b.
            # Not searchsorted: numbers in the file need not be aligned, and numpy would copy all of them each time.
            low = bisect.bisect_right(shard.starts, a * scale)
            high = bisect.bisect_left(shard.starts, b * scale, lo=low)
            edges = [a, *(shard.starts[low:high] // scale).tolist(), b]
            lengths += [y - x for x, y in itertools.pairwise(edges) if y > x]
        return lengths

    def _cut(self, start: int, stop: int):
        """(shard, first, behind the last) for the shards that hold tokens ``start`` to ``stop`` - 1."""
        k = bisect.bisect_right(self._first_tokens, start) - 1
        while start < stop:
            first, end = self._first_tokens[k], min(stop, self._first_tokens[k + 1])
            yield self._shards[k], start - first, end - first
            start, k = end, k + 1


class Texts(collections.abc.Sequence):
    """The documents of a stream as text."""

    def __init__(self, stream: Stream, tokenizer: tokenizers.Tokenizer):
        self._stream, self._tokenizer = stream, tokenizer

    def __len__(self) -> int:
        return len(self._stream)

    def __getitem__(self, index: int) -> str:
        return self._tokenizer.decode(self._stream[index].tolist())


def open_manifest(directory: str | Path, config: DataConfig) -> Manifest:
    """The manifest of a prepared corpus that fits a config.

    Raises:
      UserError: there is none, or it was prepared with another kind of tokenizer, or its documents end elsewhere.
    """
    found = manifests.read(directory)
    if found.tokenizer.name != config.tokenizer:
        need = f"{found.tokenizer.name!r}, with which {directory} was prepared"
        raise UserError(f"config.data.tokenizer = {config.tokenizer!r}: must be {need}")
    if found.align % config.align:
        need = f"a divisor of {found.align}, to which launch/prepare.py --align filled up the documents of {directory}"
        raise UserError(f"config.data.align = {config.align}: must be {need}")
    return found


def open_stream(directory: str | Path, manifest: Manifest, split: Split) -> Stream:
    """The documents of a split.

    Raises:
      UserError: a shard is missing, or is not what the manifest says: its size, and the hash of files up to 1 GiB in
        all.
    """
    return Stream([_open(Path(directory), info, budget) for info, budget in _budgets(manifest.splits[split])])


def _budgets(infos):
    """Each shard with whether its hash is to be compared."""
    left = _HASHED
    for info in infos:
        left -= 4 * info.tokens + 16 * info.documents
        yield info, left >= 0


def _open(directory: Path, info: manifests.ShardInfo, check_hash: bool) -> Shard:
    shard = Shard(directory / info.name)
    if (len(shard), len(shard.ids)) != (info.documents, info.tokens):
        need = f"{info.documents} and {info.tokens}, as {manifests.NAME} says"
        raise UserError(f"{shard.stem}: has {len(shard)} documents and {len(shard.ids)} tokens; must have {need}")
    if check_hash:
        verify(shard, info)
    return shard


def verify(shard: Shard, info: manifests.ShardInfo) -> None:
    """Raises UserError that names the file of a shard whose content is not what the manifest says."""
    for suffix, expected in ((".bin", info.bin_sha256), (".idx", info.idx_sha256)):
        path = shard.file(suffix)
        status = path.stat()
        if (found := _file_sha256(str(path), status.st_size, status.st_mtime_ns)) != expected:
            need = f"{expected[:16]}..., as {manifests.NAME} says; it has changed since it was prepared"
            raise UserError(f"{path}: sha256 {found[:16]}...; must be {need}")


def verify_all(directory: str | Path, infos: collections.abc.Iterable[manifests.ShardInfo]) -> int:
    """Compares every shard with its hash; the bytes that were read.

    Raises:
      UserError: a shard is missing or has changed.
    """
    total = 0
    for info in infos:
        shard = _open(Path(directory), info, check_hash=True)
        total += sum(shard.file(suffix).stat().st_size for suffix in (".bin", ".idx"))
    return total


@functools.lru_cache(maxsize=4096)
def _file_sha256(path: str, size: int, changed: int) -> str:
    """Of a file; read again only when its size or its time has changed."""
    del size, changed
    return manifests.file_sha256(path)


def read_tokenizer(directory: str | Path, manifest: Manifest) -> tokenizers.Tokenizer:
    """The tokenizer with which a corpus was prepared, from its own directory.

    Raises:
      UserError: its file is missing, or is another one.
    """
    info = manifest.tokenizer
    if info.name == "bytes":
        return tokenizers.ByteTokenizer()
    path = Path(directory) / manifests.TOKENIZER_FILES[info.name]
    if info.name == "sentencepiece":
        found = tokenizers.SentencePieceTokenizer.load(path)
    else:
        found = tokenizers.HuggingFaceTokenizer.load(path, info.eos_id, info.pad_id)
    if found.fingerprint != info.fingerprint:
        need = f"{info.fingerprint[:16]}..., with which the corpus was prepared"
        raise UserError(f"{path}: fingerprint {found.fingerprint[:16]}...; must be {need}")
    return found


def check_tokenizer(directory: str | Path, manifest: Manifest, tokenizer: tokenizers.Tokenizer) -> None:
    """Raises UserError unless a corpus was prepared with this tokenizer."""
    ours, theirs = tokenizer, manifest.tokenizer
    if (ours.name, ours.fingerprint) != (theirs.name, theirs.fingerprint):
        need = f"{theirs.name} {theirs.fingerprint[:16]}..., with which {os.fspath(directory)} was prepared"
        raise UserError(f"the run's tokenizer is {ours.name} {ours.fingerprint[:16]}...: must be {need}")
