"""Prepared corpora: rows by index are the rows that online text gives, whoever reads them and from wherever."""

import dataclasses
import hashlib
import json
import pickle
from collections import Counter

import numpy as np
import pytest

from cola_jax.config import DataConfig
from cola_jax.data import corpora, manifest, pipeline, prepared, rows, shards, tokenizers
from cola_jax.types import UserError
from tests.data.prepared_corpora import TOKENIZER, texts, write

BATCH, LENGTH = 4, 64


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    """60 documents as a text file, a fifth of them held out."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n\n".join(texts(60)), encoding="utf-8")
    return DataConfig(
        corpus="text", files=str(path), tokenizer="bytes", sequence_length=LENGTH, batch_size=BATCH, holdout=0.2
    )


@pytest.fixture(scope="module")
def config(online, tmp_path_factory):
    """The same documents, prepared."""
    train, holdout = (list(corpora.documents(online, split, 0)) for split in ("train", "holdout"))
    directory = write(tmp_path_factory.mktemp("prepared"), train, holdout)
    assert len(list(directory.glob("train-*.bin"))) > 3
    return dataclasses.replace(online, corpus="prepared", files=str(directory))


def take(config, count, seed=0, split="train", wanted=None, state=None):
    iterator = iter(pipeline.create(config, TOKENIZER, split, seed, wanted))
    if state is not None:
        iterator.set_state(state)
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


def digest(batches) -> str:
    return hashlib.sha256(
        b"".join(b[name].tobytes() for b in batches for name in ("tokens", "segment_ids"))
    ).hexdigest()


@pytest.mark.parametrize("mode", ["concat", "pad"])
@pytest.mark.parametrize("offset", [0, 3])
def test_prepared_rows_are_those_of_online_text(online, config, mode, offset):
    change = {"packing": mode, "random_offset": offset}
    online, config = (dataclasses.replace(each, **change) for each in (online, config))
    for split, count in (("train", 40), ("holdout", 2)):  # 40 batches are more than three epochs
        assert digest(take(online, count, 3, split)) == digest(take(config, count, 3, split))
    assert digest(take(config, 5, 3)) != digest(take(config, 5, 4))


def test_an_epoch_shorter_than_a_row(online, tmp_path):
    write(tmp_path / "prepared", ["ab", "cde", "f"], ["g"])
    config = dataclasses.replace(online, corpus="prepared", files=str(tmp_path / "prepared"))
    row = take(config, 1)[0]
    assert np.bincount(row["segment_ids"][0])[1:].sum() == LENGTH  # 9 tokens an epoch, seven epochs and a bit
    first = "".join(map(chr, row["tokens"][0][:9])).split("Ā")  # id 256 ends a document
    assert sorted(first[:-1]) == ["ab", "cde", "f"]


def documents_of(batches) -> Counter:
    """Whole documents in rows, as text, from their segments."""
    found = Counter()
    for batch in batches:
        for ids, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                piece = ids[segments == segment]
                if piece[-1] == TOKENIZER.eos_id:
                    found[bytes(piece[:-1].astype(np.uint8)).decode()] += 1
    return found


def stream_of(config, split="train") -> prepared.Stream:
    return prepared.open_stream(config.files, prepared.open_manifest(config.files, config), split)


def test_shuffled_rows_hold_each_token_once_an_epoch(config):
    stream = stream_of(config)
    by_rows = rows.InOrder(stream, LENGTH, TOKENIZER.pad_id, seed=7)
    for epoch in range(3):
        found = [by_rows[epoch * by_rows.size + i] for i in range(by_rows.size)]
        texts_of = sorted(row["tokens"][row["segment_ids"] > 0].tobytes() for row in found)
        expected = np.array_split(stream.ids(0, stream.tokens), range(LENGTH, stream.tokens, LENGTH))
        assert texts_of == sorted(part.astype(np.int32).tobytes() for part in expected)
    orders = [[by_rows[e * by_rows.size + i]["tokens"].tobytes() for i in range(by_rows.size)] for e in (0, 1)]
    assert orders[0] != orders[1]


def test_segments_are_the_documents(config):
    stream = stream_of(config)
    starts = stream.starts()
    assert [len(stream[i]) for i in range(len(stream))] == np.diff(starts).tolist()
    assert np.concatenate([stream[i] for i in range(len(stream))]).tolist() == stream.ids(0, stream.tokens).tolist()
    rng = np.random.default_rng(0)
    for _ in range(200):
        start, stop = sorted(rng.integers(0, stream.tokens + 1, 2).tolist())
        edges = [start, *starts[(starts > start) & (starts < stop)].tolist(), stop]
        assert stream.pieces(start, stop) == [n for n in np.diff(edges).tolist() if n]


def test_best_fit_keeps_documents_whole(config):
    packed = dataclasses.replace(config, packing="best_fit", sequence_length=100, batch_size=1)
    stream = stream_of(config)
    size = rows.BestFit(stream, 100, TOKENIZER.pad_id, 0).size
    for epoch in (0, 1):
        batches = take(packed, size, state={"step": epoch * size})
        assert documents_of(batches) == Counter(corpora.documents(config, "train", 0))
    fill = stream.tokens / (100 * size)
    assert fill > 0.9, fill
    long = dataclasses.replace(packed, sequence_length=20)
    size = rows.BestFit(stream, 20, TOKENIZER.pad_id, 0).size
    ids = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in take(long, size)])
    assert sorted(ids.tolist()) == sorted(stream.ids(0, stream.tokens).tolist())


def test_best_fit_takes_the_fullest_bin_with_room():
    # 6 and 5 open bins with room for 4 and 5; 4 fits the first exactly, then 5 the second, 3 opens another.
    assert rows.best_fit(np.array([6, 5, 4, 5, 3]), 10).tolist() == [0, 1, 0, 1, 2]
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 65, 500)
    bins = rows.best_fit(sizes, 64)
    filled = np.bincount(bins, weights=sizes)
    assert filled.max() <= 64 and len(filled) <= 1.23 * sizes.sum() / 64 + 1  # the bound of best-fit-decreasing


@pytest.mark.parametrize("mode", ["concat", "pad", "best_fit", "rows"])
def test_batches_do_not_depend_on_who_reads_them(config, mode):
    """Processes that want other rows, workers, and starts in the middle give the batches of one that reads them all."""
    change = {"packing": "concat", "shuffle": "rows"} if mode == "rows" else {"packing": mode}
    config = dataclasses.replace(config, random_offset=2, **change)
    whole = take(config, 50)
    for parts in (2, 4):
        shares = [take(config, 50, wanted=np.arange(k, BATCH, parts)) for k in range(parts)]
        for step, batch in enumerate(whole):
            for k, share in enumerate(shares):
                assert all((share[step][name] == batch[name][k::parts]).all() for name in batch)
    iterator = iter(pipeline.create(config, TOKENIZER, "train", 0))
    for step in range(49, -1, -1):
        iterator.set_state({"step": step})
        assert digest([next(iterator)]) == digest([whole[step]])
    iterator.close()


@pytest.mark.parametrize("workers", [3])
def test_workers_change_nothing(config, workers):
    whole = take(config, 20)
    some = dataclasses.replace(config, num_workers=workers)
    assert digest(take(some, 13, state={"step": 7})) == digest(whole[7:])


def test_the_state_is_the_number_of_batches(config):
    iterator = iter(pipeline.create(config, TOKENIZER, "train", 0))
    for step in range(4):
        assert iterator.get_state() == {"step": step}
        next(iterator)
    iterator.close()


@pytest.mark.parametrize("packing", ["concat", "pad", "best_fit"])
def test_holdout_is_one_pass_in_order(config, packing):
    config = dataclasses.replace(config, packing=packing, sequence_length=96)
    batches = list(pipeline.create(config, TOKENIZER, "holdout", 0))
    ids = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in batches])
    stream = stream_of(config, "holdout")
    if packing == "best_fit":
        assert documents_of(batches) == Counter(corpora.documents(config, "holdout", 0))
    else:
        assert ids.tolist() == stream.ids(0, stream.tokens).tolist()
    assert not set(corpora.documents(config, "holdout", 0)) & set(corpora.documents(config, "train", 0))
    assert all(batch["tokens"].shape == (BATCH, 96) for batch in batches)


def mixed(config, tmp_path, spec: str):
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        if not (tmp_path / name).exists():
            write(tmp_path / name, texts(40, seed, longest=50), texts(3, seed + 10))
    return dataclasses.replace(config, packing="pad", files=spec.replace("@", f"{tmp_path}/"))


def sources(batches) -> list[str]:
    """The corpus of each row: texts begin with its seed."""
    return [chr(row[0]) for batch in batches for row in batch["tokens"]]


def test_shares_of_a_mixture_are_exact_to_a_row(config, tmp_path):
    shares = {"1": 0.6, "2": 0.3, "3": 0.1}
    found = sources(take(mixed(config, tmp_path, "@a=6,@b=3,@c=1"), 60))
    for rows_so_far in range(1, len(found) + 1):
        counts = Counter(found[:rows_so_far])
        assert all(abs(counts[k] - share * rows_so_far) < 1 for k, share in shares.items())


def test_a_changed_mixture_goes_on_where_each_corpus_stood(config, tmp_path):
    before = take(mixed(config, tmp_path, "@a=0.7,@b=0.3"), 30)
    both = take(mixed(config, tmp_path, "@a=0.7,@b=0.3; 10: @b=0.5,@c=0.5; 20: @a=1"), 30)
    assert digest(before[:10]) == digest(both[:10])
    after = Counter(sources(both[10:20]))
    assert set(after) == {"2", "3"} and after["2"] == after["3"]
    alone = {k: take(mixed(config, tmp_path, f"@{k}"), 30) for k in "abc"}
    for name, key in (("a", "1"), ("b", "2"), ("c", "3")):
        mine = [row.tobytes() for b in both for row in b["tokens"] if chr(row[0]) == key]
        expected = [row.tobytes() for b in alone[name] for row in b["tokens"]][: len(mine)]
        assert len(mine) > 8 and mine == expected  # every row of a corpus in its order, none twice, none left out


def test_a_mixture_may_change_from_the_checkpoint_on(config, tmp_path):
    def of(spec, step=10):
        other = pipeline.fingerprint(mixed(config, tmp_path, spec), TOKENIZER, 0)
        return [str(c) for c in pipeline.changes(json.loads(json.dumps(base)), other, step)]

    base = pipeline.fingerprint(mixed(config, tmp_path, "@a=0.7,@b=0.3"), TOKENIZER, 0)
    assert of("@a=0.7,@b=0.3; 10: @c") == []
    assert of("@a=0.7,@b=0.3; 9: @c") != []
    assert of("@a=0.6,@b=0.4; 10: @c") != []
    assert of("@a=0.7,@b=0.3; 10: @c", step=11) != []


@pytest.mark.parametrize(
    "spec, message",
    [
        ("@a=0,@b=1", "'.*a=0': must be DIR=SHARE with a share above 0"),
        ("@a=0.5,@b", "'.*b': must be DIR=SHARE"),
        ("@a=nan,@b=1", "must be DIR=SHARE"),
        ("@a=1,@a=1", "each directory once"),
        ("@a; 5: @b; 5: @a", "must be of the form .* with growing steps"),
        ("5: @a", "must be of the form"),
        ("@a; ", "must be of the form"),
        ("ftp://a/b=1,@a=1", "config.data.files = ftp://a/b: must be a path of this machine, or begin with one of"),
        ("@none", "none.manifest.json: No such file.*launch/prepare.py"),
    ],
)
def test_bad_mixtures(config, tmp_path, spec, message):
    with pytest.raises(UserError, match=message):
        pipeline.create(mixed(config, tmp_path, spec), TOKENIZER, "train", 0)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"sequence_length": 32}, "sequence_length: 64 -> 32"),
        ({"batch_size": 8}, "batch_size: 4 -> 8"),
        ({"packing": "pad"}, "packing: 'concat' -> 'pad'"),
        ({"shuffle": "rows"}, "shuffle: absent -> 'rows'"),
    ],
)
def test_fingerprints_name_what_changed(config, change, named):
    before = pipeline.fingerprint(config, TOKENIZER, 0)
    after = pipeline.fingerprint(dataclasses.replace(config, **change), TOKENIZER, 0)
    assert [str(c) for c in pipeline.changes(before, after, 5)] == [named]
    workers = pipeline.fingerprint(dataclasses.replace(config, num_workers=3), TOKENIZER, 0)
    assert pipeline.changes(before, workers, 5) == []


@pytest.fixture
def damaged(config, tmp_path):
    directory = write(tmp_path / "prepared", texts(30), texts(3, 5))
    return directory, dataclasses.replace(config, files=str(directory))


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: flip(d / "train-00001.bin"), r"train-00001\.bin: sha256 .*has changed since it was prepared"),
        (lambda d: (d / "train-00001.bin").unlink(), r"train-00001\.bin: No such file.*must be a shard"),
        (lambda d: (d / "train-00000.idx").unlink(), r"train-00000\.idx: No such file"),
        (lambda d: (d / "train-00000.idx").write_bytes(b"no index"), r"must be the index of a Megatron data set"),
        (lambda d: (d / "train-00000.bin").write_bytes(b"123"), r"train-00000\.bin: has 3 bytes; must be a multiple"),
        (lambda d: (d / "train-00000.bin").write_bytes(b"1234"), r"has 2 tokens; must have"),
        (lambda d: (d / "manifest.json").write_text("{"), r"manifest\.json: must be a JSON file"),
        (lambda d: (d / "manifest.json").write_text('{"version": 9}'), r"version = 9: must be 1"),
        (lambda d: (d / "manifest.json").write_text('{"version": 1}'), r"as launch/prepare\.py wrote it"),
    ],
)
def test_damaged_corpora_are_named(damaged, damage, message):
    directory, config = damaged
    damage(directory)
    with pytest.raises(UserError, match=message):
        pipeline.create(config, TOKENIZER, "train", 0)


def test_an_edited_manifest_is_noticed(damaged):
    directory, config = damaged
    path = directory / "manifest.json"
    body = json.loads(path.read_text())
    body["splits"]["train"].pop()
    path.write_text(json.dumps(body))
    with pytest.raises(UserError, match="does not match its own fingerprint"):
        pipeline.create(config, TOKENIZER, "train", 0)


def test_a_corpus_without_held_out_documents_is_refused_before_training(config, tmp_path):
    write(tmp_path / "none", texts(20))
    with pytest.raises(UserError, match="has no held-out documents; must be prepared with a --holdout"):
        pipeline.create(dataclasses.replace(config, files=str(tmp_path / "none")), TOKENIZER, "train", 0)
    both = dataclasses.replace(config, files=f"{config.files}=1,{tmp_path / 'none'}=1")
    held_out = list(pipeline.create(both, TOKENIZER, "holdout", 0))
    assert digest(held_out) == digest(list(pipeline.create(config, TOKENIZER, "holdout", 0)))


def test_another_tokenizer_and_alignment_are_refused(damaged):
    _, config = damaged
    with pytest.raises(UserError, match=r"config\.data\.tokenizer = 'sentencepiece': must be 'bytes'"):
        pipeline.create(dataclasses.replace(config, tokenizer="sentencepiece"), TOKENIZER, "train", 0)
    with pytest.raises(UserError, match=r"config\.data\.align = 8: must be a divisor of 1"):
        pipeline.create(dataclasses.replace(config, align=8), TOKENIZER, "train", 0)

    other = tokenizers.SentencePieceTokenizer.train(["some text, some more text."], 300)
    with pytest.raises(UserError, match="the run's tokenizer is sentencepiece .*: must be bytes"):
        pipeline.create(config, other, "train", 0)


def test_shards_can_be_pickled_and_read_megatron_documents_of_several_sequences(tmp_path):
    writer = shards.Writer(tmp_path / "a", "<i4")
    for ids in ([1, 2, 3], [4], [5, 6], [70_000]):
        writer.add(np.array(ids))
    writer.close()
    data = bytearray((tmp_path / "a.idx").read_bytes())
    head = 9 + 25
    data[17 + 1 + 8 : head] = np.array([3], "<u8").tobytes()  # two documents: of three sequences, and of one
    data[head + 12 * 4 :] = np.array([0, 3, 4], "<i8").tobytes()
    (tmp_path / "a.idx").write_bytes(data)
    shard = pickle.loads(pickle.dumps(shards.Shard(tmp_path / "a")))
    assert [shard.document(i).tolist() for i in range(len(shard))] == [[1, 2, 3, 4, 5, 6], [70_000]]
    stream = prepared.Stream([shard])
    assert stream.starts().tolist() == [0, 6, 7] and stream.pieces(2, 7) == [4, 1]


def test_shards_of_wrong_documents(tmp_path):
    writer = shards.Writer(tmp_path / "a", "<u2")
    with pytest.raises(ValueError, match="a document of 0 tokens"):
        writer.add(np.zeros(0, np.int32))
    writer.discard()
    assert not list(tmp_path.iterdir())
    assert [shards.smallest_type(n) for n in (258, 65_500, 65_501)] == ["<u2", "<u2", "<i4"]


def test_a_manifest_survives_writing(damaged):
    directory, _ = damaged
    found = manifest.read(directory)
    found.write(directory)
    assert manifest.read(directory) == found and len(found.fingerprint) == 64
