"""Images with captions, of files or of a TensorFlow data set, as pairs by index.

At the start every image is read once, so that a bad one is found before anything is trained; then only those that are
asked for are. Pillow decodes them (extra [images]).
"""

import concurrent.futures
import functools
import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from cola_jax import paths
from cola_jax.data import tfds_records
from cola_jax.data.hashing import position
from cola_jax.data.preparation import records
from cola_jax.data.preparation.records import Bad, Place
from cola_jax.types import UserError

_MARK = b"\xef\xbb\xbf"  # the byte order mark of a file


class Fields(NamedTuple):
    """What a pair is made of: fields of the object of a line, or features of a record.

    Attributes:
      text: holds the caption.
      image: holds the image, or its path.
      group: pairs that share its value are on one side of the hold-out; "": those that share a caption.
    """

    text: str
    image: str
    group: str = ""


class _Pair(NamedTuple):
    """Where a pair was found, its caption, what it belongs to, and what reads its image."""

    place: Place
    caption: str
    group: str
    read: Callable[[], bytes]


class CaptionedImages:
    """Pairs in the order in which they were found.

    Attributes:
      positions: `hashing.position` of each pair, float64 [pairs]: the same for all that share a caption, an image or a
        group, directly or by way of others.
      description: what it is, for fingerprints; with the hash of all images.
    """

    def __init__(self, pairs: Sequence[_Pair], digests: Sequence[bytes], description: str):
        self._pairs, self._digests = pairs, digests
        self.positions = _positions(pairs, digests)
        self.description = f"{description}, {len(pairs)} images sha256 {hashlib.sha256(b''.join(digests)).hexdigest()}"

    def place(self, index: int) -> str:
        """File and line of a pair, or data set and record."""
        return str(self._pairs[index].place)

    def caption(self, index: int) -> str:
        """The caption of a pair, unchanged."""
        return self._pairs[index].caption

    def picture(self, index: int, size: int) -> np.ndarray:
        """The image of a pair, uint8 [size, size, 3]: its middle, if it is no square.

        Raises:
          UserError: its file is gone or has changed.
        """
        pair = self._pairs[index]
        content, bad = _content(pair)
        if content is None or hashlib.sha256(content).digest() != self._digests[index]:
            reason = bad or "the image has changed while it was read"
            raise UserError(f"{pair.place}: {reason}; must stay as it is during a run")
        return decode(content, size)


