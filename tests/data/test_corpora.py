"""Corpora: how text becomes documents, and that no text is both trained on and held out."""

import dataclasses
import pickle

import pytest

from cola_jax.config import DataConfig, StoriesConfig
from cola_jax.data import corpora, tfds_records
from cola_jax.types import UserError

# Few enough stories that many of them occur several times among a few hundred.
SMALL = StoriesConfig(values=2, variants=1, max_sentences=4)


def _stories(**fields) -> DataConfig:
    return DataConfig(**{"corpus": "stories", "num_stories": 400, "holdout": 0.2, **fields})


def _text(path, **fields) -> DataConfig:
    return DataConfig(**{"corpus": "text", "files": str(path), "holdout": 0.2, **fields})


def _both(config: DataConfig, seed: int = 0) -> tuple[list[str], list[str]]:
    return list(corpora.documents(config, "train", seed)), list(corpora.documents(config, "holdout", seed))


def test_stories_that_repeat_are_never_in_both_splits():
    train, holdout = _both(_stories(stories=SMALL))
    assert len(set(train)) < len(train)  # or the test would show nothing
    assert not set(train) & set(holdout)


def test_held_out_stories_are_held_out_under_every_seed():
    config = _stories(stories=SMALL)
    assert not set(_both(config, seed=1)[0]) & set(_both(config, seed=2)[1])


def test_numbers_of_stories():
    train, holdout = _both(_stories())
    assert (len(train), len(holdout)) == (400, 80)
    assert len(set(train)) > 390 and len(set(holdout)) > 75  # each index is a draw of its own
    assert len(corpora.documents(_stories(num_stories=3, holdout=0.01), "holdout", 0)) == 1


def test_stories_depend_on_seed_and_index_alone():
    config = _stories()
    train, holdout = _both(config)
    copy = pickle.loads(pickle.dumps(corpora.documents(config, "holdout", 0)))
    for documents, expected in ((corpora.documents(config, "train", 0), train), (copy, holdout)):
        assert [documents[i] for i in reversed(range(len(documents)))] == expected[::-1]
    more = corpora.documents(dataclasses.replace(config, num_stories=500), "train", 0)
    assert [more[i] for i in range(400)] == train
    assert _both(config, seed=1)[0] != train


def test_stories_end_where_they_end():
    documents = corpora.documents(_stories(), "train", 0)
    for index in (400, -1):
        with pytest.raises(IndexError):
            documents[index]


def test_stories_that_cannot_be_divided_are_a_user_error(monkeypatch):
    monkeypatch.setattr(corpora, "_ATTEMPTS", 50)
    documents = corpora.documents(_stories(holdout=1e-9), "holdout", 0)
    with pytest.raises(UserError, match=r"config\.data\.holdout = 1e-09: must be"):
        documents[0]


def _write(tmp_path, name: str, count: int, first: int = 0) -> list[str]:
    texts = [f"Document {i}\nhas two lines." for i in range(first, first + count)]
    (tmp_path / name).write_text("\n\n".join(texts), encoding="utf-8")
    return texts


def test_text_is_divided_completely_and_about_as_told(tmp_path):
    texts = _write(tmp_path, "a.txt", 2000)
    train, holdout = _both(_text(tmp_path / "a.txt"))
    assert sorted(train + holdout) == sorted(texts)
    assert [text for text in texts if text in set(train)] == train  # in the order of the file
    assert 330 < len(holdout) < 470  # 400 expected, standard deviation 18


def test_text_is_divided_by_content_alone(tmp_path):
    texts = _write(tmp_path, "a.txt", 200)
    (tmp_path / "b.txt").write_text("\n\n".join(texts[::-1] + texts), encoding="utf-8")
    one, two = _both(_text(tmp_path / "a.txt")), _both(_text(tmp_path / "b.txt"), seed=5)
    assert set(one[1]) == set(two[1])
    assert not set(two[0]) & set(two[1])


def test_a_larger_share_only_adds_to_the_held_out_documents(tmp_path):
    _write(tmp_path, "a.txt", 300)
    small, large = (set(_both(_text(tmp_path / "a.txt", holdout=share))[1]) for share in (0.1, 0.5))
    assert small < large


def test_a_glob_is_read_in_sorted_order(tmp_path):
    (tmp_path / "sub").mkdir()
    expected = []
    for name, first in (("a.txt", 0), ("b.txt", 10), ("sub/c.txt", 20)):
        expected += _write(tmp_path, name, 10, first)
    _write(tmp_path, "d.md", 5, 100)
    train, holdout = _both(_text(tmp_path / "**" / "*.txt"))
    assert [text for text in expected if text in set(train)] == train
    assert set(train) | set(holdout) == set(expected)


def test_a_file_name_that_looks_like_a_glob(tmp_path):
    _write(tmp_path, "a[1].txt", 10)
    assert sum(map(len, _both(_text(tmp_path / "a[1].txt")))) == 10


