"""Documents to shards: the texts come back, in the split their content says, whatever was counted, skipped or sized."""

import contextlib
import dataclasses
import json
import os
import random
import signal

import corpus_files
import numpy as np
import pytest
from test_huggingface_tokenizer import byte_level
from test_tokenizers import HOSTILE, WORDS

from cola_jax.data import hashing, manifest, packing, shards, tokenizers
from cola_jax.data.preparation import meter, prepare, sources, tokenizer_choice, workers
from cola_jax.types import UserError


def _words(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for i in range(count)]


TEXTS = [text for text in HOSTILE if text.strip()] + _words(60)
OPTIONS = prepare.Options(holdout=0.2, shard_tokens=3000)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Nothing here stops the machine."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The tokenizers by name, as ``--tokenizer`` takes them."""
    folder = tmp_path_factory.mktemp("models")
    tokenizers.SentencePieceTokenizer.train(_words(300), 500).save(folder / "tokenizer.model")
    (folder / "tokenizer.json").write_bytes(byte_level())
    names = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}
    return {"bytes": "bytes"} | {name: str(folder / file) for name, file in names.items()}


def run(arguments: dict, output, tokenizer: str = "bytes", options: prepare.Options = OPTIONS, say=lambda line: None):
    choice = tokenizer_choice.Choice(tokenizer, 400)
    return prepare.prepare(sources.create(**arguments), choice, options, output, say)


def jsonl(folder, texts: list[str] = TEXTS) -> dict:
    return corpus_files.write(folder, "jsonl", texts)


def documents(directory) -> dict[str, list[np.ndarray]]:
    """The ids of each split, as a reader of the manifest finds them."""
    found = {split: [] for split in ("train", "holdout")}
    for split, infos in manifest.read(directory).splits.items():
        for info in infos:
            shard = shards.Shard(directory / info.name)
            assert (len(shard), len(shard.ids)) == (info.documents, info.tokens)
            assert manifest.file_sha256(shard.file(".bin")) == info.bin_sha256
            found[split] += [shard.document(i) for i in range(len(shard))]
    return found


