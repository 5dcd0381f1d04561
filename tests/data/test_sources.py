"""Streaming readers: every format gives the same texts, and what is wrong is named by file and line."""

import gzip
import io
import json
import random
import re
import sys
import tracemalloc

import corpus_files
import numpy as np
import pytest
from test_tokenizers import HOSTILE

from cola_jax.config import DataConfig
from cola_jax.data import text_files, tokenizers
from cola_jax.data.preparation import records, sources
from cola_jax.types import UserError

TEXTS = [text for text in HOSTILE if text.strip()] + [f"text {i} \u00e9" for i in range(20)]


def contents(source) -> list:
    found = [content for _, content in source]
    if source.has_ids:
        return [tokenizers.ByteTokenizer().decode(ids) for ids in found]
    return found


@pytest.mark.parametrize("form", corpus_files.FORMATS)
def test_every_format_gives_the_texts_in_order(form, tmp_path):
    source = sources.create(**corpus_files.write(tmp_path, form, TEXTS))
    assert contents(source) == TEXTS
    assert contents(source) == TEXTS  # and again
    assert source.position == source.size > 0
    json.dumps(source.description)


def test_descriptions_do_not_depend_on_the_place_and_tell_inputs_apart(tmp_path):
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    first, same = (sources.create(**corpus_files.write(folder, "jsonl", TEXTS)) for folder in (a, b))
    other = sources.create(**corpus_files.write(c, "jsonl", [*TEXTS, "more"]))
    assert first.description == same.description != other.description


def test_files_are_read_in_the_order_of_their_names_and_places_are_named(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.jsonl"):
        (tmp_path / name).write_bytes(b"\n" + corpus_files.lines([name, name + "2"]))
    found = [(str(place), content) for place, content in sources.create("jsonl", str(tmp_path / "*.jsonl"))]
    assert [content for _, content in found] == [n + e for n in ("a.jsonl", "b.jsonl", "c.jsonl") for e in ("", "2")]
    assert found[3][0] == f"{tmp_path / 'b.jsonl'} line 3"


def test_a_name_that_exists_is_meant_literally(tmp_path):
    (tmp_path / "[a].jsonl").write_bytes(corpus_files.lines(["here"]))
    assert contents(sources.create("jsonl", str(tmp_path / "[a].jsonl"))) == ["here"]


@pytest.mark.parametrize("separator", ["\n\n", "\n", "\n---\n", "aa", "aXa", "", "\u00e9", ".*", "\r\n"])
def test_text_is_divided_as_corpora_divides_it(separator, tmp_path):
    rng = random.Random(0)
    for trial in range(15):
        text = "".join(rng.choices(["\n", "\r", "\r\n", "a", "X", "\u00e9", separator, separator, " "], k=60)) + "z"
        path = tmp_path / "text.txt"
        path.write_bytes(text.encode())
        config = DataConfig(corpus="text", files=str(path), document_separator=separator)
        files = text_files.scan(config.files, separator)
        expected = [files.read(i) for i in range(len(files.positions))]
        assert contents(sources.create("text", str(path), document_separator=separator)) == expected
        parts = re.split("\r?\n".join(map(re.escape, separator.split("\n"))), text) if separator else [text]
        for piece in (1, 2, 3, 5, 64):
            found = list(sources.divided(io.BytesIO(text.encode()), separator, piece))
            assert [data.decode() for _, data in found] == parts, (trial, piece)
            assert all(text.encode()[at:].startswith(data) for at, data in found)


def test_compressed_text(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n\ntwo"))
    assert contents(sources.create("text", str(tmp_path / "*"))) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "cut', ["not JSON"]),
        (b"[1]", ["list", "must be a JSON object"]),
        (b'"text"', ["str", "must be a JSON object"]),
        (b'{"txt": "a", "id": 3}', ["no field 'text'", "'txt', 'id'"]),
        (b"{}", ["no field 'text'", "none"]),
        (b'{"text": null}', ["'text' is null", "must be a string"]),
        (b'{"text": 3}', ["'text' is int", "must be a string"]),
        (b'{"text": "a\xff"}', ["byte 11 is not UTF-8"]),
        (b'{"text": "a\\ud800b"}', ["surrogate", "character 1"]),
        (b'{"text": "a"} {"text": "b"}', ["not JSON"]),
        (b'{"a": ' + b"9" * 5000 + b"}", ["not JSON"]),
        (b"[" * 100_000, ["not JSON"]),
        (b"\0" * 10, ["not JSON"]),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_a_bad_line_is_no_document_and_the_others_are(line, words, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + line + b'\n{"text": "last"}')
    first, (place, bad), last = sources.create("jsonl", str(path))
    assert (first[1], last[1]) == ("first", "last") and str(place) == f"{path} line 2"
    assert isinstance(bad, records.Bad) and all(word in bad.reason for word in words), bad


def test_byte_order_mark_and_line_ends_of_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "\xef\xbb\xbfb"}\r\n')
    assert contents(sources.create("jsonl", str(path))) == ["a", "\ufeffb"]


def test_text_that_is_not_utf8_costs_its_document_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\nb\xffd\n\ngood too")
    (_, first), (place, bad), (_, last) = sources.create("text", str(path))
    assert (first, last) == ("good", "good too") and str(place) == f"{path} document at byte 6"
    assert isinstance(bad, records.Bad) and "byte 1 of it is not UTF-8" in bad.reason


def test_parquet_nulls_and_bytes_that_are_not_utf8(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": pyarrow.array([b"good", None, b"b\xff", b"last"], pyarrow.binary())})
    pyarrow.parquet.write_table(table, path)
    found = list(sources.create("parquet", str(path)))
    assert found[0][1] == "good" and found[3][1] == "last"
    assert "null" in found[1][1].reason and "not UTF-8" in found[2][1].reason and str(found[2][0]) == f"{path} row 3"


def _cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def _flip(data: bytes) -> bytes:
    middle = len(data) // 3
    return data[:middle] + bytes(255 - byte for byte in data[middle : middle + 40]) + data[middle + 40 :]


@pytest.mark.parametrize("damage", [_cut, _flip])
@pytest.mark.parametrize("form", ["jsonl.gz", "jsonl.zst", "parquet", "arrayrecord", "megatron"])
def test_damaged_files_are_named(form, damage, tmp_path):
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(32, 0x2000, 500))) for _ in range(200)]
    arguments = corpus_files.write(tmp_path, form, texts)
    last = max(tmp_path.glob("b*"))
    last.write_bytes(damage(last.read_bytes()))
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}/b.* must be") as found:
        list(sources.create(**arguments))
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b", b"not compressed at all", b"\x28\xb5\x2f\xfd"], ids=ascii)
@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_files_that_are_not_what_their_name_says(data, suffix, tmp_path):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(data)
    if not data:
        assert not contents(sources.create("jsonl", str(path)))
        return
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: cannot be read at its start .*; must be a whole"):
        contents(sources.create("jsonl", str(path)))


