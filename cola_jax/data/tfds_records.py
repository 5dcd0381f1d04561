"""A text data set of TensorFlow Datasets as documents by index, without TensorFlow."""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from cola_jax.data.hashing import position
from cola_jax.types import UserError


def text(value) -> str:
    """The text of a feature, which is bytes, or an array of one such.

    Raises:
      UnicodeDecodeError: it is not UTF-8.
    """
    value = value.item() if isinstance(value, np.ndarray) else value
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


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
          UserError: it is not UTF-8.
        """
        try:
            return text(self._source[index][self._field])
        except UnicodeDecodeError as error:
            raise UserError(f"{self._name}: record {index} is not UTF-8 ({error.reason}); must be text") from error


def open_source(
    name: str, fields: Sequence[str], split: str, data_dir: str | None, asked: str, stored: Sequence[str] = ()
):
    """The examples of a data set, by index, and its full name; it is downloaded and prepared if it is not here.

    Args:
      name: NAME, NAME/CONFIG or NAME:VERSION.
      fields: the features that are decoded; the others are left as they are stored.
      split: as TFDS understands it.
      data_dir: None: TFDS's own.
      asked: flags or fields that asked for it, with their values, for errors.
      stored: features that must be there, too, and are left as they are stored.

    Raises:
      UserError: TFDS has no such data set, split or feature, or cannot read it.
    """
    try:
        import tensorflow_datasets as tfds  # takes a second to import

        builder = tfds.builder(name, data_dir=data_dir)
        features = builder.info.features
        named = isinstance(features, dict | tfds.features.FeaturesDict)
        for field in (*fields, *stored):
            if not named or field not in features:
                has = ", ".join(map(repr, sorted(features))) if features else "none that are named"
                raise UserError(f"{asked}: no feature {field!r}; it has {has}")
        if not builder.data_path.exists():
            builder.download_and_prepare(file_format="array_record")
        decoders = {name: tfds.decode.SkipDecoding() for name in features if name not in fields}
        return builder.as_data_source(split=split, decoders=decoders), builder.info.full_name
    except UserError:
        raise
    except ImportError as error:
        package = error.name or "tensorflow"  # TFDS asks for it where features are ragged, and wraps the error
        need = "cola_jax[data]" if package == "tensorflow_datasets" else package
        raise UserError(f"{asked}: needs the package {package}; pip install '{need}'") from error
    except Exception as error:  # TFDS raises what it likes: of names, splits, versions, downloads and formats
        reason = " ".join(str(error).split()).partition(" Available datasets")[0][:300]
        raise UserError(f"{asked}: must be a data set of TFDS ({reason or type(error).__name__})") from error


@functools.lru_cache(maxsize=4)
def scan(name: str, split: str, field: str) -> Records:
    """The texts of a split, each read once.

    Raises:
      UserError: as `open_source` and `Records.read`.
    """
    source, full_name = open_source(name, (field,), split, None, f"config.data.files = {name}, tfds_split = {split}")
    return Records(source, f"{full_name} {split}", field)
