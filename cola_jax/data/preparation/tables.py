"""Documents of Parquet and ArrayRecord files and of TensorFlow Datasets. Their packages are imported where needed."""

from collections.abc import Iterator

from cola_jax.data import tfds_records
from cola_jax.data.preparation import records
from cola_jax.types import UserError

_PIECE = 2**20  # bytes of a buffer for reading
_BATCH_BYTES = 2**22  # about what a batch of records holds
_MOST_RECORDS = 1024  # of a batch


class Parquet(records.Files):
    """Rows of Parquet files, a column of text; read by row groups."""

    unit = "row"

    def __init__(self, pattern: str, field: str):
        super().__init__(pattern)
        self._field = field
        self._arrow = records.require("pyarrow", "data", "--format=parquet")
        self._parquet = records.require("pyarrow.parquet", "data", "--format=parquet")
        self.damage = (*records.Files.damage, self._arrow.ArrowException, ValueError)
        for path in self.paths:
            try:
                self._open(path).close()
            except self.damage as error:
                if isinstance(error, UserError):
                    raise
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{path}: cannot be read ({reason}); must be a Parquet file") from None

    def _open(self, path: str):
        file = self._parquet.ParquetFile(path, buffer_size=_PIECE, pre_buffer=False, page_checksum_verification=True)
        schema = file.schema_arrow
        if self._field not in schema.names:
            file.close()
            raise UserError(f"{path}: no column {self._field!r}; it has {', '.join(map(repr, schema.names))}")
        kind, types = schema.field(self._field).type, self._arrow.types
        if not any(
            is_type(kind)
            for is_type in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
        ):
            file.close()
            raise UserError(f"{path}: column {self._field!r} has type {kind}; must be text")
        return file

    def read(self, path: str, size: int) -> records.Numbered:
        with self._open(path) as file:
            number, rows = 0, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=256, columns=[self._field], use_threads=False):
                # As bytes: Arrow does not check that text is UTF-8.
                for value in batch.column(0).cast(self._arrow.large_binary()).to_pylist():
                    number += 1
                    yield number, records.checked(None, self._field) if value is None else records.decoded(value)
                self._within = size * number // rows


def _batches(read, count: int) -> Iterator[list]:
    """The records 0 to ``count - 1`` of ``read(start, stop)``, in batches of about `_BATCH_BYTES`."""
    start, many = 0, 1
    while start < count:
        batch = read(start, min(start + many, count))
        yield batch
        start += len(batch)
        small = sum(map(len, batch)) < _BATCH_BYTES
        many = min(2 * many, _MOST_RECORDS) if small else max(1, many // 2)


class ArrayRecord(records.Files):
    """Records of ArrayRecord files: UTF-8 text, or JSON objects with a field of text."""

    damage = (*records.Files.damage, RuntimeError, ValueError, IndexError)

    def __init__(self, pattern: str, field: str | None):
        super().__init__(pattern)
        self._field = field
        self._module = records.require("array_record.python.array_record_module", "data", "--format=arrayrecord")

    def read(self, path: str, size: int) -> records.Numbered:
        reader = self._module.ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
        try:
            if not reader.ok():
                raise ValueError("no ArrayRecord file, or cut")
            number, count = 0, reader.num_records()
            for batch in _batches(reader.read, count):
                for data in batch:
                    number += 1
                    yield number, records.json_text(data, self._field) if self._field else records.decoded(data)
                self._within = size * number // count
        finally:
            if reader.is_open():
                reader.close()


class Tfds(records.Source):
    """Examples of a TensorFlow Datasets data set whose files are ArrayRecord; a feature is text."""

    unit = "example"

    def __init__(self, name: str, field: str, split: str, data_dir: str | None):
        asked = f"--input = {name}, --split = {split}"
        self._examples, self._name = tfds_records.open_source(name, (field,), split, data_dir, asked)
        self._field = field
        self.size, self.position = len(self._examples), 0
        self.description = {"data set": self._name, "split": split, "examples": self.size}

    def __iter__(self) -> Iterator[tuple[records.Place, records.Content]]:
        self.position = 0
        for start in range(0, self.size, 64):
            numbers = range(start, min(start + 64, self.size))
            try:
                examples = self._examples.__getitems__(list(numbers))
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{self._name}: cannot be read behind example {start} ({reason})") from error
            for number, example in zip(numbers, examples, strict=True):
                value = example[self._field]
                yield (
                    records.Place(self._name, self.unit, number + 1),
                    records.decoded(value) if isinstance(value, bytes) else records.checked(value, self._field),
                )
            self.position = numbers.stop
