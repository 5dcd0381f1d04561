"""A bound on log p(x) of LLaDA: what it predicts of random parts of a text from the rest (11.13-11.14)."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from cola_jax import rng
from cola_jax.fields import check, setting
from cola_jax.likelihood import token_rows
from cola_jax.likelihood.row_scorer import Estimate, Row, RowScore, RowScorer
from cola_jax.likelihood.rows import stack
from cola_jax.models.llada import LLaDA
from cola_jax.objectives import common
from cola_jax.types import Key, Params


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to estimate the bound."""

    samples: int = setting(32, "masks drawn for each text", at_least=1)

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        check(self, "likelihood ")


class Bound(NamedTuple):
    """Lower bounds on log p(x), or on that of a response given its prefix, in nats, float64.

    Attributes:
      log_prob: [B].
      error: [B], Monte-Carlo standard error over the masks; nan for one mask. The numbers of masked tokens are
        stratified, so that the error is rather too large.
      tokens: [B], scored tokens.
    """

    log_prob: np.ndarray
    error: np.ndarray
    tokens: np.ndarray


def draw(keys: Key, scored: Bool[Array, "B T"], number, samples: int) -> tuple[Bool[Array, "B T"], Float[Array, " B"]]:
    """A mask of each row, and what its cross-entropy counts.

    How many of the L scored tokens are masked is uniform in 1..L, and so is which: ``E[(L / l) sum over l masked
    tokens]`` is the bound of 11.13 with less variance than masking each token with probability t.

    Args:
      keys: [B].
      scored: tokens that may be masked.
      number: of the mask, below ``samples``.
      samples: masks of a row; their l are equally far apart.
    """
    length = scored.sum(axis=1)
    share = (rng.uniform(keys, ()) + number / samples) % 1.0
    count = jnp.clip(1 + jnp.floor(share * length), 1, jnp.maximum(length, 1))
    # A draw for each position: what is drawn does not depend on how far rows are padded.
    each = rng.fold_in(rng.fold_in(keys, 1 + number)[:, None], np.arange(scored.shape[1])[None])
    height = jax.vmap(jax.vmap(jax.random.uniform))(each)
    rank = jnp.argsort(jnp.argsort(jnp.where(scored, height, 2.0), axis=1), axis=1)
    return scored & (rank < count[:, None]), length / count


@functools.partial(jax.jit, static_argnums=(0, 4))
def _samples(model: LLaDA, params: Params, key: Key, rows: dict, samples: int) -> Array:
    """Values of all masks, [samples, B]."""
    tokens, segments, scored, ids = (rows[name] for name in ("tokens", "segment_ids", "scored", "ids"))
    keys = rng.fold_in(key, ids)

    def one(number):
        masked, weight = draw(keys, scored, number, samples)
        found = model.apply(params, tokens, masked, common.cross_entropy, segments, method="logits_reduced")
        return -weight * jnp.sum(jnp.where(masked, found, 0.0), axis=1)

    return jax.lax.map(one, jnp.arange(samples))


def log_likelihood(
    model: LLaDA,
    params: Params,
    tokens,
    segment_ids=None,
    settings: Settings = Settings(),
    key: Key | None = None,
    prefix=None,
    ids: Sequence[int] | None = None,
    mesh=None,
) -> Bound:
    """A `Bound` of each row, or of what follows its prefix given that. The length of a text is known to the model.

    Args:
      model: a `LLaDA`.
      params: its variables.
      tokens, segment_ids, prefix: as of `exact.log_likelihood`.
      settings: see `Settings`.
      key: of the masks.
      ids: [B], identity of each row in the random stream; its index by default.
      mesh: as of `exact.token_log_probs`.

    Raises:
      UserError: naming a row that cannot be used.
    """
    settings.validate()
    rows = token_rows.make(model.config.vocab_size, tokens, segment_ids, prefix)
    scored, key = rows.scored, jax.random.key(0) if key is None else key
    ids = np.arange(len(scored)) if ids is None else np.asarray(ids)
    arrays = {"tokens": rows.tokens, "segment_ids": rows.real, "scored": scored, "ids": ids.astype(np.int32)}

    def program(arrays):
        return _samples(model, params, key, arrays, settings.samples)

    found = token_rows.run(program, arrays, mesh)
    found = found[:, : len(scored)]
    error = found.std(axis=0, ddof=1) / math.sqrt(len(found)) if len(found) > 1 else np.full(len(scored), math.nan)
    return Bound(found.mean(axis=0), error, scored.sum(axis=1))


def scorer(model: LLaDA, params: Params, settings: Settings, key: Key, batch_size: int = 32, mesh=None) -> RowScorer:
    """Scores requests with one model. Candidates of a request have the same draws."""

    def score(rows: Sequence[Row], given: list[int]) -> list[Estimate]:
        tokens, segments = stack([row.ids for row in rows])
        ids = [row.request for row in rows]
        found = log_likelihood(model, params, tokens, segments, settings, key, given, ids, mesh)
        return [Estimate(*map(float, pair)) for pair in zip(found.log_prob, found.error, strict=True)]

    def score_rows(rows: Sequence[Row]) -> list[RowScore]:
        given = [row.given for row in rows]
        joint = score(rows, [0] * len(rows))
        response = score(rows, given) if any(given) else joint
        return [RowScore(*pair) for pair in zip(response, joint, strict=True)]

    return RowScorer(score_rows, "lower", batch_size)
