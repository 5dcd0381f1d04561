"""Documents of a corpus, divided by their content into a training and a held-out part.

A document is held out if a hash of its text falls into the held-out share. The same text is therefore never in both
parts, however often it occurs, and the division does not depend on order, file names or seeds.
"""

import collections.abc
import dataclasses
import glob
import hashlib
import os
import re
from typing import Literal

from cola_jax.config import DataConfig
from cola_jax.data.stories import Stories
from cola_jax.types import UserError

Split = Literal["train", "holdout"]

# A story's number: its index, above it the attempt to draw one that belongs to the split, above that the split.
_INDEX_BITS = 40
_ATTEMPTS = 1 << 20
_HOLDOUT_BIT = 1 << 63
_SAMPLED_STORIES = 100  # stories that stand for the generator's code in `describe`


def position(content: str | bytes) -> float:
    """A number from 0 to below 1 that depends on the content alone; text counts as its UTF-8."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    digest = hashlib.blake2b(data, digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


class _StoryDocuments(collections.abc.Sequence):
    """Stories of one split; story i is drawn again until its hash is on the right side."""

    def __init__(self, config: DataConfig, split: Split, seed: int):
        self._arguments = (config, split, seed)
        self._stories = Stories(config.stories)
        self._seed = seed % 2**64
        self._holdout = config.holdout
        self._held_out = split == "holdout"
        share = config.holdout if self._held_out else 1.0
        self._length = max(1, round(config.num_stories * share))
        self._found: dict[int, str] = {}  # held-out stories take 1 / holdout draws each: keep them

    def __reduce__(self):
        return _StoryDocuments, self._arguments  # data workers build their own copy

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self._length:
            raise IndexError(f"document {index} of {self._length}")
        if index in self._found:
            return self._found[index]
        number = index | (_HOLDOUT_BIT if self._held_out else 0)
        for attempt in range(_ATTEMPTS):
            text = self._stories.story(self._seed, number | attempt << _INDEX_BITS)
            if (position(text) < self._holdout) == self._held_out:
                if self._held_out:
                    self._found[index] = text
                return text
        raise UserError(
            f"config.data.holdout = {self._holdout}: must be a share that leaves stories in both splits"
            " (data.stories allows too few different ones)"
        )


def _paths(config: DataConfig) -> list[str]:
    """The sorted files that ``config.files`` names."""
    pattern = config.files
    # A name that exists is meant literally, even if it looks like a pattern.
    found = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not found:
        raise UserError(f"config.data.files = {pattern!r}: no such file; must be a file or a glob that matches one")
    return found


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; must be a readable file of UTF-8 text") from error


def _text_documents(config: DataConfig) -> list[str]:
    """All documents of a text corpus, in the order of the files, their text unchanged."""
    result = []
    # A separator of line ends also divides files that have "\r\n".
    separator = "\r?\n".join(re.escape(part) for part in config.document_separator.split("\n"))
    for path in _paths(config):
        try:
            text = _read(path).decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"byte {error.start} is not UTF-8 ({error.reason})"
            raise UserError(f"{path}: {where}; must be UTF-8 text") from error
        parts = re.split(separator, text) if config.document_separator else [text]
        result += [part for part in parts if part.strip()]
    if not result:
        raise UserError(f"config.data.files = {config.files!r}: no text in it; the files must hold documents")
    return result


def _text_split(config: DataConfig, split: Split) -> list[str]:
    everything = _text_documents(config)
    positions = [position(text) for text in everything]
    # A small corpus may have no hash in the share: its document with the lowest one is then held out.
    limit = max(config.holdout, min(positions) + 2.0**-48)
    held_out = [text for text, at in zip(everything, positions, strict=True) if at < limit]
    train = [text for text, at in zip(everything, positions, strict=True) if at >= limit]
    if not train:
        raise UserError(
            f"config.data.files = {config.files!r}: {len(everything)} document(s), all of them held out; there must be"
            f" at least two different ones (data.document_separator = {config.document_separator!r}) and a data.holdout"
            f" that leaves some for training (now {config.holdout})"
        )
    return train if split == "train" else held_out


def documents(config: DataConfig, split: Split, seed: int) -> collections.abc.Sequence:
    """The documents of a split, as strings by index.

    Args:
      config: `corpus`, and the fields that belong to it.
      split: "train" or "holdout"; no text is in both.
      seed: Of the generated stories; text corpora do not depend on it.

    Returns:
      A sequence (``len``, ``[index]``) that can be pickled and read from several threads.

    Raises:
      UserError: Files are missing, empty or not UTF-8, or a split would be empty.
    """
    if split not in ("train", "holdout"):
        raise ValueError(f"split = {split!r}: must be 'train' or 'holdout'")
    if config.corpus == "stories":
        return _StoryDocuments(config, split, seed)
    return _text_split(config, split)


def describe(config: DataConfig, seed: int) -> dict:
    """What defines the documents and their order, as JSON can hold it."""
    if config.corpus == "text":
        files = []
        for path in _paths(config):
            data = _read(path)
            name = os.path.basename(path)  # files may move between runs
            files.append(f"{name}, {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
        return {"files": files, "document_separator": config.document_separator, "holdout": config.holdout}
    stories = _StoryDocuments(config, "train", seed)
    sample = "\n".join(stories[i] for i in range(min(_SAMPLED_STORIES, len(stories))))
    return {
        "stories": dataclasses.asdict(config.stories),
        "num_stories": config.num_stories,
        "stories_sha256": hashlib.sha256(sample.encode("utf-8")).hexdigest(),
        "holdout": config.holdout,
    }
