"""Texts as a model's context holds them, and what rates per token and per byte divide by."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cola_jax.config import DataConfig
from cola_jax.data import packing
from cola_jax.data.tokenizers import Tokenizer
from cola_jax.evaluation.statistics import Mean, per_token


class Cut(NamedTuple):
    """Texts, cut to a context.

    Attributes:
      ids: tokens of each row as in training, with the ends of text that fill it up.
      tokens: [B], of each text and one end of text, within the context: the T of rates per token.
      bytes: [B], of UTF-8 of the text within the context.
      whole: whether no row was cut.
    """

    ids: list[list[int]]
    tokens: np.ndarray
    bytes: np.ndarray
    whole: bool


def cut(texts: Sequence[str], tokenizer: Tokenizer, data: DataConfig) -> Cut:
    """The beginning of each text, at most ``data.sequence_length`` tokens of it."""
    context = data.sequence_length
    encoded = [tokenizer.encode(text) for text in texts]
    rows = [packing.ended(ids, tokenizer.eos_id, data.align) for ids in encoded]
    pairs = zip(texts, encoded, strict=True)
    kept = [text if len(ids) <= context else tokenizer.decode(ids[:context]) for text, ids in pairs]
    return Cut(
        [ids[:context] for ids in rows],
        np.array([min(len(ids) + 1, context) for ids in encoded]),
        np.array([len(text.encode()) for text in kept]),
        all(len(ids) <= context for ids in rows),
    )


def unigram_entropy(texts: Cut) -> Mean:
    """Entropy of the tokens within a text, nats: its mean over texts, and the standard error."""
    found = []
    for ids, count in zip(texts.ids, texts.tokens, strict=True):
        shares = np.unique(ids[:count], return_counts=True)[1] / count
        found.append(-np.sum(shares * np.log(shares)))
    return per_token(np.array(found), np.ones(len(found)))
