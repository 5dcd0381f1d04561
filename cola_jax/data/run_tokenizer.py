"""The tokenizer of a run: of a file, of its prepared corpus, or trained on its corpus."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cola_jax import paths
from cola_jax.config import DataConfig
from cola_jax.data import corpora, manifest, mixture, prepared
from cola_jax.data.tokenizers import (
    SAMPLE_CHARACTERS,
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

_SAMPLE_STORIES = 5_000  # stories, or captions of scenes, that a tokenizer is trained on
_INSTRUCTIONS = 100  # times that it sees each instruction: rows have them as often as captions


def _training_sample(config: DataConfig) -> Iterator[str]:
    """Some training documents in a fixed random order; the held-out ones never reach the tokenizer."""
    documents = corpora.documents(config, "train", seed=0)
    budget = SAMPLE_CHARACTERS
    most = _SAMPLE_STORIES if config.corpus in ("stories", "scenes") else len(documents)
    if config.instruction_length:
        yield from config.instructions * _INSTRUCTIONS
    for index in np.random.default_rng(0).permutation(len(documents))[:most]:
        text = documents[int(index)][:budget]
        budget -= len(text)
        yield text
        if not budget:
            return


def create(config: DataConfig, path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a run.

    Args:
      config: `tokenizer`, `tokenizer_path`, `vocab_size` and the corpus count.
      path: Where a SentencePiece model that is trained here is kept: loaded if it exists, else written; or the
        tokenizer.json where the config names none. The tokenizer of a prepared corpus is copied there.

    Raises:
      UserError: A model file is missing or broken, or the corpus cannot be read.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.corpus == "prepared" and not config.tokenizer_path and not os.path.exists(path):
        _copy_prepared(config, path)
    if config.tokenizer == "huggingface":
        return HuggingFaceTokenizer.load(config.tokenizer_path or path, config.eos_id, config.pad_id)
    if config.tokenizer_path:
        return SentencePieceTokenizer.load(config.tokenizer_path)
    if not os.path.exists(path):
        SentencePieceTokenizer.train(_training_sample(config), config.vocab_size).save(path)
    return SentencePieceTokenizer.load(path)


def _copy_prepared(config: DataConfig, path: str | os.PathLike) -> None:
    """Copies the tokenizer of a prepared corpus to ``path``, so that the run does not need the corpus to be read."""
    directory = mixture.directories(mixture.parse(config.files))[0]
    found = prepared.open_manifest(directory, config)
    prepared.read_tokenizer(directory, found)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    name = manifest.TOKENIZER_FILES[found.tokenizer.name]
    paths.write_atomically(target, (Path(directory) / name).read_bytes())
