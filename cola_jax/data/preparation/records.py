"""What documents of files and data sets are read as, one after the other in bounded memory, always in the same order.

A source is iterated over for pairs of a `Place` and its content: text (str), ids (int32 array [n], of Megatron files),
or `Bad` where there should have been a document. What can be skipped is `Bad`; a file that cannot be read on is an
error.
"""

import abc
import importlib
import json
import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cola_jax import paths
from cola_jax.types import UserError

LONGEST = 2**30  # bytes of a document; more is a file of another format


class Place(NamedTuple):
    """Where a document was found: a file (or data set) and a number in it, from 1."""

    path: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.path} {self.unit} {self.number}"


class Bad(NamedTuple):
    """What is wrong with a record."""

    reason: str


Content = str | np.ndarray | Bad
Numbered = Iterator[tuple[int, Content]]


class Source(abc.ABC):
    """Documents in a fixed order; each iteration begins again.

    Attributes:
      size: of the whole input: bytes as they are stored; of a TFDS data set examples.
      position: how much of it has been read.
      description: what it is, JSON-able: equal for equal inputs wherever they lie.
      has_ids: whether its documents are ids, not text.
    """

    unit = "record"
    has_ids = False
    size: int
    position: int
    description: dict

    @abc.abstractmethod
    def __iter__(self) -> Iterator[tuple[Place, Content]]:
        """Raises:
        UserError: a file cannot be read, or is damaged.
        """


def require(module: str, extra: str, what: str):
    """The module of an optional package.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{what}: needs the package {package}; pip install 'cola_jax[{extra}]'") from None


def json_text(data: bytes, field: str) -> Content:
    """The text in a field of a JSON object."""
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Bad(f"byte {error.start} is not UTF-8 ({error.reason})")
    except (ValueError, RecursionError) as error:
        return Bad(f"not JSON ({error})")
    if not isinstance(value, dict):
        return Bad(f"{type(value).__name__}: must be a JSON object")
    if field not in value:
        return Bad(f"no field {field!r}; it has {', '.join(map(repr, value)) or 'none'}")
    return checked(value[field], field)


def checked(value, field: str) -> Content:
    """What a field holds, if it is text."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        return Bad(f"field {field!r} is {kind}: must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return Bad(f"field {field!r}: half of a surrogate pair at character {error.start}: must be Unicode")
    return value


def decoded(data: bytes) -> Content:
    """Text from its UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Bad(f"byte {error.start} of it is not UTF-8 ({error.reason})")


class Files(Source):
    """Documents of files, in the order of their names."""

    damage: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)

    def __init__(self, pattern: str):
        self.paths = paths.matching(pattern, "--input")
        self._sizes = [os.path.getsize(path) for path in self.paths]
        self.size = sum(self._sizes)
        self._before, self._within = 0, 0
        names = zip(map(os.path.basename, self.paths), self._sizes, strict=True)
        self.description = {"files": [f"{name}, {size} bytes" for name, size in names]}

    @property
    def position(self) -> int:
        return self._before + self._within

    @abc.abstractmethod
    def read(self, path: str, size: int) -> Numbered:
        """The records of one file; keeps ``_within`` up to date."""

    def __iter__(self) -> Iterator[tuple[Place, Content]]:
        self._before = 0
        for path, size in zip(self.paths, self._sizes, strict=True):
            self._within = number = 0
            try:
                for number, content in self.read(path, size):
                    yield Place(path, self.unit, number), content
            except self.damage as error:
                if isinstance(error, UserError):
                    raise
                reason = error.strerror if isinstance(error, OSError) and error.strerror else error
                where = f"behind {self.unit} {number}" if number else "at its start"
                reason = " ".join(str(reason).split())[:200]
                raise UserError(f"{path}: cannot be read {where} ({reason}); must be a whole file") from error
            self._within = 0
            self._before += size
