"""Documents of a corpus, divided by their content into a training and a held-out part.

A document is held out if a hash of its text falls into the held-out share. The same text is therefore never in both
parts, however often it occurs, and the division does not depend on order, file names or seeds. Of corpora of pictures
neither the same caption nor the same picture is in both parts.
"""

import collections.abc
import dataclasses
import functools
import hashlib
from collections.abc import Callable

import numpy as np

from cola_jax.config import DataConfig
from cola_jax.data import captioned_images, mixture, prepared, scenes_pictures, text_files, tfds_records
from cola_jax.data.captioned_images import CaptionedImages
from cola_jax.data.hashing import Split, position
from cola_jax.data.scene_pairs import ScenePairs
from cola_jax.data.scenes import Scene
from cola_jax.data.stories import Stories
from cola_jax.types import UserError

# A story's number: its index, above it the attempt to draw one that belongs to the split, above that the split.
_INDEX_BITS = 40
_ATTEMPTS = 1 << 20
_HOLDOUT_BIT = 1 << 63
_SAMPLED_STORIES = 100  # stories, or scenes, that stand for the generator's code in `describe`


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
            if (position(text.encode()) < self._holdout) == self._held_out:
                if self._held_out:
                    self._found[index] = text
                return text
        raise UserError(
            f"config.data.holdout = {self._holdout}: must be a share that leaves stories in both splits"
            " (data.stories allows too few different ones)"
        )


class _Texts(collections.abc.Sequence):
    """Documents, or pictures, by index; can be pickled."""

    def __init__(self, read: Callable, indices: np.ndarray, where: Callable[[int], str] | None = None):
        self._read, self._indices, self._where = read, indices, where

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int):
        if not 0 <= index < len(self._indices):
            raise IndexError(f"document {index} of {len(self._indices)}")
        return self._read(int(self._indices[index]))

    def place(self, index: int) -> str:
        """Where a document stands: its file and line."""
        return f"document {index}" if self._where is None else self._where(int(self._indices[index]))


class _OfScenes(collections.abc.Sequence):
    """Captions or pictures of scenes; can be pickled."""

    def __init__(self, pairs: ScenePairs, make: Callable):
        self._pairs, self._make = pairs, make

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int):
        return self._make(self._pairs[index])

    def place(self, index: int) -> str:
        return f"scene {index}"


def _picture(scene: Scene, size: int) -> np.ndarray:
    return scenes_pictures.render(scene.shapes, size)


def _split(
    read: Callable,
    positions: np.ndarray,
    config: DataConfig,
    split: Split,
    where: Callable[[int], str] | None = None,
) -> _Texts:
    """The documents of a split, by their positions."""
    if not len(positions):
        raise UserError(f"config.data.files = {config.files!r}: no text in it; the files must hold documents")
    # A small corpus may have no hash in the share: its document with the lowest one is then held out.
    limit = max(config.holdout, positions.min() + 2.0**-48)
    held_out = positions < limit
    if held_out.all():
        raise UserError(
            f"config.data.files = {config.files!r}: {len(positions)} document(s), all of them held out; there must be"
            f" at least two different ones (data.document_separator = {config.document_separator!r}) and a data.holdout"
            f" that leaves some for training (now {config.holdout})"
        )
    return _Texts(read, np.flatnonzero(held_out if split == "holdout" else ~held_out), where)


def documents(config: DataConfig, split: Split, seed: int) -> collections.abc.Sequence:
    """The documents of a split, as strings by index.

    Args:
      config: `corpus`, and the fields that belong to it.
      split: "train" or "holdout"; no text is in both.
      seed: Of the generated stories; other corpora do not depend on it.

    Returns:
      A sequence (``len``, ``[index]``) that can be pickled and read from several threads. Text stays in its files and
      is read when it is asked for.

    Raises:
      UserError: Files are missing, empty or not UTF-8, or a split would be empty.
    """
    _check_split(split)
    if config.corpus == "stories":
        return _StoryDocuments(config, split, seed)
    if config.corpus == "scenes":
        pairs = scenes(config, split, seed)
        return _OfScenes(pairs, pairs.scenes.caption)
    if has_image_files(config):
        images = _images(config)
        return _split(images.caption, images.positions, config, split, images.place)
    if config.corpus == "prepared":
        return _prepared_texts(config, split)
    if config.corpus == "tfds":
        records = tfds_records.scan(config.files, config.tfds_split, config.text_field)
        return _split(records.read, records.positions, config, split)
    files = text_files.scan(config.files, config.document_separator)
    return _split(files.read, files.positions, config, split)


def _check_split(split: str) -> None:
    if split not in ("train", "holdout"):
        raise ValueError(f"split = {split!r}: must be 'train' or 'holdout'")


