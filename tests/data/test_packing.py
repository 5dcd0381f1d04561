"""Packing against an independent expectation, and exact states of the packing iterator."""

import json

import grain
import numpy as np
import pytest

from cola_jax.data import packing, tokenizers

LENGTH, PAD = 16, 99


def _documents(seed: int, count: int, longest: int, align: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = align * rng.integers(1, longest // align + 1, count)
    return [rng.integers(0, 90, n).astype(np.int32) for n in lengths]


def _concat(documents: list[np.ndarray]) -> grain.IterDataset:
    return packing.ConcatIterDataset(grain.MapDataset.source(documents).to_iter_dataset(), LENGTH, PAD)


def _expected_concat(documents: list[np.ndarray]) -> dict[str, np.ndarray]:
    """All rows at once, from the stream of tokens and the document that each one belongs to."""
    stream = np.concatenate(documents)
    owner = np.concatenate([np.full(len(d), i) for i, d in enumerate(documents)])
    padding = -len(stream) % LENGTH
    stream = np.pad(stream, (0, padding), constant_values=PAD).reshape(-1, LENGTH)
    owner = np.pad(owner, (0, padding), constant_values=-1).reshape(-1, LENGTH)
    real = owner >= 0
    segments = np.where(real, owner - owner[:, :1] + 1, 0)
    return {"tokens": stream, "segment_ids": segments}


def _stack(rows: list[dict]) -> dict[str, np.ndarray]:
    assert all(row[name].dtype == np.int32 and row[name].shape == (LENGTH,) for row in rows for name in row)
    return {name: np.stack([row[name] for row in rows]) for name in ("tokens", "segment_ids")}


# Longest 5: many documents a row; 16: with align 8 they end where rows end; 70: documents of several rows.
CASES = [(seed, longest, align) for seed in range(3) for longest, align in ((5, 1), (16, 1), (16, 8), (70, 1), (70, 8))]


@pytest.mark.parametrize("seed, longest, align", CASES)
def test_concat_makes_the_expected_rows(seed, longest, align):
    documents = _documents(seed, 40, longest, align)
    rows, expected = _stack(list(_concat(documents))), _expected_concat(documents)
    for name in expected:
        np.testing.assert_array_equal(rows[name], expected[name], err_msg=name)
    assert (rows["segment_ids"][:-1] > 0).all()  # only the last row has padding
    segments = np.pad(rows["segment_ids"], ((0, 0), (1, 0)))
    starts = np.nonzero(np.diff(segments, axis=1) > 0)[1]
    assert (starts % align == 0).all()


@pytest.mark.parametrize("seed, longest, align", CASES)
def test_concat_loses_no_token(seed, longest, align):
    documents = _documents(seed, 40, longest, align)
    kept = [row["tokens"][row["segment_ids"] > 0] for row in _concat(documents)]
    np.testing.assert_array_equal(np.concatenate(kept), np.concatenate(documents))


@pytest.mark.parametrize("seed, longest, align", CASES)
def test_concat_goes_on_exactly_after_a_state_in_json(seed, longest, align):
    dataset = _concat(_documents(seed, 20, longest, align))
    iterator, states, rows = iter(dataset), [], []
    while True:
        states.append(json.dumps(iterator.get_state()))
        try:
            rows.append(next(iterator))
        except StopIteration:
            break
    for i, state in enumerate(states):
        restored = iter(dataset)
        restored.set_state(json.loads(state))
        assert json.dumps(restored.get_state()) == state
        np.testing.assert_equal(list(restored), rows[i:])


def test_grains_own_check_of_states():
    grain.experimental.assert_equal_output_after_checkpoint(_concat(_documents(0, 20, 30)))


def test_concat_of_nothing_is_nothing():
    iterator = iter(_concat([]))
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(iterator)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 60])
def test_pad_keeps_the_head_of_one_document(count):
    document = np.arange(1, count + 1, dtype=np.int32)
    kept = min(count, LENGTH)
    row = _stack([packing.pad_row(document, LENGTH, PAD)])
    np.testing.assert_array_equal(row["tokens"][0], [*range(1, kept + 1), *[PAD] * (LENGTH - kept)])
    np.testing.assert_array_equal(row["segment_ids"][0], [1] * kept + [0] * (LENGTH - kept))


@pytest.mark.parametrize(
    "align, text, ends",
    [(1, "", 1), (1, "abc", 1), (8, "", 8), (8, "abc", 5), (8, "abcdefg", 1), (8, "abcdefgh", 8)],
)
def test_documents_end_with_ends_of_text_up_to_the_alignment(align, text, ends):
    tokenizer = tokenizers.ByteTokenizer()
    tokens = packing.document_tokens(text, tokenizer, align)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [*text.encode(), *[tokenizer.eos_id] * ends]


def test_padding_before_a_document():
    """The document moves by the offset; what does not fit any more is cut."""
    row = packing.pad_row(np.arange(5, 10, dtype=np.int32), 8, 99, offset=2)
    np.testing.assert_array_equal(row["tokens"], [99, 99, 5, 6, 7, 8, 9, 99])
    np.testing.assert_array_equal(row["segment_ids"], [0, 0, 1, 1, 1, 1, 1, 0])
    full = packing.pad_row(np.arange(5, 15, dtype=np.int32), 8, 99, offset=1)
    np.testing.assert_array_equal(full["tokens"], [99, *range(5, 12)])


def test_offsets_are_drawn_up_to_the_most():
    draw = np.random.default_rng(0)
    rows = [packing.pad_row_anywhere(np.full(3, 7, np.int32), draw, 6, 99, most=2) for _ in range(60)]
    assert {int(np.argmax(row["tokens"] == 7)) for row in rows} == {0, 1, 2}
