"""A text data set of TensorFlow Datasets as documents by index, without TensorFlow."""

import functools
import hashlib

import numpy as np

from cola_jax.data.hashing import position
from cola_jax.types import UserError


class Records:
    """The texts of a split.

    Attributes:
      positions: `hashing.position` of each record, float64 [records].
      description: the data set, its version and a hash of all its texts.
    """

    def __init__(self, source, name: str, field: str):
        self._source, self._field, self._name = source, field, name
        digests, positions = hashlib.sha256(), []
        for index in range(len(source)):
            text = self.read(index).encode()
            digests.update(hashlib.sha256(text).digest())
            positions.append(position(text))
        self.positions = np.array(positions)
        self.description = f"{name}, {len(source)} records, sha256 {digests.hexdigest()}"

    def read(self, index: int) -> str:
        """The text of a record.

        Raises:
          UserError: it has no such field, or is not UTF-8.
        """
        record = self._source[index]
        if self._field not in record:
            there = ", ".join(map(repr, record))
            raise UserError(f"config.data.text_field = {self._field!r}: {self._name} has {there}; must be one of them")
        value = record[self._field]
        value = value.item() if isinstance(value, np.ndarray) else value
        try:
            return value.decode("utf-8") if isinstance(value, bytes) else str(value)
        except UnicodeDecodeError as error:
            raise UserError(f"{self._name}: record {index} is not UTF-8 ({error.reason}); must be text") from error


def open_source(name: str, split: str):
    """The random-access source of a data set that is prepared on this machine, or that TFDS can prepare.

    Raises:
      UserError: TFDS has no such data set or split, or cannot read it.
    """
    import tensorflow_datasets as tfds  # takes a second to import

    try:
        return tfds.data_source(name, split=split)
    except Exception as error:  # TFDS raises its own of many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"config.data.files = {name!r}, tfds_split = {split!r}: must be a data set of TFDS ({reason})"
        ) from error


@functools.lru_cache(maxsize=4)
def scan(name: str, split: str, field: str) -> Records:
    """The texts of a split, each read once.

    Raises:
      UserError: as `open_source` and `Records.read`.
    """
    return Records(open_source(name, split), f"{name} {split}", field)
