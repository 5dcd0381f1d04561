"""Tokenizers: exact round trips, determinism, whole words as pieces, and what happens to wrong files."""

import io
import pickle
import random

import pytest
import sentencepiece

from cola_jax.config import DataConfig
from cola_jax.data import corpora, run_tokenizer, tokenizers
from cola_jax.types import UserError

WORDS = "the garden kite uncle visited dusty found home bravely and went for to a of was where lantern".split()


def _texts(seed: int, count: int = 400) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=12)).capitalize() + ".\nThe end." for _ in range(count)]


@pytest.fixture(scope="module")
def trained():
    return tokenizers.SentencePieceTokenizer.train(_texts(0), vocab_size=600)


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request, trained):
    return tokenizers.ByteTokenizer() if request.param == "bytes" else trained


HOSTILE = [
    "",
    " ",
    "   leading",
    "trailing   ",
    "two  three   spaces",
    "\n",
    "\n\n a \n",
    "carriage\r\nreturn\r",
    "\ttabs\t\tinside\t",
    "\0",
    "a\0b\0\0",
    "".join(map(chr, range(32))) + "\x7f\x80\x9f",
    "\u2581",
    "a\u2581b \u2581 \u2581\u2581c\u2581",  # SentencePiece's own sign for a space
    "\u2585 \u2047",  # its signs for unknown characters
    "<s>",
    "</s>",
    "<pad>",
    "<unk> <s>a</s> <pad></s>",
    "<0x41><0x0A><0xE2>",
    "\ufeffbyte order mark",
    "\u00a0\u2003\u3000 exotic\u200bspaces\u2028\u2029",
    "caf\u00e9 cafe\u0301 \ufb01 \uff21\uff22 \u212b \u00c5",  # would change under NFC or NFKC
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "\u4f60\u597d \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\ue000\ufffd\ufffe\uffff\U0010ffff",
    "The garden and the kite.",
    "x" * 5000,
]


def _random_unicode(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF), (0x2580, 0x2586)]
    return ["".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 40))) for _ in range(count)]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_hostile_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_random_unicode_comes_back_exactly(tokenizer):
    for text in _random_unicode(0, 300):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_text_never_becomes_a_special_token(tokenizer, text):
    assert not {tokenizer.eos_id, tokenizer.pad_id} & set(tokenizer.encode(text))


def test_decode_skips_padding_and_ends_of_text(tokenizer):
    first, second = tokenizer.encode("The kite"), tokenizer.encode(" went home.")
    ids = first + [tokenizer.eos_id] + second + [tokenizer.eos_id] * 2 + [tokenizer.pad_id] * 3
    assert tokenizer.decode(ids) == "The kite went home."


def test_decode_takes_any_ids_in_range(tokenizer):
    rng = random.Random(0)
    for i in range(tokenizer.vocab_size):
        assert isinstance(tokenizer.decode([i]), str)
    for _ in range(200):
        assert isinstance(tokenizer.decode([rng.randrange(tokenizer.vocab_size) for _ in range(20)]), str)


def test_tokenizers_have_what_the_protocol_names(tokenizer):
    assert isinstance(tokenizer, tokenizers.Tokenizer)
    assert len({tokenizer.eos_id, tokenizer.pad_id}) == 2
    assert len(tokenizer.fingerprint) == 64 and int(tokenizer.fingerprint, 16)


