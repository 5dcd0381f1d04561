"""Continuations and conditional likelihoods of many texts, for any family: what the protocols of evaluation share.

What is drawn for a text depends on (key, text) alone: neither on the batch, nor on its place, nor on what a run that
was stopped and started again has done before.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cola_jax.likelihood.requests import Request
from cola_jax.runs import Run
from cola_jax.types import Key

Ids = Sequence[int]


class Given(NamedTuple):
    """Responses to one prefix, to be scored; `requests.Request` says what the ids may be.

    Attributes:
      prefix: ids of what is given; may be empty.
      responses: ids of each response.
      identity: of the draws, from `identities`.
      complete: whether the responses end with their ends of text.
    """

    prefix: Ids
    responses: Sequence[Ids]
    identity: int
    complete: bool


class Score(NamedTuple):
    """log p(response | prefix) in nats, exact or a bound, and its Monte-Carlo error; nan where there is none."""

    log_prob: float
    error: float


def identities(texts: Sequence[Ids]) -> list[int]:
    """A number of 31 bits for each text: equal for equal texts, but for the second and later ones among these."""
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for text in map(tuple, texts):
        digest = hashlib.sha256(np.array([seen[text], *text], np.int64).tobytes()).digest()
        found.append(int.from_bytes(digest[:4], "big") >> 1)
        seen[text] += 1
    return found


def generate(
    run: Run, prompts: Sequence[Ids], settings: Any, key: Key, samples: Sequence[int], batch_size: int
) -> Iterator[list[list[int]]]:
    """The new tokens of each prompt, batch by batch, in order.

    By `Family.stream`: it takes numbers of samples, where `Family.generate_batches` counts the prompts (which a
    restart would move), and its programs compile quickly (those of `Family.generate` hold the whole generation).

    Args:
      run: from `runs.load`.
      prompts: token ids.
      settings: of the family's generation.
      key: of all draws.
      samples: identity of each prompt in the random stream.
      batch_size: prompts at a time; it does not change the result.
    """
    size = min(batch_size, len(prompts))
    for start in range(0, len(prompts), size or 1):
        # The last batch is filled up: it needs no program of its own.
        places = [min(index, len(prompts) - 1) for index in range(start, start + size)]
        chunk, ids = [prompts[index] for index in places], [samples[index] for index in places]
        rows: list[list[int]] = [[] for _ in places]
        for piece in run.family.stream(run.model, run.params, chunk, settings, key, sample_ids=ids):
            for row, new in zip(rows, piece.tokens, strict=True):
                row += new
        yield rows[: len(prompts) - start]


def score(
    run: Run,
    given: Sequence[Given],
    settings: Any,
    key: Key,
    batch_size: int,
    report: Callable[[int, int], None] | None = None,
) -> Iterator[list[list[Score]]]:
    """The scores of each prefix's responses, some prefixes at a time, in order.

    Args:
      run: from `runs.load`.
      given: within the run's context.
      settings: of the family's scoring.
      key: of all draws.
      batch_size: rows at a time; it does not change the result.
      report: called with (work done, all of it).
    """
    context = run.config.data.sequence_length
    scorer = run.family.scorer(run.model, run.params, settings, key, context, batch_size, None)
    asked = []
    for one in given:
        texts = [run.tokenizer.decode(response) or " " for response in one.responses]
        line = {"prefix": run.tokenizer.decode(one.prefix), "candidates": texts}
        counts = [len(response) for response in one.responses]
        responses = [list(response) for response in one.responses]
        asked.append(Request(line, one.identity, list(one.prefix), responses, counts, one.complete))
    for results in scorer.score(asked, report):
        yield [[_score(entry) for entry in result["scores"]] for result in results]


def _score(entry: dict) -> Score:
    """Of one candidate of a scorer's line: log_prob, or the tighter of the bounds that it has."""
    terms = entry.get("response", entry)
    for name in ("log_prob", "iwae", "elbo"):
        if terms.get(name) is not None:
            error = terms.get(f"{name}_error")
            return Score(terms[name], float("nan") if error is None else error)
    return Score(float("nan"), float("nan"))
