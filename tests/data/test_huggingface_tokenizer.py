"""The third tokenizer: a Hugging Face tokenizer.json."""

import json
import pickle
import sys

import pytest

from cola_jax.config import DataConfig
from cola_jax.data import run_tokenizer, tokenizers
from cola_jax.types import UserError

library = pytest.importorskip("tokenizers")
SPECIALS = ("<|endoftext|>", "<|im_end|>", "<|pad|>")


def byte_level(specials=SPECIALS) -> bytes:
    """A byte-level BPE trained on three sentences, as the released tokenizer is on more."""
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the cat sat on the mat", "the dog ate the cat", "the end"], trainer)
    made.add_special_tokens(list(specials))
    made.enable_padding(length=50)
    made.enable_truncation(3)
    return made.to_str().encode()


@pytest.fixture(scope="module")
def model():
    return byte_level()


def test_text_comes_back(model):
    tokenizer = tokenizers.HuggingFaceTokenizer(model)
    assert isinstance(tokenizer, tokenizers.Tokenizer) and tokenizer.name == "huggingface"
    for text in ("", "the cat", " two  spaces\n\ttab", "Žluťoučký 🐈 \u2581", "a" * 500):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert len(tokenizer.encode("the cat")) < 7  # pieces, and neither padding nor truncation of the file


def test_specials(model):
    tokenizer = tokenizers.HuggingFaceTokenizer(model)
    size = tokenizer.vocab_size
    assert (tokenizer.eos_id, tokenizer.pad_id) == (size - 3, size - 1)
    ids = tokenizer.encode("the <|endoftext|> cat<|pad|>")  # text that spells them is text
    assert not {size - 3, size - 2, size - 1} & set(ids)
    assert tokenizer.decode([*ids, size - 3, size - 2, size - 1]) == "the <|endoftext|> cat<|pad|>"
    given = tokenizers.HuggingFaceTokenizer(model, eos_id=5, pad_id=6)
    assert (given.eos_id, given.pad_id) == (5, 6) and given.fingerprint != tokenizer.fingerprint
    with pytest.raises(ValueError, match=f"eos_id = {size}: must be an id below {size}"):
        tokenizers.HuggingFaceTokenizer(model, eos_id=size)


def test_specials_that_the_file_does_not_name():
    with pytest.raises(ValueError, match="no special token of the names .*; eos_id must be given"):
        tokenizers.HuggingFaceTokenizer(byte_level(("<|stop|>",)))
    tokenizer = tokenizers.HuggingFaceTokenizer(byte_level(("</s>",)))
    assert tokenizer.pad_id == tokenizer.eos_id  # where there is no padding token


def test_a_copy_is_the_same(model):
    tokenizer = tokenizers.HuggingFaceTokenizer(model, pad_id=7)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint and copy.pad_id == 7
    assert copy.encode("the dog") == tokenizer.encode("the dog")


def test_files(model, tmp_path):
    file = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="tokenizer.json: No such file"):
        tokenizers.HuggingFaceTokenizer.load(file)
    for content in (b"{", b"\xff", b"[]", json.dumps({"model": {}}).encode()):
        file.write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.json: not a tokenizer.json") as caught:
            tokenizers.HuggingFaceTokenizer.load(file)
        assert "\n" not in str(caught.value)
    file.write_bytes(model)
    config = DataConfig(tokenizer="huggingface", eos_id=3)
    assert run_tokenizer.create(config, file).eos_id == 3
    named = DataConfig(tokenizer="huggingface", tokenizer_path=str(file))
    assert run_tokenizer.create(named, tmp_path / "none").eos_id > 3


def test_the_package_is_optional(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        UserError, match=r"needs the package tokenizers, which is missing: pip install 'cola_jax\[hf\]'"
    ):
        tokenizers.HuggingFaceTokenizer(model)