def scenes(config: DataConfig, split: Split, seed: int) -> ScenePairs:
    """The scenes (`scenes.Scene`) of a split of corpus 'scenes', in the order of `documents` and `pictures`."""
    _check_split(split)
    return ScenePairs(config, split, seed)


def has_image_files(config: DataConfig) -> bool:
    """Whether the corpus is image files with captions."""
    return config.corpus == "images" or (config.corpus == "tfds" and config.image_size > 0)


def _images(config: DataConfig) -> CaptionedImages:
    fields = captioned_images.Fields(config.text_field, config.image_field, config.group_field)
    if config.corpus == "tfds":
        return captioned_images.scan_records(config.files, config.tfds_split, fields, config.on_bad_image)
    return captioned_images.scan(config.files, fields, config.on_bad_image)


def pictures(config: DataConfig, split: Split, seed: int) -> collections.abc.Sequence:
    """The pictures of a split, uint8 [S, S, 3] by index; the caption of picture i is document i (`documents`).

    Args:
      config, split, seed: as for `documents`; S is ``config.image_size``.

    Returns:
      A sequence that can be pickled and read from several threads. Image files are read when they are asked for.

    Raises:
      UserError: the corpus has no pictures, or as `documents`.
    """
    _check_split(split)
    if config.corpus == "scenes":
        return _OfScenes(scenes(config, split, seed), functools.partial(_picture, size=config.image_size))
    if not has_image_files(config):
        raise UserError(f"config.data.corpus = {config.corpus!r}: must be a corpus with pictures")
    images = _images(config)
    read = functools.partial(images.picture, size=config.image_size)
    return _split(read, images.positions, config, split, images.place)


def place(found: collections.abc.Sequence, index: int) -> str:
    """Where a document of a corpus of pictures comes from, for errors."""
    return found.place(index)


def _prepared_texts(config: DataConfig, split: Split) -> collections.abc.Sequence:
    parts = []
    for directory in mixture.directories(mixture.parse(config.files)):
        found = prepared.open_manifest(directory, config)
        tokenizer = prepared.read_tokenizer(directory, found)
        parts.append(prepared.Texts(prepared.open_stream(directory, found, split), tokenizer))
    if not any(len(part) for part in parts):
        raise UserError(f"config.data.files = {config.files!r}: must be prepared with documents of split {split!r}")
    return parts[0] if len(parts) == 1 else _Chained(parts)


class _Chained(collections.abc.Sequence):
    """Several sequences, one after another."""

    def __init__(self, parts: list):
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, index: int) -> str:
        for part in self._parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def describe(config: DataConfig, seed: int) -> dict:
    """What defines the documents and their order, as JSON can hold it."""
    if config.corpus == "text":
        files = text_files.scan(config.files, config.document_separator)
        return {
            "files": files.description,
            "document_separator": config.document_separator,
            "holdout": config.holdout,
        }
    if config.image_size:
        return _describe_pictures(config, seed)
    if config.corpus == "tfds":
        records = tfds_records.scan(config.files, config.tfds_split, config.text_field)
        return {"records": records.description, "holdout": config.holdout}
    if config.corpus == "prepared":
        return {"mixture": _describe_mixture(config)}
    stories = _StoryDocuments(config, "train", seed)
    sample = "\n".join(stories[i] for i in range(min(_SAMPLED_STORIES, len(stories))))
    return {
        "stories": dataclasses.asdict(config.stories),
        "num_stories": config.num_stories,
        "stories_sha256": hashlib.sha256(sample.encode("utf-8")).hexdigest(),
        "holdout": config.holdout,
    }


def _describe_pictures(config: DataConfig, seed: int) -> dict:
    found: dict = {"holdout": config.holdout, "image_size": config.image_size}
    if config.instruction_length:
        found |= {"instruction_length": config.instruction_length, "instructions": list(config.instructions)}
    if has_image_files(config):
        return found | {"images": _images(config).description, "on_bad_image": config.on_bad_image}
    captions, drawn = (make(config, "train", seed) for make in (documents, pictures))
    sample = hashlib.sha256()
    for index in range(min(_SAMPLED_STORIES, len(captions))):
        sample.update(captions[index].encode() + drawn[index].tobytes())
    own = {"scenes": dataclasses.asdict(config.scenes), "num_scenes": config.num_scenes}
    return found | own | {"scenes_sha256": sample.hexdigest()}


def _describe_mixture(config: DataConfig) -> list[dict]:
    """The phases of a mixture by the content of its corpora, wherever they lie."""
    phases = mixture.parse(config.files)
    found = {path: prepared.open_manifest(path, config).fingerprint for path in mixture.directories(phases)}
    return [
        {"from_step": phase.start, "shares": {found[path]: share for path, share in phase.shares.items()}}
        for phase in phases
    ]
