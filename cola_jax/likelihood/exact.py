"""log p(x) of the autoregressive model: exact, by the chain rule, one pass over a text (SPEC 7)."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from cola_jax.likelihood import token_rows
from cola_jax.likelihood.row_scorer import Estimate, Row, RowScore, RowScorer
from cola_jax.likelihood.rows import stack
from cola_jax.likelihood.token_rows import TokenRows
from cola_jax.models.autoregressive import Autoregressive
from cola_jax.objectives import common
from cola_jax.types import Params


class Exact(NamedTuple):
    """log p(x), or that of a response given its prefix, for each example, in nats.

    Attributes:
      log_prob: [B], float64.
      tokens: [B], scored tokens.
    """

    log_prob: np.ndarray
    tokens: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(model: Autoregressive, params: Params, tokens, segment_ids):
    return model.apply(
        params,
        tokens,
        lambda logits, tokens: -common.cross_entropy(logits, tokens),
        segment_ids,
        method="logits_reduced",
    )


def token_log_probs(model: Autoregressive, params: Params, tokens, segment_ids=None, mesh=None) -> np.ndarray:
    """``log p(x_t | x_<t)`` in nats of every token of each row, 0 at padding; float64 [B, T].

    Args:
      model: an `Autoregressive`.
      params: its variables.
      tokens: ids [B, T], one document a row.
      segment_ids: [B, T], 1 for the document, 0 for padding behind it; None: no padding.
      mesh: from `sharding.make_mesh`: rows are shared out over its batch axes; params must lie on it.

    Raises:
      UserError: naming a row that cannot be used.
    """
    return _token_log_probs(model, params, token_rows.make(model.config.vocab_size, tokens, segment_ids), mesh)


def _token_log_probs(model: Autoregressive, params: Params, rows: TokenRows, mesh) -> np.ndarray:
    def program(arrays):
        return _log_probs(model, params, arrays["tokens"], arrays["segment_ids"])

    found = token_rows.run(program, {"tokens": rows.tokens, "segment_ids": rows.real}, mesh)
    count, length = rows.tokens.shape
    return np.where(rows.real > 0, found[:count, :length], 0.0)


def log_likelihood(model: Autoregressive, params: Params, tokens, segment_ids=None, prefix=None, mesh=None) -> Exact:
    """``log p(x) = sum_t log p(x_t | x_<t)`` of each row, or of what follows its prefix given that.

    Args:
      model, params, tokens, segment_ids, mesh: as in `token_log_probs`. A whole document ends with its end of text.
      prefix: [B], tokens that are given, fewer than the row has; None: none.

    Returns:
      An `Exact`.

    Raises:
      UserError: naming a row that cannot be used.
    """
    rows = token_rows.make(model.config.vocab_size, tokens, segment_ids, prefix)
    found = _token_log_probs(model, params, rows, mesh)
    return Exact((found * rows.scored).sum(axis=1), rows.scored.sum(axis=1))


def scorer(model: Autoregressive, params: Params, batch_size: int = 32, mesh=None) -> RowScorer:
    """Scores requests with one model; both scores of a row are of one pass over it."""

    def score_rows(rows: Sequence[Row]) -> list[RowScore]:
        tokens, segments = stack([row.ids for row in rows])
        found = token_log_probs(model, params, tokens, segments, mesh)
        return [
            RowScore(Estimate(one[row.given :].sum()), Estimate(one.sum()))
            for one, row in zip(found, rows, strict=True)
        ]

    return RowScorer(score_rows, "exact", batch_size)