def test_a_pickled_copy_is_the_same_tokenizer(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode(HOSTILE[13]) == tokenizer.encode(HOSTILE[13])


def test_training_is_deterministic_and_the_fingerprint_tells_models_apart(trained):
    again = tokenizers.SentencePieceTokenizer.train(_texts(0), vocab_size=600)
    other = tokenizers.SentencePieceTokenizer.train(_texts(0) + ["zebra zebra."], vocab_size=600)
    assert again.fingerprint == trained.fingerprint
    assert other.fingerprint != trained.fingerprint


def test_words_of_the_corpus_are_single_pieces(trained):
    for word in WORDS:
        assert len(trained.encode(" " + word)) == 1, word
    for text in _texts(0, 50):
        pieces = text.replace(".", " .").replace("\n", " \n ").split(" ")
        assert len(trained.encode(text)) == len([piece for piece in pieces if piece])


def test_training_stops_at_the_vocabulary_size():
    letters = "abcdefghij"
    texts = [" ".join("".join(random.Random(i).choices(letters, k=6)) for i in range(j, j + 20)) for j in range(500)]
    assert tokenizers.SentencePieceTokenizer.train(texts, vocab_size=400).vocab_size == 400


def test_more_characters_than_pieces_fall_back_to_bytes():
    texts = ["".join(map(chr, range(0x4E00 + i, 0x4E00 + i + 40))) for i in range(0, 2000, 20)]
    tokenizer = tokenizers.SentencePieceTokenizer.train(texts, vocab_size=400)
    assert tokenizer.vocab_size <= 400
    assert tokenizer.decode(tokenizer.encode(texts[3])) == texts[3]


def test_training_reads_all_lines_whatever_they_contain():
    # The trainer alone would skip each of these lines: reserved characters, or longer than its limit.
    for text in ("\u2192\t" * 50, "\0\u2192 \u2192", "\u2192\u2581\u2192", "\u2192\u2585", "\u2192 " * 20_000):
        tokenizer = tokenizers.SentencePieceTokenizer.train([text, "lantern"], vocab_size=320)
        assert len(tokenizer.encode("\u2192")) == 1, ascii(text[:20])


@pytest.mark.parametrize("texts, vocab_size", [([], 400), (["", "\n"], 400), (_texts(0), 100)])
def test_training_that_cannot_work_is_a_user_error(texts, vocab_size):
    with pytest.raises(UserError, match=rf"config\.data\.vocab_size = {vocab_size}: .*") as error:
        tokenizers.SentencePieceTokenizer.train(texts, vocab_size)
    assert "\n" not in str(error.value)


def test_saved_models_load_as_the_same_tokenizer(trained, tmp_path):
    path = tmp_path / "new" / "tokenizer.model"
    trained.save(path)
    assert tokenizers.SentencePieceTokenizer.load(path).fingerprint == trained.fingerprint
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\n\0", "half", "directory"])
def test_wrong_model_files_are_named(trained, tmp_path, content):
    path = tmp_path / "wrong.model"
    if content == "directory":
        path.mkdir()
    elif content == "half":
        trained.save(path)
        path.write_bytes(path.read_bytes()[:-100])
    elif content is not None:
        path.write_bytes(content)
    for load in (
        lambda: tokenizers.SentencePieceTokenizer.load(path),
        lambda: run_tokenizer.create(DataConfig(tokenizer_path=str(path)), tmp_path / "unused"),
    ):
        with pytest.raises(UserError, match=r"wrong\.model: .*must be a SentencePiece model file") as error:
            load()
        assert "\n" not in str(error.value)


def _foreign_model(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_texts(0)),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def test_models_from_elsewhere_pad_with_the_end_of_text():
    tokenizer = tokenizers.SentencePieceTokenizer(_foreign_model(pad_id=-1))
    assert tokenizer.pad_id == tokenizer.eos_id
    assert tokenizer.decode(tokenizer.encode("The kite\u2581home") + [tokenizer.eos_id]) == "The kite home"


def test_models_without_an_end_of_text_are_refused():
    with pytest.raises(ValueError, match="end-of-text"):
        tokenizers.SentencePieceTokenizer(_foreign_model(eos_id=-1))


def _text_config(tmp_path, **fields) -> DataConfig:
    (tmp_path / "corpus.txt").write_text("\n\n".join(_texts(0)), encoding="utf-8")
    return DataConfig(corpus="text", files=str(tmp_path / "corpus.txt"), vocab_size=500, **fields)


def test_create_makes_bytes_without_a_file(tmp_path):
    assert run_tokenizer.create(DataConfig(tokenizer="bytes"), tmp_path / "model").name == "bytes"
    assert not list(tmp_path.iterdir())


def test_create_trains_once_and_then_loads(tmp_path, monkeypatch):
    config = _text_config(tmp_path)
    first = run_tokenizer.create(config, tmp_path / "model")
    monkeypatch.setattr(tokenizers.SentencePieceTokenizer, "train", None)
    assert run_tokenizer.create(config, tmp_path / "model").fingerprint == first.fingerprint
    named = _text_config(tmp_path, tokenizer_path=str(tmp_path / "model"))
    assert run_tokenizer.create(named, tmp_path / "other").fingerprint == first.fingerprint
    assert not (tmp_path / "other").exists()


def test_create_never_trains_on_held_out_documents(tmp_path, monkeypatch):
    config = _text_config(tmp_path, holdout=0.3)
    seen = []
    train = tokenizers.SentencePieceTokenizer.train

    def spy(texts, vocab_size):
        seen.extend(texts)
        return train(seen, vocab_size)

    monkeypatch.setattr(tokenizers.SentencePieceTokenizer, "train", spy)
    run_tokenizer.create(config, tmp_path / "model")
    assert set(seen) == set(corpora.documents(config, "train", 0))
    assert not set(seen) & set(corpora.documents(config, "holdout", 0))