def content(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def held_out(text: str) -> bool:
    return hashing.position(text if isinstance(text, bytes) else text.encode()) < OPTIONS.holdout


@pytest.mark.parametrize("name", ["bytes", "sentencepiece", "huggingface"])
@pytest.mark.parametrize("form", corpus_files.FORMATS)
def test_every_text_comes_back_from_its_split(form, name, models, tmp_path):
    if form == "megatron" and name != "bytes":
        pytest.skip("its ids are bytes")
    options = dataclasses.replace(OPTIONS, align=4)
    found = run(corpus_files.write(tmp_path / "in", form, TEXTS), tmp_path / "out", models[name], options)
    tokenizer = {
        "bytes": lambda path: tokenizers.ByteTokenizer(),
        "sentencepiece": tokenizers.SentencePieceTokenizer.load,
        "huggingface": tokenizers.HuggingFaceTokenizer.load,
    }[name](tmp_path / "out" / manifest.TOKENIZER_FILES.get(name, ""))
    assert found.tokenizer.fingerprint == tokenizer.fingerprint and found.tokenizer.name == name
    ids = documents(tmp_path / "out")
    expected = {"train": [t for t in TEXTS if not held_out(t)], "holdout": [t for t in TEXTS if held_out(t)]}
    if form == "megatron":  # the split of ids goes by the ids
        ids, expected = ({"train": sorted(map(bytes, d["train"] + d["holdout"]))} for d in (ids, {**ids}))
        texts = sorted(tokenizer.decode(row) for split in documents(tmp_path / "out").values() for row in split)
        assert texts == sorted(TEXTS)
        return
    for split, texts in expected.items():
        assert texts
        for text, row in zip(texts, ids[split], strict=True):
            np.testing.assert_array_equal(row, packing.document_tokens(text, tokenizer, 4))
            assert tokenizer.decode(row) == text


def test_counts_and_what_the_manifest_says(tmp_path):
    texts = ["", " \n", "a", "b", "a", "\u00e9\u00e9"]
    arguments = jsonl(tmp_path / "in", texts)
    (tmp_path / "in" / "c.jsonl").write_bytes(b"{}\n")
    arguments["input"] = str(tmp_path / "in" / "*.jsonl")
    options = prepare.Options(holdout=0.0, deduplicate=True)
    found = run(arguments, tmp_path / "out", options=options)
    counts = {"read": 7, "kept": 3, "empty": 2, "bad": 1, "duplicate": 1, "characters": 4, "tokens": 9}
    assert found.counts == counts and manifest.read(tmp_path / "out") == found
    assert found.source["tokenizer"].startswith("bytes ") and found.source["text_field"] == "text"
    assert run(arguments, tmp_path / "two", options=prepare.Options(holdout=0.0)).counts["kept"] == 4
    assert sorted(content(tmp_path / "out")) == ["manifest.json", "train-00000.bin", "train-00000.idx"]


def test_equal_texts_are_never_in_both_splits(tmp_path):
    run(jsonl(tmp_path / "in", _words(80) * 3), tmp_path / "out")
    splits = [{row.tobytes() for row in rows} for rows in documents(tmp_path / "out").values()]
    assert all(splits) and not splits[0] & splits[1]


def test_shards_end_with_documents_and_long_ones_have_their_own(tmp_path):
    texts = ["a" * 9] * 25 + ["b" * 500] + ["c" * 9] * 3
    found = run(jsonl(tmp_path / "in", texts), tmp_path / "out", options=prepare.Options(holdout=0.0, shard_tokens=100))
    assert [info.tokens for info in found.splits["train"]] == [100, 100, 50, 501, 30]


def test_few_documents_have_no_holdout_and_that_is_said(tmp_path):
    said = []
    found = run(
        jsonl(tmp_path / "in", ["a", "b"]), tmp_path / "out", options=prepare.Options(holdout=1e-9), say=said.append
    )
    assert not found.splits["holdout"] and "no document is held out" in said[-1]


@pytest.mark.parametrize("name", ["bytes", "sentencepiece", "huggingface"])
def test_the_number_of_workers_does_not_matter(name, models, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_CHUNK_CHARACTERS", 200)
    arguments = jsonl(tmp_path / "in")
    found = []
    for count in (0, 1, 3):
        run(arguments, tmp_path / str(count), models[name], dataclasses.replace(OPTIONS, workers=count))
        found.append(content(tmp_path / str(count)))
    assert found[0] == found[1] == found[2] and len(found[0]) > 5


def test_megatron_documents_end_once(tmp_path):
    writer = shards.Writer(tmp_path / "in", "<i4")
    for ids in ([1, 2, 3], [4, 256, 5, 256], [6, 256, 256, 256, 256], [256, 256], [7] * 7):
        writer.add(np.array(ids, dtype=np.int32))
    writer.close()
    found = run(
        {"format": "megatron", "input": str(tmp_path / "in.idx")},
        tmp_path / "out",
        options=prepare.Options(holdout=0.0, align=4),
    )
    expected = [[1, 2, 3, 256], [4, 256, 5, 256], [6, 256, 256, 256], [7] * 7 + [256]]
    assert [row.tolist() for row in documents(tmp_path / "out")["train"]] == expected
    assert found.counts["empty"] == 1
    assert (tmp_path / "out" / "train-00000.bin").stat().st_size == 2 * 20  # uint16: the vocabulary is small


@pytest.mark.parametrize("wrong", [258, -1])
def test_ids_of_another_tokenizer_are_refused(wrong, tmp_path):
    writer = shards.Writer(tmp_path / "in", "<i4")
    writer.add(np.array([1, 2], dtype=np.int32))
    writer.add(np.array([1, wrong], dtype=np.int32))
    writer.close()
    with pytest.raises(UserError, match=f"in.idx document 2: id {wrong}: must be below 258"):
        run({"format": "megatron", "input": str(tmp_path / "in.idx")}, tmp_path / "out")
    with pytest.raises(UserError, match="--tokenizer = train: the input has no text"):
        run({"format": "megatron", "input": str(tmp_path / "in.idx")}, tmp_path / "out", "train")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_trained_on_what_is_not_held_out(tmp_path, monkeypatch):
    shown = []
    train = tokenizers.SentencePieceTokenizer.train

    def spy(texts, vocab_size):
        shown.append(list(texts))
        return train(shown[-1], vocab_size)

    monkeypatch.setattr(tokenizers.SentencePieceTokenizer, "train", spy)
    texts = _words(200)
    found = run(jsonl(tmp_path / "in", texts), tmp_path / "out", "train")
    assert sorted(shown[0]) == sorted(text for text in texts if not held_out(text))
    saved = tokenizers.SentencePieceTokenizer.load(tmp_path / "out" / "tokenizer.model")
    assert found.tokenizer.fingerprint == saved.fingerprint and saved.vocab_size <= 400
    assert found.source["tokenizer"] == "trained, vocab_size 400"
    again = run(jsonl(tmp_path / "in2", texts[::-1]), tmp_path / "again", "train")
    assert again.tokenizer == found.tokenizer  # the order of the input does not count


def test_a_vocabulary_that_cannot_be_trained(tmp_path):
    with pytest.raises(UserError, match="--vocab_size = 299: must be at least 300"):
        tokenizer_choice.Choice("train", 299)


def test_the_sample_of_a_tokenizer_is_bounded_and_spread():
    texts = [f"{i:04d}" * 5 for i in range(1000)]
    found = tokenizer_choice.sample(iter(texts * 2), characters=2000)
    assert len(found) == len(set(found)) == 100
    assert found == tokenizer_choice.sample(reversed(texts), characters=2000)
    assert 30 < sum(text < "0500" * 5 for text in found) < 70
    assert tokenizer_choice.sample(["x" * 900, "y"], 100, longest=50) != tokenizer_choice.sample(["x" * 900], 100)
    assert tokenizer_choice.sample(["x" * 900], 100) == ["x" * 900]  # one is better than none


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (None, ["--tokenizer is missing", "bytes, train"]),
        ("words", ["--tokenizer = 'words'", "bytes, train"]),
        ("none.model", ["none.model", "No such file"]),
        ("none.json", ["none.json", "No such file"]),
        ("bad.model", ["bad.model", "must be a SentencePiece model"]),
        ("bad.json", ["bad.json", "not a tokenizer.json"]),
    ],
)
def test_wrong_tokenizers_are_named(asked, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bad.model", "bad.json"):
        (tmp_path / name).write_text("nothing")
    with pytest.raises(UserError) as found:
        tokenizer_choice.Choice(asked)
    assert all(word in str(found.value) for word in words) and len(str(found.value).splitlines()) == 1


def test_bad_lines_are_counted_the_first_few_shown_and_strict_stops(tmp_path):
    arguments = jsonl(tmp_path / "in", _words(600))
    path = tmp_path / "in" / "b.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    for number in (3, 5, 7, 11, 13, 17, 19):
        rows[number - 1] = b'{"text": "cut\n'
    path.write_bytes(b"".join(rows))
    said = []
    found = run(arguments, tmp_path / "out", say=said.append)
    assert found.counts["bad"] == 7 and found.counts["kept"] == 593
    shown = [line for line in said if line.startswith("skipped")]
    assert len(shown) == 5 and f"{path} line 3: not JSON" in shown[0] and "7 bad" in said[-1]
    with pytest.raises(UserError, match="b.jsonl line 3: not JSON"):
        run(arguments, tmp_path / "strict", options=dataclasses.replace(OPTIONS, strict=True))
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("bad", "total", "stops"), [(501, 1400, True), (500, 1400, False), (3, 5, True), (2, 4, False)]
)
def test_input_of_which_most_is_bad_is_refused(bad, total, stops, tmp_path):
    rows = corpus_files.lines(_words(total)).splitlines(keepends=True)
    rows[:bad] = [b'{"body": "a"}\n'] * bad
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows))
    arguments = {"format": "jsonl", "input": str(tmp_path / "a.jsonl")}
    expectation = pytest.raises(UserError, match=rf"line {bad}: no field 'text'.*'body' \({bad} of the first")
    with expectation if stops else contextlib.nullcontext():
        run(arguments, tmp_path / "out")
    assert (tmp_path / "out").exists() != stops


