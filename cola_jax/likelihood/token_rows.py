"""Texts as rows that a token model scores: checked, filled up, and shared out over a mesh."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from cola_jax import sharding
from cola_jax.types import UserError


class TokenRows(NamedTuple):
    """Texts, one a row.

    Attributes:
      tokens: ids [B, T], 0 at padding.
      real: [B, T], 1 for the text, 0 for the padding behind it.
      prefix: [B], tokens that are given and not scored.
    """

    tokens: np.ndarray
    real: np.ndarray
    prefix: np.ndarray

    @property
    def scored(self) -> np.ndarray:
        """[B, T], whether a token is scored."""
        return (self.real > 0) & (np.arange(self.tokens.shape[1])[None] >= self.prefix[:, None])


def make(vocabulary: int, tokens, segment_ids=None, prefix=None) -> TokenRows:
    """Checked rows.

    Args:
      vocabulary: V.
      tokens: ids [B, T], one document a row.
      segment_ids: [B, T], 1 for the document, 0 for padding behind it; None: no padding.
      prefix: [B], tokens that are given, fewer than the row has; None: none.

    Raises:
      UserError: naming a row that cannot be used.
    """
    tokens = np.asarray(tokens)
    real = np.ones(tokens.shape, np.int32) if segment_ids is None else np.asarray(segment_ids, np.int32)
    if tokens.ndim != 2 or real.shape != tokens.shape or not tokens.size:
        raise UserError(f"tokens {tokens.shape}, segment_ids {real.shape}: must be two equal shapes [B, T]")
    count = len(tokens)
    given = np.zeros(count, int) if prefix is None else np.asarray(prefix, int)
    if given.shape != (count,):
        raise UserError(f"prefix has shape {given.shape}: must be ({count},), one number for each row")
    for i, (row, segments) in enumerate(zip(tokens, real, strict=True)):
        length = int((segments > 0).sum())
        if not np.array_equal(segments, np.arange(len(segments)) < length):
            raise UserError(f"example {i}: segment_ids are not 1 for one document and 0 for the padding behind it")
        if length and not (0 <= row[:length].min() and row[:length].max() < vocabulary):
            raise UserError(f"example {i}: a token id is outside the vocabulary, must be 0 to {vocabulary - 1}")
        if not 0 <= given[i] < length:
            raise UserError(
                f"example {i}: {given[i]} tokens in its prefix, must be at least 0 and below its {length} tokens"
            )
    return TokenRows(np.where(real > 0, tokens, 0).astype(np.int32), real, given)


def run(program: Callable[[Any], jax.Array], rows: dict[str, np.ndarray], mesh=None) -> np.ndarray:
    """``program(rows)`` of rows that are filled up to few shapes, float64.

    Args:
      program: arrays by name, [B, ...] -> [..., B, *S]; padded positions and rows have zeros.
      rows: arrays [B] or [B, T].
      mesh: from `sharding.make_mesh`: rows are shared out over its batch axes; params must lie on it. None: one device.

    Returns:
      What the program returns, of the rows and positions that there are.
    """
    count, length = rows["tokens"].shape
    parts = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    fill = ((0, -count % parts), (0, max(16, 2 ** (length - 1).bit_length()) - length))
    filled = {name: np.pad(x, fill[: x.ndim]) for name, x in rows.items()}
    if mesh is None:
        found = program(filled)
    else:
        filled = sharding.put_batch(mesh, filled)
        with sharding.activate(mesh):
            found = program(filled)
    return np.asarray(jax.device_get(found), np.float64)
