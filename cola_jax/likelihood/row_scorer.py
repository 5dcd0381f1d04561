"""Scores of JSON lines by a function that scores rows: for families whose score of a text is a number and its error."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cola_jax.likelihood.estimators import bits_per_byte, perplexity
from cola_jax.likelihood.requests import Request


class Row(NamedTuple):
    """A text to score.

    Attributes:
      ids: its tokens, the prefix's first.
      given: how many of them are the prefix.
      request: number of its request: its identity in the random stream.
    """

    ids: list[int]
    given: int
    request: int


class Estimate(NamedTuple):
    """log p in nats, and its Monte-Carlo standard error: 0 where it is exact, nan where it is not known."""

    log_prob: float
    error: float = 0.0


class RowScore(NamedTuple):
    """Of a row: log p of what follows its prefix, given that, and of all of it."""

    response: Estimate
    joint: Estimate


@dataclasses.dataclass(frozen=True)
class RowScorer:
    """Scores requests; the interface of `requests.Scorer`.

    Attributes:
      score_rows: of ``batch_size`` rows.
      bound: of its scores: "exact" or "lower".
      batch_size: rows scored at a time; it does not change the result.
    """

    score_rows: Callable[[Sequence[Row]], list[RowScore]]
    bound: str
    batch_size: int

    def score(
        self, requests: Sequence[Request], report: Callable[[int, int], None] | None = None
    ) -> Iterator[list[dict]]:
        """Results of consecutive requests, some at a time, in their order.

        A text's result has log_prob (nats), log_prob_error, bound, perplexity, bits_per_byte and tokens; that of a
        response the same given its prefix, and "joint", those of both together; that of candidates a list of these,
        and "best", the index of the most likely one given the prefix.

        Args:
          requests: of `requests.Format.request`.
          report: called with (rows done, all of them).
        """
        work, done = sum(len(request.responses) for request in requests), 0
        for group in self._groups(requests):
            rows = [
                Row([*request.prefix, *response], len(request.prefix), request.index)
                for request in group
                for response in request.responses
            ]
            found = []
            for begin in range(0, len(rows), self.batch_size):
                some = rows[begin : begin + self.batch_size]
                # Always full batches, so that few programs are compiled.
                found += self.score_rows([*some, *[some[-1]] * (self.batch_size - len(some))])[: len(some)]
                done += len(some)
                if report is not None:
                    report(done, work)
            remaining = iter(found)
            yield [self._result(r, list(itertools.islice(remaining, len(r.responses)))) for r in group]

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

    def _result(self, request: Request, found: list[RowScore]) -> dict:
        """One line of the output, from the scores of its rows."""
        line, given = request.line, len(request.prefix)
        out, before = {"index": request.index, **line}, line.get("prefix", "")
        if "text" in line:
            return out | self._scores(found[0].joint, line["text"], request.tokens[0])
        texts = line.get("candidates", [line.get("response")])
        answers = []
        for text, score, tokens in zip(texts, found, request.tokens, strict=True):
            joint = self._scores(score.joint, before + text, given + tokens)
            answers.append(self._scores(score.response, text, tokens) | {"joint": joint})
        if "response" in line:
            return out | answers[0]
        best = int(np.argmax([score.response.log_prob for score in found]))
        return out | {"best": best, "scores": answers}

    def _scores(self, found: Estimate, text: str, tokens: int) -> dict:
        return {
            "log_prob": _number(found.log_prob),
            "log_prob_error": _number(found.error),
            "bound": self.bound,
            "perplexity": _number(perplexity(found.log_prob, tokens)),
            "bits_per_byte": _number(bits_per_byte(found.log_prob, len(text.encode()))),
            "tokens": tokens,
        }


def _number(value) -> float | None:
    """JSON has no infinity and no nan."""
    return float(value) if math.isfinite(value) else None