@pytest.mark.parametrize(
    "separator, content, expected",
    [
        ("\n\n", "a\n\n\n\nb\n\n  \n\nc", ["a", "b", "c"]),
        ("\n\n", "a\r\n\r\nb\r\nc", ["a", "b\r\nc"]),
        ("\n", " a \nb\n\n", [" a ", "b"]),
        ("<|end|>", "a<|end|>b\n\nc<|end|>", ["a", "b\n\nc"]),
        (".", "a.b", ["a", "b"]),
    ],
)
def test_documents_between_separators(tmp_path, separator, content, expected):
    (tmp_path / "a.txt").write_bytes(content.encode())
    train, holdout = _both(_text(tmp_path / "a.txt", document_separator=separator))
    assert sorted(train + holdout) == sorted(expected)


def test_without_a_separator_a_file_is_a_document(tmp_path):
    contents = ["one\n\nstill one\r\n", "two\n", "three"]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.txt").write_bytes(content.encode())
    (tmp_path / "empty.txt").touch()
    train, holdout = _both(_text(tmp_path / "*.txt", document_separator=""))
    assert sorted(train + holdout) == sorted(contents)


@pytest.mark.parametrize("share", [1e-6, 0.02, 0.5])
def test_two_documents_are_enough(tmp_path, share):
    _write(tmp_path, "a.txt", 2, first=2)
    train, holdout = _both(_text(tmp_path / "a.txt", holdout=share))
    assert len(train) == len(holdout) == 1


def test_one_document_is_too_few(tmp_path):
    (tmp_path / "a.txt").write_text("same\n\nsame\n\nsame", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.txt': 3 document\(s\), all of them held out; there must be"):
        corpora.documents(_text(tmp_path / "a.txt"), "train", 0)


@pytest.mark.parametrize("name", ["missing.txt", "*.none", "."])
def test_files_that_do_not_exist(tmp_path, name):
    with pytest.raises(UserError, match=r"config\.data\.files = .*no such file; must be"):
        corpora.documents(_text(tmp_path / name), "train", 0)


@pytest.mark.parametrize("content", [b"", b"\n\n \n\n"])
def test_files_without_text(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.txt': no text in it; the files"):
        corpora.documents(_text(tmp_path / "a.txt"), "train", 0)


def test_files_that_are_not_utf8(tmp_path):
    _write(tmp_path, "a.txt", 10)
    (tmp_path / "b.txt").write_bytes("gr\u00fcn\n\n".encode() + b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"b\.txt: byte 10 is not UTF-8 .*must be UTF-8 text"):
        corpora.documents(_text(tmp_path / "*.txt"), "train", 0)


def test_an_unknown_split_is_refused():
    with pytest.raises(Exception, match="test"):
        corpora.documents(_stories(), "test", 0)


def test_text_stays_in_its_files_and_a_changed_file_is_noticed(tmp_path):
    texts = _write(tmp_path, "a.txt", 50)
    documents = corpora.documents(_text(tmp_path / "a.txt"), "train", 0)
    assert pickle.loads(pickle.dumps(documents))[3] == documents[3]
    (tmp_path / "a.txt").write_text("\n\n".join(texts).replace("two", "TWO"), encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.txt: has changed while it was read"):
        documents[3]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt: No such file"):
        documents[3]


def test_a_file_is_described_as_it_was_scanned(tmp_path):
    _write(tmp_path, "a.txt", 50)
    before = corpora.describe(_text(tmp_path / "a.txt"), 0)
    _write(tmp_path, "a.txt", 51)
    after = corpora.describe(_text(tmp_path / "a.txt"), 0)
    assert before["files"] != after["files"] and "sha256" in after["files"][0]


class _Source:
    """A source of TFDS: records are dicts with bytes."""

    def __init__(self, texts: list[str], field: str = "text"):
        self._records = [{field: text.encode(), "id": i} for i, text in enumerate(texts)]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        return self._records[index]


def _tfds(**changes) -> DataConfig:
    return DataConfig(corpus="tfds", files="some", holdout=0.2, **changes)


@pytest.fixture
def tfds_texts(monkeypatch):
    texts = [f"record {i}" for i in range(300)]
    monkeypatch.setattr(tfds_records, "open_source", lambda *asked: (_Source(texts), "some"))
    tfds_records.scan.cache_clear()
    yield texts
    tfds_records.scan.cache_clear()


def test_records_of_tfds_are_documents(tfds_texts):
    train, holdout = _both(_tfds())
    assert sorted(train + holdout) == sorted(tfds_texts) and 30 < len(holdout) < 90
    assert "300 records, sha256" in corpora.describe(_tfds(), 0)["records"]


def test_a_prepared_data_set_of_tfds_is_read_without_tensorflow():
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=20):
        tfds_records.scan.cache_clear()
        train, holdout = _both(DataConfig(corpus="tfds", files="lm1b", holdout=0.3))
        with pytest.raises(UserError, match=r"tfds_split = train: no feature 'body'; it has 'text'"):
            corpora.documents(DataConfig(corpus="tfds", files="lm1b", text_field="body"), "train", 0)
    tfds_records.scan.cache_clear()
    assert len(train) + len(holdout) == 20 and all(isinstance(text, str) and text for text in train)


def test_an_unknown_data_set_is_a_user_error():
    with pytest.raises(UserError, match=r"files = no_such_set, tfds_split = train: must be a data set"):
        corpora.documents(DataConfig(corpus="tfds", files="no_such_set"), "train", 0)
