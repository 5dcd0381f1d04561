"""What `launch/inspect_data.py` says of a corpus."""

import dataclasses
import hashlib

import numpy as np
import pytest

from cola_jax.config import DataConfig
from cola_jax.data import inspection, pipeline, prepared
from cola_jax.types import UserError
from tests.data.prepared_corpora import TOKENIZER, texts, write


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = write(tmp_path_factory.mktemp("prepared") / "a", texts(50), texts(5, 1))
    data = {"corpus": "prepared", "files": str(directory), "tokenizer": "bytes"}
    return DataConfig(**data, sequence_length=64, batch_size=4)


def test_the_digest_is_of_the_tokens_of_the_steps_whoever_reads(config):
    iterator = iter(pipeline.create(config, TOKENIZER, "train", 3))
    batches = [next(iterator) for _ in range(7)]
    iterator.close()
    expected = hashlib.sha256()
    for batch in batches[2:]:
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            expected.update(tokens.tobytes() + segments.tobytes())
    for processes in (1, 2, 4):
        assert inspection.digest(config, TOKENIZER, 3, 2, 7, processes) == expected.hexdigest()
    assert inspection.digest(config, TOKENIZER, 4, 2, 7) != expected.hexdigest()


def test_the_digest_of_what_is_not_found_by_index(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(texts(50)), encoding="utf-8")
    data = {"corpus": "text", "files": str(tmp_path / "a.txt"), "tokenizer": "bytes"}
    config = DataConfig(**data, sequence_length=64, batch_size=4)
    found = [inspection.digest(config, TOKENIZER, 0, 2, 5, processes) for processes in (1, 2)]
    assert found[0] == found[1] != inspection.digest(config, TOKENIZER, 0, 3, 6)


def test_a_row_as_text():
    ids = [*b"ab", 256, *b"cde", 256, 256, 257, 257]
    row = {"tokens": np.array(ids), "segment_ids": np.array([1, 1, 1, 2, 2, 2, 2, 2, 0, 0])}
    assert inspection.show_row(row, TOKENIZER, 4) == "[1]ab<end>[2]c|de<end x2>|[padding]"


def test_lengths_and_fertility(tmp_path, config):
    write(tmp_path / "b", ["two words", "and three words"], ["held out"])
    other = dataclasses.replace(config, files=str(tmp_path / "b"))
    stream = prepared.open_stream(other.files, prepared.open_manifest(other.files, other), "train")
    assert "2 documents, 26 tokens; a document has 13.0 on average (shortest 10" in inspection.lengths(stream)
    assert inspection.fertility(stream, TOKENIZER) == "4.80 tokens a word, 1.00 characters a token"


def test_fill_and_cuts(config):
    padded = dataclasses.replace(config, packing="pad", sequence_length=128)
    full = inspection.fill(config, TOKENIZER, 0, 0, 5)
    assert full.startswith("steps 1 to 5: rows are 100.00 % full")
    assert "20 documents or parts of them, 0 cut" in inspection.fill(padded, TOKENIZER, 0, 0, 5)
    short = dataclasses.replace(config, packing="pad", sequence_length=5)  # every document is longer
    assert "20 documents or parts of them, 20 cut" in inspection.fill(short, TOKENIZER, 0, 0, 5)


def test_shares_by_phase(config, tmp_path):
    write(tmp_path / "b", texts(9, 2), texts(2, 3))
    mixed = dataclasses.replace(config, files=f"{config.files}=3,{tmp_path / 'b'}=1; 5: {config.files}")
    first, second = inspection.shares(mixed, 8)
    assert first.startswith("steps 1 to 5: 20 rows:") and " 15 (75.00 %)" in first and " 5 (25.00 %)" in first
    assert second.startswith("steps 6 to 8: 12 rows:") and " 12 (100.00 %)" in second


def test_verification_names_the_shard(tmp_path, config):
    directory = write(tmp_path / "b", texts(30), texts(2, 3))
    other = dataclasses.replace(config, files=str(directory))
    assert any("bytes are as they were prepared" in line for line in inspection.corpora(other, verify=True))
    path = directory / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(UserError, match=r"train-00001\.bin: sha256"):
        list(inspection.corpora(other, verify=True))
