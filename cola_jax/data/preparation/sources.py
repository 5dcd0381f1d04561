"""Corpora by the name of their format (`create`): JSON lines, text and Megatron files here, the others in `tables`."""

import io
import itertools
import os
from collections.abc import Iterable, Iterator

from cola_jax.data import shards, text_files
from cola_jax.data.preparation import compression, records, tables
from cola_jax.types import UserError

FORMATS = ("jsonl", "parquet", "text", "tfds", "arrayrecord", "megatron")
_PIECE = 2**20  # bytes read at a time


class JsonLines(records.Files):
    """A JSON object a line, plain or compressed (.gz, .zst); blank lines are no records."""

    unit = "line"

    def __init__(self, pattern: str, field: str):
        super().__init__(pattern)
        self._field = field
        compression.check(self.paths)

    def read(self, path: str, size: int) -> records.Numbered:
        with compression.opened(path) as (raw, file):
            for number in itertools.count(1):
                line = file.readline(records.LONGEST + 1)
                self._within = raw.tell()
                if not line:
                    return
                if len(line) > records.LONGEST:
                    need = "must be JSON lines, an object a line"
                    raise UserError(f"{path} line {number}: more than {records.LONGEST} bytes; {need}")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of a file
                if not line.isspace():
                    yield number, records.json_text(line, self._field)


def divided(file: io.BufferedIOBase, separator: str, piece: int = _PIECE) -> Iterator[tuple[int, bytes]]:
    """The parts of a file between separators, with the byte where each begins; they are what `re.split` gives.

    Args:
      file: of UTF-8.
      separator: line ends in it also match "\\r\\n"; "": there is one part.
      piece: bytes read at a time.

    Raises:
      UserError: a part is longer than `records.LONGEST`.
    """
    pattern = text_files.divider(separator)
    reach = len(separator.encode("utf-8")) + separator.count("\n")  # bytes of its longest match
    buffer, start, searched, ended = bytearray(), 0, 0, False
    while not ended:
        read = file.read(piece)
        buffer += read
        ended = not read
        # What begins in the last bytes may match longer, or match at all, with the next piece.
        limit = len(buffer) - (0 if ended else reach)
        done = 0  # bytes of the buffer that belong to parts that are complete
        while separator:
            found = pattern.search(buffer, searched)
            span = found.span() if found else None
            del found  # it forbids to change the buffer
            if span is None or (span[0] > limit and not ended):
                searched = max(searched, limit, 0)
                break
            yield start + done, bytes(memoryview(buffer)[done : span[0]])
            done = searched = span[1]
        del buffer[:done]
        start, searched = start + done, searched - done
        if len(buffer) > records.LONGEST:
            raise UserError(
                f"document at byte {start}: more than {records.LONGEST} bytes; --document_separator must divide it"
            )
    yield start, bytes(buffer)


class Text(records.Files):
    """Documents in files of UTF-8 text (also .gz and .zst), as `corpora` divides them: only those with content."""

    unit = "document at byte"

    def __init__(self, pattern: str, separator: str):
        super().__init__(pattern)
        self._separator = separator
        compression.check(self.paths)

    def read(self, path: str, size: int) -> records.Numbered:
        with compression.opened(path) as (raw, file):
            try:
                for start, data in divided(file, self._separator):
                    self._within = raw.tell()
                    if data and not data.isspace():
                        content = records.decoded(data)
                        if isinstance(content, records.Bad) or content.strip():
                            yield start, content
            except UserError as error:
                raise UserError(f"{path} {error}") from None


class Megatron(records.Files):
    """Documents of Megatron's indexed files: ids. ``pattern`` names the .idx files, beside which the .bin lie."""

    unit = "document"
    has_ids = True
    damage = (*records.Files.damage, ValueError)

    def __init__(self, pattern: str):
        super().__init__(pattern)
        for path in self.paths:
            if not path.endswith(".idx"):
                raise UserError(f"--input = {path}: must be the .idx of Megatron's .bin and .idx")
            shards.Shard(path.removesuffix(".idx"))
        self._sizes = [size + os.path.getsize(path[:-4] + ".bin") for path, size in self._with_sizes()]
        self.size = sum(self._sizes)
        self.description = {"files": [f"{os.path.basename(p)}, {s} bytes with .bin" for p, s in self._with_sizes()]}

    def _with_sizes(self) -> Iterable[tuple[str, int]]:
        return zip(self.paths, self._sizes, strict=True)

    def read(self, path: str, size: int) -> records.Numbered:
        shard = shards.Shard(path.removesuffix(".idx"))
        for index in range(len(shard)):
            self._within = size * index // len(shard)
            start, stop = shard.bounds(index)
            if not 0 <= start <= stop <= len(shard.ids) or (start and not index):
                raise ValueError(f"document {index + 1} has tokens {start} to {stop} of {len(shard.ids)}")
            yield index + 1, shard.document(index)


def create(
    format: str,
    input: str,
    text_field: str | None = None,
    document_separator: str = "\n\n",
    split: str = "train",
    data_dir: str | None = None,
) -> records.Source:
    """The source that a command names.

    Args:
      format: one of `FORMATS`.
      input: a file or a glob; for "tfds" the name of a data set.
      text_field: of JSON objects, columns and features; None: "text", and for "arrayrecord" that records are text.
      document_separator: of "text".
      split: of "tfds", as TFDS spells it.
      data_dir: of "tfds".

    Raises:
      UserError: there is no such format, file, column or data set, or a package is missing.
    """
    field = text_field or "text"
    makers = {
        "jsonl": (lambda: JsonLines(input, field), {"text_field": field}),
        "parquet": (lambda: tables.Parquet(input, field), {"text_field": field}),
        "text": (lambda: Text(input, document_separator), {"document_separator": document_separator}),
        "tfds": (lambda: tables.Tfds(input, field, split, data_dir), {"text_field": field}),
        "arrayrecord": (lambda: tables.ArrayRecord(input, text_field), {"text_field": text_field}),
        "megatron": (lambda: Megatron(input), {}),
    }
    if format not in makers:
        raise UserError(f"--format = {format!r}: must be one of {', '.join(FORMATS)}")
    make, options = makers[format]
    source = make()
    source.description = {"format": format, **options, **source.description}
    return source
