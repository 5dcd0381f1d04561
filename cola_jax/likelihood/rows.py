"""Texts as rows of whole blocks: what is real, what is given, what is scored."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int

from cola_jax.models.cola import ColaDLM
from cola_jax.types import UserError


class Rows(NamedTuple):
    """Texts as the networks take them; T is a multiple of K * P.

    Attributes:
      tokens: ids.
      real: 1 for the text, 0 for the padding behind it.
      given: True for tokens that are a condition and not scored (a prefix).
      ids: identity of each row in the random stream.
    """

    tokens: Int[Array, "B T"] | np.ndarray
    real: Int[Array, "B T"] | np.ndarray
    given: Bool[Array, "B T"] | np.ndarray
    ids: Int[Array, " B"] | np.ndarray


def make_rows(model: ColaDLM, tokens, segment_ids=None, prefix=None, ids=None) -> Rows:
    """Checked rows, filled up to whole blocks; arguments as in `estimators.log_likelihood`.

    Raises:
      UserError: naming the example.
    """
    patch, vocabulary = model.vae_config.patch_size, model.vae_config.vocab_size
    tokens = np.asarray(tokens)
    real = np.ones(tokens.shape, np.int32) if segment_ids is None else np.asarray(segment_ids, np.int32)
    if tokens.ndim != 2 or real.shape != tokens.shape or not tokens.size:
        raise UserError(f"tokens {tokens.shape}, segment_ids {real.shape}: must be two equal shapes [B, T]")
    lengths = (real > 0).sum(axis=1)
    prefix = np.zeros(len(tokens), np.int32) if prefix is None else np.asarray(prefix, np.int32)
    ids = np.arange(len(tokens), dtype=np.int32) if ids is None else np.asarray(ids, np.int32)
    for i, (row, segments, length) in enumerate(zip(tokens, real, lengths, strict=True)):
        if not np.array_equal(segments, np.arange(len(segments)) < length):
            raise UserError(f"example {i}: segment_ids are not 1 for one document and 0 for the padding behind it")
        if length and not (0 <= row[:length].min() and row[:length].max() < vocabulary):
            raise UserError(f"example {i}: a token id is outside the vocabulary, must be 0 to {vocabulary - 1}")
        if not 0 <= prefix[i] < length:
            what = "no token" if not length else f"{length} tokens, of which the prefix has {prefix[i]}"
            raise UserError(f"example {i}: {what}; there must be at least one token to score")
        for name, value in (("tokens", length), ("tokens in its prefix", prefix[i])):
            if value % patch:
                raise UserError(f"example {i}: {value} {name}; must be a multiple of the patch size {patch}")
    fill = -tokens.shape[1] % (model.dit_config.block_size * patch)
    tokens = np.pad(np.where(real > 0, tokens, 0), ((0, 0), (0, fill))).astype(np.int32)
    real = np.pad(real, ((0, 0), (0, fill)))
    return Rows(tokens, real, np.arange(tokens.shape[1])[None] < prefix[:, None], ids)


def stack(sequences: Sequence[Sequence[int]], width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Token rows and segment ids [B, T] of id lists, padded behind to the longest (or to ``width``)."""
    width = max([width, *map(len, sequences)])
    tokens, segments = np.zeros((2, len(sequences), width), np.int32)
    for row, (ids, out) in enumerate(zip(sequences, tokens, strict=True)):
        out[: len(ids)] = ids
        segments[row, : len(ids)] = 1
    return tokens, segments