@pytest.mark.parametrize("texts", [[], ["", " "]])
def test_input_without_documents(texts, tmp_path):
    with pytest.raises(UserError, match="--input: no documents in it"):
        run(jsonl(tmp_path / "in", texts), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_input_of_which_all_is_held_out(tmp_path):
    with pytest.raises(UserError, match="--holdout = 0.999: 1 document.* must leave some for training"):
        run(jsonl(tmp_path / "in", ["a"]), tmp_path / "out", options=prepare.Options(holdout=0.999))
    assert not (tmp_path / "out").exists()


def test_a_lost_worker_ends_with_a_line_and_the_same_command_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_CHUNK_CHARACTERS", 200)
    arguments = jsonl(tmp_path / "in")
    run(arguments, tmp_path / "whole")
    monkeypatch.setattr(prepare, "_Encoder", _Killed)
    with pytest.raises(prepare.Unfinished, match="worker process is gone.*same command goes on"):
        run(arguments, tmp_path / "out", options=dataclasses.replace(OPTIONS, workers=1))
    monkeypatch.undo()
    run(arguments, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


class _Killed(prepare._Encoder):
    """An encoder whose process is killed at its third chunk."""

    calls = 0

    def __call__(self, contents):
        _Killed.calls += 1
        if _Killed.calls == 3:
            signal.raise_signal(signal.SIGKILL)
        return super().__call__(contents)


def test_few_items_are_on_the_way():
    taken = []

    def items():
        for i in range(50):
            taken.append(i)
            yield i, i

    results = workers.ordered(_double, items(), 2)
    for i in range(20):
        assert next(results) == (i, 2 * i)
        assert len(taken) <= i + 6
    results.close()
    assert len(taken) < 30


def _double(value):
    return 2 * value


def test_the_console(tmp_path):
    said, now = [], [0.0]
    shown = meter.Meter(said.append, seconds=5.0, clock=lambda: now[0])
    assert not shown.due
    now[0], shown.tokens = 10.0, 25_000_000
    assert shown.due
    shown.show("tokens", 1234, 10**9, 4 * 10**9)
    assert said == ["tokens: 1,234 documents, 1G of 4G (25.0 %), 2.5M tokens/s, ETA 0:00:30"] and not shown.due


def test_a_long_document(tmp_path, models):
    text = "".join(f"{i} the garden went home\n" for i in range(40_000))  # 1 MB
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": text}))
    run(
        {"format": "jsonl", "input": str(tmp_path / "in.jsonl")}, tmp_path / "out", options=prepare.Options(holdout=0.0)
    )
    (row,) = documents(tmp_path / "out")["train"]
    assert tokenizers.ByteTokenizer().decode(row) == text
