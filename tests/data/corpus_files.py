"""Writes the same texts as files of every format that `sources` reads."""

import gzip
import importlib
import json
import sys
from pathlib import Path

import numpy as np

from cola_jax.data import shards, tokenizers

FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrayrecord", "arrayrecord json", "text", "megatron", "tfds")
SEPARATOR = "<%>"


def lines(texts: list[str], field: str = "text") -> bytes:
    """JSON lines, with characters as they are and escaped in turn."""
    return b"".join(
        json.dumps({"id": i, field: text, "url": "x"}, ensure_ascii=i % 2 == 0).encode() + b"\n"
        for i, text in enumerate(texts)
    )


def write(folder: Path, form: str, texts: list[str]) -> dict:
    """Writes two files of about half of the texts each; returns the arguments of `sources.create`."""
    folder.mkdir(parents=True, exist_ok=True)
    if form == "tfds":
        return _tfds(folder, texts)
    kind, _, detail = form.replace(".", " ").partition(" ")
    half = len(texts) // 2
    for name, part in (("a", texts[:half]), ("b", texts[half:])):
        _WRITERS[kind](folder / name, part, detail)
    suffix = ".idx" if kind == "megatron" else "*"
    arguments = {"format": kind, "input": str(folder / f"[ab]{suffix}")}
    if form == "arrayrecord json":
        arguments["text_field"] = "text"
    if form == "text":
        arguments["document_separator"] = SEPARATOR
    return arguments


def _jsonl(path: Path, texts: list[str], detail: str) -> None:
    data = lines(texts)
    if detail == "gz":
        data = gzip.compress(data)
    if detail == "zst":
        compress = importlib.import_module("zstandard").compress
        data = compress(data[:1000]) + compress(data[1000:])  # two frames
    path.with_suffix(f".jsonl.{detail}".rstrip(".")).write_bytes(data)


def _text(path: Path, texts: list[str], detail: str) -> None:
    path.with_suffix(".txt").write_bytes(SEPARATOR.join(texts).encode())


def _parquet(path: Path, texts: list[str], detail: str) -> None:
    import pyarrow
    import pyarrow.parquet

    kind = pyarrow.large_binary() if path.name == "b" else pyarrow.string()
    column = pyarrow.array([text.encode() for text in texts], pyarrow.binary()).cast(kind)
    table = pyarrow.table({"id": list(range(len(texts))), "text": column})
    pyarrow.parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=5, write_page_checksum=True)


def _arrayrecord(path: Path, texts: list[str], detail: str) -> None:
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path.with_suffix(".array_record")), "group_size:1")
    for record in lines(texts).splitlines() if detail else [text.encode() for text in texts]:
        writer.write(record)
    writer.close()


def _megatron(path: Path, texts: list[str], detail: str) -> None:
    writer = shards.Writer(path, "<u2")
    for text in texts:
        writer.add(np.array([*tokenizers.ByteTokenizer().encode(text), 256], dtype=np.int32))
    writer.close()


def _tfds(folder: Path, texts: list[str]) -> dict:
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": np.int64})
    builder = tfds_builder(folder, features, "train", [{"text": text, "n": i} for i, text in enumerate(texts)])
    builder.download_and_prepare()
    return {"format": "tfds", "input": "mine", "data_dir": str(folder)}


def tfds_builder(folder: Path, data_features, split: str, records: list[dict]):
    """The builder of a data set "mine" with these records."""
    import tensorflow_datasets as tfds

    # TFDS needs it to write, and does not ask for it; Python's own does as well.
    importlib.import_module("importlib.resources.abc")
    sys.modules.setdefault("importlib_resources", importlib.import_module("importlib.resources"))
    with tfds.core.registered.skip_registration():

        class Mine(tfds.core.GeneratorBasedBuilder):
            """Some records."""

            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = folder

            def _info(self):
                return self.dataset_info_from_configs(features=data_features, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples()}

            def _generate_examples(self):
                yield from enumerate(records)

    return Mine(data_dir=str(folder), file_format="array_record")


_WRITERS = {
    "jsonl": _jsonl,
    "text": _text,
    "parquet": _parquet,
    "arrayrecord": _arrayrecord,
    "megatron": _megatron,
}
