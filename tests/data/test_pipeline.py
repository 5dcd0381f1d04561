"""Batches: shapes, order, division among processes, and iterators that go on exactly where they were saved."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import grain
import numpy as np
import pytest

from cola_jax.config import DataConfig, StoriesConfig
from cola_jax.data import corpora, packing, pipeline, run_tokenizer, tokenizers
from cola_jax.nested import differences
from cola_jax.types import UserError

TOKENIZER = tokenizers.ByteTokenizer()
NAMES = ("tokens", "segment_ids")


def difference(before: dict, after: dict) -> list[str]:
    return [str(each) for each in differences(before, after)]


@pytest.fixture(scope="module")
def text_config(tmp_path_factory):
    """60 documents of 1 to 90 bytes: an epoch is about 11 batches of 4 rows of 64 tokens."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    rng = np.random.default_rng(0)
    path.write_text("\n\n".join(f"{i} " + "x" * rng.integers(1, 88) for i in range(60)), encoding="utf-8")
    return DataConfig(corpus="text", files=str(path), tokenizer="bytes", sequence_length=64, batch_size=4, holdout=0.2)


def _take(iterator, count: int) -> list[dict]:
    return [next(iterator) for _ in range(count)]


def _batches(config: DataConfig, count: int, seed: int = 0, **options) -> list[dict]:
    return _take(iter(pipeline.create(config, TOKENIZER, "train", seed, **options)), count)


def _digest(batches: list[dict]) -> str:
    return hashlib.sha256(b"".join(batch[name].tobytes() for batch in batches for name in NAMES)).hexdigest()


def _documents(batches: list[dict]) -> Counter:
    """The complete documents in the text of the batches' rows laid end to end."""
    ids = np.concatenate([batch["tokens"][batch["segment_ids"] > 0] for batch in batches])
    texts = "".join(chr(i) if i < 256 else "\n" for i in ids).split("\n")
    return Counter(text for text in texts[:-1] if text)


@pytest.mark.parametrize("mode", ["concat", "pad"])
@pytest.mark.parametrize("align", [1, 8])
def test_batches_have_fixed_shapes_and_types(text_config, mode, align):
    config = dataclasses.replace(text_config, packing=mode, align=align)
    for batch in _batches(config, 30):
        assert tuple(batch) == NAMES
        assert all(batch[name].shape == (4, 64) and batch[name].dtype == np.int32 for name in NAMES)
        assert ((batch["tokens"] >= 0) & (batch["tokens"] < TOKENIZER.vocab_size)).all()
        assert ((batch["tokens"] == TOKENIZER.pad_id) == (batch["segment_ids"] == 0)).all()


@pytest.mark.parametrize("mode", ["concat", "pad"])
def test_training_batches_are_the_packed_documents_in_a_shuffled_order(text_config, mode):
    config = dataclasses.replace(text_config, packing=mode, align=8, sequence_length=96)  # no document is cut in "pad"
    train = list(corpora.documents(config, "train", 0))
    seen = _documents(_batches(config, 40))
    # 40 batches are several epochs, so each document has come, about equally often.
    assert set(seen) == set(train)
    assert max(seen.values()) - min(seen.values()) <= 1
    first = _documents(_batches(config, 3))
    assert list(first) != train[: len(first)]


def test_an_epoch_has_each_document_once_and_the_next_another_order(text_config):
    config = dataclasses.replace(text_config, packing="pad", batch_size=1)
    epoch = len(corpora.documents(config, "train", 0))
    rows = [batch["tokens"].tobytes() for batch in _batches(config, 2 * epoch)]
    assert len(set(rows[:epoch])) == epoch
    assert set(rows[:epoch]) == set(rows[epoch:])
    assert rows[:epoch] != rows[epoch:]


def test_a_seeds_second_epoch_is_not_the_next_seeds_first(text_config):
    config = dataclasses.replace(text_config, packing="pad", batch_size=1)
    epoch = len(corpora.documents(config, "train", 0))
    assert _digest(_batches(config, 2 * epoch)[epoch:]) != _digest(_batches(config, epoch, seed=1))