def scan(path: str, fields: Fields, on_bad: str) -> CaptionedImages:
    """The pairs of a file of JSON lines; the paths of images begin at its directory.

    Args:
      path: of the file.
      fields: of the object of a line.
      on_bad: "fail" or "skip": what a bad line or image does.

    Raises:
      UserError: there is no such file, or something in it is bad and ``on_bad`` is "fail".
    """
    _pillow()
    paths.local(path, "config.data.files")
    (found, *others) = paths.matching(path, "config.data.files")
    if others:
        raise UserError(f"config.data.files = {path!r}: {len(others) + 1} files; must be one file of JSON lines")
    status = os.stat(found)
    return _scan(found, fields, on_bad, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _scan(path: str, fields: Fields, on_bad: str, size: int, changed: int) -> CaptionedImages:
    """One pass; another one only when the size or the time of the file has changed."""
    del changed
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; must be a readable file of JSON lines") from error
    lines = content.removeprefix(_MARK).split(b"\n")
    found = [
        _line(Place(path, "line", number), line, fields)
        for number, line in enumerate(lines, 1)
        if line and not line.isspace()
    ]
    description = f"{os.path.basename(path)}, {size} bytes, sha256 {hashlib.sha256(content).hexdigest()}"
    return _checked(found, on_bad, _grouped(description, fields))


def _grouped(description: str, fields: Fields) -> str:
    return description + (f", grouped by {fields.group!r}" if fields.group else "")


def _line(place: Place, line: bytes, fields: Fields) -> _Pair | tuple[Place, Bad]:
    """The pair of a line."""
    caption, image, group = (records.json_text(line, field or fields.text) for field in fields)
    for field, value in zip(fields, (caption, image, group), strict=True):
        if isinstance(value, Bad):
            return place, value
        if not value.strip():
            return place, Bad(f"field {field!r} is empty: must be {'a path' if field == fields.image else 'text'}")
    if "\0" in image:
        return place, Bad(f"field {fields.image!r} has a NUL: must be a path")
    path = os.path.join(os.path.dirname(place.path), image)
    return _Pair(place, caption, group, functools.partial(_read_file, path))


def scan_records(name: str, split: str, fields: Fields, on_bad: str) -> CaptionedImages:
    """The pairs of a split of a data set of TFDS, whose features are a text and an image.

    Raises:
      UserError: as `tfds_records.open_source`; or something in it is bad and ``on_bad`` is "fail".
    """
    _pillow()
    return _scan_records(name, split, fields, on_bad)


@functools.lru_cache(maxsize=4)
def _scan_records(name: str, split: str, fields: Fields, on_bad: str) -> CaptionedImages:
    asked = f"config.data.files = {name}, tfds_split = {split}"
    texts_of = dict.fromkeys((fields.text, fields.group or fields.text))
    source, full = tfds_records.open_source(name, tuple(texts_of), split, None, asked, stored=(fields.image,))
    found, texts = [], hashlib.sha256()
    for index in range(len(source)):
        place = Place(f"{full} {split}", "record", index)
        record, values = source[index], {}
        try:
            for field in texts_of:
                values[field] = tfds_records.text(record[field])
        except UnicodeDecodeError as error:
            found.append((place, Bad(f"field {field!r} is not UTF-8 ({error.reason})")))
            continue
        for value in values.values():
            texts.update(hashlib.sha256(value.encode()).digest())
        empty = next((field for field, value in values.items() if not value.strip()), None)
        read = functools.partial(_read_record, source, index, fields.image)
        pair = _Pair(place, values[fields.text], values[fields.group or fields.text], read)
        found.append(pair if empty is None else (place, Bad(f"field {empty!r} is empty: must be text")))
    description = f"{full} {split}, {len(source)} records, sha256 {texts.hexdigest()}"
    return _checked(found, on_bad, _grouped(description, fields))


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _read_record(source, index: int, field: str) -> bytes:
    return source[index][field]


def _checked(found: Iterable, on_bad: str, description: str) -> CaptionedImages:
    """The pairs whose images can be read."""
    found = list(found)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        checked = list(pool.map(_check, found))
    bad = [(place, content.reason) for place, content in checked if isinstance(content, Bad)]
    if bad:
        place, reason = bad[0]
        if on_bad == "fail":
            raise UserError(f"{place}: {reason} (data.on_bad_image = 'skip' would leave it out)")
        message = "%d of %d images with captions are skipped; the first: %s: %s"
        logging.getLogger(__name__).warning(message, len(bad), len(found), place, reason)
        description += f", {len(bad)} skipped"
    good = [(pair, digest) for pair, (_, digest) in zip(found, checked, strict=True) if not isinstance(digest, Bad)]
    return CaptionedImages([pair for pair, _ in good], [digest for _, digest in good], description)


def _check(found: _Pair | tuple[Place, Bad]) -> tuple[Place, bytes | Bad]:
    """The hash of an image that can be decoded."""
    if not isinstance(found, _Pair):
        return found
    content, bad = _content(found)
    if content is None:
        return found.place, Bad(bad)
    try:
        _open(content)
    except UserError as error:
        return found.place, Bad(str(error))
    return found.place, hashlib.sha256(content).digest()


def _content(pair: _Pair) -> tuple[bytes | None, str]:
    """The bytes of an image; or None, and why they cannot be read."""
    try:
        return pair.read(), ""
    except OSError as error:
        return None, f"{error.filename}: {error.strerror}; must be a readable image"


def _positions(pairs: Sequence[_Pair], digests: Sequence[bytes]) -> np.ndarray:
    """Of each pair that of the first group, in the order of the alphabet, of all that hang together with it."""
    parent = list(range(len(pairs)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    first: dict[tuple[str, str | bytes], int] = {}
    for index, (pair, digest) in enumerate(zip(pairs, digests, strict=True)):
        for key in (("caption", pair.caption), ("group", pair.group), ("image", digest)):
            parent[root(index)] = root(first.setdefault(key, index))
    names: dict[int, str] = {}
    for index, pair in enumerate(pairs):
        names[root(index)] = min(names.get(root(index), pair.group), pair.group)
    return np.array([position(names[root(index)].encode()) for index in range(len(pairs))])


def decode(content: bytes, size: int, most: int | None = None) -> np.ndarray:
    """An image file as an array: what is transparent is white, the shorter side is ``size``, and the middle is kept.

    Args:
      content: of the file.
      size: S; a smaller image is enlarged.
      most: pixels that it may have; None: as many as Pillow allows.

    Returns:
      uint8 [S, S, 3].

    Raises:
      UserError: it is broken, animated, too large, or has more than 8 bits a channel.
    """
    image, ops = _open(content, most), _pillow().ImageOps
    return np.asarray(ops.fit(image, (size, size), method=_pillow().Image.Resampling.LANCZOS), np.uint8)


def encode(picture: np.ndarray) -> bytes:
    """uint8 [Y, X, 3] as a PNG file."""
    buffer = io.BytesIO()
    _pillow().Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def _open(content: bytes, most: int | None = None):
    """The image of a file, RGB, upright and decoded."""
    pillow = _pillow()
    try:
        with pillow.Image.open(io.BytesIO(content)) as image:
            if most is not None and image.width * image.height > most:
                raise UserError(f"the image has {image.width} x {image.height} pixels: must be at most {most} in all")
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # a photograph with previews
                raise UserError(f"the image is animated ({frames} frames): must be a single one")
            if image.mode.partition(";")[0] in ("I", "F"):
                raise UserError(f"the image has pixels of mode {image.mode!r}: must have 8 bits a channel")
            upright = pillow.ImageOps.exif_transpose(image)
            if not upright.has_transparency_data:
                return upright.convert("RGB")
            coloured = upright.convert("RGBA")
            ground = pillow.Image.new("RGBA", coloured.size, (255, 255, 255, 255))
            return pillow.Image.alpha_composite(ground, coloured).convert("RGB")
    except UserError:
        raise
    except Exception as error:  # Pillow raises what its formats raise: OSError, SyntaxError, struct.error, ...
        reason = " ".join(str(error).split()).partition(" <_io")[0][:200]
        raise UserError(f"the image is broken or of no known format ({reason}): must be a whole image file") from error


@functools.cache
def _pillow():
    """The package, with what is used of it."""
    records.require("PIL", "images", "config.data: images")
    import PIL.Image
    import PIL.ImageOps

    return PIL
