"""log p(x) of the autoregressive model: exact, by the chain rule, one pass over a text (SPEC 7)."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from cola_jax import sharding
from cola_jax.likelihood.estimators import bits_per_byte, perplexity
from cola_jax.likelihood.requests import Request
from cola_jax.likelihood.rows import stack
from cola_jax.models.autoregressive import Autoregressive
from cola_jax.objectives import common
from cola_jax.types import Params, UserError


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


def _width(length: int) -> int:
    """A power of two, so that few programs are compiled."""
    return max(16, 2 ** (length - 1).bit_length())


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
    tokens, real = _checked(model, tokens, segment_ids)
    count, length = tokens.shape
    parts = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    fill = ((0, -count % parts), (0, _width(length) - length))
    rows = {"tokens": np.pad(tokens, fill), "segment_ids": np.pad(real, fill)}
    if mesh is None:
        found = _log_probs(model, params, rows["tokens"], rows["segment_ids"])
    else:
        rows = sharding.put_batch(mesh, rows)
        with sharding.activate(mesh):
            found = _log_probs(model, params, rows["tokens"], rows["segment_ids"])
    found = np.asarray(jax.device_get(found), np.float64)[:count, :length]
    return np.where(real > 0, found, 0.0)


def _checked(model: Autoregressive, tokens, segment_ids) -> tuple[np.ndarray, np.ndarray]:
    tokens, vocabulary = np.asarray(tokens), model.config.vocab_size
    real = np.ones(tokens.shape, np.int32) if segment_ids is None else np.asarray(segment_ids, np.int32)
    if tokens.ndim != 2 or real.shape != tokens.shape or not tokens.size:
        raise UserError(f"tokens {tokens.shape}, segment_ids {real.shape}: must be two equal shapes [B, T]")
    for i, (row, segments) in enumerate(zip(tokens, real, strict=True)):
        length = int((segments > 0).sum())
        if not np.array_equal(segments, np.arange(len(segments)) < length):
            raise UserError(f"example {i}: segment_ids are not 1 for one document and 0 for the padding behind it")
        if length and not (0 <= row[:length].min() and row[:length].max() < vocabulary):
            raise UserError(f"example {i}: a token id is outside the vocabulary, must be 0 to {vocabulary - 1}")
    return np.where(real > 0, tokens, 0).astype(np.int32), real


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
    found = token_log_probs(model, params, tokens, segment_ids, mesh)
    count, length = found.shape
    lengths = np.full(count, length) if segment_ids is None else (np.asarray(segment_ids) > 0).sum(axis=1)
    prefix = np.zeros(count, int) if prefix is None else np.asarray(prefix, int)
    if prefix.shape != (count,):
        raise UserError(f"prefix has shape {prefix.shape}: must be ({count},), one number for each row")
    for i, (given, total) in enumerate(zip(prefix, lengths, strict=True)):
        if not 0 <= given < total:
            raise UserError(
                f"example {i}: {given} tokens in its prefix, must be at least 0 and below its {total} tokens"
            )
    scored = np.arange(length)[None] >= prefix[:, None]
    return Exact((found * scored).sum(axis=1), lengths - prefix)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores requests with one model; the interface of `requests.Scorer`.

    Attributes:
      model, params, mesh: as in `log_likelihood`.
      batch_size: rows scored at a time; it does not change the result.
    """

    model: Autoregressive
    params: Params
    batch_size: int = 32
    mesh: object = None

    def score(
        self, requests: Sequence[Request], report: Callable[[int, int], None] | None = None
    ) -> Iterator[list[dict]]:
        """Results of consecutive requests, some at a time, in their order.

        A text's result has log_prob (nats), log_prob_error 0, bound "exact", perplexity, bits_per_byte and tokens; that
        of a response the same given its prefix, and "joint", those of both together; that of candidates a list of
        these, and "best", the index of the most likely one given the prefix.

        Args:
          requests: of `requests.Format.request`.
          report: called with (rows done, all of them).
        """
        work, done = sum(len(request.responses) for request in requests), 0
        for group in self._groups(requests):
            rows = [[*request.prefix, *response] for request in group for response in request.responses]
            found = []
            for begin in range(0, len(rows), self.batch_size):
                some = rows[begin : begin + self.batch_size]
                found += self._batch(some)
                done += len(some)
                if report is not None:
                    report(done, work)
            remaining = iter(found)
            yield [_result(r, list(itertools.islice(remaining, len(r.responses)))) for r in group]

    def _groups(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Consecutive requests that fill at least one batch."""
        group, rows = [], 0
        for request in requests:
            group.append(request)
            rows += len(request.responses)
            if rows >= self.batch_size:
                yield group
                group, rows = [], 0
        if group:
            yield group

    def _batch(self, rows: list[list[int]]) -> list[np.ndarray]:
        """Log-probabilities of the tokens of each row; always full batches, so that few programs compile."""
        tokens, segments = stack([*rows, *[rows[-1]] * (self.batch_size - len(rows))])
        found = token_log_probs(self.model, self.params, tokens, segments, self.mesh)
        return [one[: len(row)] for one, row in zip(found, rows, strict=False)]


def _result(request: Request, found: list[np.ndarray]) -> dict:
    """One line of the output, from the log-probabilities of prefix and response of each row."""
    line, given = request.line, len(request.prefix)
    out, before = {"index": request.index, **line}, line.get("prefix", "")
    if "text" in line:
        return out | _scores(found[0].sum(), line["text"], request.tokens[0])
    texts = line.get("candidates", [line.get("response")])
    answers = []
    for text, values, tokens in zip(texts, found, request.tokens, strict=True):
        joint = _scores(values.sum(), before + text, given + tokens)
        answers.append(_scores(values[given:].sum(), text, tokens) | {"joint": joint})
    if "response" in line:
        return out | answers[0]
    best = int(np.argmax([values[given:].sum() for values in found]))
    return out | {"best": best, "scores": answers}


def _scores(log_prob: float, text: str, tokens: int) -> dict:
    return {
        "log_prob": _number(log_prob),
        "log_prob_error": 0.0,
        "bound": "exact",
        "perplexity": _number(perplexity(log_prob, tokens)),
        "bits_per_byte": _number(bits_per_byte(log_prob, len(text.encode()))),
        "tokens": tokens,
    }


def _number(value) -> float | None:
    """JSON has no infinity."""
    return float(value) if math.isfinite(value) else None