def test_the_order_depends_on_the_seed_alone(text_config):
    assert _digest(_batches(text_config, 20)) == _digest(_batches(text_config, 20))
    assert _digest(_batches(text_config, 20)) != _digest(_batches(text_config, 20, seed=1))
    assert _batches(text_config, 1, seed=2**70)  # seeds of any size


@pytest.mark.parametrize("mode", ["concat", "pad"])
def test_holdout_is_one_pass_in_order_filled_up_with_padding(text_config, mode):
    config = dataclasses.replace(text_config, packing=mode, sequence_length=96, holdout=0.3, batch_size=8)
    batches = list(pipeline.create(config, TOKENIZER, "holdout", 0))
    expected = list(corpora.documents(config, "holdout", 0))
    assert all(batch["tokens"].shape == (8, 96) for batch in batches)
    assert list(_documents(batches)) == expected and set(_documents(batches).values()) == {1}
    empty = batches[-1]["segment_ids"].sum(axis=1) == 0
    assert empty.any() and not empty[0] and (batches[-1]["tokens"][empty] == TOKENIZER.pad_id).all()
    other = list(pipeline.create(config, TOKENIZER, "holdout", 1))
    assert _digest(batches) == _digest(other)


# An epoch has about 9 batches: 7 and 8 go on across its end.
@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("mode", ["concat", "pad"])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 25])
def test_restored_iterators_go_on_exactly(text_config, mode, align, count):
    config = dataclasses.replace(text_config, packing=mode, align=align)
    iterator = iter(pipeline.create(config, TOKENIZER, "train", 0))
    _take(iterator, count)
    state = json.dumps(iterator.get_state())
    expected = _digest(_take(iterator, 5))
    restored = iter(pipeline.create(config, TOKENIZER, "train", 0))
    _take(restored, 2)  # and has made others ahead
    restored.set_state(json.loads(state))
    assert json.dumps(restored.get_state()) == state
    assert _digest(_take(restored, 5)) == expected


@pytest.mark.parametrize("mode", ["concat", "pad"])
def test_grains_own_check_of_states(text_config, mode):
    config = dataclasses.replace(text_config, packing=mode, batch_size=2, holdout=0.4)
    grain.experimental.assert_equal_output_after_checkpoint(pipeline.create(config, TOKENIZER, "holdout", 0))


_NEW_PROCESS = """
import json, sys
from cola_jax.config import DataConfig, StoriesConfig
from cola_jax.nested import differences
from cola_jax.data import pipeline, run_tokenizer, tokenizers
fields, state, path = json.loads(sys.argv[1])
fields["stories"] = StoriesConfig(**fields["stories"])
config = DataConfig(**fields)
tokenizer = run_tokenizer.create(config, path)
iterator = iter(pipeline.create(config, tokenizer, "train", 3))
iterator.set_state(state)
print(json.dumps([[next(iterator)["tokens"].tolist() for _ in range(3)], pipeline.fingerprint(config, tokenizer, 3)]))
"""