def test_compression_is_seen_without_a_suffix(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(corpus_files.lines(["inside"])))
    assert contents(sources.create("jsonl", str(tmp_path / "a.jsonl"))) == ["inside"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"format": "csv", "input": "a"}, ["--format = 'csv'", "jsonl, parquet"]),
        ({"format": "jsonl", "input": "none*"}, ["--input = 'none*'", "no such file"]),
        ({"format": "parquet", "input": "a.parquet", "text_field": "body"}, ["a.parquet", "'body'", "'text', 'n'"]),
        ({"format": "parquet", "input": "a.parquet", "text_field": "n"}, ["a.parquet", "'n' has type int64"]),
        ({"format": "parquet", "input": "a.txt"}, ["a.txt", "must be a Parquet file"]),
        ({"format": "megatron", "input": "a.txt"}, ["a.txt", "must be the .idx"]),
        ({"format": "megatron", "input": "a.idx"}, ["a.idx", "MMIDIDX"]),
    ],
)
def test_wrong_arguments_are_named(arguments, words, tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.chdir(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "n": [1]}), "a.parquet")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.idx").write_text("a")
    with pytest.raises(UserError) as found:
        sources.create(**arguments)
    assert all(word in str(found.value) for word in words) and len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("form", "module"),
    [
        ("jsonl.zst", "zstandard"),
        ("parquet", "pyarrow"),
        ("arrayrecord", "array_record.python.array_record_module"),
        ("tfds", "tensorflow_datasets"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(form, module, tmp_path, monkeypatch):
    arguments = corpus_files.write(tmp_path, form, TEXTS)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{module.partition('.')[0]}; pip install 'cola_jax\[data\]'"):
        sources.create(**arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "tset"}, ["'tset'", "train"]),
        ({"input": "none_such"}, ["none_such", "not found"]),
        ({"text_field": "txt"}, ["no feature 'txt'", "'n', 'text'"]),
    ],
)
def test_wrong_names_of_a_data_set(changes, words, tmp_path):
    arguments = corpus_files.write(tmp_path, "tfds", TEXTS)
    with pytest.raises(UserError) as found:
        sources.create(**arguments | changes)
    assert all(word in str(found.value) for word in words) and len(str(found.value).splitlines()) == 1
    assert contents(sources.create(**arguments, split="train[:3]")) == TEXTS[:3]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrayrecord", "text"])
def test_memory_does_not_grow_with_the_files(form, tmp_path):
    texts = [random.randbytes(5000).hex() for _ in range(1000)]  # 10 MB
    source = sources.create(**corpus_files.write(tmp_path, form, texts))
    next(iter(source))  # imports
    tracemalloc.start()
    try:
        count = sum(len(content) for _, content in source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == sum(map(len, texts)) and peak < 6e6, peak


def test_what_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST", 1000)
    path = tmp_path / "a"
    path.write_bytes(corpus_files.lines(["a", "b" * 2000]))
    with pytest.raises(UserError, match="a line 2: more than 1000 bytes; must be JSON lines"):
        list(sources.create("jsonl", str(path)))
    path.write_text("a\n\n" + "b" * 2_000_000)
    with pytest.raises(UserError, match="a document at byte 3: more than 1000 bytes; --document_separator"):
        list(sources.create("text", str(path)))