def test_a_new_process_goes_on_exactly(tmp_path):
    config = DataConfig(num_stories=60, stories=StoriesConfig(aligned=True), align=8, batch_size=4)
    tokenizer = run_tokenizer.create(config, tmp_path / "model")
    iterator = iter(pipeline.create(config, tokenizer, "train", 3))
    _take(iterator, 9)
    fields = dataclasses.asdict(config)
    result = subprocess.run(
        [sys.executable, "-c", _NEW_PROCESS, json.dumps([fields, iterator.get_state(), str(tmp_path / "model")])],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    tokens, fingerprint = json.loads(result.stdout)
    assert tokens == [batch["tokens"].tolist() for batch in _take(iterator, 3)]
    assert difference(fingerprint, pipeline.fingerprint(config, tokenizer, 3)) == []


def test_aligned_stories_have_a_sentence_in_each_block(tmp_path):
    config = DataConfig(num_stories=500, stories=StoriesConfig(aligned=True), align=8)
    tokenizer = run_tokenizer.create(config, tmp_path / "model")
    batch = next(iter(pipeline.create(config, tokenizer, "train", 0)))
    blocks = batch["tokens"].reshape(-1, 8)
    for block in blocks:
        if tokenizer.eos_id in block:
            assert (block == tokenizer.eos_id).all()
        else:
            assert tokenizer.decode(block).endswith(".") and tokenizer.decode(block).count(".") == 1


def test_worker_processes_go_on_exactly(text_config):
    config = dataclasses.replace(text_config, num_workers=2)
    iterator = iter(pipeline.create(config, TOKENIZER, "train", 0))
    try:
        _take(iterator, 7)
        state = json.dumps(iterator.get_state())
        expected = _take(iterator, 5)
    finally:
        iterator.close()
    restored = iter(pipeline.create(config, TOKENIZER, "train", 0))
    try:
        restored.set_state(json.loads(state))
        assert _digest(_take(restored, 5)) == _digest(expected)
    finally:
        restored.close()


def test_errors_in_the_data_reach_the_reader(text_config, monkeypatch):
    def fail(text, tokenizer, align):
        raise UserError("told from the thread")

    monkeypatch.setattr(packing, "document_tokens", fail)
    with pytest.raises(UserError, match="told from the thread"):
        _batches(text_config, 1)


def test_fingerprints_are_json_and_equal_for_equal_data(text_config, tmp_path):
    copy = tmp_path / "corpus.txt"
    shutil.copy(text_config.files, copy)
    first = pipeline.fingerprint(text_config, TOKENIZER, 0)
    second = pipeline.fingerprint(dataclasses.replace(text_config, files=str(copy)), TOKENIZER, 0)
    assert difference(json.loads(json.dumps(first)), second) == []
    copy.write_bytes(copy.read_bytes()[::-1])
    third = pipeline.fingerprint(dataclasses.replace(text_config, files=str(copy)), TOKENIZER, 0)
    (line,) = difference(first, third)
    assert line.startswith("files[0]: 'corpus.txt, ") and " -> 'corpus.txt, " in line


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": "pad"},
        {"align": 8},
        {"sequence_length": 128},
        {"batch_size": 8},
        {"num_workers": 2},
        {"num_stories": 30},
        {"holdout": 0.5},
    ],
    ids=str,
)
def test_fingerprints_name_what_changed(changes):
    config = DataConfig(num_stories=20)
    ((name, value),) = changes.items()
    changed = dataclasses.replace(config, **changes)
    lines = difference(pipeline.fingerprint(config, TOKENIZER, 0), pipeline.fingerprint(changed, TOKENIZER, 0))
    assert f"{name}: {getattr(config, name)!r} -> {value!r}" in lines


def test_fingerprints_see_seed_stories_and_tokenizer():
    config = DataConfig(num_stories=20)
    base = pipeline.fingerprint(config, TOKENIZER, 0)
    assert "seed: 0 -> 1" in difference(base, pipeline.fingerprint(config, TOKENIZER, 1))
    harder = dataclasses.replace(config, stories=StoriesConfig(values=3))
    lines = difference(base, pipeline.fingerprint(harder, TOKENIZER, 0))
    assert "stories.values: 0 -> 3" in lines and any(line.startswith("stories_sha256: ") for line in lines)
    trained = tokenizers.SentencePieceTokenizer.train(["some text, some more text."], 300)
    (line,) = difference(base, pipeline.fingerprint(config, trained, 0))
    assert line == f"tokenizer: 'bytes {TOKENIZER.fingerprint}' -> 'sentencepiece {trained.fingerprint}'"


def test_differences_of_fields_that_one_side_lacks():
    assert difference({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1]}, "d": 0}) == [
        "b.c[1]: 2 -> absent",
        "d: absent -> 0",
    ]
